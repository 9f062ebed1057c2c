"""Settings of the studies, one file each."""
