"""Agent workloads: what sharing is worth to models that take turns over one context."""
