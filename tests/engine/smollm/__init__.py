"""Tests on one real system: the small model with its shipped decoders, as in examples/own_adapter/deployment.yaml."""
