"""One vLLM engine: how it starts in its role, its scheduler and worker, and its life in a Serve replica."""
