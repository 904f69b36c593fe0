"""Base KV that is made before a turn asks for it: prefilled eagerly, or pulled back from where it was generated."""
