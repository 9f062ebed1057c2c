"""The page of `experiments.hidden_prefetch`."""
