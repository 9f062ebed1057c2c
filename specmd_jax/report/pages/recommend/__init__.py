"""What to run on a machine, and why: what `experiments.recommend` writes, shown."""
