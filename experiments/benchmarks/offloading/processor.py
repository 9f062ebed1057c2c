"""One expert on one token by the host's processor, by each library that is there."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert

Compute = Callable[[int], Any]
"""Number of an expert -> its output on the token, when it is there."""


def computes(cfg: MoEConfig, experts: list[Expert]) -> Iterator[tuple[str, int, Compute]]:
    """Gives each way to compute them: its name, bytes of an expert in its form, and the function. One way's copy of the
    experts is given up before the next way's is made, if the caller gives up the function.

    Args:
        experts: numpy arrays at the model's own precision, without biases or encoding.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(experts[0]))
    wide = 4 * sum(leaf.size for leaf in jax.tree.leaves(experts[0]))
    yield f"jax {cfg.dtype}", size, _by_jax(cfg, experts)
    if cfg.dtype != "float32":
        yield "jax float32", wide, _by_jax(dataclasses.replace(cfg, dtype="float32"), experts)
    yield "numpy float32", wide, _by_numpy(cfg, experts)
    if importlib.util.find_spec("torch"):
        for dtype in dict.fromkeys((cfg.dtype, "float32")):
            yield f"torch {dtype}", wide if dtype == "float32" else size, _by_torch(cfg, experts, dtype)


def token(cfg: MoEConfig) -> Any:
    """Gives the token's row [1, D] float32."""
    return np.random.default_rng(1).standard_normal((1, cfg.width), np.float32)


def _by_jax(cfg: MoEConfig, experts: list[Expert]) -> Compute:
    """The program that the layerwise engine runs for experts on the host."""
    cpu = jax.local_devices(backend="cpu")[0]
    h = jax.device_put(token(cfg).astype(cfg.np_dtype), cpu)
    here = [jax.device_put(jax.tree.map(lambda leaf: leaf.astype(cfg.np_dtype), one), cpu) for one in experts]
    run = jax.jit(functools.partial(moe_experts.apply, cfg))
    return lambda number: np.asarray(run(here[number], h))


def _by_numpy(cfg: MoEConfig, experts: list[Expert]) -> Compute:
    h, inner = token(cfg)[0], cfg.expert_width
    here = [(one.gate_up.astype(np.float32), one.down.astype(np.float32)) for one in experts]

    def run(number: int) -> Any:
        gate_up, down = here[number]
        hidden = gate_up @ h
        return down @ (hidden[:inner] / (1 + np.exp(-hidden[:inner])) * hidden[inner:])

    return run


def _by_torch(cfg: MoEConfig, experts: list[Expert], dtype: str) -> Compute:
    import torch  # pyright: ignore[reportMissingImports]

    kind, inner = getattr(torch, dtype), cfg.expert_width

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.asarray(array, np.float32)).to(kind)

    h, here = tensor(token(cfg)[0]), [(tensor(one.gate_up), tensor(one.down)) for one in experts]

    def run(number: int) -> Any:
        gate_up, down = here[number]
        with torch.inference_mode():
            hidden = torch.mv(gate_up, h)
            return torch.mv(down, torch.nn.functional.silu(hidden[:inner]) * hidden[inner:])

    return run
