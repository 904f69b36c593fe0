"""What every part of the system agrees on: configuration, KV contract, handoff, sharing modes, errors, metrics.

The lowest layer. It imports neither vLLM, torch nor Ray, so that a config or a contract can be checked anywhere.
"""
