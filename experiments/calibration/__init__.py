"""Steps of `experiments.calibrate`: what is timed, and the rates that follow."""
