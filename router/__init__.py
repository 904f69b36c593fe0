"""The ingress: HTTP and gRPC surfaces, sessions, placement, and the orchestration of a turn."""
