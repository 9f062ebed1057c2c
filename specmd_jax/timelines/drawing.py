"""Draws the visits of a replay, one after the other, from the events that the scan gives in full.

Collisions are marked at the gate that finds them, evictions at the end of the visit that makes room. Drafting is drawn
before the gate of the pass that it belongs to. A copy that began before the first visit is drawn from then on, and so
is its read; where that begins with drafting, from where it begins if nothing slows it down, and a read that is over by
the first gate is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.engines.prepared import Prepared
from specmd_jax.errors import SpecmdError
from specmd_jax.replay.state import Numbers, Setup
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
from specmd_jax.timelines.course import THE_HOST, Course, Load, course
from specmd_jax.timelines.host_memory import HostMemory
from specmd_jax.timelines.loads import Loads, Replayed
from specmd_jax.timelines.parts import CACHE, DEVICE, HOST, IN_HOST, PASSES, STALL, VISITS, Timeline
from specmd_jax.timelines.sheet import Sheet
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


@dataclass(frozen=True)
class Start:
    """How the first visit that is drawn finds the link and the cache."""

    link_s: float = 0.0  # seconds from its gate until the link is free
    flight: int = -1  # flat id of the copy in flight
    level: npt.NDArray[np.int8] | None = None  # [L, E]; None: as it begins
    fresh: npt.NDArray[np.bool_] | None = None  # [L, E] came by prefetch and is unused; None: nothing
    storage_s: float = 0.0  # seconds from its gate until storage is free
    in_host: npt.NDArray[np.int8] | None = None  # [L, E] in front of storage; None: as it begins
    reading: int = -1  # flat id of what is being read into host memory and goes no further
    read: npt.NDArray[np.bool_] | None = None  # [L, E] was so and is unused; None: nothing


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
        in_host: npt.NDArray[np.int8] | None = None,
    ) -> None:
        """Begins before a visit; `begins` [L, E] is what the cache holds before anything is demanded, and `in_host`
        what host memory does in front of storage (None: everything).
        """
        self.loads = Loads(prepared, numbers)
        self.prepared, self.setup, self.begins, self.host_begins = prepared, setup, begins, in_host
        self.now_s = 0.0  # the end of the last visit
        gate_s = self._drafting_s(first_visit)
        self.link_s, self.storage_s = gate_s + start.link_s, gate_s + start.storage_s
        self.level = begins if start.level is None else start.level
        self.sheet = Sheet(setup.experts, prepared.sizes.level_bytes, prepared.bits)
        for places, early in ((self.sheet.unused, start.fresh), (self.sheet.unasked, start.read)):
            places.update({} if early is None else dict.fromkeys(np.flatnonzero(early).tolist(), -1))
        self.host: HostMemory | None = None
        if in_host is not None:
            self.host = self._host_memory(in_host if start.in_host is None else start.in_host)
        self.pass_began: tuple[int, float] | None = None  # its first visit
        self._under_way(start, gate_s)

    def _under_way(self, start: Start, gate_s: float) -> None:
        """Draws the copy that is in flight at the first gate, and its read if that is not over; or a mere read."""
        sheet, loads, began = self.sheet, self.loads, {"began": "before this timeline"}
        reading = start.reading if start.reading >= 0 else start.flight
        reads, copies = reading >= 0 and start.storage_s > 0, start.flight >= 0 and start.link_s > 0
        if reads:
            begin_s = max(0.0, self.storage_s - loads.read_s(reading // self.setup.experts)) if gate_s else 0.0
            place = sheet.read("prefetch", -1, reading, (begin_s, self.storage_s), began)
            if start.reading >= 0:
                sheet.unasked[reading] = place
        if copies:
            copy_s = float(loads.costs.copy_s[-1, start.flight // self.setup.experts])
            begin_s = self.storage_s if reads else max(0.0, self.link_s - copy_s) if gate_s else 0.0
            sheet.copy("prefetch", -1, start.flight, (begin_s, self.link_s), more=began)

    def _host_memory(self, level: npt.NDArray[np.int8]) -> HostMemory:
        tier = self.setup.tier
        assert tier is not None
        return HostMemory(level, tier, len(self.prepared.sizes.level_bytes))

    # ------------------------------------------------------------------------------------------------- a visit

    def visit(self, index: int, events: Events) -> None:
        """Draws one visit; `events` are its own, in full."""
        s = self.prepared.schedule
        count, mass = (s.count[index], s.mass[index]) if events.count is None else (events.count, events.mass)
        assert mass is not None
        visit = Replayed(index, int(s.layer[index]), np.asarray(count), np.asarray(mass), events)
        gate_s = self.now_s + self._drafting_s(index)
        if s.starts_pass[index]:
            self._end_pass()
            self.pass_began = index, self.now_s
        if s.reset[index]:
            anew = "begins anew" if self.begins.any() else "is emptied"
            self.sheet.mark(CACHE, "reset", f"the cache {anew}", gate_s, index)
            self.sheet.unused, self.sheet.unasked, self.level = {}, {}, self.begins
            if self.host_begins is not None:
                self.host = self._host_memory(self.host_begins)
        if gate_s > self.now_s:
            self.sheet.span(DEVICE, "drafting", "drafting", (self.now_s, gate_s), index)
        load = self.loads.of(visit)
        found = course(load, gate_s, self.link_s, None if self.host is None else self.storage_s)
        if self.link_s > gate_s:  # the host may slow down what is under way
            self.sheet.prolong(found.found_s)
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
        if self.host is not None:
            args["stall, storage (us)"] = _us(found.waits_s)
        self.sheet.span(VISITS, "visit", f"L{visit.layer}", (self.now_s, next_s), index, visit.layer, -1, args)
        self.sheet.count("stall of the visit (us)", gate_s, _us(found.stall_s))
        self.now_s = next_s

    def _drafting_s(self, index: int) -> float:
        """Gives the time before the gate of a visit in which tokens are drafted."""
        drafting_s = self.prepared.schedule.drafting_s
        return 0.0 if drafting_s is None else float(drafting_s[index, 0])

    # ---------------------------------------------------------------------------------------------- its pieces

    def _demand(self, visit: Replayed, load: Load, found: Course) -> None:
        """Draws the reads, the demand copies, the computations, the waits and the collisions."""
        events, layer, v = visit.events, visit.layer, visit.index
        assert events.instead is not None and events.row is not None and events.taken is not None
        for expert, piece in found.reads.items():
            self.sheet.read("miss", v, self._flat(layer, expert), piece)
        for expert, piece in found.copies.items():
            away = {} if events.taken[expert] else {"admitted": False}
            flat = self._flat(layer, expert)
            self.sheet.ask(flat, self.sheet.copy("miss", v, flat, piece, int(events.row[expert]), away))
        for expert, piece in found.runs.items():
            outcome = int(events.outcome[expert])
            args = self._about(visit, expert)
            if not outcome:
                args = {"outcome": "stands in", "for": _listed(np.asarray(events.instead), expert)}
            place = self.sheet.span(DEVICE, "expert", f"L{layer} E{expert}", piece, v, layer, expert, args)
            if outcome in (PREFETCHED, LATE):
                self.sheet.use(self._flat(layer, expert), place)
        for expert, piece in found.hosted.items():
            args = self._about(visit, expert)
            place = self.sheet.span(HOST, "expert", f"L{layer} E{expert} on the host", piece, v, layer, expert, args)
            self.sheet.ask(self._flat(layer, expert), place)
        if found.handover[1] > found.handover[0]:
            self.sheet.span(HOST, "handover", f"L{layer} handed over", found.handover, v, layer)
        if load.dense_s:
            self.sheet.span(DEVICE, "dense", f"L{layer} dense", found.dense, v, layer)
        for expert, *(begin_s, end_s) in found.waits:
            kind = "late" if expert == load.late else "miss"
            kind, what = ("host", "the host") if expert == THE_HOST else (kind, f"L{layer} E{expert} ({kind})")
            self.sheet.span(STALL, kind, f"waits for {what}", (begin_s, end_s), v, layer, expert)
        for expert in np.flatnonzero(events.collision).tolist():
            name = f"L{layer} E{expert}: collision"
            self.sheet.mark(CACHE, "collision", name, found.gate_s, v, layer, expert)

    def _prefetches(self, visit: Replayed, found: Course) -> None:
        """Draws the prefetch copies that the visit starts, in their order, and settles when the links are free."""
        self.link_s, self.storage_s, started = found.link_s, found.storage_s, visit.events.prefetched
        tier = visit.events.tier
        if tier is not None and tier.early is not None:  # reads that go no further
            ahead, experts = _in_order(tier.ahead)
            layers = ((visit.layer + 1 + ahead) % self.setup.layers).tolist()
            pieces = found.read_only(self.loads.read_s(layer) for layer in layers)
            for layer, expert, piece in zip(layers, experts.tolist(), pieces, strict=True):
                flat = self._flat(layer, expert)
                self.sheet.unasked[flat] = self.sheet.read("prefetch", visit.index, flat, piece)
                self.storage_s = piece[1]
            return
        if started is None:
            return
        ahead, experts = _in_order(started)
        layers = (visit.layer + 1 + ahead) % self.setup.layers
        copies_s = self.loads.costs.copy_s[-1, layers].tolist()
        if tier is None:
            pieces = [(None, piece) for piece in found.ahead(copies_s)]
        else:
            read = (np.asarray(tier.ahead)[ahead, experts] > 0).tolist()
            reads_s = [
                self.loads.read_s(at) if first else None for at, first in zip(layers.tolist(), read, strict=True)
            ]
            pieces = found.read_ahead(zip(reads_s, copies_s, strict=True))
        for layer, expert, (read, piece) in zip(layers.tolist(), experts.tolist(), pieces, strict=True):
            if read is not None:
                self.sheet.read("prefetch", visit.index, self._flat(layer, expert), read)
                self.storage_s = read[1]
            self.sheet.copy("prefetch", visit.index, self._flat(layer, expert), piece)
            self.link_s = piece[1]

    def _cache(self, visit: Replayed, at_s: float) -> None:
        """Marks what left the caches by the end of the visit, and counts what is in them."""
        events, bytes_of = visit.events, self.prepared.sizes.level_bytes
        assert events.level is not None and events.taken is not None and events.row is not None
        held, targets = np.array(self.level), (visit.layer + 1 + np.arange(self.setup.horizon)) % self.setup.layers
        held[visit.layer] = np.where(events.taken, events.row, held[visit.layer])
        if events.prefetched is not None:
            held[targets] = np.where(np.asarray(events.prefetched) > 0, len(bytes_of), held[targets])
        if self.host is not None:
            for layer, expert in np.argwhere(self.host.visit(visit.layer, targets, events, held)).tolist():
                unused = self.sheet.unasked.pop(self._flat(layer, expert), None) is not None
                name = f"L{layer} E{expert} leaves host memory{', read in vain' if unused else ''}"
                self.sheet.mark(IN_HOST, "eviction", name, at_s, visit.index, layer, expert)
            there = int(self.host.level.sum(axis=1) @ bytes_of[-1])
            self.sheet.count("experts in host memory (MB)", at_s, there / 1e6)
        for layer, expert in np.argwhere((held > 0) & (events.level == 0)).tolist():
            unused = self.sheet.unused.pop(self._flat(layer, expert), None) is not None
            name = f"L{layer} E{expert} leaves{', prefetched in vain' if unused else ''}"
            self.sheet.mark(CACHE, "eviction", name, at_s, visit.index, layer, expert)
        self.level = events.level
        cached = sum(int((self.level == q + 1).sum(axis=1) @ bytes_of[q]) for q in range(len(bytes_of)))
        self.sheet.count("cached experts (MB)", at_s, cached / 1e6)

    def _about(self, visit: Replayed, expert: int) -> dict[str, Any]:
        row = visit.events.row
        level = 0 if row is None else int(row[expert])
        outcome = OUTCOMES.get(int(visit.events.outcome[expert]), "")
        found = {"outcome": outcome, "gate mass": float(visit.mass[expert]), "tokens": int(visit.count[expert])}
        return found | ({"bits": self.prepared.bits[level - 1]} if level else {})

    def _flat(self, layer: int, expert: int) -> int:
        return layer * self.setup.experts + expert

    # -------------------------------------------------------------------------------------------------- the end

    def _end_pass(self) -> None:
        if self.pass_began is None:
            return
        (first, began_s), s = self.pass_began, self.prepared.schedule
        number, phase = int(s.pass_id[first]), "decode" if s.phase[first] == DECODE else "prefill"
        args = {"request": int(s.request[first]), "tokens": int(s.tokens[first]), "phase": phase}
        self.sheet.span(PASSES, phase, f"pass {number} ({phase})", (began_s, self.now_s), first, args=args)

    def finish(self, name: str, about: Mapping[str, Any]) -> Timeline:
        """Gives the timeline of what has been drawn."""
        self._end_pass()
        self.pass_began = None
        return self.sheet.timeline(name, about)


def _in_order(started: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Gives layers ahead and experts by the numbers in [H, E]; 0: not among them."""
    ahead, experts = np.nonzero(started)
    order = np.argsort(np.asarray(started)[ahead, experts])
    return ahead[order], experts[order]


def _listed(instead: npt.NDArray[np.int32], stand_in: int) -> str:
    return ", ".join(f"E{expert}" for expert in np.flatnonzero(instead == stand_in).tolist())


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
