"""One vLLM engine: how it is started and told apart by role, its scheduler and worker, and its life in a Serve replica."""
