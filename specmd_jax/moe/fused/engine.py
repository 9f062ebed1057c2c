"""A model whose experts live in host memory, one program per pass: nothing is read back before the next token is made.

`Fused.generate` does what `specmd_jax.moe.layerwise.engine.Offloaded.generate` does, with the cache's state on the
device. One program (`program.run`) is a whole pass: attention, router, the simulator's own step, copies of the experts
that are missing out of the pinned stack into free slots, the experts out of their slots, and so on through the layers
to the next token, which feeds the next program. The host reads the tokens while the programs go on, and the rest of
what it wants to know (trace, events) after the request.

The slots are one array per matrix, [C, ...], given from program to program: C is the capacity, one token's demand
beyond it (`staging`), and one slot for what nobody keeps. A decoded token's missing experts are copied first, then the
prefetched ones, then all are computed out of their slots by the expressions of the all-resident model. A prefill copies
its missing experts one by one, each while the one before it is computed, and keeps those that stay.

Equal layers are one loop, so that 48 layers compile as fast as 2; the dense layers are held stacked for it, a second
time beside ``params``. Gates and `ahead` scores are recorded with 22 bits of mantissa (`experts.uncontracted`), and the
policies see them so.

This engine leaves to the simulator what the layerwise one does, and miss rules other than `fetch`. No clock runs inside
a program: `Run.visit_s` shares a pass's time out evenly among its visits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused import program
from specmd_jax.moe.fused.arrays import Fixed, ForcedRouting, Form, Live, Made, Record, Request, Segment
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params, build, init_cache
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime.decider import Decision, begin_state
from specmd_jax.moe.runtime.memory import Beside, cache_bytes, dense_spec, work_bytes
from specmd_jax.moe.runtime.policy import make_policy, numbers_of, slots_of
from specmd_jax.moe.runtime.run import (
    OnToken,
    Run,
    by_falling_gate,
    check_finite,
    ends,
    forced_routing,
    prompt_rows,
    recorded_trace,
    spans,
)
from specmd_jax.moe.runtime.store import DEVICE, StackedStore, sharding
from specmd_jax.setting import Setting
from specmd_jax.types import Trace

AHEAD = 4
"""Passes that may be started beyond the last token known, where a token may end the request."""

Layers = list[list[list[tuple[int, ...]]]]
"""Layer numbers of the model, [segment][span][layer of the span]: those of its repeats."""


class Fused:
    """The fused engine; see the module. Arguments, `generate` and errors are those of
    `specmd_jax.moe.layerwise.engine.Offloaded`.

    Args:
        store: all experts, stacked (`store.stack`).
    """

    def __init__(
        self,
        cfg: MoEConfig,
        params: Params,
        store: StackedStore,
        setting: Setting | None = None,
        /,
        *,
        name: str | None = None,
        keep_logits: bool = False,
        **changes: Any,
    ):
        self.cfg, self.params, self.store, self.name = cfg, params, store, name or cfg.family
        self.policy = make_policy(cfg, store.expert_bytes, setting, **changes)
        self.staging = max(cfg.top_k, 2)  # a prefill holds two experts beside its slots
        if not self.policy.policies.miss.fetches_all:
            raise SpecmdError(
                f"miss {self.policy.mix.miss.name!r}: the fused engine fetches every expert at its one precision; "
                "the layerwise engine runs every rule"
            )
        numbers, fns, tail = numbers_of(self.policy), build(cfg).layers, spans(cfg)[-1]
        self.capacity_slots = min(slots_of(self.policy, numbers), len(cfg.moe_layers) * cfg.experts)
        self._layers, self._tail = segments(cfg), tail
        self._form = Form(
            cfg=cfg,
            setup=self.policy.setup,
            segments=tuple(
                Segment(tuple(tuple(fns[same[0]] for same in span) for span in segment), len(segment[0][0]))
                for segment in self._layers
            ),
            tail=tuple(fns[layer] for layer in tail),
            ahead=self.policy.needs_ahead,
            logits=keep_logits,
        )
        self._fixed = Fixed(
            embed=params["embed"],
            head=params["head"],
            segments=_stacked(self._layers, params["layers"]),
            tail=tuple(params["layers"][layer] for layer in tail),
            host=store.stack,
            numbers=jax.device_put(numbers),
            traced=jax.device_put(self.policy.mix.traced()),
        )

    def generate(
        self,
        prompts: Sequence[npt.ArrayLike],
        steps: int,
        replay: Trace | None = None,
        keep_logits: bool = False,
        on_token: OnToken | None = None,
    ) -> Run:
        """As `Offloaded.generate`, but for ``text``. Another thread calls ``on_token``; passes that were started before
        it ended the request are run and left out of the record."""
        rows = prompt_rows(self.cfg, prompts, steps)
        fed = [row.size + steps - 1 for row in rows]
        forced = None if replay is None else forced_routing(self.cfg, replay, fed)
        live, at = jax.device_put(self._begin(), sharding(DEVICE)), 0
        tokens, records, ttft_s, tpot_s, visit_s, logits = [], [], [], [], [], []
        for number, row in enumerate(rows):
            routing: list[ForcedRouting | None] = [None] * steps
            if forced is not None:
                cuts = np.cumsum([at, row.size, *[1] * (steps - 1)])
                routing = [_routing([part[a:b] for part in forced]) for a, b in itertools.pairwise(cuts)]
            at += fed[number]
            hear = None if on_token is None else _Hearing(on_token, number, len(rows), steps)
            live, made, arrivals, begin_s = self._serve(live, row, fed[number], routing, hear)
            for step, arrival in enumerate(arrivals):
                check_finite(self.name, number, step, arrival.good)
            took_s = np.diff([begin_s, *(arrival.at_s for arrival in arrivals)])
            tokens.append([arrival.token for arrival in arrivals])
            ttft_s.append(float(took_s[0]))
            tpot_s.append(float(took_s[1:].mean()) if len(arrivals) > 1 else float("nan"))
            visit_s.append(np.repeat(took_s, len(self.cfg.moe_layers)) / len(self.cfg.moe_layers))
            records.extend(jax.device_get([end.record for end in made]))
            if keep_logits:
                logits.append(np.stack([np.asarray(end.logits) for end in made]))
        columns = [_column(records, name) for name in ("ids", "gates", "ahead", "logits")]
        columns[:2] = by_falling_gate(columns[0], columns[1])
        trace = recorded_trace(
            self.name, "specmd_jax.moe.fused.engine", self.cfg, self.params, self.store.expert_bytes,
            [row.size for row in rows], len(tokens[-1]), columns,
        )  # fmt: skip
        most = max(int(r.held.max()) + (0 if r.ids.shape[1] == 1 else 2) for r in records)
        return Run(
            tokens=np.array(tokens, np.int32),
            trace=trace,
            decisions=tuple(decision for record in records for decision in _decisions(record)),
            visit_s=np.concatenate(visit_s),
            ttft_s=np.array(ttft_s),
            tpot_s=np.array(tpot_s),
            logits=np.stack(logits) if keep_logits else None,
            most_resident=most,
            most_bytes=most * self.store.expert_bytes,
        )

    def _serve(
        self,
        live: Live,
        prompt: npt.NDArray[np.int32],
        length: int,
        routing: list[ForcedRouting | None],
        hear: _Hearing | None,
    ) -> tuple[Live, list[Made], list[Arrival], float]:
        """Runs the passes of one request: what they made up to its last token, when each token arrived, and when the
        request began."""
        # all arrays bound to the device from the start, as a program's results are: a pass is then compiled once
        token, request = jax.device_put((prompt[None], self._request(length)), sharding(DEVICE))
        jax.block_until_ready((live, request, token, routing))
        made: list[Made] = []
        # starting a program may take as long as running it, so another thread waits for the tokens and notes the time
        with ThreadPoolExecutor(1) as reader:
            begin_s, arrivals = time.perf_counter(), []
            for given in routing:
                live, request, end = program.run(self._form, self._fixed, live, request, token, given)
                arrivals.append(reader.submit(_arrival, end.packed, hear))
                made.append(end)
                token = end.token
                if hear is not None and len(made) > AHEAD:
                    arrivals[-AHEAD].result()
                    if hear.last is not None:
                        break
        count = len(made) if hear is None or hear.last is None else hear.last + 1
        return live, made[:count], [arrival.result() for arrival in arrivals[:count]], begin_s

    def _begin(self) -> Live:
        """Gives an empty cache."""
        cfg, slots = self.cfg, self.capacity_slots + self.staging
        return Live(
            state=begin_state(self._form.setup, self._fixed.numbers, self._fixed.traced),
            slots=jax.tree.map(lambda leaf: jnp.zeros((slots + 1, *leaf.shape[1:]), leaf.dtype), self.store.stack),
            owner=jnp.full(slots, -1, jnp.int32),
            slot_of=jnp.full(len(cfg.moe_layers) * cfg.experts, -1, jnp.int32),
            visit=jnp.int32(0),
            pass_id=jnp.int32(0),
        )

    def _request(self, length: int) -> Request:
        caches = init_cache(self.cfg, 1, length)
        return Request(
            start=jnp.zeros(1, jnp.int32),
            caches=_stacked(self._layers, caches),
            tail=tuple(caches[layer] for layer in self._tail),
        )


class Arrival(NamedTuple):
    """A token on the host."""

    token: int
    good: int
    at_s: float


class _Hearing:
    """Tells a listener of one request's tokens in their order, until it ends the request."""

    def __init__(self, on_token: OnToken, request: int, requests: int, steps: int):
        self._on_token, self._request, self._of = on_token, request, (requests, steps)
        self._step = 0
        self.last: int | None = None  # the step that ended the request early

    def __call__(self, arrival: Arrival) -> None:
        step, self._step = self._step, self._step + 1
        if self.last is None and arrival.good and ends(self._on_token, (self._request, step), self._of, arrival.token):
            self.last = step


def _arrival(packed: jax.Array, hear: _Hearing | None) -> Arrival:
    token, good = np.asarray(packed).tolist()
    arrival = Arrival(token, good, time.perf_counter())
    if hear is not None:
        hear(arrival)
    return arrival


def segments(cfg: MoEConfig) -> Layers:
    """Cuts the model into what comes once and what is repeated to its last gate, with as few layers to compile as can
    be."""
    fns, stretches = build(cfg).layers, spans(cfg)[:-1]
    kinds = [tuple(fns[layer] for layer in span) for span in stretches]

    def repeats(lead: int, period: int) -> bool:
        rest = kinds[lead:]
        return len(rest) % period == 0 and rest[period:] == rest[:-period]

    count = len(stretches)
    choices = [(a, p) for a in range(count) for p in range(1, count - a + 1) if repeats(a, p)]
    lead, period = min(choices, key=lambda choice: (sum(choice), choice))
    once: Layers = [[[(layer,) for layer in span] for span in stretches[:lead]]] if lead else []
    again = [list(zip(*stretches[lead + at :: period], strict=True)) for at in range(period)]
    return [*once, again]


def _stacked(layers: Layers, rows: Any) -> tuple[Any, ...]:
    """Gives what ``rows`` holds for each layer of the model, stacked over the repeats."""
    return tuple(
        tuple(tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(rows[n] for n in same)) for same in span)
              for span in segment)
        for segment in layers
    )  # fmt: skip


def _routing(columns: list[npt.NDArray[Any]]) -> ForcedRouting:
    """Gives columns [T, L, ...] of one pass, on the device."""
    ids, gates, *ahead = (jnp.asarray(np.ascontiguousarray(column.swapaxes(0, 1))) for column in columns)
    return ForcedRouting(ids, gates, ahead[0] if ahead else None)


def _column(records: list[Record], name: str) -> Any:
    """Gives a column of the trace, [N, L, ...], or None where it was not recorded."""
    rows = [getattr(record, name) for record in records]
    return None if rows[0] is None else np.concatenate([row.swapaxes(0, 1) for row in rows])


def _decisions(record: Record) -> list[Decision]:
    return [jax.tree.map(lambda leaf, n=n: leaf[n], record.decision) for n in range(record.held.shape[0])]


def beside(cfg: MoEConfig, prompt: int, steps: int) -> Beside:
    """Gives what the device holds for a prompt of so many tokens and so many steps, beside the cache's experts."""
    positions, layers = prompt + steps - 1, len(cfg.moe_layers)
    spec, caches = dense_spec(cfg), cache_bytes(cfg, positions)
    stacked = range(cfg.layers - len(spans(cfg)[-1]))  # held a second time
    decision = layers * cfg.experts + 12 * cfg.experts + 4 * layers  # of one visit, in the record
    return Beside(
        dense_bytes=tree_bytes(spec) + sum(tree_bytes(spec["layers"][layer]) for layer in stacked),
        cache_bytes=caches,
        record_bytes=steps * (layers * decision + 4 * cfg.vocabulary) + 12 * positions * layers * cfg.top_k,
        work_bytes=max(work_bytes(cfg, prompt, positions), caches),  # caches are made, then stacked
        experts=max(cfg.top_k, 2) + 1 + 2,  # staging, the slot that is nobody's, two on their way in a prefill
    )
