"""The GPU program counts what the scan counts; without a GPU it is interpreted, and lowered for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from parity import LINK, small_trace

from specmd_jax.engines import gpu as kernel
from specmd_jax.engines.asked import Asked
from specmd_jax.engines.devices import devices, replay_spread
from specmd_jax.engines.gpu_columns import Columns, columns_of
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.engines.table import replay_grid
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import EVICTION, PREFETCH
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.eviction import lfu_decay
from specmd_jax.replay.state import Numbers, Setup
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.setting import Setting
from specmd_jax.types import Trace

TRACE = small_trace(3)
SIZE = int(TRACE.expert_bytes.max())
GLOBAL = tuple(SIZE * slots for slots in (1, 3, 9, 16, 24, 40))
QUOTAS = tuple(np.array(slots) * SIZE for slots in ((1, 1, 1, 1), (2, 1, 3, 2), (4, 4, 4, 4), (8, 8, 8, 8)))
SERVED = [name for name in EVICTION if EVICTION[name]().rows is not None]

Case = tuple[Prepared, Setup, Numbers, Mix]


def case(
    eviction: str,
    prefetch: str,
    *,
    budgets: tuple[Any, ...] = GLOBAL,
    hardware: Any = LINK,
    schedule: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    trace: Trace = TRACE,
    **mixed: Any,
) -> Case:
    replays = prepare(trace, **(schedule or {}))
    mix = Setting(eviction=eviction, prefetch=prefetch, **mixed).mix(trace.top_k)
    setup = replays.setup(mix, hardware, **{**Setting().options, **(options or {})})
    units = jnp.asarray(np.stack([replays.sizes.budget(budget) for budget in budgets]))
    numbers = replays.numbers(budgets[0], hardware)._replace(budget=units)
    return replays, setup, numbers, mix.traced()


def equal(found: Any, wanted: Any) -> None:
    """Counts to the last; seconds but for the order of their sums."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for name in wanted._fields:
        if name == "rounding":
            continue
        one, other = getattr(found, name), getattr(wanted, name)
        if name in ("seconds", "mass", "lost_mass"):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-9, err_msg=name)
        else:
            jax.tree.map(lambda a, b, name=name: np.testing.assert_array_equal(a, b, name), one, other)


def check(given: Case, axes: tuple[str, ...] = ("budget",), mesh: Any = None) -> Any:
    replays, setup, numbers, mix = given
    assert kernel.serves(Asked(setup, mix, 1)) is None
    columns = columns_of(replays, setup, mix)
    found = replay_spread(setup, axes, numbers, mix, columns, mesh)
    (_, wanted), _ = replay_many(setup, axes, numbers, mix, replays.visits(setup, mix))
    equal(found, wanted)
    return found


SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    {"contract": "sequential"},
    {"batch": 2, "prefill_chunk": 3},
    {"reset_per_request": True},
    {"contract": "sequential-id", "reset_per_request": True, "phase": "decode"},
    {"batch": 2, "drafts": Drafts(2, 0.6, 1, 3e-5)},
)


def test_it_serves_all_policies_but_one() -> None:
    assert set(EVICTION) - set(SERVED) == {"slru"}  # a demotion reorders layers that nobody visits


@pytest.mark.parametrize("eviction", SERVED)
def test_every_eviction_policy_counts_as_in_the_scan(eviction: str) -> None:
    """Each with another predictor and another schedule."""
    which = SERVED.index(eviction)
    predictors = [name for name in PREFETCH if name != "none"]
    found = check(
        case(eviction, predictors[which % len(predictors)], schedule=SCHEDULES[which % len(SCHEDULES)]), mesh=devices()
    )
    assert found.evictions.sum() > 100
    assert found.prefetched.sum() > 50
    assert found.experts.late.sum() > 0


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_every_predictor_counts_as_in_the_scan(prefetch: str) -> None:
    """On a link that lets most copies arrive in time."""
    found = check(case("least_stale", prefetch, hardware=LINK.replace(link_bytes_per_s=9e9, link_latency_s=1e-6)))
    assert (found.experts.prefetch_hits.sum() > 0) == (prefetch != "none")


@pytest.mark.parametrize(
    "given",
    [
        {"hardware": None, "prefetch": "none"},
        {"hardware": None, "options": {"horizon": 2}},
        {"hardware": LINK.replace(overlaps=0.3), "prefetch": "transition"},
        {"options": {"horizon": 3}},
        {"options": {"horizon": 2, "may_evict": False}},
        {"options": {"hold": True}},
        {"selection": "percentile", "percentile": 50.0},
        {"overfetch": 2.0},
        {"budgets": QUOTAS},
        {"budgets": QUOTAS, "options": {"horizon": 2, "may_evict": False, "hold": True}},
        {"budgets": QUOTAS, "hardware": None, "schedule": {"reset_per_request": True}},
    ],
    ids=str,
)
def test_every_setting_counts_as_in_the_scan(given: dict[str, Any]) -> None:
    check(case("least_stale", **{"prefetch": "transition", **given}))


def test_attention_over_a_context_takes_the_time_that_it_takes_in_the_scan() -> None:
    trace = replace(TRACE, meta={"model": "gpt-oss-20b"})
    check(case("lru", "none", trace=trace, schedule={"context": 200_000}))


def test_axes_in_any_order_and_launches_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    replays, setup, numbers, mix = case("lfu_decay", "previous", numbers={"decay": np.array([0.3, 0.8, 0.99])})
    links = [LINK.replace(link_bytes_per_s=rate) for rate in (0.4e9, 9e9)]
    numbers = numbers._replace(costs=jax.tree.map(lambda *x: jnp.stack(x), *(replays.costs(link) for link in links)))
    whole = replays, setup, numbers, mix
    found = check(whole, ("budget", "hardware", "policy"))
    misses = found.experts.fetched.sum(axis=-1)
    assert (np.ptp(misses, axis=1) > 0).any(), "the links make no difference"
    assert (np.ptp(misses, axis=2) > 0).any(), "the decays make no difference"
    check(whole, ("budget", "policy", "hardware"))
    monkeypatch.setattr(kernel, "TABLE_BYTES", 20_000)  # of 6 budgets, 4 at a time
    jax.clear_caches()
    check(whole, ("budget", "hardware", "policy"))


def test_numbers_are_traced() -> None:
    """Other budgets, links and decays are the same program, as is a trace of nearly the same length."""
    program: Any = kernel.replay_columns
    found = []
    check(case("lru", "none"))  # Pallas' interpreter imports more of itself when it first runs, and JAX starts over
    before = program._cache_size()
    for shift, link, decay, tokens in ((0, 1e9, 0.5, 24), (1, 2e9, 0.9, 23)):
        trace = small_trace(7, tokens=tokens)
        replays = prepare(trace)
        mix = Setting(eviction="lfu_decay", prefetch="popular", numbers={"decay": decay}).mix(trace.top_k)
        budgets = [size + shift * SIZE for size in GLOBAL]
        machine = LINK.replace(link_bytes_per_s=link)
        found.append(replay_grid(replays, mix, budgets, [machine], engine="gpu"))
    assert found[0][2][0].tpot_s != found[1][2][0].tpot_s
    assert program._cache_size() == before + 1


def test_shapes_that_are_no_powers_of_two() -> None:
    """3 layers of 12 experts, top-3; an expert of the padding would be the first to leave."""
    trace = small_trace(5, layers=3, experts=12, top_k=3, expert_bytes=[SIZE] * 3)
    replays, budgets = prepare(trace), [Setting(capacity=size, scope="global").budget(trace) for size in ("20%", "60%")]
    for eviction in ("random", "least_stale_literal"):
        mix = Setting(eviction=eviction, prefetch="popular").mix(trace.top_k)
        scan, program = (replay_grid(replays, mix, budgets, [LINK], engine=engine) for engine in ("scan", "gpu"))
        for (one,), (other,) in zip(scan, program, strict=True):
            assert one.evictions > 0
            rows = [{k: v for k, v in found.row().items() if v is not None} for found in (one, other)]
            assert rows[0] == pytest.approx(rows[1], rel=2e-5)


@pytest.mark.parametrize(
    ("mixed", "options", "reason"),
    [
        ({"eviction": "slru"}, {}, "'slru' does not change one layer at a time"),
        ({"eviction": "lru", "miss": "drop"}, {}, "miss 'drop': it fetches every miss"),
        ({"eviction": "lhu"}, {"precisions": (4, 8)}, "one stored precision, this has 2"),
        ({"eviction": lfu_decay(0.5)}, {}, "built already"),
        ({"eviction": "online", "numbers": {"fade": np.array([0.5, 0.9])}}, {}, "numbers of eviction 'online' vary"),
        ({"prefetch": "online", "numbers": {"rate": np.array([0.1, 0.2])}}, {}, "numbers of the prefetch policy vary"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve_is_said(mixed: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    replays = prepare(TRACE, **options)
    with pytest.raises(SpecmdError, match=f"engine 'gpu' does not serve this: .*{reason}"):
        replay_grid(replays, Setting(**mixed).mix(TRACE.top_k), [GLOBAL[1]], [LINK], engine="gpu")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("eviction", SERVED)
def test_a_gpu_could_run_it(eviction: str) -> None:
    """Lowers to Triton's language, which has no gathers, sorts or slices and wants powers of two."""
    schedule = SCHEDULES[-1] if eviction == "lru" else {}  # one with time between passes
    lowered(case(eviction, "transition", schedule=schedule, options={"horizon": 2}))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_prompts_that_demand_many_experts() -> None:
    """A visit's copies are summed up in another way."""
    trace = small_trace(5, layers=2, experts=40, top_k=4, prompt_tokens=12, expert_bytes=[SIZE] * 2)
    wide = case("lru", "previous", budgets=GLOBAL[2:], trace=trace)
    assert wide[0].schedule.most > 16
    check(wide)
    lowered(wide)


def lowered(given: Case) -> None:
    replays, setup, numbers, mix = given
    columns: Columns = columns_of(replays, setup, mix)
    program: Any = kernel.replay_columns
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        traced = program.trace(setup, ("budget",), numbers, mix, columns)
        assert "replay" in traced.lower(lowering_platforms=("cuda",)).as_text()
