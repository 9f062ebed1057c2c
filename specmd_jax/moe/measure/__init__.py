"""Measured runs: their times predicted by the simulator, their quality against the resident model."""
