"""Published models by name, to build and time one without its checkpoint."""

from __future__ import annotations

from typing import Any

from specmd_jax.errors import unknown
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.families import FAMILIES, from_hf
from specmd_jax.specs import published as shapes

PUBLISHED: dict[str, dict[str, Any]] = {
    name: hf for name, hf in shapes.PUBLISHED.items() if hf["model_type"] in FAMILIES
}
"""The ``config.json`` dictionaries of `specmd_jax.specs.published.PUBLISHED` whose family can be run."""


def published(name: str, dtype: str = "bfloat16") -> MoEConfig:
    """Gives the configuration of a published model by its name in `PUBLISHED`; raises SpecmdError for any other."""
    if name not in PUBLISHED:
        raise unknown("published model", name, PUBLISHED)
    return from_hf(PUBLISHED[name], dtype)
