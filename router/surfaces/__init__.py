"""The gRPC surface, and what the router checks before requests on both surfaces: API keys, sizes, readiness."""
