"""Timelines of a run: what was measured, and what rates fitted to other runs of the engine make of the same routing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.engines.prepared import Prepared
from specmd_jax.moe.measure.predict import PassRates, Piece, Rates, clock, predict_passes
from specmd_jax.moe.runtime.policy import Policy
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import FETCHED, LATE, PREFETCHED
from specmd_jax.timelines.parts import DEVICE, HOST, LINK, PASSES, VISITS, Arrow, Span, Timeline
from specmd_jax.timelines.record import PASSES_SHOWN, window
from specmd_jax.types import DECODE, Schedule

HOST_STEPS = ("waits for the gate", "chooses, starts copies", "starts the experts", "begins what can wait")
"""What `Run.host_s` has of a decode visit; the first ends at the visit's gate."""
_PLACES = {
    "miss": (LINK, "copy (miss)"), "prefetch": (LINK, "copy (prefetch)"), "expert": (DEVICE, ""),
    "rest": (DEVICE, "rest of the layer"), "host": (HOST, "on the host"),
}  # fmt: skip


def run_timelines(
    policy: Policy, run: Run, rates: Rates | PassRates | None, *, passes: int = PASSES_SHOWN, first_request: int = 0
) -> tuple[Timeline, ...]:
    """Gives the measured timeline of a run, and below it the simulated one by fitted rates (None: there are none).

    The fused engine looks at no clock within a pass: its timelines have passes and no more. Both leave out the time
    from a prompt to its first gate.

    Args:
      passes: how many are shown at most.
      first_request: they begin with its prompt.
    """
    replays, events = policy.replay(run.trace)
    s = replays.schedule
    prompt = int(s.pass_id[np.flatnonzero(s.request >= min(first_request, int(s.request.max())))[0]])
    begin, end = window(s, passes, prompt)
    about = {
        "model": run.trace.model, "eviction": policy.mix.eviction.name, "prefetch": policy.mix.prefetch.name,
        "miss": policy.mix.miss.name, "batch": policy.batch, "first pass": prompt, "last pass": int(s.pass_id[end - 1]),
        "passes of the replay": int(s.pass_id[-1]) + 1,
    }  # fmt: skip
    by_visit = run.host_s is not None  # else a pass is one program, and its time is shared out evenly
    spans = [*_passes(s, run.visit_s, begin, end), *(_visits(s, run.visit_s, events, begin, end) if by_visit else ())]
    spans += _host_steps(run, s, begin, end) if by_visit else ()
    found = [_timeline("the run", "measured", spans, (), about)]
    if isinstance(rates, PassRates):
        visit_s = predict_passes(policy, run.trace, rates).visit_s
        found.append(_timeline("the same by fitted rates", "simulated", [*_passes(s, visit_s, begin, end)], (), about))
    elif rates is not None:
        spans, arrows = _simulated(replays, events, rates, begin, end)
        found.append(_timeline("the same by fitted rates", "simulated", spans, arrows, about))
    return tuple(found)


def _timeline(name: str, evidence: str, spans: list[Span], arrows: Any, about: dict[str, Any]) -> Timeline:
    used = {span.track for span in spans}
    tracks = tuple(track for track in (PASSES, VISITS, DEVICE, HOST, LINK) if track in used)
    return Timeline(name, evidence, tracks, tuple(spans), arrows=tuple(arrows), about=about)


def _gates(visit_s: npt.NDArray[np.float64], begin: int, end: int) -> npt.NDArray[np.float64]:
    """Gives when each visit begins, and in the end when the last one ends: [end - begin + 1]."""
    return np.concatenate([[0.0], np.cumsum(visit_s[begin:end])])


def _passes(s: Schedule, visit_s: npt.NDArray[np.float64], begin: int, end: int) -> Iterator[Span]:
    gates = _gates(visit_s, begin, end)
    starts = [v for v in range(begin, end) if s.starts_pass[v]]
    for first, after in zip(starts, [*starts[1:], end], strict=True):
        phase = "decode" if s.phase[first] == DECODE else "prefill"
        args = {"request": int(s.request[first]), "tokens": int(s.tokens[first])}
        piece = float(gates[first - begin]), float(gates[after - begin])
        yield Span(PASSES, phase, f"pass {int(s.pass_id[first])} ({phase})", *piece, first, args=args)


def _visits(s: Schedule, visit_s: npt.NDArray[np.float64], events: Any, begin: int, end: int) -> Iterator[Span]:
    gates = _gates(visit_s, begin, end)
    for v in range(begin, end):
        outcome, started = np.asarray(events.outcome[v]), events.prefetched
        args = {
            "pass": int(s.pass_id[v]), "demanded experts": int((outcome > 0).sum()),
            "copies of misses": int((outcome == FETCHED).sum()),
            "copies ahead": 0 if started is None else int((np.asarray(started[v]) > 0).sum()),
        }  # fmt: skip
        piece = float(gates[v - begin]), float(gates[v - begin + 1])
        yield Span(VISITS, "visit", f"L{int(s.layer[v])}", *piece, v, int(s.layer[v]), args=args)


def _host_steps(run: Run, s: Schedule, begin: int, end: int) -> Iterator[Span]:
    """Draws what the host does around the gates of decode visits."""
    assert run.host_s is not None
    gates, decode = _gates(run.visit_s, begin, end), np.flatnonzero(s.phase == DECODE)
    for v, steps_s in zip(decode.tolist(), run.host_s.tolist(), strict=True):
        if begin <= v < end:
            at_s = float(gates[v - begin]) - steps_s[0]
            for name, step_s in zip(HOST_STEPS, steps_s, strict=True):
                if at_s >= 0:  # it waited for the first gate before the timeline begins
                    yield Span(HOST, "step", name, at_s, at_s + step_s, v, int(s.layer[v]))
                at_s += step_s


def _simulated(replays: Prepared, events: Any, rates: Rates, begin: int, end: int) -> tuple[list[Span], list[Arrow]]:
    """Draws what `clock` lets happen."""
    s, outcome, pieces = replays.schedule, np.asarray(events.outcome), []
    visit_s = clock(replays, outcome, events.prefetched, rates, np.asarray(events.row), pieces)
    gates = _gates(visit_s, begin, end)
    spans = [*_passes(s, visit_s, begin, end), *_visits(s, visit_s, events, begin, end)]
    arrows, unused = [], dict[tuple[int, int], int]()
    for piece in _within(pieces, begin, end):
        track, what = _PLACES[piece.kind]
        gate_s = float(gates[piece.visit - begin])
        # a rule may cost less than the rates say: what a visit's experts take then ends with the visit
        end_s = piece.end_s if track == LINK else min(piece.end_s, float(visit_s[piece.visit]))
        name = " ".join(part for part in (_place(piece), what) if part)
        times = gate_s + min(piece.start_s, end_s), gate_s + end_s
        spans.append(Span(track, piece.kind, name, *times, piece.visit, piece.layer, piece.expert))
        at = piece.layer, piece.expert
        if piece.kind == "prefetch":
            unused[at] = len(spans) - 1
        elif piece.kind == "expert" and outcome[piece.visit, piece.expert] in (PREFETCHED, LATE) and at in unused:
            arrows.append(Arrow(unused.pop(at), len(spans) - 1))
    return spans, arrows


def _within(pieces: list[Piece], begin: int, end: int) -> Iterator[Piece]:
    return (piece for piece in pieces if begin <= piece.visit < end)


def _place(piece: Piece) -> str:
    return f"L{piece.layer}" if piece.expert < 0 else f"L{piece.layer} E{piece.expert}"
