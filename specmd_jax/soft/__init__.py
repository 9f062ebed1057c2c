"""The differentiable cache: a replay whose misses and stall have gradients, and searches that use them."""
