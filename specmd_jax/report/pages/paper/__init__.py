"""SpecMD's claims beside what `experiments.paper` finds for them."""
