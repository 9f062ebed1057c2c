"""A model with its experts in host memory, as `experiments.offload` runs it."""
