"""Annotations are executed: a wrong shape or dtype ends the call that it is given to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from parity import small_trace

from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.demand import pack, widest_demand


def test_a_record_with_a_wrong_shape_is_refused() -> None:
    schedule = build_schedule(small_trace(0))
    with pytest.raises(TypeCheckError, match="parameter 'schedule'"):
        pack(replace(schedule, mass=schedule.mass[:, :-1]))
    with pytest.raises(TypeCheckError, match="parameter 'schedule'"):
        pack(replace(schedule, rank=schedule.rank.astype(np.int64)))


def test_axes_that_differ_by_one_are_refused() -> None:
    demand = pack(build_schedule(small_trace(0)))
    assert widest_demand(demand, 4).shape == (4,)
    with pytest.raises(TypeCheckError, match="parameter 'demand'"):
        widest_demand(demand._replace(start=demand.start[:-1]), 4)


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'trace'"):
        build_schedule(None)  # pyright: ignore[reportArgumentType]
