"""The page of `experiments.routing`."""
