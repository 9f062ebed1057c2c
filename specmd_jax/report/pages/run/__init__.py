"""The page of `experiments.run`."""
