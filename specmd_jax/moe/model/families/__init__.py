"""The supported model families: how each one's ``config.json`` and tensor names read.

To add one: a file with its `Family`, and a line in `FAMILIES`.

These are left out, each with a clear error: activations other than SiLU, rotary embeddings of other kinds than those of
`config.Rope` or on a part of the head (but for latent attention), quantised checkpoints other than gpt-oss's mxfp4,
biases in dense MLPs, DeepSeek-V2 with renormalised gates. Dropout, router jitter in training and auxiliary losses do
not concern inference.
"""

from specmd_jax.moe.model.families.config_json import from_hf as from_hf
from specmd_jax.moe.model.families.config_json import tiny as tiny
from specmd_jax.moe.model.families.config_json import tiny_hf as tiny_hf
from specmd_jax.moe.model.families.names import dense_names as dense_names
from specmd_jax.moe.model.families.names import expert_names as expert_names
from specmd_jax.moe.model.families.table import FAMILIES as FAMILIES
