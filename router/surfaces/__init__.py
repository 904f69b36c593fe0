"""What clients talk to beside vLLM's own HTTP app: gRPC, and what both surfaces check of a request before it is one."""
