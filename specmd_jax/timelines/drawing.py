"""Draws the visits of a replay, one after the other, from the events that the scan gives in full.

Collisions are marked at the gate that finds them, evictions at the end of the visit that makes room. Drafting is drawn
before the gate of the pass that it belongs to. A copy that began before the first visit is drawn from then on; where
that begins with drafting, from where it begins if nothing slows it down.
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
from specmd_jax.errors import SpecmdError
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
from specmd_jax.timelines.course import THE_HOST, Course, Host, Load, course
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
from specmd_jax.units import MIB

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

    link_s: float = 0.0  # seconds from its gate until the link is free
    flight: int = -1  # flat id of the copy in flight
    level: npt.NDArray[np.int8] | None = None  # [L, E]; None: as it begins
    fresh: npt.NDArray[np.bool_] | None = None  # [L, E] came by prefetch and is unused; None: nothing


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

    def __init__(
        self,
        prepared: Prepared,
        setup: Setup,
        numbers: Numbers,
        begins: npt.NDArray[np.int8],
        start: Start,
        first_visit: int = 0,
    ) -> None:
        """Begins before a visit; `begins` [L, E] is what the cache holds before anything is demanded."""
        assert numbers.costs is not None
        # the seconds that the scan adds up in float32, added up in float64 here
        self.costs = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), numbers.costs)
        self.prepared, self.setup, self.numbers, self.begins = prepared, setup, numbers, begins
        self.dense_s: dict[tuple[int, int, bool, int], tuple[float, float]] = {}
        self.now_s = 0.0  # the end of the last visit
        gate_s = self._drafting_s(first_visit)
        self.link_s = gate_s + start.link_s
        self.level = begins if start.level is None else start.level
        self.spans: list[Span] = []
        self.marks: list[Mark] = []
        self.arrows: list[Arrow] = []
        self.counts: list[Count] = []
        # flat id of what came by prefetch -> its copy among the spans (-1: it is not shown)
        self.unused: dict[int, int] = {}
        if start.fresh is not None:
            self.unused = dict.fromkeys(np.flatnonzero(start.fresh).tolist(), -1)
        self.pass_began: tuple[int, float] | None = None  # its first visit
        self.copying: int | None = None  # the last copy, among the spans
        if start.flight >= 0 and start.link_s > 0:
            began_s = 0.0
            if gate_s:
                began_s = max(0.0, self.link_s - float(self.costs.copy_s[-1, start.flight // setup.experts]))
            piece = began_s, self.link_s
            self._copy("prefetch", -1, start.flight, piece, began="before this timeline")

    # ------------------------------------------------------------------------------------------------- a visit

    def visit(self, index: int, events: Events) -> None:
        """Draws one visit; `events` are its own, in full."""
        s = self.prepared.schedule
        count, mass = (s.count[index], s.mass[index]) if events.count is None else (events.count, events.mass)
        assert mass is not None
        visit = _Visit(index, int(s.layer[index]), np.asarray(count), np.asarray(mass), events)
        gate_s = self.now_s + self._drafting_s(index)
        if s.starts_pass[index]:
            self._end_pass()
            self.pass_began = index, self.now_s
        if s.reset[index]:
            anew = "begins anew" if self.begins.any() else "is emptied"
            self.marks.append(Mark(CACHE, "reset", f"the cache {anew}", gate_s, index))
            self.level, self.unused = self.begins, {}
        if gate_s > self.now_s:
            self._span(DEVICE, "drafting", "drafting", (self.now_s, gate_s), index)
        load = self._load(visit)
        found = course(load, gate_s, self.link_s)
        if self.copying is not None and self.link_s > gate_s:  # the host may slow down what is under way
            self.spans[self.copying] = replace(self.spans[self.copying], end_s=found.found_s)
        self._demand(visit, load, found)
        next_s = found.dense[1]
        drawn_s, replayed_s = next_s - self.now_s, float(events.seconds[VISIT_S])
        if not math.isclose(drawn_s, replayed_s, rel_tol=1e-4, abs_tol=1e-9):
            raise SpecmdError(
                f"visit {index} (layer {visit.layer}) cannot be drawn: it takes {drawn_s:.6g} s piece by piece, and "
                f"{replayed_s:.6g} s in the replay"
            )
        self._prefetches(visit, found)
        self._cache(visit, next_s)
        outcome = np.asarray(events.outcome)
        args = {
            "pass": int(s.pass_id[index]), "request": int(s.request[index]), "tokens": int(s.tokens[index]),
            "demanded experts": int((outcome > 0).sum()), "misses": int((outcome >= FETCHED).sum()),
            "stall, late hits (us)": _us(found.late_s), "stall, misses (us)": _us(found.miss_s),
            "stall, link busy (us)": _us(found.busy_s), "counted": bool(s.counted[index]),
        }  # fmt: skip
        self._span(VISITS, "visit", f"L{visit.layer}", (self.now_s, next_s), index, visit.layer, -1, args)
        self.counts.append(Count("stall of the visit (us)", gate_s, _us(found.stall_s)))
        self.now_s = next_s

    def _drafting_s(self, index: int) -> float:
        """Gives the time before the gate of a visit in which tokens are drafted."""
        drafting_s = self.prepared.schedule.drafting_s
        return 0.0 if drafting_s is None else float(drafting_s[index, 0])

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
        if events.stream:
            missing.sort()
        hosted = {e: host_s(e) for e in demanded if outcome[e] == ON_HOST}
        dense_s = 0.0
        if s.ends_layer[visit.index]:
            of_pass = int(s.tokens[visit.index])
            per_token_s, read_s = self._dense(
                layer, of_pass, bool(s.phase[visit.index] == DECODE), int(s.served[visit.index])
            )
            dense_s = roofline(of_pass, per_token_s, read_s, costs.launch_s + costs.layer_s)
        return Load(
            copies={e: float(costs.copy_s[row[e] - 1, layer]) for e in missing},
            runs={e: run_s(e) for e in [*demanded, *others] if tokens[e] > 0},
            hosted=hosted,
            dense_s=dense_s,
            late=next((e for e in demanded if outcome[e] == LATE), -1),
            host=self._host(layer, sum(hosted.values()), len(hosted)),
            adds=float(costs.adds),
        )

    def _host(self, layer: int, work_s: float, experts: int) -> Host:
        """Gives how so much work on so many experts and the link disturb each other."""
        costs = self.costs
        own, link = (
            experts * float(costs.host_least_s[layer]) / work_s if work_s else 0.0,
            float(costs.link_load[layer]),
        )
        spare = max(1.0 - own, 0.0)
        left = spare / link if spare < link else 1.0
        return Host(float(costs.handover_s), max(own + link - 1.0, 0.0), left)

    def _dense(self, layer: int, tokens: int, decode: bool, turns: int) -> tuple[float, float]:
        """Gives the seconds of the dense part per token, and of its reading."""
        at = layer, tokens, decode, turns
        if at not in self.dense_s:
            found = dense(self.numbers.costs, layer, jnp.int32(tokens), jnp.asarray(decode), jnp.int32(turns))
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

    # ---------------------------------------------------------------------------------------------- its pieces

    def _demand(self, visit: _Visit, load: Load, found: Course) -> None:
        """Draws the demand copies, the computations, the waits and the collisions."""
        events, layer, v = visit.events, visit.layer, visit.index
        assert events.instead is not None and events.row is not None and events.taken is not None
        for expert, piece in found.copies.items():
            away = {} if events.taken[expert] else {"admitted": False}
            self._copy("miss", v, self._flat(layer, expert), piece, level=int(events.row[expert]), **away)
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
        if found.handover[1] > found.handover[0]:
            self._span(HOST, "handover", f"L{layer} handed over", found.handover, v, layer)
        if load.dense_s:
            self._span(DEVICE, "dense", f"L{layer} dense", found.dense, v, layer)
        for expert, *(begin_s, end_s) in found.waits:
            kind = "late" if expert == load.late else "miss"
            kind, what = ("host", "the host") if expert == THE_HOST else (kind, f"L{layer} E{expert} ({kind})")
            self._span(STALL, kind, f"waits for {what}", (begin_s, end_s), v, layer, expert)
        for expert in np.flatnonzero(events.collision).tolist():
            name = f"L{layer} E{expert}: collision"
            self.marks.append(Mark(CACHE, "collision", name, found.gate_s, v, layer, expert))

    def _prefetches(self, visit: _Visit, found: Course) -> None:
        """Draws the prefetch copies that the visit starts, in their order, and settles when the link is free."""
        self.link_s, started = found.link_s, visit.events.prefetched
        if started is None:
            return
        ahead, experts = np.nonzero(started)
        order = np.argsort(started[ahead, experts])
        layers, experts = (visit.layer + 1 + ahead[order]) % self.setup.layers, experts[order]
        pieces = found.ahead(self.costs.copy_s[-1, layers].tolist())
        for layer, expert, piece in zip(layers.tolist(), experts.tolist(), pieces, strict=True):
            self._copy("prefetch", visit.index, self._flat(layer, expert), piece)
            self.link_s = piece[1]

    def _cache(self, visit: _Visit, at_s: float) -> None:
        """Marks what left the cache by the end of the visit, and counts what is in it."""
        events, bytes_of = visit.events, self.prepared.sizes.level_bytes
        assert events.level is not None and events.taken is not None
        came = self.level > 0
        came[visit.layer] |= events.taken
        if events.prefetched is not None:
            ahead, experts = np.nonzero(events.prefetched)
            came[(visit.layer + 1 + ahead) % self.setup.layers, experts] = True
        for layer, expert in np.argwhere(came & (events.level == 0)).tolist():
            unused = self.unused.pop(self._flat(layer, expert), None) is not None
            name = f"L{layer} E{expert} leaves{', prefetched in vain' if unused else ''}"
            self.marks.append(Mark(CACHE, "eviction", name, at_s, visit.index, layer, expert))
        self.level = events.level
        held = sum(int((self.level == q + 1).sum(axis=1) @ bytes_of[q]) for q in range(len(bytes_of)))
        self.counts.append(Count("cached experts (MiB)", at_s, held / MIB))

    def _copy(self, kind: str, visit: int, flat: int, piece: tuple[float, float], level: int = 0, **more: Any) -> None:
        """Draws a copy; at the highest precision unless a level is given."""
        layer, expert = divmod(flat, self.setup.experts)
        level = level or len(self.prepared.sizes.level_bytes)
        args = {"bytes": int(self.prepared.sizes.level_bytes[level - 1, layer]), "bits": self.prepared.bits[level - 1]}
        place = self._span(LINK, kind, f"L{layer} E{expert} copy ({kind})", piece, visit, layer, expert, args | more)
        self.copying = place
        if kind == "prefetch":
            self.unused[flat] = place

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
        self._span(PASSES, phase, f"pass {number} ({phase})", (began_s, self.now_s), first, args=args)

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
