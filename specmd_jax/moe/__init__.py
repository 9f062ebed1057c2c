"""A mixture-of-experts language model whose expert weights live outside its parameters.

``cfg, params, store = weights.load(folder)``; `build` gives its pure functions layer by layer, `generate` runs it with
all experts resident.
"""

from specmd_jax.moe.model.config import Latent as Latent
from specmd_jax.moe.model.config import MoEConfig as MoEConfig
from specmd_jax.moe.model.config import Rope as Rope
from specmd_jax.moe.model.experts import Expert as Expert
from specmd_jax.moe.model.experts import expert_bytes as expert_bytes
from specmd_jax.moe.model.experts import slotted as slotted
from specmd_jax.moe.model.experts import stacked as stacked
from specmd_jax.moe.model.families import FAMILIES as FAMILIES
from specmd_jax.moe.model.families import from_hf as from_hf
from specmd_jax.moe.model.families import tiny as tiny
from specmd_jax.moe.model.forward import Generated as Generated
from specmd_jax.moe.model.forward import Net as Net
from specmd_jax.moe.model.forward import PassRouting as PassRouting
from specmd_jax.moe.model.forward import build as build
from specmd_jax.moe.model.forward import forward as forward
from specmd_jax.moe.model.forward import generate as generate
from specmd_jax.moe.model.forward import init_cache as init_cache
from specmd_jax.moe.model.published import PUBLISHED as PUBLISHED
from specmd_jax.moe.model.published import published as published
from specmd_jax.moe.model.random_weights import random_params as random_params
from specmd_jax.moe.model.random_weights import random_stacks as random_stacks
