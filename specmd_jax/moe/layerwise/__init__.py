"""The engine that stops at every gate and lets the host decide."""
