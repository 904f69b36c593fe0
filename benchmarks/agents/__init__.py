"""Agent workloads: what sharing gains for models that take turns over one context."""
