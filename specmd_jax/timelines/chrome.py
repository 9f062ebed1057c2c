"""Timelines as a file that a browser shows: the trace event format of Chrome, which ui.perfetto.dev opens.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A timeline is a process, a
track of it a thread, a span a complete event ("X"), a mark an instant ("i"), an arrow a flow ("s" and "f"), a count a
counter ("C"). Times are microseconds with three decimals: whole nanoseconds, so that spans that do not overlap do not
after rounding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.files import require_name, whole_file
from specmd_jax.timelines.parts import Timeline

_HEAD = '{"displayTimeUnit": "ms", "otherData": {"format": "specmd-jax timeline 1"'


def check_timeline_path(path: str | os.PathLike[str]) -> Path:
    """Gives the path if `write_chrome_trace` can write there; raises SpecmdError for another ending, a folder that does
    not exist, and a file that is no timeline.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise SpecmdError(f"{path}: expected a name that ends in .json")
    if not os.path.isdir(path.parent):
        raise SpecmdError(f"{path}: no folder {path.parent}, expected one that exists")
    require_name(path)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise SpecmdError(f"{path}: expected a file, found a folder")
        try:
            with path.open("rb") as file:
                found = file.read(len(_HEAD))
        except OSError as error:
            raise SpecmdError(f"{path}: cannot read: {error.strerror or error}") from error
        if found != _HEAD.encode():
            raise SpecmdError(f"{path} already exists and is no timeline, expected another name")
    return path


def write_chrome_trace(path: str | os.PathLike[str], *timelines: Timeline) -> None:
    """Writes timelines, one below the other, as one file; an older timeline under this name is replaced.

    Raises SpecmdError for what `check_timeline_path` refuses, and for a file that cannot be written.
    """
    path = check_timeline_path(path)
    about = [{"name": one.name, "evidence": one.evidence, **one.about} for one in timelines]
    with whole_file(path) as file:
        file.write(f'{_HEAD}, "timelines": {_json(about)}}},\n"traceEvents": [\n'.encode())
        comma = ""
        for process, timeline in enumerate(timelines, start=1):
            for event in events_of(timeline, process):
                file.write(f"{comma}{_json(event)}".encode())
                comma = ",\n"
        file.write(b"\n]}\n")


def events_of(timeline: Timeline, process: int) -> Iterator[dict[str, Any]]:
    """Gives the trace events of a timeline. Arrows are numbered by their process, too."""
    threads = {track: number for number, track in enumerate(timeline.tracks, start=1)}
    yield _named("process_name", process, 0, name=f"{timeline.name} ({timeline.evidence})")
    yield _named("process_sort_index", process, 0, sort_index=process)
    for track, thread in threads.items():
        yield _named("thread_name", process, thread, name=track)
        yield _named("thread_sort_index", process, thread, sort_index=thread)
    for span in timeline.spans:
        place = {"visit": span.visit} if span.visit >= 0 else {}
        start_ns, end_ns = _ns(span.start_s), _ns(span.end_s)
        yield {
            "ph": "X", "pid": process, "tid": threads[span.track], "ts": start_ns / 1000,
            "dur": (end_ns - start_ns) / 1000, "name": span.name, "cat": span.kind, "args": {**span.args, **place},
        }  # fmt: skip
    for mark in timeline.marks:
        yield {
            "ph": "i", "s": "t", "pid": process, "tid": threads[mark.track], "ts": _ns(mark.at_s) / 1000,
            "name": mark.name, "cat": mark.kind, "args": {"visit": mark.visit},
        }  # fmt: skip
    for number, arrow in enumerate(timeline.arrows):
        flow = {"cat": "prefetch", "name": "first use", "id": f"{process}.{number}", "pid": process}
        for phase, at in (("s", timeline.spans[arrow.start]), ("f", timeline.spans[arrow.end])):
            binding = {"bp": "e"} if phase == "f" else {}  # to the span around this moment, not to the next one
            yield {"ph": phase, **flow, **binding, "tid": threads[at.track], "ts": _ns(at.start_s) / 1000}
    for count in timeline.counts:
        yield {
            "ph": "C", "pid": process, "ts": _ns(count.at_s) / 1000, "name": count.name,
            "args": {"value": count.value},
        }  # fmt: skip


def _named(kind: str, process: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "ts": 0, "name": kind, "args": args}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, default=str)
