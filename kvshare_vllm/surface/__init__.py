"""vLLM's OpenAI server over the router: an EngineClient without an engine, and what is checked of requests before it."""
