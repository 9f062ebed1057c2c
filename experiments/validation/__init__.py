"""Published measurements, and what the timing model says of them."""
