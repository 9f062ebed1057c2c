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
policies see them so. Under cache-aware routing the policy chooses from the router's logits before the visit
(`replay.routing.choose`), and the model's rule weighs what it chose; the trace has the router's own choice.

Requests run one after the other, or in a batch (`Setting.batch`): `serving` plans the passes. A decode pass of a batch
is one program for any number of its requests, by the rules and kernels of several tokens.

Experts of several precisions, which miss rules choose from, share one array of pages (`pages`, `levels`), and neither
policy nor experts are kernels then.

This engine leaves to the simulator what the layerwise one does but for batches, and miss rules that run experts on the
host. No clock runs inside a program: `Run.visit_s` shares a pass's time out evenly among its visits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused import pages, placing, program, serving
from specmd_jax.moe.fused.arrays import (
    Block,
    Fixed,
    Form,
    Functions,
    Kernels,
    Live,
    Record,
    Request,
    Segment,
)
from specmd_jax.moe.fused.held import held
from specmd_jax.moe.kernels import decode, many_tokens, one_token, placed, policy
from specmd_jax.moe.kernels.decode import AttendRoute
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import Net, Params, build, init_cache
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime.decider import Decision, begin_routing
from specmd_jax.moe.runtime.memory import Beside, cache_bytes, dense_spec, work_bytes
from specmd_jax.moe.runtime.policy import Policy, make_policy, numbers_of
from specmd_jax.moe.runtime.run import (
    OnToken,
    Run,
    forced_routing,
    prompt_rows,
    recorded_trace,
    spans,
    text_rows,
)
from specmd_jax.moe.runtime.store import DEVICE, StackedStore, sharding
from specmd_jax.setting import Setting
from specmd_jax.types import Trace

PARTS = ("policy", "experts", "dense")
NO_KERNELS = dict.fromkeys(PARTS, "no kernels were asked for, or the device is no GPU")

Layers = list[list[list[tuple[int, ...]]]]
"""Layer numbers of the model, [segment][span][layer of the span]: those of its repeats."""


class Fused:
    """The fused engine; see the module. Arguments, `generate` and errors are those of
    `specmd_jax.moe.layerwise.engine.Offloaded`.

    Args:
        store: all experts, stacked (`store.stack`), at one or more precisions.
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
        self.policy = make_policy(cfg, store.level_bytes, setting, **changes)
        miss = self.policy.policies.miss
        if miss.hosts:
            raise SpecmdError(
                f"miss {self.policy.mix.miss.name!r}: the fused engine runs all experts on the device; the layerwise "
                "engine runs every rule"
            )
        frame = placed.make_frame(self.policy, cfg.top_k)
        self.capacity_slots, self.staging = frame.capacity, frame.staging
        gpu = jax.default_backend() == "gpu"
        stack = None if store.layout else store.stack
        self.reasons = why_not(cfg, self.policy, stack) if kernels or (gpu and kernels is None) else NO_KERNELS
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
            reroutes=self.policy.reroutes,
            reads_logits=miss.needs_logits,
            logits=keep_logits or self.policy.needs_logits,
            pool=None if store.layout is None else pages.make_pool(store.layout, self.policy, frame.staging),
        )
        self._fixed = Fixed(
            embed=params["embed"],
            head=params["head"],
            segments=_stacked(self._layers, params["layers"]),
            tail=tuple(params["layers"][layer] for layer in self._tail),
            host=_readable(store, used),
            numbers=jax.device_put(numbers_of(self.policy)),
            mix=jax.device_put(self.policy.visits.traced()),
            routing=jax.device_put(self.policy.mix.traced().routing),
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
        text: npt.ArrayLike | None = None,
        on_token: OnToken | None = None,
    ) -> Run:
        """As `Offloaded.generate`, and batches. Another thread calls ``on_token``; passes that were
        started before it ended the request are run and left out of the record.

        In a batch all prompts wait from the beginning and take places in their order. Key-value caches have the length
        of the longest request: each length of a prompt is compiled once, and the decode pass once. Trace and ``replay``
        are request by request all the same, and the decisions of the run are in the order of its passes.

        Raises:
            SpecmdError: as `Offloaded.generate`, and for a batch that `serving.plan` refuses.
        """
        rows, batch = prompt_rows(self.cfg, prompts, steps), self.policy.batch
        sessions = serving.plan(self.cfg, [row.size for row in rows], steps, batch)
        forced = (
            None
            if replay is None
            else forced_routing(self.cfg, replay, [row.size + steps - 1 for row in rows], self.policy.reroutes)
        )
        goes_on = text_rows(self.cfg, text, len(rows), steps, on_token)
        hear = None if on_token is None else serving.Hearing(on_token, len(rows), steps)
        run, served = functools.partial(program.run, self._form, self._fixed), []
        live = jax.device_put(self._begin(), sharding(DEVICE))
        for passes in sessions:
            request = self._request(max(rows[own.requests[0]].size for own in passes) + steps - 1)
            given = serving.feeds(passes, rows, batch, forced, goes_on)
            live, found = serving.serve(run, live, request, passes, given, keep_logits, hear)
            serving.check_served(self.name, found)
            served.append(found)
        made, columns = serving.text_of(served, len(rows), keep_logits), serving.columns_of(served)
        trace = recorded_trace(
            self.name, "specmd_jax.moe.fused.engine", self.cfg, self.params, self.store,
            [row.size for row in rows], made.tokens.shape[1], columns,
        )  # fmt: skip
        records = [record for found in served for record in found.records]
        told, form = self._decisions(records), self._form
        kept = [
            held(decision, layer, record.ids.shape[1], form.frame, form.kernels.experts, self.store.level_bytes)
            for record, row in zip(records, told, strict=True)
            for layer, decision in enumerate(row)
        ]
        return Run(
            **made._asdict(),
            trace=trace,
            decisions=tuple(itertools.chain(*told)),
            visit_s=serving.visit_s_of(served, len(self.cfg.moe_layers)),
            most_resident=max(count for count, _ in kept),
            most_bytes=max(size for _, size in kept),
            batch=batch,
        )

    def _decisions(self, records: list[Record]) -> list[list[Decision]]:
        """Gives the decisions of each pass."""
        layers = len(self.cfg.moe_layers)
        if self._form.kernels.policy:
            told = placed.decisions(self._form.frame.setup, [record.note for record in records])
            return [told[at : at + layers] for at in range(0, len(told), layers)]
        return [[jax.tree.map(lambda leaf, n=n: leaf[n], record.note) for n in range(layers)] for record in records]

    def _begin(self) -> Live:
        """Gives an empty cache."""
        form, given = self._form, (self._form.frame, self._fixed.numbers, self._fixed.mix)
        if form.pool is None:
            cache = (policy.begin if form.kernels.policy else placing.begin)(*given)
            slots = jax.tree.map(
                lambda leaf: jnp.zeros((form.frame.slots, *leaf.shape[1:]), leaf.dtype), self.store.stack
            )
        else:
            cache, slots = pages.begin(form.pool, *given), pages.blank(form.pool)
        memories = cache, begin_routing(form.frame.setup.layers, self._fixed.routing)
        # nothing shared and nothing weakly typed: it is given away, and a pass is compiled once
        cache, routing = jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), memories)
        return Live(
            cache=cache,
            routing=routing,
            slots=slots,
            pass_id=jnp.int32(0),
        )

    def _request(self, length: int) -> Request:
        caches = init_cache(self.cfg, self.policy.batch, length)
        return Request(
            start=jnp.zeros(self.policy.batch, jnp.int32),
            caches=_stacked(self._layers, caches),
            tail=tuple(caches[layer] for layer in self._tail),
        )


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


def _readable(store: StackedStore, used: Kernels) -> Any:
    """Gives the host's experts where what runs them can read them: interpreted kernels take arrays of one memory
    only."""
    if store.layout is not None:
        return store.levels
    return jax.device_put(store.stack, sharding(DEVICE)) if used.experts and used.interpret else store.stack


def why_not(cfg: MoEConfig, setting: Policy, experts: Expert | None) -> dict[str, str]:
    """Gives the parts of a pass that no kernel serves, with the reasons; ``experts`` None: they lie in pages."""
    in_pages = f"experts at {len(setting.sizes.level_bytes)} precisions lie in pages, they read experts at one"
    found = {
        "policy": policy.serves(setting),
        "experts": one_token.serves(experts) or many_tokens.serves(cfg, experts) if experts else in_pages,
        "dense": decode.serves(cfg),
    }
    if setting.batch > 1:
        found["dense"] = f"{setting.batch} requests are decoded together, and it runs one token"
    return {part: reason for part, reason in found.items() if reason}


def beside(cfg: MoEConfig, prompt: int, steps: int, batch: int = 1) -> Beside:
    """Gives what the device holds for a prompt of so many tokens and so many steps, beside the cache's experts; or for
    any number of such prompts of which ``batch`` are decoded together."""
    positions, layers = prompt + steps - 1, len(cfg.moe_layers)
    spec, caches = dense_spec(cfg), batch * cache_bytes(cfg, positions)
    stacked = range(cfg.layers - len(spans(cfg)[-1]))  # held a second time
    decision = layers * cfg.experts + 12 * cfg.experts + 4 * layers  # of one visit, in the record
    passes, fed = steps, positions
    if batch > 1:  # each may be a prompt
        passes, fed = serving.HELD + 1, (serving.HELD + 1) * max(prompt, batch)
    return Beside(
        dense_bytes=tree_bytes(spec) + sum(tree_bytes(spec["layers"][layer]) for layer in stacked),
        cache_bytes=caches,
        record_bytes=passes * (layers * decision + 4 * batch * cfg.vocabulary) + 12 * fed * layers * cfg.top_k,
        # caches are made, then stacked
        work_bytes=max(work_bytes(cfg, max(prompt, batch), positions), caches),
        experts=max(cfg.top_k, 2) + 2,  # staging, and two on their way in a prefill without kernels
    )
