"""Studies, one file each: `python -m experiments.<name>`."""
