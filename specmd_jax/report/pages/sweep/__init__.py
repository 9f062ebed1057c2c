"""Eviction policies over cache sizes: what `experiments.sweep` writes, shown."""
