"""Pallas kernels of the fused engine (Triton backend)."""
