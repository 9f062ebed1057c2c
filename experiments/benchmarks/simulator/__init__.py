"""How fast the simulator is: the sections of `experiments.benchmark`."""
