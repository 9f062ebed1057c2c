"""The page of `experiments.quality`."""
