"""What `experiments.benchmark` and `experiments.bench_offload` measure, a file each."""
