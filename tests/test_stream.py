"""A trace that is read a stretch at a time gives what the whole trace gives, and damage is named as it is elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from parity import LINK, small_trace

from specmd_jax import run, sweep
from specmd_jax.engines import stream
from specmd_jax.engines.curves import curves
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.stream import Curve, blocks, prepare_stream, stream_curves
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import EVICTION
from specmd_jax.policies.choice import choose
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.demand import pack
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.schedule.stretches import Timetable, demand_of
from specmd_jax.setting import Setting
from specmd_jax.trace import load_trace, save_trace, select_requests, synthesize
from specmd_jax.trace import stream as trace_stream
from specmd_jax.trace.stream import cuts, open_trace, save_stretches, stretches, unpacked_bytes
from specmd_jax.trace.synthetic import relabelled
from specmd_jax.types import Trace

TESTS = Path(__file__).resolve().parent
SLOW = LINK.replace(link_bytes_per_s=5e8)
TIMETABLES: dict[str, dict[str, Any]] = {
    "event": {"warmup_tokens": 30},
    "sequential": {"contract": "sequential", "phase": "decode"},
    "sequential-id": {"contract": "sequential-id", "prefill_chunk": 2, "phase": "prefill"},
    "resets": {"reset_per_request": True, "warmup_tokens": 2},
    "drafts": {"drafts": Drafts(2, 0.6, 1), "contract": "sequential", "warmup_tokens": 30},
}


def long_trace(**changes: Any) -> Trace:
    """Seven requests of different lengths; some layers of some tokens are skipped."""
    trace = small_trace(3, requests=7, tokens=18, prompt_tokens=4, **changes)
    lengths = np.array([3, 18, 1, 30, 18, 30, 26], np.int32)
    ids = trace.expert_ids.astype(np.int16)
    ids[np.random.default_rng(0).random(ids.shape[:2]) < 0.1] = -1
    return replace(
        trace,
        expert_ids=ids,
        lengths=lengths,
        prompt_lengths=np.minimum(trace.prompt_lengths, lengths - 1),
        meta={**trace.meta, "requests": [{} for _ in lengths]},
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("stream") / "long.npz"
    save_trace(long_trace(with_logits=True), file)
    return file


@pytest.mark.parametrize("most", [1, 20, 48, 1000])
def test_stretches_make_up_the_trace(path: Path, most: int) -> None:
    whole, file = load_trace(path), open_trace(path)
    parts = list(stretches(file, most, ("gates", "logits", "ahead")))
    assert [part.requests for part in parts] == np.diff(cuts(whole.lengths, most)).tolist()
    assert all(part.tokens <= most or part.requests == 1 for part in parts)
    for name in ("expert_ids", "gates", "logits", "ahead", "lengths", "prompt_lengths"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name), name)
    assert (file.head.tokens, file.head.requests, file.head.model) == (whole.tokens, 7, whole.model)
    assert next(stretches(file, most, ())).gates is None
    assert unpacked_bytes(path) > whole.tokens * whole.layers * whole.experts * 8


def test_the_first_tokens_of_a_file(path: Path) -> None:
    parts = list(stretches(open_trace(path, 50), 21))
    assert sum(part.tokens for part in parts) == 50
    assert parts[-1].lengths[-1] == 28  # the fourth request, cut
    np.testing.assert_array_equal(np.concatenate([p.expert_ids for p in parts]), load_trace(path).expert_ids[:50])


@pytest.mark.parametrize("compress", [False, True])
def test_stretches_are_written(path: Path, tmp_path: Path, compress: bool) -> None:
    copy = tmp_path / "copy.npz"
    save_stretches(stretches(open_trace(path), 20, ("gates", "logits", "ahead")), copy, compress=compress)
    for name in ("expert_ids", "gates", "logits", "ahead", "lengths", "prompt_lengths", "expert_bytes"):
        np.testing.assert_array_equal(getattr(load_trace(copy), name), getattr(load_trace(path), name), name)
    assert [left.name for left in tmp_path.iterdir()] == ["copy.npz"]
    with pytest.raises(SpecmdError, match="already exists"):
        save_stretches([long_trace()], copy)


def test_a_long_trace_is_made_of_copies_that_share_no_names(tmp_path: Path) -> None:
    base = long_trace()
    save_stretches(relabelled(base, 300, seed=1), tmp_path / "long.npz")
    long = load_trace(tmp_path / "long.npz")
    assert long.tokens == 300 and long.lengths[:7].tolist() != base.lengths.tolist()
    assert sorted(long.lengths[:7]) == sorted(base.lengths) == sorted(long.lengths[7:14])
    counts = [np.bincount(part[part >= 0].ravel(), minlength=8) for part in np.split(long.expert_ids[:252, 1], 2)]
    assert sorted(counts[0]) == sorted(counts[1]) and counts[0].tolist() != counts[1].tolist()
    with pytest.raises(SpecmdError, match="tokens is 0"):
        next(relabelled(base, 0))


def test_what_does_not_go_together_is_not_written(tmp_path: Path) -> None:
    def parts() -> Iterator[Trace]:
        yield long_trace()
        yield replace(long_trace(), gates=None)

    with pytest.raises(SpecmdError, match=r"part 1: gates is absent, expected float32 \[tokens, 4, 2\]"):
        save_stretches(parts(), tmp_path / "bad.npz")
    with pytest.raises(SpecmdError, match="no part"):
        save_stretches([], tmp_path / "bad.npz")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", TIMETABLES)
def test_the_demand_of_a_trace_is_that_of_its_schedule(kind: str) -> None:
    trace = long_trace()
    found, schedule = demand_of(trace, Timetable(**TIMETABLES[kind])), build_schedule(trace, **TIMETABLES[kind])
    expected = pack(schedule)
    for name, a, b in zip(expected._fields, found.demand, expected, strict=True):
        np.testing.assert_array_equal(a, b, name)
        assert a.dtype == b.dtype, name
    assert found.next.visit == schedule.visits and found.next.pass_id == schedule.pass_id[-1] + 1
    assert found.next.clock == schedule.clock[-1] + schedule.demanded[-1] + 1


@pytest.mark.parametrize("kind", TIMETABLES)
def test_curves_equal_those_of_the_whole_trace(path: Path, kind: str) -> None:
    options = TIMETABLES[kind]
    names = sorted(name for name in EVICTION if EVICTION[name]().curve is not None)
    budgets: list[Any] = [0, 15, 100, 215, np.array([31, 20, 28, 23])]
    for units in (np.full(4, 10), np.array([10, 9, 10, 11])):
        trace = replace(load_trace(path), expert_bytes=units)
        schedule = build_schedule(trace, **options)
        for most in (1, 33) if kind in ("event", "resets") else (40,):
            file = replace(open_trace(path), head=replace(open_trace(path).head, expert_bytes=units))
            streamed = prepare_stream(file, stretch_tokens=most, **options)
            assert len(streamed.survey.origins) > 3
            unit = streamed.first.sizes.unit_bytes
            found = stream_curves(
                streamed, [Curve(choose("eviction", name), [b // unit for b in budgets]) for name in names]
            )
            for name, row in zip(names, found, strict=True):
                for budget, a, b in zip(budgets, row, curves(schedule, units, budgets, name), strict=True):
                    np.testing.assert_array_equal(np.array(a), np.array(b), f"{name} at {budget}, stretches of {most}")


CASES: dict[str, dict[str, Any]] = {
    "learns": {
        "evictions": ["lfu_decay"],
        "prefetch": "transition",
        "selection": "percentile",
        "reset_per_request": True,
    },
    "knows": {
        "evictions": ["belady"],
        "prefetch": "perfect",
        "horizon": 2,
        "warmup_tokens": 5,
        "drafts": 2,
        "acceptance": 0.6,
        "draft_s": 3e-5,
    },
    "reroutes": {"evictions": ["slru"], "prefetch": "gate_ahead", "miss": "substitute", "routing": "cache_aware"},
}


@pytest.mark.parametrize("case", ["learns", "knows", pytest.param("reroutes", marks=pytest.mark.slow)])
def test_the_scan_equals_that_of_the_whole_trace(path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_VISITS", 96)
    monkeypatch.setattr(trace_stream, "STRETCH_CELLS", 25 * 4 * 8)
    asked: dict[str, Any] = {"capacities": ["20%", "50%"], "hardware": [LINK, SLOW], "prefill_chunk": 3, **CASES[case]}
    for a, b in zip(sweep(open_trace(path), **asked), sweep(load_trace(path), **asked), strict=True):
        # gate mass is summed in another order
        np.testing.assert_allclose(a.pop("lost_mass"), b.pop("lost_mass"), rtol=1e-5)
        assert a == b
        assert a["prefetch_recall"] > 0 and a["tpot_s"] > 0


def test_the_scan_on_several_devices() -> None:
    """In a process of its own: the devices of one CPU are chosen before JAX begins."""
    script = """
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from test_stream import long_trace
from specmd_jax.setting import Setting
from specmd_jax.engines.stream import Curve, prepare_stream, stream_curves, stream_totals
from specmd_jax.policies.choice import choose
from specmd_jax.trace import save_trace
from specmd_jax.trace.stream import open_trace
save_trace(long_trace(), "long.npz")
streamed = prepare_stream(open_trace("long.npz"), stretch_tokens=40)
mix, budgets = Setting(eviction="lru").mix(streamed.file.head.top_k), [200_000, 400_000, 600_000]
scan = stream_totals(streamed, mix, budgets, [None], block_visits=128)
units = [streamed.first.sizes.budget(budget) for budget in budgets]
for i, curve in enumerate(stream_curves(streamed, [Curve(choose("eviction", "lru"), units)])[0]):
    np.testing.assert_array_equal(scan.experts.fetched[i], curve.misses)
    np.testing.assert_array_equal(scan.evictions[i], curve.evictions)
print(scan.experts.demand.shape, len(jax.devices()))
"""
    with tempfile.TemporaryDirectory() as folder:
        places = os.pathsep.join(str(place) for place in (TESTS, TESTS.parent))
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": places, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.split("\n")[0] == "(3, 4) 2", done.stderr


def test_run_and_sweep_take_an_opened_file(path: Path) -> None:
    whole, file = load_trace(path), open_trace(path)
    assert run(file, eviction="lfu", capacity="50%", hardware=None) == run(
        whole, eviction="lfu", capacity="50%", hardware=None
    )
    asked: dict[str, Any] = {"evictions": ["belady", "lru", "lfu_decay"], "capacities": ["25%", "12 slots"]}
    assert list(sweep(file, **asked)) == list(sweep(whole, **asked))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 2}, "batch is 2, expected 1 for a trace that is streamed"),
        ({"batch": 0}, "batch is 0"),
        ({"prefetch": "shuffled"}, "cannot be streamed"),
        ({"warmup_tokens": 10**6}, "counts nothing"),
        ({"contract": "social"}, "unknown contract"),
        ({"routing": "cache_aware", "contract": "sequential"}, "logits with contract"),
    ],
)
def test_what_cannot_be_streamed(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError, match=message):
        run(open_trace(path), eviction="lru", capacity="50%", hardware=None, **options)


def test_padding_comes_at_the_end_only(path: Path) -> None:
    whole = load_trace(path)
    replays = prepare(whole)
    mix = Setting(eviction="lru").mix(whole.top_k)
    setup = replays.setup(mix, None)
    columns = replays.columns(setup, mix, replays.schedule.most)
    parts = [jax.tree.map(lambda x, at=at: x[at : at + 13], columns) for at in range(0, len(columns.index), 13)]
    cut = list(blocks(parts, 50))
    assert {len(block.index) for block in cut} == {50}
    joined = np.concatenate([block.layer for block in cut])
    np.testing.assert_array_equal(joined[: len(columns.layer)], columns.layer)


def rewritten(path: Path, target: Path, **changes: Any) -> Path:
    """The same file with other arrays."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    np.savez(target, **arrays)
    return target


@pytest.mark.parametrize("name", ["expert_ids", "gates", "ahead"])
def test_a_bad_cell_is_named_as_in_memory(path: Path, tmp_path: Path, name: str) -> None:
    array = np.array(getattr(load_trace(path), name), np.int16 if name == "expert_ids" else np.float32)
    array[60, 2, 1] = 8 if name == "expert_ids" else np.nan
    bad = rewritten(path, tmp_path / "bad.npz", **{name: array})
    with pytest.raises(SpecmdError) as whole:
        load_trace(bad)
    with pytest.raises(SpecmdError) as streamed:
        prepare_stream(open_trace(bad), stretch_tokens=20, ahead_scores=True)
    assert str(streamed.value) == str(whole.value)
    assert "request 4, token 8, layer 2" in str(whole.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": np.array([3, 4])}, "prompt_lengths has 7 entries"),
        ({"expert_ids": np.zeros((126, 4, 3), int)}, r"expert_ids has shape \[126, 4, 3\]"),
        ({"gates": np.zeros((126, 4, 2), int)}, "gates has dtype int64"),
        ({"expert_ids": np.zeros((126, 4, 2), object)}, "holds a pickled object"),
        ({"surprise": np.zeros(1)}, "surprise"),
    ],
)
def test_a_bad_header_is_found_at_once(path: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError, match=message):
        open_trace(rewritten(path, tmp_path / "bad.npz", **changes))


def test_damage_is_found(path: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match="no such file"):
        open_trace(tmp_path / "none.npz")
    stored = rewritten(path, tmp_path / "stored.npz")
    raw = bytearray(stored.read_bytes())
    at = raw.index(np.load(stored)["gates"][-1].tobytes())
    raw[at] ^= 1  # a gate that is still a gate
    stored.write_bytes(raw)
    with pytest.raises(SpecmdError, match=r"damaged file: cannot read 'gates': Bad CRC"):
        list(stretches(open_trace(stored), 20))
    short = tmp_path / "short.npz"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(short, "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            target.writestr(entry, data[:-8] if entry == "gates.npy" else data)
    with pytest.raises(SpecmdError, match=r"damaged file: cannot read 'gates': .* bytes, and its header says"):
        list(stretches(open_trace(short), 20))


def test_numbers_beyond_32_bits_are_refused() -> None:
    trace = select_requests(synthesize(layers=2, experts=4, top_k=2, tokens=3), [0])
    origin = demand_of(trace, Timetable()).next._replace(clock=2**31 - 10)
    with pytest.raises(SpecmdError, match="fewer than 2\\^31 in all: cut the trace"):
        demand_of(trace, Timetable(), origin)
