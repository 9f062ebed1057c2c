"""The model that `experiments.offload` runs: a checkpoint's or made-up weights, held as its engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.calibration.subject import model_config
from specmd_jax import moe
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.checkpoint.folder import Checkpoint, load_config
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params
from specmd_jax.moe.runtime import store
from specmd_jax.setting import Setting

Engine = Offloaded | Fused


@dataclass(frozen=True)
class Model:
    """What is run. The kind of store says by which engine."""

    name: str
    cfg: MoEConfig
    params: Params
    experts: store.PinnedStore | store.StackedStore
    precisions: str  # what the host holds of each expert, by rising bits, with + between

    def engine(self, setting: Setting) -> Engine:
        if isinstance(self.experts, store.StackedStore):
            return Fused(self.cfg, self.params, self.experts, setting, name=self.name)
        return Offloaded(self.cfg, self.params, self.experts, setting, name=self.name)


@dataclass(frozen=True)
class Source:
    """Where weights come from: the folder of a checkpoint, or none and they are made up."""

    name: str
    cfg: MoEConfig
    checkpoint: Checkpoint | None

    def open(self, engine: str, precision: str | None = None, precisions: Sequence[str] | None = None) -> Model:
        """Gives the model for an engine: its experts at one ``precision`` (None: its own), or at several."""
        cfg, checkpoint, key = self.cfg, self.checkpoint, jax.random.key(0)
        if checkpoint is None:
            params = moe.random_params(cfg, key)
        else:
            params = weights.load_dense(checkpoint, cfg, check_finite=True)
        if checkpoint is None:
            hold = store.stack_random if engine == "fused" else store.pin_random
            experts = hold(cfg, key, precisions=precisions)
        else:
            hold = store.stack_checkpoint if engine == "fused" else store.pin_checkpoint
            experts = hold(checkpoint, cfg, precision, precisions=precisions)
        return Model(self.name, cfg, params, experts, "+".join(experts.precisions))


def source(model: str, folder: str | None, precision: str | None = None) -> Source:
    """Gives the weights of a folder, every tensor checked and none read; without one made-up weights of ``model``."""
    if folder is None:
        return Source(model, model_config(model), None)
    cfg, checkpoint = load_config(folder), Checkpoint(folder)
    weights.verify(checkpoint, cfg, precision)
    return Source(Path(folder).resolve().name, cfg, checkpoint)
