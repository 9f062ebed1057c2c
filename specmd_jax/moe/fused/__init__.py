"""The engine that is one program per pass."""
