"""One visit of a replay, and what is counted: residency, prefetching, time (CONTRACT.md sections 2 to 5)."""
