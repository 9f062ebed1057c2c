"""The hash of CONTRACT.md section 3, in Python integers."""

from __future__ import annotations


def hash31(seed: int, visit: int, flat: int) -> int:
    mask = 0xFFFFFFFF
    x = (seed * 0x9E3779B1 + visit * 0x85EBCA77 + flat * 0xC2B2AE3D) & mask
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= x >> 15
    x = x * 0x846CA68B & mask
    x ^= x >> 16
    return x >> 1
