"""What the simulator expects a layerwise run to take, with rates fitted to other runs of the same engine.

`fit` reads the rates off runs of their own: one with everything resident (what a visit costs without copies), one that
misses (what a copy adds) and, for a prefetcher, one that prefetches (what asking for a copy costs the host). `predict`
replays another run's trace by the simulator, untimed, which gives the engine's events: the timed simulator limits
prefetching by time, the engine by number. `clock` then puts times to them by CONTRACT.md section 5, with any number of
copies in flight and costs that the contract does not have: the start of a visit's first copy, the host's time for each
prefetch, and what a miss rule other than `fetch` adds to a visit (`fit_rule`). Without those and without prefetch it
gives the timed simulator's seconds. A copy takes its share of bytes of one at the highest precision.

The fused engine's pass is one program that nobody stops to look at the clock, so its rates are those of passes:
`fit_passes` and `predict_passes`. A pass takes a time of its own and so much per copy, and a visit that copies hides
the work on experts that are there behind the link: section 5 of the contract, where a visit ends as soon as its last
missing expert has arrived and is computed, summed over a pass, for experts that are computed faster than they arrive.
In a batch, decode passes demand more experts or fewer, and each takes a time of its own (`PassRates.expert_s`).
`fit_alike` fits a run of either engine from others at the same capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.engines.prepared import Prepared
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.runtime.policy import Policy
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import DROPPED, FETCHED, HOST
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.passes import passes_of
from specmd_jax.types import DECODE, PREFILL, Schedule, Trace


class Rates(NamedTuple):
    """Seconds of one engine on one machine."""

    copy_s: float  # one expert over the link, others in flight
    expert_s: float  # one expert of a decoded token
    expert_token_s: float  # one expert on one token of a prefill, if that is more
    layer_s: float  # the rest of a layer, read-back and starting the next program included
    head_s: float  # what the last layer adds
    entry_s: float  # from a prompt to its first gate
    start_s: float = 0.0  # before the first copy of a visit that misses
    issue_s: float = 0.0  # the host's time for one prefetch, which delays the visit's experts
    # what a visit takes more where routing or a miss rule decides before anything starts (or less: below 0)
    rule_s: float = 0.0
    host_s: float = 0.0  # one expert of a decoded token on the host's processor
    host_token_s: float = 0.0  # one expert on one token of a prefill there, if that is more


class Piece(NamedTuple):
    """Something that `clock` lets happen, in seconds from the gate of its visit."""

    kind: str  # "miss" or "prefetch" copy, "expert" on the device, on the "host", or the "rest" of the layer
    visit: int
    layer: int
    expert: int  # -1: of none
    start_s: float
    end_s: float


class Predicted(NamedTuple):
    visit_s: npt.NDArray[np.float64]  # [V]
    ttft_s: float  # mean over the counted requests
    tpot_s: float  # mean over their decode passes


def fit(resident: Run, missing: Run, warmup: int = 1) -> Rates:
    """Fits rates to a run whose demand is all resident, and one that misses; both of the same model, without prefetch.

    Args:
        warmup: leading requests of the runs to leave out (they fill the cache and compile).
    Raises:
        SpecmdError: runs too short to tell the rates apart.
    """
    idle_s, head_s, entry_s = _without_copies(resident, warmup)
    schedule, top_k, last = build_schedule(missing.trace), resident.trace.top_k, resident.trace.layers - 1
    misses = _misses(missing)
    rows = (schedule.phase == DECODE) & (misses > 0) & (schedule.request >= min(warmup, missing.trace.requests - 1))
    if not rows.any():
        raise SpecmdError("calibration: no decoded token misses an expert, expected a run at a smaller capacity")
    took_s = missing.visit_s - np.where(schedule.layer == last, head_s, 0.0)
    counts = np.unique(misses[rows])
    typical = np.array([_typical(took_s[rows & (misses == n)]) for n in counts])
    weight = np.sqrt([np.sum(rows & (misses == n)) for n in counts])
    design = np.stack([np.ones_like(typical), counts], axis=1) * weight[:, None]
    start_s, copy_s = (float(value) for value in np.linalg.lstsq(design, typical * weight, rcond=None)[0])
    if counts.size == 1:  # all visits miss alike: the whole difference is the copies'
        start_s, copy_s = idle_s, float(((typical - idle_s) / counts)[0])
    # the copies of a visit hide all of its experts but the last
    expert_s = min(max(idle_s - start_s, 0.0) / max(top_k - 1, 1), idle_s / top_k)
    rates = Rates(
        copy_s=max(copy_s, 1e-9),
        expert_s=expert_s,
        expert_token_s=0.0,
        layer_s=idle_s - top_k * expert_s,
        head_s=head_s,
        entry_s=entry_s,
        start_s=max(start_s - idle_s, 0.0),
    )
    return rates._replace(expert_token_s=_expert_token_s(resident, rates, warmup))


def fit_prefetch(rates: Rates, resident: Run, policy: Policy, run: Run, warmup: int = 1) -> Rates:
    """Fits rates of the same engine with a prefetcher, which decides before a visit's experts start.

    Args:
        rates: without prefetch. ``resident``: a run with this prefetcher and all resident.
        policy, run: a policy with this prefetcher, and a run that copies.
    """
    idle_s, head_s, entry_s = _without_copies(resident, warmup)
    layer_s = max(idle_s - resident.trace.top_k * rates.expert_s, 0.0)
    rates = rates._replace(layer_s=layer_s, head_s=head_s, entry_s=entry_s)
    rates = rates._replace(expert_token_s=_expert_token_s(resident, rates, warmup))
    return rates._replace(issue_s=_issue_s(policy, run, rates, warmup))


def fit_rule(rates: Rates, policy: Policy, run: Run, warmup: int = 1) -> Rates:
    """Adds to rates of `fetch` and standard routing what another miss rule or routing costs, from a run under it: a
    straight line through what decode visits take beside the rest over how many experts run on the host; where all run
    as many, all of it is theirs. What prefills take beside the rest is shared out among the host's (token, expert)
    pairs.
    """
    replays, events = policy.replay(run.trace)
    s, outcome = replays.schedule, np.asarray(events.outcome)
    rows = (s.phase == DECODE) & (s.request >= min(warmup, run.trace.requests - 1))
    beside_s = run.visit_s - clock(replays, outcome, events.prefetched, rates, np.asarray(events.row))
    hosted = (outcome == HOST).sum(axis=-1)
    prefill = (s.phase == PREFILL) & (s.request >= min(warmup, run.trace.requests - 1))
    pairs = int(s.count[prefill][outcome[prefill] == HOST].sum())
    token_s = max(float(beside_s[prefill].sum()) / pairs, 0.0) if pairs else 0.0
    rates = rates._replace(host_token_s=token_s)
    counts = np.unique(hosted[rows])
    means_s = np.array([_typical(beside_s[rows & (hosted == n)]) for n in counts])
    if counts.size == 1:
        n = int(counts[0])
        return rates._replace(rule_s=0.0 if n else float(means_s[0]), host_s=float(means_s[0]) / n if n else 0.0)
    weight = np.sqrt([np.sum(rows & (hosted == n)) for n in counts])
    design = np.stack([np.ones_like(means_s), counts], axis=1) * weight[:, None]
    rule_s, host_s = (float(value) for value in np.linalg.lstsq(design, means_s * weight, rcond=None)[0])
    return rates._replace(rule_s=rule_s, host_s=max(host_s, 0.0))


def _without_copies(resident: Run, warmup: int) -> tuple[float, float, float]:
    """Gives (a decode visit, what the last layer's takes more, from a prompt to its first gate) in seconds."""
    schedule, last = build_schedule(resident.trace), resident.trace.layers - 1
    warm = (schedule.request >= warmup) & (schedule.phase == DECODE) & (_misses(resident) == 0)
    if not (warm & (schedule.layer == last)).any() or last == 0 or not (warm & (schedule.layer != last)).any():
        raise SpecmdError(f"calibration: no warm visit in {resident.trace.requests} requests, expected over {warmup}")
    idle_s = _typical(resident.visit_s[warm & (schedule.layer != last)])
    head_s = max(_typical(resident.visit_s[warm & (schedule.layer == last)]) - idle_s, 0.0)
    prefill_s = _by_request(resident.visit_s, schedule, PREFILL)
    return idle_s, head_s, _typical(resident.ttft_s[warmup:] - prefill_s[warmup:])


def _expert_token_s(resident: Run, rates: Rates, warmup: int) -> float:
    """Gives what a prefill's warm visits take beside `rates`, shared out among (token, expert) pairs."""
    schedule, last = build_schedule(resident.trace), resident.trace.layers - 1
    rows = (schedule.request >= warmup) & (schedule.phase == PREFILL) & (_misses(resident) == 0)
    alone_s = resident.visit_s[rows] - np.where(schedule.layer[rows] == last, rates.head_s, 0.0) - rates.layer_s
    pairs = int(schedule.tokens[rows].sum()) * resident.trace.top_k
    return max(float(alone_s.sum() / pairs), 0.0) if pairs else 0.0


def _issue_s(policy: Policy, run: Run, rates: Rates, warmup: int) -> float:
    """Finds, by bisection, the cost of asking for a prefetch that explains a run's time per token."""
    replays, events = policy.replay(run.trace)
    schedule, (_, tpot_s) = replays.schedule, measured(run, warmup)
    low, high = 0.0, 1e-3
    for _ in range(12):
        middle = (low + high) / 2
        visit_s = clock(replays, np.asarray(events.outcome), events.prefetched, rates._replace(issue_s=middle))
        low, high = (middle, high) if _tpot_s(visit_s, schedule, warmup) < tpot_s else (low, middle)
    return low


def predict(policy: Policy, trace: Trace, rates: Rates, warmup: int = 0) -> Predicted:
    """Gives the times of a run from its trace; ``warmup`` leading requests are replayed but not counted."""
    replays, events = policy.replay(trace)
    visit_s = clock(replays, np.asarray(events.outcome), events.prefetched, rates, np.asarray(events.row))
    ttft_s = _by_request(visit_s, replays.schedule, PREFILL)[warmup:].mean() + rates.entry_s
    return Predicted(visit_s, float(ttft_s), _tpot_s(visit_s, replays.schedule, warmup))


def clock(
    replays: Prepared,
    outcome: npt.NDArray[np.int8],
    prefetched: Any,
    rates: Rates,
    row: npt.NDArray[np.int8] | None = None,
    pieces: list[Piece] | None = None,
) -> npt.NDArray[np.float64]:
    """[V] seconds of each visit of untimed events: outcome [V, E], prefetched [V, H, E] or None, and at which precision
    the visit's experts run, row [V, E] (None: all at the highest). What happens when is added to ``pieces``."""
    s, level_bytes = replays.schedule, replays.sizes.level_bytes
    weight = np.concatenate([[0.0], level_bytes[:, 0] / level_bytes[-1, 0]])  # of a copy at each level
    free_s, arrival_s = 0.0, np.zeros((s.layers, s.experts))  # from the current gate
    took_s = np.zeros(s.visits)

    def note(kind: str, visit: int, layer: int, expert: int, start_s: Any, end_s: Any) -> None:
        if pieces is not None:
            pieces.append(Piece(kind, visit, layer, expert, float(start_s), float(end_s)))

    for v in range(s.visits):
        layer, demanded = int(s.layer[v]), s.by_mass[v][s.by_mass[v] >= 0]
        missing = demanded[outcome[v, demanded] == FETCHED]
        free_s = max(free_s, rates.start_s if missing.size else 0.0)
        for expert in missing:
            begin_s, free_s = free_s, free_s + rates.copy_s * (1.0 if row is None else weight[row[v, expert]])
            arrival_s[layer, expert] = free_s
            note("miss", v, layer, int(expert), begin_s, free_s)
        order = np.zeros(0, np.int32) if prefetched is None else prefetched[v].reshape(-1)
        wanted = np.flatnonzero(order)
        done_s, host_s = rates.issue_s * wanted.size, 0.0
        for expert in demanded[np.argsort(arrival_s[layer, demanded], kind="stable")]:
            if outcome[v, expert] == HOST:
                alone_s = max(s.count[v, expert] * rates.host_token_s if s.tokens[v] > 1 else 0.0, rates.host_s)
                note("host", v, layer, int(expert), host_s, host_s + alone_s)
                host_s += alone_s
            elif outcome[v, expert] != DROPPED:  # a stand-in takes as long as the one that it stands in for
                alone_s = max(s.count[v, expert] * rates.expert_token_s if s.tokens[v] > 1 else 0.0, rates.expert_s)
                begin_s = max(done_s, arrival_s[layer, expert])
                done_s = begin_s + alone_s
                note("expert", v, layer, int(expert), begin_s, done_s)
        for copy in wanted[np.argsort(order[wanted])]:
            begin_s, free_s = free_s, free_s + rates.copy_s
            target, expert = (layer + 1 + int(copy) // s.experts) % s.layers, int(copy) % s.experts
            arrival_s[target, expert] = free_s
            note("prefetch", v, target, expert, begin_s, free_s)
        took_s[v] = max(done_s, host_s) + rates.layer_s + rates.rule_s
        took_s[v] = max(took_s[v] + (rates.head_s if layer == s.layers - 1 else 0.0), 0.0)
        note("rest", v, layer, -1, min(max(done_s, host_s), took_s[v]), took_s[v])
        free_s, arrival_s = free_s - took_s[v], np.maximum(arrival_s - took_s[v], 0.0)
    return took_s


# ---- the fused engine ------------------------------------------------------------------------------------------------


class PassRates(NamedTuple):
    """Seconds of a pass of the fused engine."""

    prefill_s: float  # without copies, of prompts as long as those fitted
    decode_s: float
    copy_s: float  # what each expert copied at the highest precision adds to a decode pass, on demand or ahead
    prefill_copy_s: float  # ... and to a prefill
    hidden_s: float = 0.0  # what a decode visit that copies hides of the work on experts that are there
    expert_s: float = 0.0  # what each demanded expert adds to a decode pass, where passes demand differently many: in
    # batches. Else it is in `decode_s`


def fit_passes(resident: Run, missing: Run, warmup: int = 1) -> PassRates:
    """Fits rates of the fused engine to two runs under one prefetcher and with one batch: a plane through the times of
    the decode passes over their copies, their visits that copy and the experts that they demand, and a line through
    those of the prefills over their copies, both by least squares with no rate below 0, where errors count relative to
    a run's usual time.

    Args:
        warmup: leading requests of the runs to leave out (they fill the cache and compile).
    Raises:
        SpecmdError: all decode passes copy alike, or the runs have different batches.
    """
    if resident.batch != missing.batch:
        raise SpecmdError(f"calibration: runs with batch {resident.batch} and {missing.batch}, expected one batch")
    passes = _passes((resident, missing), warmup)
    decode, prefill = passes.phase == DECODE, passes.phase == PREFILL
    copies, took_s = passes.copies, passes.took_s
    if np.unique(copies[decode]).size < 2:
        raise SpecmdError("calibration: all decoded tokens copy alike, expected one run at a smaller capacity")
    columns = [column[decode] for column in (copies, -passes.copying, passes.demanded)]
    decode_s, copy_s, hidden_s, expert_s = _fit(columns, took_s[decode], passes.usual_s[decode])
    prefill_s, prefill_copy_s = 0.0, copy_s
    if np.unique(copies[prefill]).size > 1:
        prefill_s, prefill_copy_s = _fit([copies[prefill]], took_s[prefill], passes.usual_s[prefill])
    elif prefill.any():
        prefill_s = max(float((took_s - copies * copy_s)[prefill].mean()), 0.0)
    return PassRates(prefill_s, decode_s, copy_s, prefill_copy_s, hidden_s, expert_s)


def fit_alike(runs: Sequence[Run]) -> PassRates:
    """Fits rates of either engine to runs from an empty cache, to predict others under the same policy and capacity,
    with prompts as long. If all decode passes copy alike, all of their time counts as the copies'. What a prefill
    takes beside its copies includes the way from the prompt to the first gate.

    Raises:
        SpecmdError: a run with batches, where the way to the first token is not that of one prompt.
    """
    most_together = max(run.batch for run in runs)
    if most_together > 1:
        raise SpecmdError(f"calibration: a run with batch {most_together}, expected requests one after the other")
    passes = _passes(runs, 0)
    decode, prefill = passes.phase == DECODE, passes.phase == PREFILL
    copies, took_s = passes.copies, passes.took_s
    mean_s, most = float(took_s[decode].mean()) if decode.any() else 0.0, float(copies[decode].max(initial=0))
    if np.unique(copies[decode]).size > 1:
        decode_s, copy_s = _fit([copies[decode]], took_s[decode], passes.usual_s[decode])
    else:
        decode_s, copy_s = (0.0, mean_s / most) if most else (mean_s, 0.0)
    ttft_s = np.concatenate([run.ttft_s for run in runs])
    prefill_s = max(float((ttft_s - copies[prefill] * copy_s).mean()), 0.0)
    return PassRates(prefill_s, decode_s, copy_s, prefill_copy_s=copy_s)


def _fit(
    columns: Sequence[npt.NDArray[Any]], took_s: npt.NDArray[np.float64], usual_s: npt.NDArray[np.float64]
) -> list[float]:
    """Gives seconds of a pass beside all columns, and what one of each adds: nothing for columns that would take time
    off, or say nothing that those before them do not."""
    design, took = np.stack([np.ones_like(took_s), *columns], axis=1) / usual_s[:, None], took_s / usual_s
    used = [n for n in range(design.shape[1]) if np.linalg.matrix_rank(design[:, : n + 1]) > n]
    found = np.zeros(design.shape[1])
    while used:
        found[:] = 0.0
        found[used] = np.linalg.lstsq(design[:, used], took, rcond=None)[0]
        worst = int(found.argmin())
        if found[worst] >= 0:
            break
        used.remove(worst)
    return found.tolist()


def predict_passes(policy: Policy, trace: Trace, rates: PassRates, warmup: int = 0) -> Predicted:
    """Times of a run of the fused engine from its trace, as `predict`; a pass's time is shared among its visits."""
    replays, events = policy.replay(trace)
    s = replays.schedule
    copies = _copies(events.outcome, events.row, events.prefetched, replays.sizes.level_bytes[:, 0])
    decode_s = rates.decode_s / s.layers + copies * rates.copy_s - (copies > 0) * rates.hidden_s
    decode_s = decode_s + s.demanded * rates.expert_s
    visit_s = np.where(s.phase == PREFILL, rates.prefill_s / s.layers + copies * rates.prefill_copy_s, decode_s)
    ttft_s, tpot_s = _waits(trace, policy.batch, visit_s.reshape(-1, s.layers).sum(axis=1))
    return Predicted(visit_s, float(ttft_s[warmup:].mean()), float(tpot_s[warmup:].mean()))


def _waits(
    trace: Trace, batch: int, took_s: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Gives `Run.ttft_s` and `Run.tpot_s` [R] of passes that take so long [P]; every request has a prompt."""
    passes, end_s = passes_of(trace.lengths, trace.prompt_lengths, batch), np.cumsum(took_s)
    pass_of = np.zeros(trace.tokens, np.int64)
    pass_of[passes.order] = passes.of_token
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    later = (trace.lengths - trace.prompt_lengths).astype(np.int64)
    first_s, last_s = end_s[pass_of[ends - 1 - later]], end_s[pass_of[ends - 1]]
    begin_s = np.zeros_like(first_s) if batch > 1 else np.concatenate([[0.0], last_s[:-1]])
    return first_s - begin_s, np.where(later > 0, (last_s - first_s) / np.maximum(later, 1), np.nan)


def _copies(outcome: Any, row: Any, prefetched: Any, level_bytes: Any) -> npt.NDArray[np.float64]:
    """Gives what visits copy [V], in experts at the highest precision, of their events: outcome and row [V, E], and
    prefetched [V, H, E] or None."""
    share = np.array([0, *level_bytes], np.float64) / level_bytes[-1]
    copies = np.where(np.asarray(outcome) == FETCHED, share[np.asarray(row)], 0.0).sum(axis=-1)
    ahead = 0 if prefetched is None else (np.asarray(prefetched) > 0).sum(axis=(1, 2))
    return np.asarray(copies + ahead, np.float64)


class _Passes(NamedTuple):
    """Passes of some runs, [P] each."""

    took_s: npt.NDArray[np.float64]
    usual_s: npt.NDArray[np.float64]  # mean of the run's passes of the same phase
    copies: npt.NDArray[np.float64]  # one of fewer bits than the highest precision counts as its share of bytes
    copying: npt.NDArray[np.int64]  # visits that copy anything
    demanded: npt.NDArray[np.int64]  # experts, over all visits
    phase: npt.NDArray[np.int64]


def _passes(runs: Sequence[Run], warmup: int) -> _Passes:
    """Gives the passes of runs without their leading requests: from the first prompt on that is none of them."""

    def of(run: Run) -> tuple[npt.NDArray[Any], ...]:
        schedule = build_schedule(run.trace, batch=run.batch)
        starts = np.flatnonzero(schedule.starts_pass)
        outcome, row, ahead = (
            np.stack([getattr(d, name) for d in run.decisions]) for name in ("outcome", "row", "prefetched")
        )
        copies = _copies(outcome, row, ahead, run.trace.meta.get("level_bytes", (1,)))
        took_s, count, copying, demanded = (
            np.add.reduceat(column, starts)
            for column in (run.visit_s, copies, (copies > 0).astype(int), schedule.demanded)
        )
        counted = np.maximum.accumulate(schedule.request[starts]) >= warmup
        phase = schedule.phase[starts]
        usual_s = np.ones_like(took_s)
        for own in (counted & (phase == DECODE), counted & (phase == PREFILL)):
            usual_s[own] = took_s[own].mean() if own.any() else 1.0
        return tuple(column[counted] for column in (took_s, usual_s, count, copying, demanded, phase))

    return _Passes(*(np.concatenate(column) for column in zip(*map(of, runs), strict=True)))


# ---- both ------------------------------------------------------------------------------------------------------------


def _tpot_s(visit_s: npt.NDArray[np.float64], schedule: Schedule, warmup: int) -> float:
    passes = int((schedule.starts_pass & (schedule.phase == DECODE) & (schedule.request >= warmup)).sum())
    return float(_by_request(visit_s, schedule, DECODE)[warmup:].sum() / passes) if passes else float("nan")


def measured(run: Run, warmup: int = 0) -> tuple[float, float]:
    """Gives (TTFT, TPOT) of a run without its leading requests, as `predict` counts them."""
    return float(run.ttft_s[warmup:].mean()), float(run.tpot_s[warmup:].mean())


def _misses(run: Run) -> npt.NDArray[np.int64]:
    """Gives [V] experts copied on demand."""
    return np.array([(d.outcome == FETCHED).sum() for d in run.decisions])


def _typical(values: npt.NDArray[np.float64]) -> float:
    """Gives the mean without the slowest twentieth, which the system's interruptions take."""
    kept = np.sort(values)[: max(1, round(0.95 * values.size))]
    return float(kept.mean())


def _by_request(visit_s: npt.NDArray[np.float64], schedule: Schedule, phase: int) -> npt.NDArray[np.float64]:
    """Gives [R] seconds of each request's passes of a phase."""
    rows = schedule.phase == phase
    return np.bincount(schedule.request[rows], visit_s[rows], int(schedule.request.max()) + 1).astype(np.float64)
