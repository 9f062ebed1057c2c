"""From a trace to the visits of a replay: CONTRACT.md section 1, in numpy on the host.

The demand is first a sparse list with one *entry* for each (visit, expert); a contract only says which row of the
schedule an entry belongs to. Clock, ranks, next uses and the order by mass then follow from the rows, whatever the
contract.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.schedule.drafts import Drafts, check_accepted, check_drafts, drafted
from specmd_jax.schedule.passes import Passes, passes_of
from specmd_jax.types import DECODE, NEVER, PREFILL, Schedule, Trace

CONTRACTS = ("event", "sequential", "sequential-id")
PHASES = ("all", "prefill", "decode")

_CLOCK_LIMIT = np.iinfo(np.int32).max


class Origin(NamedTuple):
    """Where a stretch of whole requests lies in a longer trace: all numbers of its schedule go on from here."""

    visit: int = 0
    pass_id: int = 0
    clock: int = 0
    request: int = 0
    tokens: int = 0  # replayed before
    drafts_behind: bool = False  # the first pass behind the stretch drafts tokens
    after: Int32[np.ndarray, "L E"] | None = None  # first visit behind the stretch that demands each expert


class _Entries(NamedTuple):
    """The demand, an entry for each (visit, expert) of n, by visit and then by expert id."""

    visit: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    tokens: Int32[np.ndarray, " n"]
    mass: Float32[np.ndarray, " n"]
    first: Int64[np.ndarray, " n"]  # first and last position in the visit's token-major gate order
    last: Int64[np.ndarray, " n"]


def build_schedule(
    trace: Trace,
    *,
    batch: int = 1,
    prefill_chunk: int | None = None,
    contract: str = "event",
    reset_per_request: bool = False,
    phase: str = "all",
    warmup_tokens: int = 0,
    drafts: Drafts | None = None,
    with_logits: bool = False,
    with_ahead: bool = False,
    origin: Origin | None = None,
) -> Schedule:
    """Gives the visits of a replay of ``trace`` in order (shapes: `Schedule`; rules: CONTRACT.md section 1).

    Args:
      trace: a valid trace (`specmd_jax.trace.validate`).
      batch: requests decoded together, B. ``Schedule.request`` names the one in the lowest busy slot.
      prefill_chunk: prompt tokens per prefill pass; None: the whole prompt in one.
      contract: "event", or one visit per demanded expert in order of its first position ("sequential") or of its id
        ("sequential-id"). An empty visit (a skipped layer) stays one empty visit under every contract. A sequential
        schedule has as many rows as demanded experts, so its dense columns take K times the memory of "event".
      reset_per_request: empty the cache before each request, the first one too (batch 1 only).
      phase: which passes are counted: "all", "prefill" or "decode".
      warmup_tokens: passes that begin before so many tokens have been replayed are not counted.
      drafts: speculative decoding: each decode pass verifies some tokens that were drafted. Which of them are accepted
        is drawn, or ``trace.meta["accepted"]`` has a list of counts for each request, one per decode pass.
      with_logits: carry ``trace.logits``; a token that skips a layer has NaN there, like the padding. Needs "event",
        as a sequential visit is one expert that is already chosen. T is the longest pass: ``prefill_chunk`` bounds it.
      with_ahead: carry ``trace.ahead``, summed over the tokens of each pass in their order.
      origin: `trace` is a stretch of a longer one, which begins here. Visits, passes, clock and requests are numbered
        as in the schedule of the longer one, and such a stretch may count no pass.

    Raises:
      SpecmdError: an option out of range, an option that the trace cannot serve, or settings that count no pass.
    """
    options = batch, prefill_chunk, contract, reset_per_request, phase, warmup_tokens, drafts
    passes, starts, counted = _planned(trace, *options, with_logits, with_ahead, origin)
    origin = origin or Origin()
    n_passes = passes.phase.shape[0]
    tokens = np.diff(starts, append=passes.order.size)

    n_visits = n_passes * trace.layers
    entries = _demand(trace, passes, starts)
    demanded = np.bincount(entries.visit, minlength=n_visits)
    if contract == "event":
        row, visit_of_row = entries.visit, np.arange(n_visits)
    else:
        if contract == "sequential":
            entries = _take(entries, np.argsort(entries.visit * (entries.first.max(initial=0) + 1) + entries.first))
        rows_of_visit = np.maximum(demanded, 1)
        first_row = np.cumsum(rows_of_visit) - rows_of_visit
        row = first_row[entries.visit] + _within(entries.visit, demanded)
        visit_of_row = np.repeat(np.arange(n_visits), rows_of_visit)
    pass_id, layer = np.divmod(visit_of_row, trace.layers)
    starts_pass = np.diff(pass_id, prepend=-1) > 0
    columns = _columns(entries, row, visit_of_row, trace, origin)
    return Schedule(
        layers=trace.layers,
        experts=trace.experts,
        most=columns["by_mass"].shape[1],
        layer=layer.astype(np.int32),
        pass_id=(pass_id + origin.pass_id).astype(np.int32),
        phase=passes.phase[pass_id],
        request=passes.request[pass_id] + np.int32(origin.request),
        tokens=tokens[pass_id].astype(np.int32),
        starts_pass=starts_pass,
        ends_layer=np.diff(visit_of_row, append=n_visits) > 0,
        reset=(starts_pass & passes.begins[pass_id]) if reset_per_request else np.zeros(visit_of_row.shape, np.bool_),
        counted=counted[pass_id],
        first_visit=origin.visit,
        ahead=_ahead_of_visits(trace, passes, starts, tokens)[visit_of_row] if with_ahead else None,
        logits=_logits_of_visits(trace, passes, starts, tokens) if with_logits else None,
        kept=None if drafts is None else passes.kept[pass_id],
        turns=None if drafts is None else passes.turns[pass_id],
        drafting_s=_drafting(drafts, starts_pass, passes.phase[pass_id] == DECODE, origin),
        **columns,
    )


def accesses(trace: Trace, *, batch: int = 1, prefill_chunk: int | None = None) -> Int64[np.ndarray, " n"]:
    """Gives the flat ids that a schedule of the contract "sequential" demands, in order, without its dense columns.

    Raises SpecmdError as `build_schedule` does.
    """
    passes, starts, _ = _planned(trace, batch, prefill_chunk, "sequential", False, "all", 0, None, False, False, None)
    entries = _demand(trace, passes, starts)
    order = np.lexsort((entries.first, entries.visit))
    return entries.visit[order] % trace.layers * trace.experts + entries.expert[order]


def _drafting(
    drafts: Drafts | None, starts_pass: Bool[np.ndarray, " V"], decode: Bool[np.ndarray, " V"], origin: Origin
) -> Float32[np.ndarray, "V 2"] | None:
    """Gives the seconds of drafting before the gate of each visit, and behind the visit; None: nothing takes any."""
    if drafts is None or not drafts.draft_s:
        return None
    before = starts_pass & decode
    both = np.stack([before, np.append(before[1:], origin.drafts_behind)], axis=1)
    return both * np.float32(drafts.draft_s)


def check_schedule(
    trace: Trace,
    *,
    batch: int = 1,
    prefill_chunk: int | None = None,
    contract: str = "event",
    reset_per_request: bool = False,
    phase: str = "all",
    warmup_tokens: int = 0,
    drafts: Drafts | None = None,
    with_logits: bool = False,
) -> None:
    """Raises the SpecmdError that `build_schedule` would raise, without building anything, or for too large a batch."""
    if batch > max(1, trace.requests):
        raise SpecmdError(f"batch is {batch}, expected at most the {trace.requests} request(s) of the trace")
    options = batch, prefill_chunk, contract, reset_per_request, phase, warmup_tokens, drafts
    _planned(trace, *options, with_logits, False, None)


def _planned(
    trace: Trace,
    batch: int,
    prefill_chunk: int | None,
    contract: str,
    reset_per_request: bool,
    phase: str,
    warmup_tokens: int,
    drafts: Drafts | None,
    with_logits: bool,
    with_ahead: bool,
    origin: Origin | None,
) -> tuple[Passes, Int64[np.ndarray, " p"], Bool[np.ndarray, " p"]]:
    """Gives the passes, the rows that run before each of them [P], and which are counted [P]; options are checked."""
    check_options(batch, prefill_chunk, contract, reset_per_request, phase, warmup_tokens, drafts)
    check_accepted(trace, drafts)
    if with_logits and trace.logits is None:
        raise SpecmdError(f"full router logits are needed, but the trace of {trace.model} has none (array 'logits')")
    if with_logits and contract != "event":
        raise SpecmdError(f"logits with contract {contract!r}, expected 'event': a visit there is one chosen expert")
    if with_ahead and trace.ahead is None:
        raise SpecmdError(f"gate-ahead scores are needed, but the trace of {trace.model} has none (array 'ahead')")
    begun = drafted(trace, drafts, 0 if origin is None else origin.tokens)
    passes = passes_of(trace.lengths, trace.prompt_lengths, batch, prefill_chunk, begun)
    starts = np.searchsorted(passes.of_token, np.arange(passes.phase.shape[0]))
    wanted, counted = counted_passes(trace, passes, phase, warmup_tokens, reset_per_request, origin)
    if origin is None:
        check_counted(trace, phase, warmup_tokens, bool(wanted.any()), bool(counted.any()))
    return passes, starts, counted


def check_options(
    batch: int,
    prefill_chunk: int | None,
    contract: str,
    reset_per_request: bool,
    phase: str,
    warmup_tokens: int,
    drafts: Drafts | None = None,
) -> None:
    """Raises `SpecmdError` for options of `build_schedule` that no trace can serve."""
    if batch < 1:
        raise SpecmdError(f"batch is {batch}, expected at least 1")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise SpecmdError(f"prefill_chunk is {prefill_chunk}, expected at least 1 token")
    if contract not in CONTRACTS:
        raise unknown("contract", contract, CONTRACTS)
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    if reset_per_request and batch > 1:
        raise SpecmdError(
            f"reset_per_request with batch {batch}, expected batch 1: concurrent requests share the cache"
        )
    if warmup_tokens < 0:
        raise SpecmdError(f"warmup_tokens is {warmup_tokens}, expected at least 0")
    check_drafts(drafts)


def counted_passes(
    trace: Trace,
    passes: Passes,
    phase: str,
    warmup_tokens: int,
    per_request: bool,
    origin: Origin | None = None,
) -> tuple[Bool[np.ndarray, " p"], Bool[np.ndarray, " p"]]:
    """Gives the passes of the wanted phase, and those of them that enter the metrics."""
    wanted = (
        np.ones_like(passes.begins) if phase == "all" else passes.phase == (PREFILL if phase == "prefill" else DECODE)
    )
    kept = np.cumsum(passes.kept, dtype=np.int64) - passes.kept  # [P] tokens kept before the pass
    replayed = kept + (0 if origin is None else origin.tokens)
    if per_request:
        replayed = kept - (np.cumsum(trace.lengths, dtype=np.int64) - trace.lengths)[passes.request]
    return wanted, wanted & (replayed >= warmup_tokens)


def check_counted(trace: Trace, phase: str, warmup_tokens: int, wanted: bool, counted: bool) -> None:
    """Raises `SpecmdError` unless some pass is of the wanted phase, and some is counted."""
    if not wanted:
        raise SpecmdError(f"phase {phase!r} counts nothing: the trace of {trace.model} has no {phase} tokens")
    if not counted:
        raise SpecmdError(
            f"warmup_tokens {warmup_tokens} counts nothing: no pass of phase {phase!r} begins after so many tokens"
        )


def check_clock(clock: int, visits: int) -> None:
    """Raises `SpecmdError` unless the clock behind the last visit, and their number, fit the columns."""
    if clock > _CLOCK_LIMIT or visits >= NEVER:
        raise SpecmdError(
            f"the schedule has {visits} visits and {clock - visits} demanded experts, "
            "expected fewer than 2^31 in all: cut the trace"
        )


def _demand(trace: Trace, passes: Passes, starts: Int64[np.ndarray, " p"]) -> _Entries:
    ids = trace.expert_ids[passes.order]  # [N, L, K]
    layers, top_k, experts = trace.layers, trace.top_k, trace.experts
    present = (ids >= 0).reshape(-1)
    cells = np.flatnonzero(present)  # token-major gate order
    token, layer = cells // (layers * top_k), cells // top_k % layers
    visit = passes.of_token[token] * layers + layer
    position = (token - starts[passes.of_token[token]]) * top_k + cells % top_k
    key, entry = np.unique(visit * experts + ids.reshape(-1)[cells], return_inverse=True)
    gates = np.full(cells.size, 1 / top_k, np.float32)
    if trace.gates is not None:
        gates = trace.gates[passes.order].reshape(-1)[cells].astype(np.float32)
    mass = np.zeros(key.size, np.float32)
    np.add.at(mass, entry, gates)  # one after the other in token order, in float32
    first = np.full(key.size, np.iinfo(np.int64).max)
    np.minimum.at(first, entry, position)
    last = np.full(key.size, -1, np.int64)
    np.maximum.at(last, entry, position)
    count = np.bincount(entry, minlength=key.size).astype(np.int32)
    return _Entries(key // experts, key % experts, count, mass, first, last)


def _take(entries: _Entries, order: Int64[np.ndarray, " n"]) -> _Entries:
    return _Entries(
        visit=entries.visit[order],
        expert=entries.expert[order],
        tokens=entries.tokens[order],
        mass=entries.mass[order],
        first=entries.first[order],
        last=entries.last[order],
    )


def _within(group: Int64[np.ndarray, " n"], sizes: Int64[np.ndarray, " groups"]) -> Int64[np.ndarray, " n"]:
    """Gives the position of each item in its group; items lie group by group, group g having sizes[g]."""
    return np.arange(group.size) - (np.cumsum(sizes) - sizes)[group]


def _columns(
    entries: _Entries,
    row: Int64[np.ndarray, " n"],
    visit_of_row: Int64[np.ndarray, " V"],
    trace: Trace,
    origin: Origin,
) -> dict[str, np.ndarray]:
    """Gives the columns of the demand, rows of entries given. Entries lie by row."""
    n_rows, experts = visit_of_row.shape[0], trace.experts
    demanded = np.bincount(row, minlength=n_rows)
    after = np.cumsum(demanded + 1) + origin.clock
    check_clock(int(after[-1]), n_rows + origin.visit)
    cell = row * experts + entries.expert

    def dense(values: Shaped[np.ndarray, " n"], dtype: type, fill: int) -> Shaped[np.ndarray, "V E"]:
        column = np.full(n_rows * experts, fill, dtype)
        column[cell] = values
        return column.reshape(n_rows, experts)

    by_last = np.argsort(row * (entries.last.max(initial=0) + 1) + entries.last)
    rank = np.empty(row.size, np.int64)
    rank[by_last] = _within(row, demanded)

    flat_id = visit_of_row[row] % trace.layers * experts + entries.expert
    by_id = np.argsort(flat_id, kind="stable")  # in each id, rows rise
    same = flat_id[by_id[1:]] == flat_id[by_id[:-1]]
    next_use = np.full(row.size, NEVER, np.int64)
    if origin.after is not None:
        next_use[:] = origin.after.reshape(-1)[flat_id]
    next_use[by_id[:-1][same]] = row[by_id[1:][same]] + origin.visit

    # The bits of floats >= 0 order as the floats do; entries of a row lie by id, so that a stable sort settles ties.
    falling = np.int64(0x7FFFFFFF) - entries.mass.view(np.int32)
    ordered = np.argsort(row << 32 | falling, kind="stable")
    by_mass = np.full((n_rows, max(1, int(demanded.max()))), -1, np.int32)
    by_mass[row, _within(row, demanded)] = entries.expert[ordered]
    return {
        "clock": (after - demanded - 1).astype(np.int32),
        "count": dense(entries.tokens, np.int32, 0),
        "mass": dense(entries.mass, np.float32, 0),
        "rank": dense(rank, np.int32, -1),
        "next_use": dense(next_use, np.int32, NEVER),
        "by_mass": by_mass,
    }


def _ahead_of_visits(
    trace: Trace, passes: Passes, starts: Int64[np.ndarray, " p"], tokens: Int64[np.ndarray, " p"]
) -> Float32[np.ndarray, "p*L E"]:
    """Gives gate-ahead scores summed over the tokens of each pass in their order."""
    assert trace.ahead is not None
    total = trace.ahead[passes.order[starts]].astype(np.float32)  # [P, L, E]
    for position in range(1, int(tokens.max())):
        longer = np.flatnonzero(tokens > position)
        total[longer] += trace.ahead[passes.order[starts[longer] + position]].astype(np.float32)
    return total.reshape(-1, trace.experts)


def _logits_of_visits(
    trace: Trace, passes: Passes, starts: Int64[np.ndarray, " p"], tokens: Int64[np.ndarray, " p"]
) -> Float32[np.ndarray, "p*L t E"]:
    """Gives the logits of the tokens of each pass, NaN where there is no token or it skips the layer."""
    assert trace.logits is not None
    out = np.full((starts.size, trace.layers, int(tokens.max()), trace.experts), np.nan, np.float32)
    position = np.arange(passes.order.size) - starts[passes.of_token]
    routed = (trace.expert_ids >= 0).any(axis=-1, keepdims=True)  # [N, L, 1]
    values = np.where(routed, trace.logits.astype(np.float32), np.float32(np.nan))
    out[passes.of_token, :, position] = values[passes.order]
    return out.reshape(-1, out.shape[2], trace.experts)
