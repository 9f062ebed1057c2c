"""Mixes over caches and links: what `experiments.study` writes, shown."""
