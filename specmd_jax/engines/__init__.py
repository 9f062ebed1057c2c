"""Who replays what: engines that give the same counts at different speeds, and the table that chooses one."""
