"""Parts of `experiments.recommend`: the question, and the replays that answer it."""
