"""Ways of training that were tried to close the gap, and are no features: benchmarks.accuracy.experiments says why."""
