"""KV on its way between engines: the connector held to the rules of shared KV, and which cache layers move."""
