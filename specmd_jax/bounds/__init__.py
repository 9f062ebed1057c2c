"""What no policy can beat: lower bounds and feasible schedules of a replay's stall."""
