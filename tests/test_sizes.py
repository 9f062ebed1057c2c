"""Room is counted in whole units: exact where sizes have a common divisor, else sizes rounded up and budgets down."""

from __future__ import annotations

import numpy as np
import pytest
from parity import compare, small_trace
from reference.cache import Cache

from specmd_jax.engines.sizes import MOST_ROUNDING, MOST_UNITS, in_units, sizes
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import Mix
from specmd_jax.specs.models import MODELS

ODD = [70_000_001, 69_999_989, 70_000_003, 65_000_011]  # no common unit, and 32 of them are more than 2^30


def test_a_common_unit_is_exact() -> None:
    found = sizes(np.array([40960, 36864]), 8, None, 16)
    assert found.unit_bytes == 4096
    assert (found.units[1:] * found.unit_bytes == found.level_bytes).all()
    assert found.budget(123_456) == 123_456 // 4096


@pytest.mark.parametrize("name", MODELS)
def test_every_model_at_any_bits_and_precisions(name: str) -> None:
    spec = MODELS[name]
    for bits in (2.06, 3.4375, 4.25, 4.5, 4.85, 5.5, 6.5625, 8.5, 16.0):
        native = np.full(spec.layers, spec.expert_bytes_at(bits), np.int64)
        native[::2] += 4096 + 1  # layers of two sizes without a common unit, as mixed quantisations have
        for precisions in (None, (bits / 2, bits), (2.0, 4.0, 8.0), (3.3, 7.7)):
            found = sizes(native, spec.experts, precisions, bits)
            units = found.units[1:].astype(np.int64)
            assert spec.experts * units[-1].sum() <= MOST_UNITS
            assert (units * found.unit_bytes >= found.level_bytes).all()
            assert (units * found.unit_bytes <= found.level_bytes * (1 + MOST_ROUNDING)).all()
            everything = int(found.level_bytes[-1].sum()) * spec.experts
            assert found.budget(everything) == spec.experts * units[-1].sum()
            assert int(found.budget(everything - 1)) * found.unit_bytes < everything


def test_the_reference_counts_in_the_same_units() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        level_bytes = np.sort(rng.integers(1 << 20, 1 << 26, (2, 3)), axis=0)
        experts = int(rng.integers(2, 200))
        found = in_units(level_bytes, experts)
        pool = int(rng.integers(1 << 24, int(level_bytes[-1].sum()) * experts))
        slow = Cache(3, experts, pool, level_bytes.tolist())
        assert slow.unit == found.unit_bytes
        assert slow.budgets[0] // slow.unit == found.budget(pool)
        for level in (1, 2):
            assert slow.room_bytes(0, level) == found.units[level, 0] * found.unit_bytes
        quotas = level_bytes[-1] * np.array([1, experts, experts + 1])
        slow = Cache(3, experts, quotas.tolist(), level_bytes.tolist())
        np.testing.assert_array_equal([one // slow.unit for one in slow.budgets], found.budget(quotas))


@pytest.mark.parametrize(("eviction", "prefetch"), [("lru", "none"), ("slru", "previous"), ("belady", "none")])
def test_engine_and_reference_agree_where_sizes_are_rounded(eviction: str, prefetch: str) -> None:
    exact = sum(ODD) * 2  # two experts of each layer, to the byte: rounded up they are one too many
    for budget in (exact, exact + 64, sum(ODD) * 8):
        slow = compare(small_trace(1, expert_bytes=ODD), Mix.of(eviction, prefetch), budget)
        held = (np.asarray(slow.resident) * np.array(ODD)[:, None]).sum(axis=(1, 2))
        assert held.max() <= budget
        assert (budget < sum(ODD) * 8) == bool(slow.evictions.sum())


def test_sizes_that_units_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(SpecmdError, match="would change by") as caught:
        sizes(np.full(2, 1 << 40), 8, (0.0001, 15.99999), 16)
    assert len(str(caught.value).splitlines()) == 1
