"""Ray Serve deployment around a KV-producing engine."""
