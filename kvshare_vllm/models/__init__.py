"""Out-of-tree vLLM models."""
