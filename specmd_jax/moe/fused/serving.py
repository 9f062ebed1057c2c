"""The requests of a run: their passes in order, what each pass is fed, its tokens as they come, and the record of all
passes put back into the order of a trace.

How many tokens a request will have is known before it begins, so the passes are those of the simulator's schedule
(`schedule.passes`), planned before the first. Passes that share key-value caches are a *session*: without batches those
of one request, else all of the run. A batch has B *places*, which are the slots of the schedule: a row of every cache,
of a decode pass, and of the tokens that are fed next. A request keeps its place until its last token; a place without
a request takes part in decode passes as a row that is routed to no expert.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused.arrays import Active, Admission, ForcedRouting, Live, Made, Part, Record, Request
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.runtime.run import Forced, OnToken, by_falling_gate, check_finite, ends
from specmd_jax.moe.runtime.store import DEVICE, sharding
from specmd_jax.schedule.passes import passes_of
from specmd_jax.types import DECODE

AHEAD = 4
"""Passes that may be started beyond the last token known, where a token may end the request."""

HELD = 16
"""Passes of a batch whose records are on the device: those before are read while these go on, as a batch's session has
no end before the run's."""


class Pass(NamedTuple):
    """A pass that is planned; it makes n tokens."""

    decode: bool
    fed: npt.NDArray[np.int64]  # the tokens that it is fed, by their places in the trace
    requests: tuple[int, ...]  # [n] whose tokens it makes
    places: tuple[int, ...]  # [n] their places in the batch
    steps: tuple[int, ...]  # [n] how many tokens each request had before

    @property
    def rows(self) -> tuple[int, ...]:
        """Where the tokens are in what the pass gives."""
        return self.places if self.decode else (0,)


class Feed(NamedTuple):
    """What a pass is given, on the device."""

    tokens: jax.Array | None  # a prompt [1, T] int32, or a given text [B, 1]; None: it goes on with the tokens made
    part: Part  # an `Admission` without what is fed next
    forced: ForcedRouting | None


class Arrival(NamedTuple):
    """What a pass made, on the host."""

    tokens: list[int]  # [M]
    good: list[int]  # [M]
    at_s: float


class Served(NamedTuple):
    """A session that has ended, a row for each of its passes."""

    passes: Sequence[Pass]
    arrivals: list[Arrival]
    records: list[Record]  # numpy
    logits: list[Any]  # [M, V] each, if they were asked for
    begin_s: float

    @property
    def took_s(self) -> npt.NDArray[np.float64]:
        """Seconds of each pass."""
        return np.diff([self.begin_s, *(arrival.at_s for arrival in self.arrivals)])


class Hearing:
    """Tells a listener of tokens in their order, until it ends the run."""

    def __init__(self, on_token: OnToken, requests: int, steps: int):
        self._on_token, self._of = on_token, (requests, steps)
        self.last: int | None = None  # the step that ended the only request early

    def __call__(self, own: Pass, arrival: Arrival) -> None:
        for row, request, step in zip(own.rows, own.requests, own.steps, strict=True):
            if self.last is None and arrival.good[row]:
                stop = ends(self._on_token, (request, step), self._of, arrival.tokens[row])
                if stop and self._of[0] == 1:
                    self.last = step


def plan(cfg: MoEConfig, prompts: Sequence[int], steps: int, batch: int) -> list[list[Pass]]:
    """Gives the passes of each session for prompts of so many tokens, each followed by ``steps``.

    Raises:
        SpecmdError: a batch's caches have the length of its longest request, and the model's rotary factors depend on
            it: some requests would get those of others.
    """
    sizes = np.array(prompts, np.int32)
    lengths = (sizes + (steps - 1)).astype(np.int32)
    rope = cfg.rope
    if batch > 1 and rope.kind == "longrope" and lengths.min() <= rope.original_positions < lengths.max():
        raise SpecmdError(
            f"batch is {batch}: requests of {lengths.min()} and {lengths.max()} positions, expected all of them up to "
            f"{rope.original_positions} or all above, where the model's rotary factors change"
        )
    found = passes_of(lengths, sizes, batch)
    request_of = np.repeat(np.arange(sizes.size), lengths)
    step_of = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths + sizes - 1, lengths)
    starts = np.searchsorted(found.of_token, np.arange(found.phase.size))
    sessions: list[list[Pass]] = []
    for number, fed in enumerate(np.split(found.order, starts[1:])):
        decode = bool(found.phase[number] == DECODE)
        making = fed if decode else fed[-1:]
        requests = request_of[making]
        columns = requests, found.slot[requests], step_of[making]
        if not sessions or found.begins[number]:
            sessions.append([])
        sessions[-1].append(Pass(decode, fed, *(tuple(column.tolist()) for column in columns)))
    return sessions


def feeds(
    passes: Sequence[Pass],
    prompts: Sequence[npt.NDArray[np.int32]],
    batch: int,
    forced: Forced | None,
    text: Sequence[npt.NDArray[np.int32] | None],
) -> list[Feed]:
    """Gives what the passes of a session are given, on the device.

    Args:
        prompts: of all requests of the run; ``forced``: the routing of all of its tokens, as `run.forced_routing` has
            it.
        text: what each request goes on with, [S]; None: with what the model makes. All of one kind.
    """
    device = sharding(DEVICE)
    # all arrays bound to the device from the start, as a program's results are: a pass is then compiled once
    blank, places = jax.device_put((np.zeros((batch, 1), np.int32), list(np.arange(batch, dtype=np.int32))), device)
    active: dict[tuple[int, ...], Active] = {}

    def part(own: Pass) -> Part:
        if batch == 1:
            return None
        if not own.decode:
            return Admission(places[own.places[0]], blank)
        if own.places not in active:
            active[own.places] = Active(jax.device_put(np.isin(np.arange(batch), own.places), device))
        return active[own.places]

    def routing(own: Pass) -> ForcedRouting | None:
        if forced is None:
            return None

        def column(rows: npt.NDArray[Any]) -> jax.Array:
            rows = rows[own.fed]
            rows = _spread(rows, own.places, batch) if own.decode else rows
            return jnp.asarray(np.ascontiguousarray(rows.swapaxes(0, 1)))

        return ForcedRouting(*jax.tree.map(column, forced))

    def tokens(own: Pass) -> jax.Array | None:
        if not own.decode:
            return jax.device_put(prompts[own.requests[0]][None], device)
        rows = [text[request] for request in own.requests]
        given = [row[step - 1 : step] for row, step in zip(rows, own.steps, strict=True) if row is not None]
        return jax.device_put(_spread(np.stack(given), own.places, batch), device) if given else None

    return [Feed(tokens(own), part(own), routing(own)) for own in passes]


def _spread(rows: npt.NDArray[Any], places: tuple[int, ...], batch: int) -> npt.NDArray[Any]:
    """Gives rows [n, ...] at their places [batch, ...]; the others are 0."""
    whole = np.zeros((batch, *rows.shape[1:]), rows.dtype)
    whole[list(places)] = rows
    return whole


def serve(
    run: Callable[..., tuple[Live, Request, Made]],
    live: Live,
    request: Request,
    passes: Sequence[Pass],
    given: Sequence[Feed],
    keep_logits: bool,
    hear: Hearing | None,
) -> tuple[Live, Served]:
    """Runs the passes of a session, up to the one that ends it early.

    Args:
        run: (live, request, tokens, forced routing, part) -> what `program.run` gives.
        request: empty caches for the session.
        given: what each pass is given (`feeds`).
    """
    request, batch = jax.device_put(request, sharding(DEVICE)), request.start.shape[0]
    jax.block_until_ready((live, request, given))
    records: list[Any] = []
    arrivals: list[Future[Arrival]] = []
    # starting a program may take as long as running it, so another thread waits for the tokens and notes the time
    with ThreadPoolExecutor(1) as reader:
        begin_s, token = time.perf_counter(), None
        for own, feed in zip(passes, given, strict=True):
            tokens, part = token if feed.tokens is None else feed.tokens, feed.part
            if isinstance(part, Admission) and token is not None:
                part = part._replace(fed=token)
            live, request, end = run(live, request, tokens, feed.forced, part)
            arrivals.append(reader.submit(_arrival, end.packed, own, hear))
            records.append((end.record, end.logits if keep_logits else None))
            token = end.token
            if hear is not None and len(arrivals) > AHEAD:
                arrivals[-AHEAD].result()
                if hear.last is not None:
                    break
            if batch > 1 and len(records) > HELD:
                records[-HELD - 1] = jax.device_get(records[-HELD - 1])
    count = len(records) if hear is None or hear.last is None else hear.last + 1
    kept = jax.device_get(records[:count])
    return live, Served(
        passes=passes[:count],
        arrivals=[arrival.result() for arrival in arrivals[:count]],
        records=[record for record, _ in kept],
        logits=[logits for _, logits in kept],
        begin_s=begin_s,
    )


def _arrival(packed: jax.Array, own: Pass, hear: Hearing | None) -> Arrival:
    rows = np.asarray(packed)
    arrival = Arrival(rows[:, 0].tolist(), rows[:, 1].tolist(), time.perf_counter())
    if hear is not None:
        hear(own, arrival)
    return arrival


def check_served(name: str, served: Served) -> None:
    """Raises SpecmdError for the first token whose logits were not all finite."""
    for own, arrival in zip(served.passes, served.arrivals, strict=True):
        for row, request, step in zip(own.rows, own.requests, own.steps, strict=True):
            check_finite(name, request, step, arrival.good[row])


class Text(NamedTuple):
    """What a run's requests were given: R of them, S tokens each."""

    tokens: npt.NDArray[np.int32]  # [R, S]
    logits: npt.NDArray[np.float32] | None  # [R, S, V]
    ttft_s: npt.NDArray[np.float64]  # [R]
    tpot_s: npt.NDArray[np.float64]  # [R]


def text_of(sessions: Sequence[Served], requests: int, keep_logits: bool) -> Text:
    """Sorts what the passes made by request."""
    tokens: list[list[int]] = [[] for _ in range(requests)]
    logits: list[list[Any]] = [[] for _ in range(requests)]
    at_s: list[list[float]] = [[] for _ in range(requests)]
    begin_s = np.zeros(requests)
    for served in sessions:
        for own, arrival, made in zip(served.passes, served.arrivals, served.logits, strict=True):
            for row, request in zip(own.rows, own.requests, strict=True):
                begin_s[request] = served.begin_s
                tokens[request].append(arrival.tokens[row])
                at_s[request].append(arrival.at_s)
                if keep_logits:
                    logits[request].append(made[row])
    arrived_s = np.array(at_s)
    return Text(
        tokens=np.array(tokens, np.int32),
        logits=np.array(logits) if keep_logits else None,
        ttft_s=arrived_s[:, 0] - begin_s,
        tpot_s=np.diff(arrived_s).mean(axis=1) if arrived_s.shape[1] > 1 else np.full(requests, np.nan),
    )


def columns_of(sessions: Sequence[Served]) -> list[npt.NDArray[Any] | None]:
    """Gives a trace's columns of what the passes recorded, request by request: ids, gates, ahead scores and logits
    [N, L, ...]; None for what was not recorded."""
    pairs = [pair for served in sessions for pair in zip(served.passes, served.records, strict=True)]
    order = np.argsort(np.concatenate([own.fed for own, _ in pairs]))

    def column(name: str) -> npt.NDArray[Any] | None:
        rows = [(own, getattr(record, name)) for own, record in pairs]
        if rows[0][1] is None:
            return None
        whole = np.concatenate([_fed(own, found.swapaxes(0, 1)) for own, found in rows])
        return whole[order]

    ids, gates, *rest = (column(name) for name in ("ids", "gates", "ahead", "logits"))
    assert ids is not None and gates is not None
    return [*by_falling_gate(ids, gates), *rest]


def _fed(own: Pass, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Gives the rows [T, ...] of the tokens that a pass was fed."""
    return rows[list(own.places)] if own.decode else rows


def visit_s_of(sessions: Sequence[Served], layers: int) -> npt.NDArray[np.float64]:
    """Gives each visit an equal share of its pass's time, [V]."""
    took_s = np.fromiter(itertools.chain(*(served.took_s for served in sessions)), np.float64)
    return np.repeat(took_s, layers) / layers
