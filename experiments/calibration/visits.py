"""The experts of a visit: those of one token and of several, on the device and missing, by the engine's own path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from configs.calibrate import CalibrateConfig
from experiments.calibration.loops import Loop, Place, Step
from experiments.calibration.subject import Subject
from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.fused import streaming
from specmd_jax.moe.kernels import many_tokens, one_token
from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.calibrate import point


class Given(NamedTuple):
    """What a visit reads."""

    h: jax.Array  # [T, D]
    ids: jax.Array  # [T, k] int32
    gates: jax.Array  # [T, k]
    missing: jax.Array  # [E] int32, 1: to be copied
    host: Expert


def path(used: bool) -> str:
    """Names what measured a point."""
    return "kernels" if used else "xla"


def visits(own: Subject, config: CalibrateConfig) -> Iterator[Row]:
    """Times visits of one token with some of its experts missing, then with fewer experts, all there, and then those of
    several tokens, all there and all missing."""
    host, slots, top_k = own.host, own.slots(), own.cfg.top_k
    how = path(own.kernels.experts)
    for chosen in sorted({*_powers(top_k), top_k}, reverse=True):
        loop = visit_loop(own, slots, 1, config.visits)
        given = reads(own, host, np.arange(chosen)[None])
        for missing in sorted({0, *_powers(top_k), top_k}) if chosen == top_k else ():
            some = given._replace(missing=mask(own, range(missing)))
            yield point("visit", missing, how, loop.seconds(some, config.loop_repeats))
        yield point("resident", chosen, how, loop.seconds(given, config.loop_repeats))
        slots, _ = loop.state
    for tokens in config.tokens:
        ids = np.arange(tokens * top_k).reshape(tokens, top_k) % own.cfg.experts  # every expert has as many
        loop, given = visit_loop(own, slots, tokens, config.prompt_visits), reads(own, host, ids)
        for name, missing in (("many resident", []), ("many missing", np.unique(ids))):
            some = given._replace(missing=mask(own, missing))
            yield point(name, tokens, how, loop.seconds(some, config.loop_repeats))
        slots, _ = loop.state


def demanded(cfg: MoEConfig, tokens: int) -> int:
    """Gives how many experts a visit of several tokens demands."""
    return min(cfg.experts, tokens * cfg.top_k)


def kernels_of_visit(own: Subject) -> int:
    """Counts the kernels of the experts of one token."""
    stack = own.store.stack
    slots = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), stack)  # nothing is run
    return visit_loop(own, slots, 1, 1).kernels(reads(own, stack, np.arange(own.cfg.top_k)[None]))


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(next_power_of_two(most).bit_length()) if 1 << n <= most]


def mask(own: Subject, experts: Any) -> jax.Array:
    """Gives [E] int32: 1 for some experts, which are missing."""
    return jnp.zeros(own.cfg.experts, jnp.int32).at[jnp.asarray(list(experts), jnp.int32)].set(1)


def reads(own: Subject, host: Expert, ids: npt.NDArray[Any]) -> Given:
    """Gives what a visit with this routing [T, k] reads, nobody missing; ``host``: `Subject.host`."""
    cfg, (tokens, chosen) = own.cfg, ids.shape
    h = jax.random.normal(jax.random.key(1), (tokens, cfg.width)).astype(cfg.np_dtype)
    gates = jnp.full((tokens, chosen), 1 / chosen, jnp.float32)
    return Given(h, jnp.asarray(ids, jnp.int32), gates, mask(own, ()), host)


def visit_loop(own: Subject, slots: Expert, tokens: int, times: int) -> Loop:
    """Gives a loop of visits; ``slots``: `Subject.slots`, which it takes."""
    y = jnp.zeros((tokens, own.cfg.width), own.cfg.np_dtype)
    return Loop(_step(own, tokens), (slots, y), times, own.layers, own.cfg.experts)


def _step(own: Subject, tokens: int) -> Step:
    """Gives a visit: the experts, and the weighted sum of what they give. Every expert has a slot of its own, which a
    missing one is copied into."""
    cfg, kernels = own.cfg, own.kernels
    none, spare = jnp.zeros(0, jnp.int32), own.layers * cfg.experts + jnp.arange(max(cfg.top_k, 2), dtype=jnp.int32)

    def step(given: Given, state: Any, place: Place) -> Any:
        slots, _ = state
        placed = Placed(place.slot, given.missing, none, none, spare)
        if not kernels.experts:
            run = streaming.one_token if tokens == 1 else streaming.many_tokens
            out, slots = run(cfg, place.layer, given.h, given.ids, placed, given.host, slots)
            return slots, moe_experts.combine(out, given.ids, given.gates).astype(given.h.dtype)
        layer, interpret = place.layer.reshape(1), kernels.interpret
        if tokens == 1:
            visit = one_token.Visit(layer, given.ids[0], placed)
            out, slots = one_token.experts(cfg, given.h, visit, given.host, slots, interpret=interpret)
        else:
            out, slots = many_tokens.visit_experts(
                cfg, layer, given.h, given.ids, placed, given.host, slots, interpret=interpret
            )
        return slots, jnp.sum(given.gates[:, :, None] * out, axis=1).astype(given.h.dtype)

    return step
