"""The model that all steps run, made once, and what has been measured so far."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specmd_jax import moe
from specmd_jax.files import replace_text
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.random_weights import random_experts
from specmd_jax.moe.runtime import store
from specmd_jax.trace import synthesize
from specmd_jax.types import Trace

Result = dict[str, Any]


class Bench:
    """The model, made once, and what has been measured so far."""

    def __init__(self, toy: bool, seconds: float, host_bytes: int | None):
        self.toy, self.begin_s, self.seconds = toy, time.perf_counter(), seconds
        self.cfg = moe.tiny("olmoe", "bfloat16", num_hidden_layers=3) if toy else moe.published("OLMoE-1B-7B")
        self.name = "tiny" if toy else "OLMoE-1B-7B"
        self.prompt, self.steps, self.requests = (8, 12, 3) if toy else (64, 40, 3)
        self.params = jax.jit(moe.random_params, static_argnums=0)(self.cfg, jax.random.key(0))
        self.host_bytes = host_bytes
        self.result: Result = {}
        self.path: Path | None = None

    def save(self) -> None:
        """Writes what there is so far: a run that is cut short loses nothing."""
        if self.path is not None:
            replace_text(self.path, json.dumps(self.result, indent=1, default=str) + "\n")

    # made when first asked for: a step may need one of them only
    @functools.cached_property
    def stacks(self) -> list[Expert]:
        """All experts, on the device."""
        key = jax.random.key(0)
        return [random_experts(self.cfg, key, layer) for layer in range(len(self.cfg.moe_layers))]

    @functools.cached_property
    def store(self) -> store.PinnedStore:
        return store.pin_stacks(self.cfg, self.stacks, available_bytes=self.host_bytes)

    @functools.cached_property
    def stacked(self) -> store.StackedStore:
        return store.stack(self.cfg, self.stacks, available_bytes=self.host_bytes)

    @property
    def expert_bytes(self) -> int:
        return moe.expert_bytes(self.cfg)

    def engine(self, name: str, capacity: str, prefetch: str, **options: Any) -> Offloaded | Fused:
        options |= {"eviction": "lru", "capacity": capacity, "prefetch": prefetch, "name": self.name}
        if name == "fused":
            return Fused(self.cfg, self.params, self.stacked, **options)
        return Offloaded(self.cfg, self.params, self.store, **options)

    def trace(self, seed: int) -> Trace:
        """Gives routing with locality, for all requests."""
        return routing(self.cfg, self.expert_bytes, self.requests, self.prompt, self.steps, seed)

    @property
    def left_s(self) -> float:
        return self.seconds - (time.perf_counter() - self.begin_s)

    def prompts(self, count: int | None = None) -> list[Any]:
        return random_prompts(self.cfg, count or self.requests, self.prompt)


def random_prompts(cfg: MoEConfig, count: int, length: int, seed: int = 1) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, cfg.vocabulary, length) for _ in range(count)]


def routing(
    cfg: MoEConfig, expert_bytes: int, requests: int, prompt: int, steps: int, seed: int, logits: bool = False
) -> Trace:
    """Gives routing with locality, which that of random weights has not."""
    return synthesize(
        layers=len(cfg.moe_layers),
        experts=cfg.experts,
        top_k=cfg.top_k,
        tokens=prompt + steps,
        requests=requests,
        prompt_tokens=prompt,
        with_ahead=True,
        with_logits=logits,
        skew=1.0,
        stickiness=0.8,
        drift=0.01,
        topics=4,
        seed=seed,
        expert_bytes=expert_bytes,
    )


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
