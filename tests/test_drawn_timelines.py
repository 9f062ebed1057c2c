"""A timeline says what the replay says: the same seconds, stalls and copies, each at a moment that can be."""

from __future__ import annotations

import functools
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from parity import LINK, engine, small_trace

from specmd_jax import Setting, run, timeline, write_chrome_trace
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import pinned
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.metrics import Metrics, metrics_of
from specmd_jax.replay.state import Tier
from specmd_jax.replay.totals import BUSY_S, HOST_S, LATE_S, LINK_S, MISS_S, READ_S, STORAGE_S, VISIT_S
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.counted import counted_of
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.timelines.parts import (
    CACHE,
    DEVICE,
    HOST,
    IN_HOST,
    PASSES,
    STALL,
    STORAGE,
    VISITS,
    Mark,
    Span,
    Timeline,
)
from specmd_jax.timelines.parts import LINK as LINK_TRACK
from specmd_jax.timelines.record import draw, window
from specmd_jax.trace import load_trace, save_trace
from specmd_jax.trace.profile import profile_of
from specmd_jax.trace.stream import open_trace

OTHERS = profile_of(small_trace(77, tokens=20))
DRAFT_S = 2.1e-4
SPLIT: dict[str, Any] = {
    "mix": Mix.of("lru", "perfect", miss="split", numbers={"selection": {"count": 3.0}}),
    "trace": {"top_k": 3},
    "options": {"horizon": 2},
}
SCARCE = LINK.replace(host_bytes_per_s=1.3e9)  # less than the host takes alone
SSD = LINK.replace(storage_bytes_per_s=0.71e9, storage_latency_s=2.3e-5)
THREE: dict[str, Any] = {"selection": {"count": 3.0}}
QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])

CELLS: dict[str, dict[str, Any]] = {
    "lru": {"mix": Mix.of("lru")},
    "lfu and previous, larger than the cache": {
        "mix": Mix.of("lfu", "previous"), "budget": 95_000, "trace": {"prompt_tokens": 20},
    },
    "the same, held": {
        "mix": Mix.of("lfu", "previous"), "budget": 95_000, "trace": {"prompt_tokens": 20}, "options": {"hold": True},
    },
    "transition": {
        "mix": Mix.of("lru", "transition", numbers={"selection": {"count": 3.0}}), "options": {"horizon": 2},
    },
    "gate_ahead": {"mix": Mix.of("lru", "gate_ahead", numbers={"selection": {"count": 3.0}})},
    "batch": {"mix": Mix.of("lru", "previous"), "schedule": {"batch": 2}, "trace": {"requests": 3, "tokens": 16}},
    "a cache for each request": {
        "mix": Mix.of("lru", "previous"),
        "schedule": {"reset_per_request": True},
        "trace": {"requests": 3, "tokens": 16},
    },
    "sequential, a pool per layer": {
        "mix": Mix.of("least_stale", "previous", numbers={"selection": {"count": 2.0}}),
        "budget": np.array([130_000, 80_000, 125_000, 95_000]),
        "schedule": {"contract": "sequential"},
        "options": {"horizon": 3, "may_evict": True},
    },
    **{
        miss: {
            "mix": Mix.of("lhu", "transition", miss=miss, numbers={"miss": {"keep": 1}} if miss == "drop" else None),
            "budget": 390_000,
            "precisions": (4.0, 8.0, 16.0),
            "trace": {"tokens": 30, "top_k": 3, "with_logits": True},
        }
        for miss in ("cpu", "cascade", "drop", "substitute")
    },
    "cache_aware": {
        "mix": Mix.of("lru", routing="cache_aware", numbers={"routing": {"strength": 0.4}}),
        "trace": {"prompt_tokens": 0, "with_logits": True},
    },
    "split": SPLIT,
    "split, scarce memory": {**SPLIT, "hardware": SCARCE},
    "split, an engine that adds": {**SPLIT, "hardware": LINK.replace(overlaps=0.0, handover_s=3.1e-5)},
    "split, in between": {**SPLIT, "hardware": SCARCE.replace(overlaps=0.37)},
    "transition, an engine that adds": {
        "mix": Mix.of("lru", "transition", numbers={"selection": {"count": 3.0}}),
        "options": {"horizon": 2},
        "hardware": LINK.replace(overlaps=0.0),
    },
    "drafts over a context": {
        "mix": Mix.of("lru", "previous", numbers={"selection": {"count": 3.0}}),
        "schedule": {"batch": 2, "drafts": Drafts(2, 0.6, 1, DRAFT_S), "context": 3000},
        "model": "gpt-oss-20b",
    },
    "a warm start for each request": {
        "mix": Mix.of("lru", "previous"),
        "schedule": {"reset_per_request": True},
        "options": {"warm_start": OTHERS},
    },
    "pinned, larger than what is left": {
        "mix": Mix.of(pinned("lru", 0.7, profile=OTHERS), "previous"), "budget": 200_000,
        "trace": {"prompt_tokens": 20}, "options": {"warm_start": OTHERS},
    },
    "limited": {
        "mix": Mix.of("lru", "previous", admission="limited", numbers={"admission": {"copies": 2}}),
        "budget": 130_000,
        "trace": {"top_k": 3},
    },
    "storage and precisions": {
        "mix": Mix.of("lhu", "transition", miss="cascade", routing="cache_aware", host_eviction="lhu"),
        "budget": 390_000, "host": 450_000, "precisions": (4.0, 8.0, 16.0), "schedule": {"reset_per_request": True},
        "trace": {"tokens": 24, "top_k": 3, "with_logits": True}, "hardware": SSD,
        "options": {"tier": Tier(uses=True, exclusive=True)},
    },
    "storage, larger than both caches": {
        "mix": Mix.of("belady", "perfect", host_eviction="belady", numbers=THREE), "budget": 90_000, "host": 95_000,
        "hardware": SSD.replace(overlaps=0.3), "options": {"tier": Tier()}, "schedule": {"prefill_chunk": 4},
        "trace": {"requests": 3, "tokens": 14, "prompt_tokens": 6},
    },
    **{
        f"storage and split, prefetch to the {where}": {
            "mix": Mix.of("lru", "perfect", miss="split", host_eviction="lru", numbers=THREE), "host": 600_000,
            "hardware": SSD.replace(host_bytes_per_s=2.2e9, overlaps=0.37), "trace": {"tokens": 20, "top_k": 3},
            "schedule": {"batch": 2},
            "options": {"horizon": 2, "tier": Tier(uses=True, exclusive=True, to_host=where == "host")},
        }
        for where in ("device", "host")
    },
    "storage and cpu, prefetch to the host": {
        "mix": Mix.of("lru", "perfect", miss="cpu", host_eviction="lru", numbers=THREE), "budget": 200_000,
        "host": 210_000, "hardware": SSD, "schedule": {"reset_per_request": True},
        "trace": {"tokens": 20, "top_k": 3}, "options": {"horizon": 3, "tier": Tier(to_host=True)},
    },
    "storage and drafts, prefetch to the host": {
        "mix": Mix.of(
            pinned("lru", 0.3, profile=OTHERS), "perfect", admission="limited", host_eviction="lfu_resident",
            numbers=THREE,
        ),
        "budget": QUOTAS, "host": QUOTAS * 5 // 4, "hardware": SSD, "schedule": {"drafts": Drafts(2, 0.6, 1, 1e-5)},
        "options": {"horizon": 2, "tier": Tier(exclusive=True, to_host=True)}, "trace": {"tokens": 20},
    },
}  # fmt: skip
"""Programs that tests of parity compile, too."""


class Drawn(NamedTuple):
    timeline: Timeline
    seconds: npt.NDArray[np.float64]  # [V, 6] of the scan
    reads: npt.NDArray[np.float64]  # [V, 2] of its reads from storage
    metrics: Metrics


@functools.cache
def drawn(name: str) -> Drawn:
    """A whole replay, and what the scan says of it."""
    cell = CELLS[name]
    trace, mix, budget = small_trace(5, **cell.get("trace", {})), cell["mix"], cell.get("budget", 420_000)
    if "model" in cell:
        trace = replace(trace, meta={"model": cell["model"]})
    prepared = prepare(trace, precisions=cell.get("precisions"), logits=True, **cell.get("schedule", {}))
    options, machine = cell.get("options", {}), cell.get("hardware", LINK)
    totals, events, _ = engine(prepared, mix, budget, machine, cell.get("host"), **options)
    setup, numbers = prepared.setup(mix, machine, **options), prepared.numbers(budget, machine, cell.get("host"))
    found = draw(prepared, setup, mix, numbers, events)
    counted, level_bytes = counted_of(prepared.schedule), prepared.sizes.level_bytes
    metrics = metrics_of(counted, level_bytes, totals, prepared.bits, timed=True)
    seconds = np.asarray(events.seconds, np.float64)
    reads = np.zeros((len(seconds), 2)) if events.tier is None else np.asarray(events.tier.seconds, np.float64)
    return Drawn(found.finish(name, {}), seconds, reads, metrics)


@pytest.mark.parametrize("name", CELLS)
def test_each_visit_takes_what_the_scan_says(name: str) -> None:
    found, seconds, reads, metrics = drawn(name)
    visits = found.on(VISITS)
    assert [span.visit for span in visits] == list(range(len(seconds)))
    scale = seconds[:, VISIT_S].max()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6 * scale)
    close([span.took_s for span in visits], seconds[:, VISIT_S])
    for column, cause in ((LATE_S, "late hits"), (MISS_S, "misses"), (BUSY_S, "link busy")):
        found_us = [span.args[f"stall, {cause} (us)"] for span in visits]
        np.testing.assert_allclose(found_us, seconds[:, column] * 1e6, atol=1e-3)  # as far as they are written down
    found_us = [span.args.get("stall, storage (us)", 0.0) for span in visits]
    np.testing.assert_allclose(found_us, reads[:, STORAGE_S] * 1e6, atol=1e-3)
    copied, hosted, read = np.zeros((3, len(seconds)))
    for span in found.on(STORAGE):
        read[span.visit] += span.took_s
    close(read, reads[:, READ_S])
    for span in found.on(LINK_TRACK):
        copied[span.visit] += span.took_s
    for span in found.on(HOST, "expert"):
        hosted[span.visit] += span.took_s
    close(hosted, seconds[:, HOST_S])
    close(copied.sum(), seconds[:, LINK_S].sum())
    if not hosted.any():  # else a visit may slow down a copy that began before
        close(copied, seconds[:, LINK_S])
    assert found.took_s == pytest.approx(seconds[:, VISIT_S].sum(), rel=1e-6)
    assert found.stall_s == pytest.approx(metrics.stall_s, rel=1e-6, abs=1e-6 * scale)


@pytest.mark.parametrize("name", CELLS)
def test_a_track_does_one_thing_at_a_time(name: str) -> None:
    found = drawn(name).timeline
    for track in (STORAGE, LINK_TRACK, DEVICE, HOST, STALL, VISITS, PASSES):
        for before, after in itertools.pairwise(found.on(track)):
            assert before.end_s <= after.start_s, (before, after)
    assert all(span.end_s >= span.start_s for span in found.spans)


@pytest.mark.parametrize("name", CELLS)
def test_counts_are_those_of_the_metrics(name: str) -> None:
    found, _, _, metrics = drawn(name)
    misses, prefetches = found.on(LINK_TRACK, "miss"), found.on(LINK_TRACK, "prefetch")
    assert len(misses) + len(prefetches) == metrics.loads
    assert len(misses) == metrics.misses - metrics.dropped - metrics.substituted - metrics.on_host
    assert len(found.on(HOST, "expert")) == metrics.on_host
    assert len(found.on(HOST, "handover")) == len({span.visit for span in found.on(HOST, "expert")})
    assert sum(span.args["bytes"] for span in misses) == metrics.bytes_demand
    used = [found.spans[arrow.start] for arrow in found.arrows]
    assert sum(span.args["bytes"] for span in used if span.track == LINK_TRACK) == metrics.bytes_prefetch_used
    assert sum(span.track == STORAGE for span in used) == (metrics.reads_ahead_used or 0)
    wasted = sum("read in vain" in mark.name for mark in marks(found, "eviction", IN_HOST))
    assert wasted <= (metrics.reads_ahead_wasted or 0)  # others are there to the end, or a reset
    assert len(found.on(STORAGE, "prefetch")) == metrics.reads_ahead
    in_all = metrics.bytes_prefetch_used + metrics.bytes_prefetch_wasted
    assert sum(span.args["bytes"] for span in prefetches) == in_all
    assert len(marks(found, "eviction", CACHE)) == metrics.evictions
    assert len(marks(found, "eviction", IN_HOST)) == metrics.host_evictions
    assert len(found.on(STORAGE, "miss")) == metrics.host_misses
    assert len(found.on(STORAGE)) == metrics.storage_reads
    assert sum(span.args["bytes"] for span in found.on(STORAGE)) == metrics.bytes_storage
    assert len(marks(found, "collision")) == metrics.collisions
    outcomes = [span.args.get("outcome") for span in found.on(DEVICE)]
    assert outcomes.count("late hit") == metrics.hits_late
    assert outcomes.count("hit by prefetch") == metrics.hits_prefetch
    assert outcomes.count("miss") == len(misses)


def test_the_cells_have_all_that_is_drawn() -> None:
    every = [drawn(name) for name in CELLS]
    assert sum(one.metrics.hits_late for one in every) and sum(one.metrics.on_host for one in every)
    assert sum(one.metrics.substituted for one in every) and sum(one.metrics.dropped for one in every)
    assert sum(len(one.timeline.arrows) for one in every) and sum(one.metrics.collisions for one in every)
    assert any("in vain" in mark.name for one in every for mark in one.timeline.marks)
    assert any(marks(one.timeline, "reset") for one in every)
    assert any(one.timeline.on(STALL, "host") for one in every)
    assert any("admitted" in span.args for one in every for span in one.timeline.on(LINK_TRACK, "miss"))
    assert sum(len(one.timeline.on(STORAGE, kind)) > 0 for one in every for kind in ("miss", "prefetch")) > 6
    assert sum(one.metrics.host_evictions for one in every)
    assert sum(one.metrics.reads_ahead_used or 0 for one in every) and sum(
        one.metrics.host_hits_late or 0 for one in every
    )
    assert any("read in vain" in mark.name for one in every for mark in one.timeline.marks)


def test_each_decode_pass_is_drafted_before_its_gate() -> None:
    found = drawn("drafts over a context").timeline
    drafted, decoded = found.on(DEVICE, "drafting"), found.on(PASSES, "decode")
    assert [span.start_s for span in drafted] == [span.start_s for span in decoded] and len(decoded) > 5
    np.testing.assert_allclose([span.took_s for span in drafted], DRAFT_S, rtol=1e-6)
    gates = [min(s.start_s for s in found.on(DEVICE, "expert") if s.visit == span.visit) for span in drafted]
    assert all(span.end_s <= gate_s for span, gate_s in zip(drafted, gates, strict=True))


ASKING = (("miss", LINK_TRACK), ("expert", HOST))
"""What asks host memory for an expert."""


@pytest.mark.parametrize("name", CELLS)
def test_nothing_runs_before_it_is_there(name: str) -> None:
    found, _, _, metrics = drawn(name)
    copies = {(span.visit, span.layer, span.expert): span for span in found.on(LINK_TRACK, "miss")}
    for span in found.on(DEVICE, "expert"):
        copy = copies.get((span.visit, span.layer, span.expert))
        assert copy is None or copy.end_s <= span.start_s
    goes_on = metrics.reads_ahead_used is None
    taken = {(span.visit, span.layer, span.expert): span for span in (*found.on(HOST, "expert"), *found.on(LINK_TRACK))}
    for read in found.on(STORAGE, None if goes_on else "miss"):
        after = taken[read.visit, read.layer, read.expert]
        assert (read.end_s == after.start_s) if read.kind == "prefetch" else (read.end_s <= after.start_s)
    for arrow in found.arrows:
        copy, use = found.spans[arrow.start], found.spans[arrow.end]
        assert copy.kind == "prefetch"
        assert use.track == DEVICE if copy.track == LINK_TRACK else (use.kind, use.track) in ASKING
        assert (copy.layer, copy.expert) == (use.layer, use.expert)
        assert copy.visit < use.visit and copy.end_s <= use.start_s + 1e-9
    for span in found.on(STALL):  # it ends when what was waited for begins to run
        if span.kind == "host":
            continue
        (run_of,) = [s for s in found.on(DEVICE, "expert") if (s.visit, s.expert) == (span.visit, span.expert)]
        adds = CELLS[name].get("hardware", LINK).overlaps < 1  # then others may run first
        assert run_of.start_s >= span.end_s if adds else run_of.start_s == span.end_s


TRACE = small_trace(3)
SETTING = Setting(eviction="lfu", prefetch="previous", horizon=2, overfetch=1.5, capacity="40%", hardware=LINK)
BEHIND = SETTING.replace(prefetch="perfect", host_capacity="50%", hardware=SSD)
SETTINGS = {"device": BEHIND, "host": BEHIND.replace(prefetch_to="host")}


@functools.cache
def whole(setting: str) -> Timeline:
    return timeline(TRACE, SETTINGS[setting], passes=99)


@pytest.mark.parametrize("name", ["device", "host"])
def test_a_part_is_the_same_as_in_the_whole(name: str) -> None:
    entire = whole(name)
    first = next(  # a prefetch read is under way as it begins
        number
        for number, span in enumerate(entire.on(PASSES))
        if number > 3 and any(read.start_s < span.start_s < read.end_s for read in entire.on(STORAGE, "prefetch"))
    )
    part, shown = timeline(TRACE, SETTINGS[name], passes=7, first_pass=first), range(first * 4, (first + 7) * 4)
    about = part.about["first pass"], part.about["last pass"], part.about["passes of the replay"]
    assert about == (first, first + 6, 40)
    assert [span.visit for span in part.on(VISITS)] == list(shown)
    offset_s = next(span.start_s for span in entire.on(VISITS) if span.visit == shown[0])
    for track in (DEVICE, LINK_TRACK, STORAGE, STALL, VISITS, PASSES):
        old = [span for span in entire.on(track) if span.visit in shown]
        new = [span for span in part.on(track) if span.visit >= 0]
        assert [(span.name, span.visit) for span in new] == [(span.name, span.visit) for span in old]
        starts = [span.start_s - offset_s for span in old]
        np.testing.assert_allclose([span.start_s for span in new], starts, atol=1e-9)
    assert [mark.name for mark in part.marks] == [mark.name for mark in entire.marks if mark.visit in shown]
    values = {(count.name, round(count.at_s + offset_s, 7)): count.value for count in part.counts}
    before = {(count.name, round(count.at_s, 7)): count.value for count in entire.counts}
    assert all(before[at] == pytest.approx(value, abs=2e-3) for at, value in values.items())
    (read,), copies = ([span for span in part.on(track) if span.visit < 0] for track in (STORAGE, LINK_TRACK))
    assert all(span.args["began"] == "before this timeline" for span in (read, *copies))
    assert read.start_s == 0 and [read.end_s] * (name == "device") == [copy.start_s for copy in copies]


def test_a_whole_replay_adds_up_to_its_metrics() -> None:
    metrics, found = run(TRACE, SETTINGS["device"], engine="scan"), whole("device")
    assert found.stall_s == pytest.approx(metrics.stall_s, rel=1e-6)
    assert (len(found.on(LINK_TRACK)), len(found.on(STORAGE))) == (metrics.loads, metrics.storage_reads)
    assert found.name == "synthetic, lfu, perfect, 40%"


@pytest.mark.parametrize(
    ("options", "passes", "first_pass", "shown"),
    [
        ({}, 64, None, (0, 40)),
        ({}, 3, None, (0, 3)),
        ({"warmup_tokens": 8}, 3, None, (4, 7)),  # 5 prompt tokens and 3 decoded ones are 4 passes
        ({"phase": "decode"}, 3, None, (1, 4)),
        ({"warmup_tokens": 8}, 3, 0, (0, 3)),
        ({}, 3, 39, (39, 40)),
    ],
)
def test_passes_that_are_shown(
    options: dict[str, Any], passes: int, first_pass: int | None, shown: tuple[int, int]
) -> None:
    begin, end = window(build_schedule(TRACE, **options), passes, first_pass)
    assert (begin, end) == (shown[0] * 4, shown[1] * 4)


# ----------------------------------------------------------------------------------------------------------- the file


STORED = "storage and cpu, prefetch to the host"


@pytest.fixture
def document(tmp_path: Path) -> tuple[dict[str, Any], Timeline]:
    found = drawn("batch").timeline
    write_chrome_trace(tmp_path / "one.json", found, drawn(STORED).timeline)
    return json.loads((tmp_path / "one.json").read_text(encoding="utf-8")), found


def test_the_file_has_what_the_format_asks_for(document: tuple[dict[str, Any], Timeline]) -> None:
    file, found = document
    events = file["traceEvents"]
    assert file["displayTimeUnit"] == "ms"
    assert [about["evidence"] for about in file["otherData"]["timelines"]] == ["simulated", "simulated"]
    assert {event["ph"] for event in events} == set("MXiCsf")
    threads = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in events:
        assert event["ts"] >= 0
        if event["ph"] in "Xisf":
            assert (event["pid"], event["tid"]) in threads
    names = [e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name" and e["pid"] == 1]
    assert tuple(names) == found.tracks
    assert len([e for e in events if e["ph"] == "X" and e["pid"] == 1]) == len(found.spans)


@pytest.mark.parametrize(("process", "name"), [(1, "batch"), (2, STORED)])
def test_read_back_nothing_overlaps_and_stalls_add_up(
    document: tuple[dict[str, Any], Timeline], process: int, name: str
) -> None:
    events, metrics = [event for event in document[0]["traceEvents"] if event["pid"] == process], drawn(name).metrics
    tids = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    for track, tid in tids.items():
        mine = sorted((round(e["ts"] * 1000), round((e["ts"] + e["dur"]) * 1000)) for e in spans if e["tid"] == tid)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(mine)), track
    stall_us = sum(event["dur"] for event in spans if event["tid"] == tids[STALL])
    assert stall_us * 1e-6 == pytest.approx(metrics.stall_s, rel=1e-4)
    assert sum(event["tid"] == tids[LINK_TRACK] for event in spans) == metrics.loads
    assert sum(event["tid"] == tids.get(STORAGE) for event in spans) == metrics.storage_reads
    assert drawn(name).timeline.stall_s == pytest.approx(metrics.stall_s, rel=1e-6)


def test_arrows_lie_inside_what_they_join(document: tuple[dict[str, Any], Timeline]) -> None:
    events = document[0]["traceEvents"]
    spans = {(e["pid"], e["tid"], e["ts"]) for e in events if e["ph"] == "X"}
    starts, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert starts and starts.keys() == ends.keys()
    for number, start in starts.items():
        end = ends[number]
        assert {(e["pid"], e["tid"], e["ts"]) for e in (start, end)} <= spans
        assert start["ts"] < end["ts"] and end["bp"] == "e"


def test_a_link_that_takes_no_time_can_be_drawn(tmp_path: Path) -> None:
    found = timeline(TRACE, SETTING.replace(hardware="infinite"), passes=7)
    assert found.stall_s == 0 and found.on(LINK_TRACK)
    write_chrome_trace(tmp_path / "fast.JSON", found)
    assert json.loads((tmp_path / "fast.JSON").read_text())["traceEvents"]


def test_rows_are_plain_values() -> None:
    rows = list(drawn("lru").timeline.rows())
    assert json.loads(json.dumps(rows)) == rows
    assert {"track", "kind", "start_s", "end_s", "took_s", "layer", "expert", "bytes", "outcome"} <= set().union(*rows)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("one.txt", "one.txt: expected a name that ends in .json"),
        ("nowhere/one.json", "nowhere/one.json: no folder nowhere, expected one that exists"),
        ("folder.json", "folder.json: expected a file, found a folder"),
        ("other.json", "other.json already exists and is no timeline, expected another name"),
    ],
)
def test_bad_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("other.json").write_text('{"dependencies": {}}')
    with pytest.raises(SpecmdError, match=f"^{re.escape(message)}$"):
        write_chrome_trace(path, Timeline("none", "simulated", (), ()))
    assert Path("other.json").read_text() == '{"dependencies": {}}'


def test_an_older_timeline_is_replaced(tmp_path: Path) -> None:
    for spans in ((), (Span(VISITS, "visit", "L0", 0.0, 1.0, 0, 0),)):
        write_chrome_trace(tmp_path / "one.json", Timeline("none", "simulated", (VISITS,), spans))
    assert '"L0"' in (tmp_path / "one.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware": None}, "hardware is None, expected a machine"),
        ({"passes": 0}, "passes is 0, expected at least 1"),
        ({"first_pass": 99}, r"first_pass is 99, expected 0\.\.39"),
        ({"first_pass": -1}, r"first_pass is -1, expected 0\.\.39"),
        ({"evictoin": "lru"}, "evictoin"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError, match=message):
        timeline(TRACE, SETTING, **changes)


def test_a_streamed_trace_is_refused(tmp_path: Path) -> None:
    save_trace(small_trace(3), tmp_path / "trace.npz")
    with pytest.raises(SpecmdError, match=r"trace\.npz: a timeline takes a trace in memory"):
        timeline(open_trace(tmp_path / "trace.npz"))
    assert load_trace(tmp_path / "trace.npz").tokens


def marks(found: Timeline, kind: str, track: str = CACHE) -> list[Mark]:
    return [mark for mark in found.marks if (mark.kind, mark.track) == (kind, track)]
