"""The work of each command, imported when its options are read and good: JAX comes with it, `--help` does without."""
