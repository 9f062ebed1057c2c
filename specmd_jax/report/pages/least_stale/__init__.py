"""Where the readings of Least-Stale win, tie and lose."""
