"""Draws the visits of a replay, one after the other, from the events that the scan gives in full.

Collisions are marked at the gate that finds them, evictions at the end of the visit that makes room. A copy that began
before the first visit is drawn from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.engines.prepared import Prepared
from specmd_jax.replay.state import Numbers, Setup
from specmd_jax.replay.timing import dense
from specmd_jax.replay.totals import (
    DROPPED,
    FETCHED,
    LATE,
    PREFETCHED,
    REUSED,
    SUBSTITUTED,
    VISIT_S,
    Events,
)
from specmd_jax.replay.totals import (
    HOST as ON_HOST,
)
from specmd_jax.timelines.course import FOR_HOST, Beside, Course, Load, course
from specmd_jax.timelines.parts import (
    CACHE,
    DEVICE,
    HOST,
    LINK,
    PASSES,
    STALL,
    VISITS,
    Arrow,
    Count,
    Mark,
    Span,
    Timeline,
)  # fmt: skip
from specmd_jax.types import DECODE

OUTCOMES = {
    REUSED: "hit by reuse",
    PREFETCHED: "hit by prefetch",
    LATE: "late hit",
    FETCHED: "miss",
    DROPPED: "dropped",
    SUBSTITUTED: "substituted",
    ON_HOST: "miss on the host",
}
TRACKS = (PASSES, VISITS, STALL, DEVICE, HOST, LINK, CACHE)


@dataclass(frozen=True)
class Start:
    """How the first visit that is drawn finds the link and the cache."""

    link_s: float = 0.0  # seconds until the link is free
    flight: int = -1  # flat id of the copy in flight
    level: npt.NDArray[np.int8] | None = None  # [L, E]; None: empty
    fresh: npt.NDArray[np.bool_] | None = None  # [L, E] came by prefetch and is unused; None: nothing
    reset: npt.NDArray[np.int8] | None = None  # [L, E] what a reset leaves; None: nothing
    held: npt.NDArray[np.bool_] | None = None  # [L, E] what never leaves; None: nothing


@dataclass(frozen=True)
class _Visit:
    """A visit as it was replayed."""

    index: int
    layer: int
    count: npt.NDArray[np.int32]  # [E] tokens routed to each expert
    mass: npt.NDArray[np.float32]  # [E]
    events: Events

    @property
    def by_mass(self) -> list[int]:
        """The demanded experts by falling gate mass (ties: lower id)."""
        order = np.argsort(-self.mass, kind="stable")
        return [int(expert) for expert in order if self.events.outcome[expert]]


class Drawing:
    """A timeline under way."""

    def __init__(self, prepared: Prepared, setup: Setup, numbers: Numbers, start: Start) -> None:
        assert numbers.costs is not None
        # the seconds that the scan adds up in float32, added up in float64 here
        self.costs = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), numbers.costs)
        self.prepared, self.setup, self.numbers, self.budget = prepared, setup, numbers, np.asarray(numbers.budget)
        self.dense_s: dict[tuple[int, int, bool, int | None], tuple[float, float]] = {}
        self.gate_s, self.link_s, self.end_s = 0.0, start.link_s, 0.0
        none = np.zeros((setup.layers, setup.experts), np.int8)
        self.level, self.reset = (none if level is None else level for level in (start.level, start.reset))
        self.held = np.zeros(none.shape, bool) if start.held is None else start.held
        self.flying = -1  # the last prefetch copy among the spans
        self.spans: list[Span] = []
        self.marks: list[Mark] = []
        self.arrows: list[Arrow] = []
        self.counts: list[Count] = []
        # flat id of what came by prefetch -> its copy among the spans (-1: it is not shown)
        self.unused: dict[int, int] = {}
        if start.fresh is not None:
            self.unused = dict.fromkeys(np.flatnonzero(start.fresh).tolist(), -1)
        self.pass_began: tuple[int, float] | None = None  # its first visit
        if start.flight >= 0 and start.link_s > 0:
            self._copy("prefetch", -1, start.flight, (0.0, start.link_s), began="before this timeline")

    # ------------------------------------------------------------------------------------------------- a visit

    def visit(self, index: int, events: Events) -> None:
        """Draws one visit; `events` are its own, in full."""
        s = self.prepared.schedule
        count, mass = (s.count[index], s.mass[index]) if events.count is None else (events.count, events.mass)
        assert mass is not None
        visit = _Visit(index, int(s.layer[index]), np.asarray(count), np.asarray(mass), events)
        before_s, after_s = (0.0, 0.0) if s.drafting_s is None else s.drafting_s[index].tolist()
        if before_s and self.pass_began is None:  # what is drawn begins with drafting
            self.gate_s, self.link_s = before_s, before_s + self.link_s
        begin_s = self.gate_s - before_s
        if s.starts_pass[index]:
            self._end_pass()
            self.pass_began = index, begin_s
        if before_s:
            self._span(DEVICE, "drafting", "drafting", (begin_s, self.gate_s), index)
        if s.reset[index]:
            self.marks.append(Mark(CACHE, "reset", "the cache is emptied", self.gate_s, index))
            self.level, self.unused = self.reset, {}
        load = self._load(visit)
        found = course(load, self.gate_s, self.link_s)
        self._demand(visit, load, found)
        end_s = self.end_s = found.dense[1]
        drawn_s, replayed_s = end_s - begin_s, float(events.seconds[VISIT_S])
        assert math.isclose(drawn_s, replayed_s, rel_tol=1e-4, abs_tol=1e-9), f"drawn: {drawn_s} s, not {replayed_s}"
        self._prefetches(visit, found)
        self._cache(visit, end_s)
        outcome = np.asarray(events.outcome)
        args = {
            "pass": int(s.pass_id[index]), "request": int(s.request[index]), "tokens": int(s.tokens[index]),
            "demanded experts": int((outcome > 0).sum()), "misses": int((outcome >= FETCHED).sum()),
            "stall, late hits (us)": _us(found.late_s), "stall, misses (us)": _us(found.miss_s),
            "stall, link busy (us)": _us(found.busy_s), "counted": bool(s.counted[index]),
        }  # fmt: skip
        self._span(VISITS, "visit", f"L{visit.layer}", (begin_s, end_s), index, visit.layer, -1, args)
        self.counts.append(Count("stall of the visit (us)", self.gate_s, _us(found.stall_s)))
        self.gate_s = end_s + after_s

    def _load(self, visit: _Visit) -> Load:
        costs, layer, events, s = self.costs, visit.layer, visit.events, self.prepared.schedule
        assert events.row is not None
        row, outcome, tokens = events.row.astype(int), events.outcome, self._device_tokens(visit)
        demanded, others = visit.by_mass, np.flatnonzero(outcome == 0).tolist()

        def run_s(expert: int) -> float:
            read_s = costs.expert_read_s[row[expert] - 1, layer]
            return roofline(int(tokens[expert]), costs.expert_flop_s[layer], read_s, costs.launch_s)

        def host_s(expert: int) -> float:
            return roofline(int(visit.count[expert]), costs.host_flop_s[layer], costs.host_read_s[layer], 0.0)

        missing = [e for e in demanded if outcome[e] == FETCHED]
        if self._streams(visit):
            missing.sort()
        dense_s = 0.0
        if s.ends_layer[visit.index]:
            launch_s = costs.launch_s + costs.layer_s
            dense_s = roofline(int(s.tokens[visit.index]), *self._dense(visit.index), launch_s)
        hosted = {e: host_s(e) for e in demanded if outcome[e] == ON_HOST}
        return Load(
            copies={e: float(costs.copy_s[row[e] - 1, layer]) for e in missing},
            runs={e: run_s(e) for e in [*demanded, *others] if tokens[e] > 0},
            hosted=hosted,
            dense_s=dense_s,
            late=next((e for e in demanded if outcome[e] == LATE), -1),
            adds=float(costs.adds),
            beside=self._beside(layer, hosted),
        )

    def _beside(self, layer: int, hosted: Mapping[int, float]) -> Beside:
        """Gives how the host's work shares the host's memory with the link."""
        costs, work_s = self.costs, sum(hosted.values())
        if not hosted:
            return Beside()
        draw = len(hosted) * float(costs.host_least_s[layer]) / work_s if work_s else 0.0
        link, spare = float(costs.link_load[layer]), max(1.0 - draw, 0.0)
        return Beside(max(draw + link - 1.0, 0.0), spare / link if spare < link else 1.0, float(costs.handover_s))

    def _dense(self, index: int) -> tuple[float, float]:
        """Gives the seconds of a layer's dense part per token, and of its reading."""
        s = self.prepared.schedule
        turns = None if s.turns is None else int(s.turns[index])
        layer, tokens, decode = int(s.layer[index]), int(s.tokens[index]), bool(s.phase[index] == DECODE)
        at = layer, tokens, decode, turns
        if at not in self.dense_s:
            counted = None if turns is None else jnp.int32(turns)
            found = dense(self.numbers.costs, layer, jnp.int32(tokens), jnp.asarray(decode), counted)
            self.dense_s[at] = float(found.flop_s), float(found.read_s)
        return self.dense_s[at]

    def _device_tokens(self, visit: _Visit) -> npt.NDArray[np.int64]:
        """Gives the tokens that each expert computes on the device, [E]: its own, and of those it stands in for."""
        outcome, instead = visit.events.outcome, visit.events.instead
        assert instead is not None
        own = np.where((outcome > 0) & (outcome <= FETCHED), visit.count, 0)
        moved = np.zeros(len(own), np.int64)
        gone = instead >= 0
        np.add.at(moved, instead[gone], visit.count[gone])
        # a token that loses several experts to one stand-in runs it once
        return own + np.minimum(moved, int(self.prepared.schedule.tokens[visit.index]))

    def _streams(self, visit: _Visit) -> bool:
        """Whether the demand is larger than its pool and passes through: then copies go in the order of ids."""
        assert visit.events.row is not None
        units = self.prepared.sizes.units[visit.events.row.astype(int), visit.layer]
        pooled, layer = self.budget.ndim == 0, visit.layer
        held = self.held.sum(axis=1) * np.asarray(self.prepared.sizes.units[-1])
        demand = visit.events.outcome > 0
        room = int(self.budget if pooled else self.budget[layer]) - int(held.sum() if pooled else held[layer])
        return not self.setup.hold and int(units[demand & ~self.held[layer]].sum()) > room

    # ---------------------------------------------------------------------------------------------- its pieces

    def _demand(self, visit: _Visit, load: Load, found: Course) -> None:
        """Draws the demand copies, the computations, the waits and the collisions."""
        events, layer, v = visit.events, visit.layer, visit.index
        assert events.instead is not None and events.row is not None
        for expert, piece in found.copies.items():
            self._copy("miss", v, self._flat(layer, expert), piece, level=int(events.row[expert]))
        for expert, piece in found.runs.items():
            outcome = int(events.outcome[expert])
            args = self._about(visit, expert)
            if not outcome:
                args = {"outcome": "stands in", "for": _listed(np.asarray(events.instead), expert)}
            place = self._span(DEVICE, "expert", f"L{layer} E{expert}", piece, v, layer, expert, args)
            copy = self.unused.pop(self._flat(layer, expert), -1) if outcome in (PREFETCHED, LATE) else -1
            if copy >= 0:
                self.arrows.append(Arrow(copy, place))
        for expert, piece in found.hosted.items():
            args = self._about(visit, expert)
            self._span(HOST, "expert", f"L{layer} E{expert} on the host", piece, v, layer, expert, args)
        if load.dense_s:
            self._span(DEVICE, "dense", f"L{layer} dense", found.dense, v, layer)
        if found.back is not None:
            self._span(HOST, "back", f"L{layer} back to the device", found.back, v, layer)
        for expert, piece in found.waits.items():
            if expert == FOR_HOST:
                self._span(STALL, "host", f"waits for the host, L{layer}", piece, v, layer)
                continue
            kind = "late" if expert == load.late else "miss"
            self._span(STALL, kind, f"waits for L{layer} E{expert} ({kind})", piece, v, layer, expert)
        for expert in np.flatnonzero(events.collision).tolist():
            name = f"L{layer} E{expert}: collision"
            self.marks.append(Mark(CACHE, "collision", name, self.gate_s, v, layer, expert))

    def _prefetches(self, visit: _Visit, found: Course) -> None:
        """Draws the prefetch copies that the visit starts, in their order; beside the host the one in flight takes
        longer.
        """
        link, started = found.link, visit.events.prefetched
        busy_s = self.link_s - self.gate_s
        if self.flying >= 0 and busy_s > 0:
            self.spans[self.flying] = replace(self.spans[self.flying], end_s=link.done_s(busy_s))
        self.link_s, work_s = max(self.link_s, link.done_s(link.work_s)) if link.work_s else self.link_s, link.work_s
        if started is None:
            return
        top = len(self.prepared.sizes.level_bytes)
        ahead, experts = np.nonzero(started)
        for place in np.argsort(started[ahead, experts]):
            layer, expert = (visit.layer + 1 + int(ahead[place])) % self.setup.layers, int(experts[place])
            begin_s, work_s = link.done_s(work_s), work_s + float(self.costs.copy_s[top - 1, layer])
            self.link_s = link.done_s(work_s)
            self._copy("prefetch", visit.index, self._flat(layer, expert), (begin_s, self.link_s))

    def _cache(self, visit: _Visit, at_s: float) -> None:
        """Marks what left the cache by the end of the visit, and counts what is in it."""
        events, bytes_of = visit.events, self.prepared.sizes.level_bytes
        assert events.level is not None
        came = np.zeros(self.level.shape, bool)
        came[visit.layer] |= events.outcome == FETCHED
        if events.prefetched is not None:
            ahead, experts = np.nonzero(events.prefetched)
            came[(visit.layer + 1 + ahead) % self.setup.layers, experts] = True
        was, gone = self.level > 0, events.level == 0
        # copies that were not admitted pass through: they never were in the cache to leave it
        left = was | came if int(((was | came) & gone).sum()) == int(events.evictions.sum()) else was
        for layer, expert in np.argwhere((was | came) & gone).tolist():
            unused = self.unused.pop(self._flat(layer, expert), None) is not None
            kind, does = ("eviction", "leaves") if left[layer, expert] else ("passes", "passes through")
            name = f"L{layer} E{expert} {does}{', prefetched in vain' if unused else ''}"
            self.marks.append(Mark(CACHE, kind, name, at_s, visit.index, layer, expert))
        self.level = events.level
        held = sum(int((self.level == q + 1).sum(axis=1) @ bytes_of[q]) for q in range(len(bytes_of)))
        self.counts.append(Count("cached experts (MB)", at_s, held / 1e6))

    def _copy(self, kind: str, visit: int, flat: int, piece: tuple[float, float], level: int = 0, **more: Any) -> None:
        """Draws a copy; at the highest precision unless a level is given."""
        layer, expert = divmod(flat, self.setup.experts)
        level = level or len(self.prepared.sizes.level_bytes)
        args = {"bytes": int(self.prepared.sizes.level_bytes[level - 1, layer]), "bits": self.prepared.bits[level - 1]}
        place = self._span(LINK, kind, f"L{layer} E{expert} copy ({kind})", piece, visit, layer, expert, args | more)
        if kind == "prefetch":
            self.unused[flat] = self.flying = place

    def _about(self, visit: _Visit, expert: int) -> dict[str, Any]:
        row = visit.events.row
        level = 0 if row is None else int(row[expert])
        outcome = OUTCOMES.get(int(visit.events.outcome[expert]), "")
        found = {"outcome": outcome, "gate mass": float(visit.mass[expert]), "tokens": int(visit.count[expert])}
        return found | ({"bits": self.prepared.bits[level - 1]} if level else {})

    def _span(
        self, track: str, kind: str, name: str, piece: tuple[float, float], visit: int, layer: int = -1,
        expert: int = -1, args: Mapping[str, Any] | None = None,
    ) -> int:  # fmt: skip
        """Adds a span, and gives its place."""
        self.spans.append(Span(track, kind, name, *piece, visit, layer, expert, args or {}))
        return len(self.spans) - 1

    def _flat(self, layer: int, expert: int) -> int:
        return layer * self.setup.experts + expert

    # -------------------------------------------------------------------------------------------------- the end

    def _end_pass(self) -> None:
        if self.pass_began is None:
            return
        (first, began_s), s = self.pass_began, self.prepared.schedule
        number, phase = int(s.pass_id[first]), "decode" if s.phase[first] == DECODE else "prefill"
        args = {"request": int(s.request[first]), "tokens": int(s.tokens[first]), "phase": phase}
        self._span(PASSES, phase, f"pass {number} ({phase})", (began_s, self.end_s), first, args=args)

    def finish(self, name: str, about: Mapping[str, Any]) -> Timeline:
        """Gives the timeline of what has been drawn."""
        self._end_pass()
        self.pass_began = None
        used = {span.track for span in self.spans} | {mark.track for mark in self.marks}
        return Timeline(
            name=name,
            evidence="simulated",
            tracks=tuple(track for track in TRACKS if track in used),
            spans=tuple(self.spans),
            marks=tuple(self.marks),
            arrows=tuple(self.arrows),
            counts=tuple(self.counts),
            about=about,
        )


def roofline(tokens: int, flop_s: npt.ArrayLike, read_s: npt.ArrayLike, launch_s: npt.ArrayLike) -> float:
    """Gives max(arithmetic, memory) + launch, or nothing for no tokens."""
    return float(np.maximum(tokens * np.asarray(flop_s), read_s) + launch_s) if tokens > 0 else 0.0


def _listed(instead: npt.NDArray[np.int32], stand_in: int) -> str:
    return ", ".join(f"E{expert}" for expert in np.flatnonzero(instead == stand_in).tolist())


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
