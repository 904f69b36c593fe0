"""Training decoders for a shared KV cache, and measuring them. One concept per file; `train.py` holds the loop."""
