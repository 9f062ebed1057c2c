"""Profiles: how often some requests used each expert. A cache for other requests may start from them.

A file is one of

* ``.npz`` with the array ``counts`` [L, E] and, if known, ``source`` and ``requests`` (as `save_profile` writes them),
  or ``.json`` with keys of these names;
* counts of another tool, see `importers.counts`: SGLang's ``logical_count``, and those of ktransformers, MoE-Infinity
  and exllamav3, or lines of text. Layers that counted nothing are dense: left out and named in the source;
* a trace, whose uses are counted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int32

from specmd_jax.archives import arrays_of
from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text, whole_file
from specmd_jax.trace.bundled import is_bundled
from specmd_jax.trace.door import as_trace
from specmd_jax.trace.file import load_trace
from specmd_jax.trace.importers.common import parse_json, read_text, require_file
from specmd_jax.trace.importers.counts import FIELDS, read_counts
from specmd_jax.trace.select import uses_of
from specmd_jax.trace.stream import TraceFile, stretches
from specmd_jax.types import Trace

SHORTEST = 16
"""Tokens of the shortest beginning of a request that is recognised again."""


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Uses of every expert by some requests: a value, equal to another with the same counts from the same source.

    Raises SpecmdError for counts that are no table [layers, experts] of finite numbers from 0, or all 0.
    """

    counts: Float64[np.ndarray, "L E"]
    source: str = "counts as given"
    requests: frozenset[str] = frozenset()
    """Marks of the requests that it counts (`marks_of`); none: not known."""

    def __post_init__(self) -> None:
        try:
            counts = np.array(self.counts, np.float64)
        except (TypeError, ValueError, OverflowError):
            raise SpecmdError(f"{self.source}: counts are no table of numbers, expected [layers, experts]") from None
        if counts.ndim != 2 or not counts.size:
            raise SpecmdError(f"{self.source}: counts have shape {list(counts.shape)}, expected [layers, experts]")
        for layer, expert in np.argwhere(~(np.isfinite(counts) & (counts >= 0)))[:1]:
            value = counts[layer, expert]
            raise SpecmdError(f"{self.source}: layer {layer}, expert {expert}: count is {value}, expected at least 0")
        if not counts.any():
            raise SpecmdError(f"{self.source}: every count is 0, expected some uses")
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Profile({self.source}: {self.layers} layers x {self.experts} experts)"

    @property
    def layers(self) -> int:
        return self.counts.shape[0]

    @property
    def experts(self) -> int:
        return self.counts.shape[1]

    @functools.cached_property
    def rank(self) -> Int32[np.ndarray, "L E"]:
        """Numbers all experts from 0 by falling count (ties: the lower flat id)."""
        order = np.argsort(-self.counts.reshape(-1), kind="stable")
        rank = np.empty(order.size, np.int32)
        rank[order] = np.arange(order.size, dtype=np.int32)
        return rank.reshape(self.counts.shape)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.counts.shape, self.counts.tobytes(), self.source, self.requests

    def check(self, what: str, layers: int, experts: int) -> None:
        """Raises SpecmdError unless it is of a model of this shape; `what` is the setting that gives it."""
        if self.counts.shape != (layers, experts):
            raise SpecmdError(
                f"{what}: {self.source} has {self.layers} layers of {self.experts} experts, expected {layers} of "
                f"{experts} as the trace has"
            )

    def described(self, replayed: Trace | TraceFile) -> str:
        """Gives its source, and whether the replayed requests are among those that it counts."""
        if not self.requests:
            return f"{self.source}; whether it saw the replayed requests is not known"
        head, parts = _parts(replayed)
        marks = (marks for part in parts for marks in marks_of(part))
        seen = sum(not self.requests.isdisjoint(mine[-2:]) for mine in marks)
        if not seen:
            return f"{self.source}; other requests than the replayed ones"
        return f"{self.source}; it has seen {seen} of the {head.requests} replayed requests"


ProfileSource: TypeAlias = Profile | Trace | TraceFile | str | os.PathLike[str]
"""What is accepted for a profile: itself, a trace, the name of a bundled trace, or the path of a file of either."""


def as_profile(given: ProfileSource, what: str = "profile") -> Profile:
    """Gives the profile that a caller hands in; raises SpecmdError, which calls it `what`, for anything else."""
    if isinstance(given, Profile):
        return given
    if isinstance(given, Trace | TraceFile):
        return profile_of(given)
    if isinstance(given, str | os.PathLike):
        text = os.fspath(given)
        return profile_of(text) if not Path(text).suffix and is_bundled(text) else load_profile(text)
    raise SpecmdError(
        f"{what} is of type {type(given).__name__}, expected a Profile, a trace, or the path of a file of either"
    )


def profile_of(trace: Trace | TraceFile | str | os.PathLike[str]) -> Profile:
    """Counts the tokens that a trace routes to each expert."""
    head, parts = _parts(as_trace(trace))
    counts, marks = np.zeros((head.layers, head.experts)), set[str]()
    for part in parts:
        counts += uses_of(part.expert_ids, head.experts)
        marks.update(mark for request in marks_of(part) for mark in request)
    of = os.fspath(trace) if isinstance(trace, str | os.PathLike) else head.model
    text = f"{of}, {head.requests:,} requests of {head.tokens:,} tokens"
    return Profile(counts, text, frozenset(marks))


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Reads the profile of a file (formats: above). Raises SpecmdError that names the file and what was expected."""
    path = Path(path)
    content = _content(path)
    if "expert_ids" in content:
        return profile_of(load_trace(path))
    counts = read_counts(path, None if _is_foreign(path) else content)
    if counts is not None:
        return Profile(counts.table, f"{path.name} ({counts.said})")
    if "counts" not in content:
        raise SpecmdError(f"{path}: expected 'counts', or SGLang's 'logical_count', [layers, experts]")
    requests = content.get("requests", [])
    if not isinstance(requests, list | np.ndarray):
        raise SpecmdError(f"{path}: requests are no list, expected the marks of the requests that it counts")
    named = content.get("source")
    counts = _table(path, "counts", content["counts"])
    return Profile(counts, path.name if named is None else f"{path.name} ({named})", frozenset(map(str, requests)))


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Writes a profile as ``.npz`` or ``.json``, whole or not at all."""
    path, marks = Path(path), sorted(profile.requests)
    if path.suffix not in (".npz", ".json"):
        raise SpecmdError(f"{path}: expected a name that ends in .npz or .json")
    if path.suffix == ".json":
        whole = {"source": profile.source, "counts": profile.counts.tolist(), "requests": marks}
        replace_text(path, json.dumps(whole) + "\n")
        return
    with whole_file(path) as file:
        np.savez_compressed(file, counts=profile.counts, source=profile.source, requests=np.array(marks, "U32"))


def marks_of(trace: Trace) -> Iterator[list[str]]:
    """Gives marks of each request, by which it is known again: of its first 16, 32, 64, ... tokens, and of all."""
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    for start, end in zip(ends - trace.lengths, ends, strict=True):
        ids = np.ascontiguousarray(trace.expert_ids[start:end], np.int32)
        steps = [SHORTEST << n for n in range(64) if SHORTEST << n < len(ids)]
        digest, marks, done = hashlib.blake2b(digest_size=8), list[str](), 0
        for step in [*steps, len(ids)]:
            digest.update(ids[done:step].tobytes())
            marks.append(digest.copy().hexdigest())
            done = step
        yield marks


def _parts(source: Trace | TraceFile) -> tuple[Trace, Iterable[Trace]]:
    """Gives what says the sizes of a trace, and its requests in one or several parts."""
    return (source.head, stretches(source, arrays=())) if isinstance(source, TraceFile) else (source, [source])


def _is_foreign(path: Path) -> bool:
    """Whether only other tools name files so."""
    return path.suffix not in (".npz", ".json")


def _content(path: Path) -> dict[str, Any]:
    require_file(path)
    if _is_foreign(path):
        return {}
    if path.suffix == ".npz":
        names, arrays = ("counts", "source", "requests", *FIELDS), arrays_of(path)
        content: Any = {name: arrays[name] for name in names if name in arrays}
        return content | {name: None for name in arrays if name == "expert_ids"}  # read as a trace
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise SpecmdError(f"{path}: expected an object with 'counts', or with SGLang's 'logical_count'")
    return content


def _table(path: Path, name: str, given: Any) -> npt.NDArray[np.float64]:
    try:
        return np.array(given, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise SpecmdError(f"{path}: {name} is no table of numbers, expected [layers, experts]") from None
