"""Training a small mixture of experts from scratch: text to tokens, the network, its losses, the loop, held-out scores.

`loop.fit` trains; `corpus.prepare` makes the data folder that it reads; `export.export` writes what
`specmd_jax.moe.checkpoint` (and transformers) load.
"""
