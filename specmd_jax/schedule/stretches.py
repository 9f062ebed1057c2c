"""The schedule of a trace that is read a stretch at a time: the demand of each, and what the rest tells of it.

The first pass over a file (`survey`) checks it and finds what a replay must know of the rest: where each stretch
begins, when its experts are used next behind it, how much one visit demands. What grows with the trace is 8 bytes for
each expert per stretch (next uses, gate mass), a small share of what the stretch itself takes, and 8 bytes per request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from specmd_jax.schedule import demand_kernels as kernel
from specmd_jax.schedule.build import Origin, check_clock, check_counted, counted_passes
from specmd_jax.schedule.counted import Counted
from specmd_jax.schedule.demand import Demand
from specmd_jax.schedule.drafts import Drafts, check_accepted, drafted
from specmd_jax.schedule.passes import one_by_one
from specmd_jax.trace.stream import TraceFile, stretches
from specmd_jax.types import DECODE, NEVER, PREFILL, Trace

Item = TypeVar("Item")

_ORDER = {"event": kernel.EVENT, "sequential": kernel.BY_POSITION, "sequential-id": kernel.BY_ID}


class Timetable(NamedTuple):
    """Options of `build_schedule` for requests that run one after the other."""

    contract: str = "event"
    prefill_chunk: int | None = None
    reset_per_request: bool = False
    phase: str = "all"
    warmup_tokens: int = 0
    drafts: Drafts | None = None


class Stretch(NamedTuple):
    """The demand of some requests of a longer trace."""

    demand: Demand
    first_use: npt.NDArray[np.int32]  # [L, E] first visit from the stretch on that demands each expert
    next: Origin  # where the next stretch begins
    wanted: bool  # some pass is of the wanted phase
    counted: Counted


def demand_of(trace: Trace, timetable: Timetable, origin: Origin = Origin()) -> Stretch:  # noqa: B008 (immutable)
    """Does what `demand.pack(build_schedule(trace, origin=origin, ...))` does, without the dense columns."""
    layers, experts = trace.layers, trace.experts
    begun = drafted(trace, timetable.drafts, origin.tokens)
    passes = one_by_one(trace.lengths, trace.prompt_lengths, timetable.prefill_chunk, begun)
    starts = np.searchsorted(passes.of_token, np.arange(passes.phase.size + 1))  # [P + 1]
    ids, gates = trace.expert_ids, trace.gates
    if begun is not None:  # a row for each time that a token runs
        ids, gates = ids[passes.order], None if gates is None else gates[passes.order]
    start, group, clock, flat, mass = kernel.gather(
        ids, gates, starts, _ORDER[timetable.contract], experts, origin.clock
    )
    check_clock(int(clock[-1]), group.size + origin.visit)
    upcoming = np.full(layers * experts, NEVER, np.int32) if origin.after is None else origin.after.flatten()
    next_use = kernel.look_ahead(start, flat, origin.visit, upcoming)
    pass_id, layer = np.divmod(group, layers)
    starts_pass = np.diff(pass_id, prepend=-1) > 0
    wanted, counted = counted_passes(
        trace, passes, timetable.phase, timetable.warmup_tokens, timetable.reset_per_request, origin
    )
    tokens, prefills, decodes = np.diff(starts), counted & (passes.phase == PREFILL), counted & (passes.phase == DECODE)
    reset = starts_pass & passes.begins[pass_id] if timetable.reset_per_request else np.zeros(group.size, np.bool_)
    return Stretch(
        demand=Demand(
            start=start,
            flat=flat,
            mass=mass,
            next_use=next_use,
            layer=layer.astype(np.int32),
            pass_id=(pass_id + origin.pass_id).astype(np.int32),
            clock=clock[:-1].astype(np.int32),
            starts_pass=starts_pass,
            reset=reset,
            counted=counted[pass_id],
        ),
        first_use=upcoming.reshape(layers, experts),
        next=Origin(
            visit=origin.visit + group.size,
            pass_id=origin.pass_id + passes.phase.size,
            clock=int(clock[-1]),
            request=origin.request + trace.requests,
            tokens=origin.tokens + trace.tokens,
        ),
        wanted=bool(wanted.any()),
        counted=Counted(
            tokens=int(passes.kept[counted].sum(dtype=np.int64)),
            prompts=len(np.unique(passes.request[prefills])),
            decodes=int(decodes.sum()),
            decoded=int(passes.kept[decodes].sum(dtype=np.int64)),
            turns=int(passes.turns[decodes].sum(dtype=np.int64)),
            verified=int(tokens[decodes].sum()),
        ),
    )


class Survey(NamedTuple):
    """What the first pass finds; C stretches."""

    origins: list[Origin]  # [C] with their `after`
    heads: npt.NDArray[np.float32]  # [C, L, E] gate mass of the first pass of each stretch
    first_use: npt.NDArray[np.int32]  # [L, E]
    widest: npt.NDArray[np.int64]  # [L] the most experts that a visit of each layer demands
    visits: int
    counted: Counted


def survey(file: TraceFile, timetable: Timetable, stretch_tokens: int, arrays: Sequence[str] = ("gates",)) -> Survey:
    """Reads a file once, and checks all of it that is read. Raises `SpecmdError` as `build_schedule` does."""
    layers, experts = file.head.layers, file.head.experts
    check_accepted(file.head, timetable.drafts)
    origin, origins, first, heads = Origin(), list[Origin](), list[npt.NDArray[np.int32]](), list[Any]()
    widest = np.zeros(layers, np.int64)
    wanted, counted = False, np.zeros(len(Counted._fields), np.int64)

    for trace in ahead(stretches(file, stretch_tokens, arrays)):
        found = demand_of(trace, timetable, origin)
        demand = found.demand
        np.maximum.at(widest, demand.layer, np.diff(demand.start))
        opening = demand.start[np.searchsorted(demand.pass_id, origin.pass_id, side="right")]
        head = np.zeros(layers * experts, np.float32)
        np.add.at(head, demand.flat[:opening], demand.mass[:opening])
        origins.append(origin)
        first.append(found.first_use)
        heads.append(head.reshape(layers, experts))
        wanted, counted = wanted or found.wanted, counted + found.counted
        origin = found.next
    check_counted(file.head, timetable.phase, timetable.warmup_tokens, wanted, bool(counted[0]))
    uses = np.stack([*first, np.full((layers, experts), NEVER, np.int32)])
    np.minimum.accumulate(uses[::-1], axis=0, out=uses[::-1])
    return Survey(
        origins=[
            place._replace(after=after, drafts_behind=_drafts_from(file.head, timetable, behind.request))
            for place, after, behind in zip(origins, uses[1:], [*origins[1:], origin], strict=True)
        ],
        heads=np.stack(heads),
        first_use=uses[0],
        widest=widest,
        visits=origin.visit,
        counted=Counted(*(int(value) for value in counted)),
    )


def _drafts_from(head: Trace, timetable: Timetable, request: int) -> bool:
    """Whether the first pass of a request drafts tokens: it has no prompt, and is one of the trace's."""
    return timetable.drafts is not None and request < head.requests and not head.prompt_lengths[request]


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Gives the same items, while another thread makes the next one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # pyright: ignore[reportReturnType]
