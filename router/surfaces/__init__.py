"""The gRPC surface, and what the router adds to vLLM's HTTP app: API keys, size limits, CORS, readiness."""
