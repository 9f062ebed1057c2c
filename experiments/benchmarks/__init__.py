"""What `experiments.benchmark` and `experiments.bench_offload` measure, one file each."""
