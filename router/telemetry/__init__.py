"""The router's telemetry: metrics for Prometheus and Ray, and spans that continue the caller's trace."""
