"""Traces as accesses for other simulators: what is written, and that libCacheSim hits as we do."""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import small_trace

from specmd_jax.api import run
from specmd_jax.engines.curves import curves
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.schedule.build import accesses
from specmd_jax.schedule.demand import pack
from specmd_jax.schedule.export import export_trace, next_accesses, read_oracle_general

CAPACITIES = (3, 8, 13, 24)
TRACE = small_trace(3, requests=3, tokens=60, expert_bytes=40960)
UNEQUAL = small_trace(3)


@functools.cache
def curve_of(policy: str) -> list[int]:
    """Our hits at every capacity of `CAPACITIES`."""
    schedule = prepare(TRACE, contract="sequential").schedule
    return [int(one.hits.sum()) for one in curves(schedule, np.ones(TRACE.layers, np.int64), list(CAPACITIES), policy)]


def hits_of(policy: str, slots: int) -> int:
    return curve_of(policy)[CAPACITIES.index(slots)]


def test_the_curve_is_the_replay() -> None:
    capacity = CAPACITIES[1] * int(TRACE.expert_bytes[0])
    found = run(TRACE, eviction="lru", capacity=capacity, contract="sequential", hardware=None)
    assert found.hits == hits_of("lru", CAPACITIES[1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "t.oracleGeneral.bin"
    export_trace(TRACE, path)
    return path


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"prefill_chunk": 3}])
def test_accesses_are_those_of_the_sequential_contract(options: dict[str, Any]) -> None:
    demand = pack(prepare(TRACE, contract="sequential", **options).schedule)
    np.testing.assert_array_equal(accesses(TRACE, **options), demand.flat)


def test_records(exported: Path) -> None:
    rows = read_oracle_general(exported)
    assert exported.stat().st_size == 24 * len(rows) and (rows["size"] == 1).all()
    np.testing.assert_array_equal(rows["id"], accesses(TRACE))
    np.testing.assert_array_equal(rows["time"], np.arange(len(rows)))
    ids = rows["id"].tolist()
    for index in range(0, len(ids), 7):
        wanted = next((later for later in range(index + 1, len(ids)) if ids[later] == ids[index]), -1)
        assert rows["next"][index] == wanted


def simulated(rows: Any, policy: str, slots: int) -> int:
    """Plain caches over the records of a file."""
    cache: OrderedDict[int, int] = OrderedDict()  # object -> index of its next access
    hits = 0
    for one, after in zip(rows["id"].tolist(), rows["next"].tolist(), strict=True):
        due = after if after >= 0 else 1 << 60
        if one in cache:
            hits += 1
            cache[one] = due
            if policy == "lru":
                cache.move_to_end(one)
            continue
        if len(cache) == slots:
            leaves = max(cache, key=lambda key: cache[key]) if policy == "belady" else next(iter(cache))
            del cache[leaves]
        cache[one] = due
    return hits


@pytest.mark.parametrize("policy", ["lru", "fifo", "belady"])
def test_plain_caches_over_the_file_hit_as_a_replay(exported: Path, policy: str) -> None:
    rows = read_oracle_general(exported)
    for slots in CAPACITIES:
        assert simulated(rows, policy, slots) == hits_of(policy, slots)


@pytest.mark.parametrize("policy", ["lru", "fifo", "belady"])
def test_libcachesim_hits_as_a_replay(exported: Path, policy: str) -> None:
    library: Any = pytest.importorskip("libcachesim", reason="libcachesim is not installed (the extra 'parity' has it)")
    cache = {"lru": library.LRU, "fifo": library.FIFO, "belady": library.Belady}[policy]
    total = len(read_oracle_general(exported))
    for slots in CAPACITIES:
        reader = library.TraceReader(str(exported), library.TraceType.ORACLE_GENERAL_TRACE)
        missed, _ = cache(slots, hashpower=12).process_trace(reader)
        assert total - round(missed * total) == hits_of(policy, slots)


def test_sizes_in_bytes(tmp_path: Path) -> None:
    done = export_trace(UNEQUAL, tmp_path / "t.bin", unit="bytes")
    rows = read_oracle_general(tmp_path / "t.bin")
    np.testing.assert_array_equal(rows["size"], UNEQUAL.expert_bytes[rows["id"].astype(int) // UNEQUAL.experts])
    assert done.accesses == len(rows) and done.objects == len(set(rows["id"].tolist()))


def test_no_accesses_have_no_next() -> None:
    assert next_accesses(np.zeros(0, np.int64)).tolist() == []
    assert next_accesses(np.array([5, 2, 5, 5])).tolist() == [2, -1, 3, -1]


def test_bad_exports(tmp_path: Path) -> None:
    there = tmp_path / "there.bin"
    there.write_bytes(b"x" * 25)
    for call, message in (
        (lambda: export_trace(TRACE, there), "there.bin: already exists"),
        (lambda: export_trace(TRACE, tmp_path / "n", "oracle"), "unknown export format 'oracle'; did you mean"),
        (
            lambda: export_trace(TRACE, tmp_path / "n", unit="byte"),
            "unknown unit of sizes 'byte'; did you mean 'bytes'",
        ),
        (lambda: export_trace(TRACE, tmp_path / "n", batch=0), "batch is 0"),
        (lambda: read_oracle_general(there), "there.bin: 25 bytes, expected a multiple of 24"),
        (lambda: read_oracle_general(tmp_path / "n"), "cannot read"),
    ):
        with pytest.raises(SpecmdError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.bin"]
