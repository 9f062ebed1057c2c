"""What requests take adds up to the totals, which are those of the other engines."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from parity import small_trace

from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.requests import groups_of, replay_requests
from specmd_jax.engines.table import replay_grid
from specmd_jax.policies.choice import Mix
from specmd_jax.specs.hardware import hardware
from specmd_jax.types import DECODE


@pytest.mark.parametrize("prefetch", ["none", "previous"])
def test_requests_add_up_to_the_totals(prefetch: str) -> None:
    trace, mix, link = small_trace(3, requests=4), Mix.of("lru", prefetch), hardware("pcie4-x16")
    prepared = prepare(trace, warmup_tokens=24)
    budgets = [300_000, 600_000, 1_310_720]
    plain = replay_grid(prepared, mix, budgets, [link], "scan")
    found = replay_requests(prepared, mix, budgets, link)
    for (cell, spent), (expected,) in zip(found, plain, strict=True):
        assert dataclasses.replace(cell, **{k: None for k, v in cell.row().items() if isinstance(v, float)}) == (
            dataclasses.replace(expected, **{k: None for k, v in expected.row().items() if isinstance(v, float)})
        )
        assert cell.tpot_s == pytest.approx(expected.tpot_s, rel=1e-6)
        assert len(spent.decode_s) == 3 and spent.decodes.tolist() == [19, 19, 19]
        assert spent.misses.sum() == cell.misses
        assert spent.decode_s.sum() / spent.decodes.sum() == pytest.approx(cell.tpot_s, rel=1e-5)
        assert spent.prefill_s.mean() == pytest.approx(cell.ttft_s, rel=1e-5)


def test_groups_are_requests_or_stretches_of_passes() -> None:
    prepared = prepare(small_trace(3, requests=4), warmup_tokens=24)
    schedule = prepared.schedule
    np.testing.assert_array_equal(groups_of(prepared), np.where(schedule.counted, schedule.request - 1, -1))
    together = prepare(small_trace(3, requests=4), batch=2)
    group = groups_of(together, blocks=3)
    assert set(group) == {0, 1, 2} and (np.diff(group) >= 0).all()
    assert (together.schedule.tokens[together.schedule.phase == DECODE] == 2).any()
    alone = groups_of(prepare(small_trace(3, requests=4), warmup_tokens=72), blocks=3)
    assert set(alone) == {-1, 0, 1, 2} and (np.diff(alone) >= 0).all()
