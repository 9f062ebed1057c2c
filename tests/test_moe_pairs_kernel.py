"""The adaptive predictors' visit as one kernel keeps every number that their own code keeps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from specmd_jax.moe.kernels import pairs
from specmd_jax.moe.kernels.placed import Token
from specmd_jax.moe.runtime.decider import Seen
from specmd_jax.policies.adaptive_eviction import adaptive as adaptive_eviction
from specmd_jax.policies.adaptive_prefetch import adaptive as adaptive_prefetch
from specmd_jax.policies.base import Gate, Now, Prefetch, Scorer, Size, Start, routed
from specmd_jax.types import NEVER


def scorer(fade: float = 0.95, rate: float = 0.2) -> Scorer:
    rows = adaptive_eviction(fade, rate).rows
    assert rows is not None and rows.scorer is not None
    return rows.scorer


def visit_of(rng: Any, visit: int, layers: int, experts: int, top_k: int, tokens: int) -> Token | Seen:
    """Few experts are much used, gates are often equal, and every few visits a pass has several tokens."""
    now: dict[str, Any] = {
        "index": jnp.int32(visit), "layer": jnp.int32(visit % layers), "pass_id": jnp.int32(visit // layers)
    }  # fmt: skip
    taste = rng.dirichlet(np.full(experts, 0.3)) + 1e-9
    taste /= taste.sum()
    ids = np.stack([rng.choice(experts, top_k, replace=False, p=taste) for _ in range(tokens)])
    gates = -np.sort(-rng.integers(1, 5, (tokens, top_k)) / np.float32(8.0)).astype(np.float32)
    if tokens == 1:
        return Token(**now, ids=jnp.asarray(ids[0], jnp.int32), gates=jnp.asarray(gates[0]))
    count, mass = np.zeros(experts, np.int32), np.zeros(experts, np.float32)
    np.add.at(count, ids, 1)
    np.add.at(mass, ids, gates)
    nothing = jnp.zeros(experts, jnp.float32)
    return Seen(
        **now, tokens=jnp.int32(tokens), decode=jnp.int32(0), count=jnp.asarray(count), mass=jnp.asarray(mass),
        rank=jnp.asarray(count), ahead=nothing,
    )  # fmt: skip


def row_of(seen: Token | Seen, experts: int) -> tuple[jax.Array, jax.Array]:
    if isinstance(seen, Seen):
        return seen.count > 0, seen.mass
    nothing = jnp.zeros(experts, jnp.float32)
    return jnp.zeros(experts, bool).at[seen.ids].set(True), nothing.at[seen.ids].set(seen.gates)


def same(found: Any, wanted: Any, visit: int) -> None:
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):  # bits, so that -0.0 is not 0.0
        name = f"visit {visit}: {jax.tree_util.keystr(path)}"
        assert one.dtype == other.dtype and one.shape == other.shape, name
        np.testing.assert_array_equal(np.asarray(one).view(np.int32), np.asarray(other).view(np.int32), name)


def compared(observe: Any, step: Any, memory: Any, layers: int, experts: int, top_k: int) -> Any:
    """Gives the sizes of all that is said [..., E], by the policy's own code and by the kernel alike."""
    rng, kernel, moved = np.random.default_rng(layers), memory, np.zeros(experts)
    for visit in range(12 * layers):
        seen = visit_of(rng, visit, layers, experts, top_k, 4 if visit // layers in (0, 7) else 1)
        memory, wanted = observe(memory, seen)
        kernel, found = step(kernel, seen)
        np.testing.assert_array_equal(found, wanted, f"visit {visit}")
        same(kernel, memory, visit)
        moved = moved + np.abs(np.asarray(found))
    assert np.asarray(memory.weights.pairs).any()  # something was learned
    return moved


SHAPES = [(3, 12, 3), (1, 4, 2), (16, 8, 2)]  # layers, experts, top-k


@pytest.mark.parametrize(("layers", "experts", "top_k"), SHAPES)
def test_the_scorer_keeps_every_number(layers: int, experts: int, top_k: int) -> None:
    own = scorer(fade=0.9, rate=0.3)
    memory = own.init(Start(jnp.full((layers, experts), NEVER, jnp.int32)))
    assert own.pairs is not None
    step = jax.jit(functools.partial(pairs.score, own.pairs, interpret=True))

    @jax.jit
    def observe(memory: Any, seen: Any) -> Any:
        now = Now(seen.index, seen.layer, seen.pass_id, layers)
        return own.observe(memory, routed(now, *row_of(seen, experts)))

    moved = compared(observe, step, memory, layers, experts, top_k)
    assert moved.all()  # something was said of everybody


@pytest.mark.parametrize(("layers", "experts", "top_k"), SHAPES)
def test_the_prefetcher_keeps_every_number(layers: int, experts: int, top_k: int) -> None:
    own: Prefetch = adaptive_prefetch(rate=0.4)
    size = Size(layers, experts, 2)
    memory = own.init(size)
    assert own.pairs is not None
    step = jax.jit(functools.partial(pairs.foresee, own.pairs, horizon=2, interpret=True))

    @jax.jit
    def observe(memory: Any, seen: Any) -> Any:
        gate = Gate(Now(seen.index, seen.layer, seen.pass_id, layers), *row_of(seen, experts), None, None)
        memory = own.observe(memory, gate)
        return memory, own.want(memory, gate, size)

    compared(observe, step, memory, layers, experts, top_k)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("layers", "experts"), [(24, 32), (26, 60), (4, 256)])
def test_a_gpu_could_run_both(layers: int, experts: int, tokens: int) -> None:
    """Lowers to Triton's language, which has no gathers, sorts or slices and wants powers of two."""
    seen = visit_of(np.random.default_rng(0), 0, layers, experts, 4, tokens)
    own, prefetch = scorer(), adaptive_prefetch()
    assert own.pairs is not None and prefetch.pairs is not None and pairs.serves(experts)
    start = Start(jnp.full((layers, experts), NEVER, jnp.int32))
    calls = (
        (functools.partial(pairs.score, own.pairs, interpret=False), own.init(start)),
        (
            functools.partial(pairs.foresee, prefetch.pairs, horizon=2, interpret=False),
            prefetch.init(Size(layers, experts, 2)),
        ),
    )

    def passes(call: Any, memory: Any, seen: Any) -> Any:
        """Visits all layers: a remainder in the loop around a kernel is one that the kernel cannot take itself."""
        return jax.lax.fori_loop(
            0, 2 * layers, lambda i, memory: call(memory, seen._replace(layer=i % layers))[0], memory
        )

    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        for call, memory in calls:
            traced = jax.jit(functools.partial(passes, call)).trace(memory, seen)
            assert "pairs" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_more_experts_than_lanes_are_left_to_the_policy() -> None:
    assert not pairs.serves(pairs.MOST_EXPERTS + 1)
