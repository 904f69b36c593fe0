"""KV over NIXL: vLLM's pull connector, held to the rules of shared KV."""
