"""Replays and runs drawn over time: what the link, the device and the host do, copy by copy."""
