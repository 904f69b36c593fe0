"""What our path costs, against a bare engine and stock vLLM."""
