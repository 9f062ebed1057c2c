"""How fast the offloaded model is: the steps of `experiments.bench_offload`."""
