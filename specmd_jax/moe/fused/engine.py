"""A model whose experts live in host memory, one program per pass: nothing is read back before the next token is made.

`Fused.generate` does what `specmd_jax.moe.layerwise.engine.Offloaded.generate` does, with the cache's state on the
device. One program (`program.run`) is a whole pass: attention, router, the simulator's own step, copies of the experts
that are missing out of the pinned stack into free slots, the experts out of their slots, and so on through the layers
to the next token, which feeds the next program. The host reads the tokens while the programs go on, and the rest of
what it wants to know (trace, events) after the request.

The slots are one array per matrix, [C + S, ...], given from program to program: C is the capacity, S one token's
demand beyond it (`staging`). A pass is made of kernels where they serve (`Fused.reasons` says why not): one decides the
visit (`kernels.policy`), two compute the experts, the missing ones while they arrive (`kernels.one_token`,
`many_tokens`), and few run what is dense in a pass of one token (`kernels.decode`). The rest, or everything on a device
that is no GPU, are XLA's operations: `placing` decides, `streaming` copies and computes.

Equal layers are one loop, so that 48 layers compile as fast as 2; the dense layers are held stacked for it, a second
time beside ``params``. Gates and `ahead` scores are recorded with 22 bits of mantissa (`experts.uncontracted`), and the
policies see them so.

This engine leaves to the simulator what the layerwise one does, and miss rules that choose among precisions or run
experts on the host. No clock runs inside a program: `Run.visit_s` shares a pass's time out evenly among its visits.
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
from specmd_jax.moe.fused import placing, program
from specmd_jax.moe.fused.arrays import (
    Block,
    Fixed,
    ForcedRouting,
    Form,
    Functions,
    Kernels,
    Live,
    Made,
    Record,
    Request,
    Segment,
)
from specmd_jax.moe.kernels import decode, many_tokens, one_token, placed, policy
from specmd_jax.moe.kernels.decode import AttendRoute
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import Net, Params, build, init_cache
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime.decider import Decision
from specmd_jax.moe.runtime.memory import Beside, cache_bytes, dense_spec, work_bytes
from specmd_jax.moe.runtime.policy import Policy, make_policy, numbers_of
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
from specmd_jax.replay.totals import FETCHED, PREFETCHED, REUSED, SUBSTITUTED
from specmd_jax.setting import Setting
from specmd_jax.types import Trace

AHEAD = 4
"""Passes that may be started beyond the last token known, where a token may end the request."""

PARTS = ("policy", "experts", "dense")
NO_KERNELS = dict.fromkeys(PARTS, "no kernels were asked for, or the device is no GPU")

Layers = list[list[list[tuple[int, ...]]]]
"""Layer numbers of the model, [segment][span][layer of the span]: those of its repeats."""


class Fused:
    """The fused engine; see the module. Arguments, `generate` and errors are those of
    `specmd_jax.moe.layerwise.engine.Offloaded`.

    Args:
        store: all experts, stacked (`store.stack`).
        kernels: whether to use the kernels that serve. None: on a GPU; elsewhere they are interpreted, which is slow.

    Attributes:
        reasons: part of a pass (policy, experts, dense) -> why it is made of XLA's operations; without those that are
            kernels.
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
        kernels: bool | None = None,
        **changes: Any,
    ):
        self.cfg, self.params, self.store, self.name = cfg, params, store, name or cfg.family
        self.policy = make_policy(cfg, store.expert_bytes, setting, **changes)
        miss = self.policy.policies.miss
        if miss.hosts or miss.least_levels > 1:
            raise SpecmdError(
                f"miss {self.policy.mix.miss.name!r}: the fused engine runs rules for experts at one precision on the "
                "device; the layerwise engine runs every rule"
            )
        frame = placed.make_frame(self.policy, cfg.top_k)
        self.capacity_slots, self.staging = frame.capacity, frame.staging
        gpu = jax.default_backend() == "gpu"
        self.reasons = why_not(cfg, self.policy, store.stack) if kernels or (gpu and kernels is None) else NO_KERNELS
        used = Kernels(*(part not in self.reasons for part in PARTS), interpret=not gpu)
        self._layers, self._tail = segments(cfg), spans(cfg)[-1]
        many = self._functions(build(cfg), (None,) * cfg.layers, False)
        one = many
        if used.dense:
            one = self._functions(decode.net(cfg, used.interpret), decode.attend_route_fns(cfg, used.interpret), True)
        self._form = Form(
            cfg=cfg,
            frame=frame,
            kernels=used,
            one=one,
            many=many,
            fetches_all=miss.fetches_all,
            ahead=self.policy.needs_ahead,
            reads_logits=self.policy.needs_logits,
            logits=keep_logits or self.policy.needs_logits,
        )
        self._fixed = Fixed(
            embed=params["embed"],
            head=params["head"],
            segments=_stacked(self._layers, params["layers"]),
            tail=tuple(params["layers"][layer] for layer in self._tail),
            host=_readable(store.stack, used),
            numbers=jax.device_put(numbers_of(self.policy)),
            mix=jax.device_put(self.policy.mix.traced()),
        )

    def _functions(self, net: Net, attend_route: Sequence[AttendRoute | None], stacked: bool) -> Functions:
        def span(same: Sequence[tuple[int, ...]]) -> tuple[Block, ...]:
            return tuple(Block(net.layers[layer], attend_route[layer]) for layer, *_ in same)

        return Functions(
            segments=tuple(
                Segment(tuple(span(same) for same in segment), len(segment[0][0])) for segment in self._layers
            ),
            tail=tuple(net.layers[layer] for layer in self._tail),
            head=net.head,
            stacked=stacked,
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
        told = self._decisions(records)
        most = max(
            self._most_resident(decision, layer, record.ids.shape[1])
            for record, row in zip(records, told, strict=True)
            for layer, decision in enumerate(row)
        )
        return Run(
            tokens=np.array(tokens, np.int32),
            trace=trace,
            decisions=tuple(itertools.chain(*told)),
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

    def _decisions(self, records: list[Record]) -> list[list[Decision]]:
        """Gives the decisions of each pass."""
        layers = len(self.cfg.moe_layers)
        if self._form.kernels.policy:
            told = placed.decisions(self._form.frame.setup, [record.note for record in records])
            return [told[at : at + layers] for at in range(0, len(told), layers)]
        return [[jax.tree.map(lambda leaf, n=n: leaf[n], record.note) for n in range(layers)] for record in records]

    def _most_resident(self, decision: Decision, layer: int, tokens: int) -> int:
        """Gives how many experts are on the device at most while a visit is under way."""
        outcome, level = decision.outcome, decision.level[layer]
        runs = (outcome == REUSED) | (outcome == PREFETCHED) | (outcome == FETCHED)
        runs[decision.instead[outcome == SUBSTITUTED]] = True
        leaves = runs & (level == 0)
        if tokens == 1:
            beside = int(leaves.sum())
        elif self._form.kernels.experts:
            beside = min(int((leaves & (outcome == FETCHED)).sum()), self.staging)
        else:  # one is computed while the next one comes
            beside = 2 * int((outcome == FETCHED).any())
        return int((decision.level > 0).sum()) + beside

    def _begin(self) -> Live:
        """Gives an empty cache."""
        form, slots = self._form, self._form.frame.slots
        begin = policy.begin if form.kernels.policy else placing.begin
        cache = begin(form.frame, self._fixed.numbers, self._fixed.mix)
        return Live(
            # nothing shared and nothing weakly typed: it is given away, and a pass is compiled once
            cache=jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), cache),
            slots=jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), self.store.stack),
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


def _readable(stack: Expert, used: Kernels) -> Expert:
    """Gives the host's stack where the expert kernels can read it: interpreted, they take arrays of one memory only."""
    return jax.device_put(stack, sharding(DEVICE)) if used.experts and used.interpret else stack


def _routing(columns: list[npt.NDArray[Any]]) -> ForcedRouting:
    """Gives columns [T, L, ...] of one pass, on the device."""
    ids, gates, *ahead = (jnp.asarray(np.ascontiguousarray(column.swapaxes(0, 1))) for column in columns)
    return ForcedRouting(ids, gates, ahead[0] if ahead else None)


def _column(records: list[Record], name: str) -> Any:
    """Gives a column of the trace, [N, L, ...], or None where it was not recorded."""
    rows = [getattr(record, name) for record in records]
    return None if rows[0] is None else np.concatenate([row.swapaxes(0, 1) for row in rows])


def why_not(cfg: MoEConfig, setting: Policy, experts: Expert) -> dict[str, str]:
    """Gives the parts of a pass that no kernel serves, with the reasons."""
    found = {
        "policy": policy.serves(setting),
        "experts": one_token.serves(experts) or many_tokens.serves(cfg, experts),
        "dense": decode.serves(cfg),
    }
    return {part: reason for part, reason in found.items() if reason}


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
        experts=max(cfg.top_k, 2) + 2,  # staging, and two on their way in a prefill without kernels
    )
