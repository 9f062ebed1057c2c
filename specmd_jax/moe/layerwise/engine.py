"""A model whose experts live in host memory, run layer by layer: the device holds as many as the cache policy keeps.

`Offloaded.generate` stops at every gate, reads the chosen ids back, copies the experts that are missing, and lets the
simulator's own step (`specmd_jax.moe.runtime.decider`) say which leave and which to prefetch. Its text equals the
all-resident model's at every capacity and policy (README.md says for which models and machines bit for bit), and its
events equal `specmd_jax.replay.step` on the trace it records.

The slots are device arrays, one set an expert, so a copy is one transfer into its final place. Copies go over the link
first come, first served. One decoded token's experts run in one program when all have arrived; a prefill runs them one
after the other as they arrive, so a demand larger than the cache passes through. While a visit is under way its missing
experts take places beyond the capacity: `staging` of them, which is one token's demand.

A miss rule other than `fetch` runs as `specmd_jax.moe.layerwise.visit` says, on experts that the store holds at the
precisions that the rule chooses from. Its text is then not the all-resident model's; `measure.quality` tells how far it
is off.

Left to the simulator: routing other than the model's own, oracles, batches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.layerwise import programs
from specmd_jax.moe.layerwise.programs import Gated, Inputs, Kind, Token
from specmd_jax.moe.layerwise.visit import Stop, Visits
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params, build, init_cache
from specmd_jax.moe.runtime.decider import Decider, GateOutput
from specmd_jax.moe.runtime.policy import make_policy
from specmd_jax.moe.runtime.run import (
    Run,
    by_falling_gate,
    check_finite,
    forced_routing,
    prompt_rows,
    recorded_trace,
    spans,
    text_rows,
)
from specmd_jax.moe.runtime.slots import warm
from specmd_jax.moe.runtime.store import PinnedStore
from specmd_jax.types import Trace


class Offloaded:
    """The layerwise engine; see the module.

    Args:
        params: dense parameters on the device; ``store``: all experts, pinned, at one or more precisions.
        eviction, capacity, miss, scope, prefetch, selection, overfetch, percentile, horizon, may_evict, numbers: as in
            `specmd_jax.run`; the precisions are the store's. Prefetching is limited by how many experts the selection
            asks for, not by time. `substitute` sees the router's own logits, also where its routing is replaced.
        name: the model's name in the recorded trace; None: its family. A name of `specmd_jax.specs.models.MODELS`
            gives the simulator that model's computation.
        keep_logits: also record the router's logits.

    Raises:
        SpecmdError: a setting that makes no sense for a running model; see `runtime.policy.make_policy`.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        params: Params,
        store: PinnedStore,
        eviction: str = "lru",
        capacity: str | int = "25%",
        *,
        name: str | None = None,
        keep_logits: bool = False,
        **policy: Any,
    ):
        self.cfg, self.params, self.store, self.name = cfg, params, store, name or cfg.family
        self.policy = make_policy(cfg, store.level_bytes, eviction, capacity, **policy)
        self.decider = Decider(self.policy)
        self.staging = cfg.top_k
        warm(store, cfg.top_k)
        hosts = self.policy.mix.miss == "cpu"
        if hosts:
            _ = store.host_experts  # made, or refused, before the first run
        reads = self.policy.needs_ahead, keep_logits or self.policy.needs_logits, hosts
        self._kinds, self._inputs, self._spans = _spans(params, store, *reads)
        self._first = programs.first(self._kinds[0])
        self._advance, self._here = [], []  # the program behind each gate, and what it needs of the gate's own layer
        for kind, layer in zip(self._kinds[1:], cfg.moe_layers, strict=True):
            shared = build(cfg).layers[layer].shared
            self._advance.append(programs.advance(kind, shared))
            self._here.append(None if shared is None else params["layers"][layer])

    @property
    def capacity_slots(self) -> int:
        """Experts at the highest precision that the cache holds, over all layers."""
        return self.decider.slots

    def generate(
        self,
        prompts: Sequence[npt.ArrayLike],
        steps: int,
        replay: Trace | None = None,
        keep_logits: bool = False,
        text: npt.ArrayLike | None = None,
    ) -> Run:
        """Greedy text of each prompt in turn, starting from an empty cache that later prompts find as it was left.

        Args:
            prompts: R rows of token ids, of any lengths (each length is compiled once).
            steps: tokens a prompt, S >= 1.
            replay: a trace of the same L, E and K whose routing is used in place of the model's own, request by
                request (and its `ahead` scores for the prefetcher, if it has them): to time a shape with real locality
                but made-up weights.
            keep_logits: also return the logits of every token.
            text: [R, S] tokens to go on with in place of those that the model makes (the last of a row is not fed).

        Raises:
            SpecmdError: bad prompts or text; a replayed trace of other shape, or too short; logits that are not finite.
        """
        rows = prompt_rows(self.cfg, prompts, steps)
        forced = None if replay is None else forced_routing(self.cfg, replay, [row.size + steps - 1 for row in rows])
        given = [None] * len(rows) if text is None else text_rows(self.cfg, text, len(rows), steps)
        self.decider.reset()
        generation = _Generation(self, steps, keep_logits)
        at = 0
        for row, goes_on in zip(rows, given, strict=True):
            fed = row.size + steps - 1
            generation.request(row, None if forced is None else [part[at : at + fed] for part in forced], goes_on)
            at += fed
        return generation.finish([row.size for row in rows])


class _Generation:
    """One `generate`: what is recorded, and the passes."""

    def __init__(self, engine: Offloaded, steps: int, keep_logits: bool):
        self.engine, self.steps, self.keep_logits = engine, steps, keep_logits
        self.visits = Visits(engine.decider, engine.store, engine._kinds[0], engine.staging)
        self.passes = 0
        self.gates: list[list[GateOutput]] = []  # [P][L]
        self.visit_s: list[float] = []
        self.host_s: list[list[float]] = []
        self.tokens: list[list[int]] = []
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        self.logits: list[Any] = []

    def request(
        self,
        prompt: npt.NDArray[np.int32],
        forced: list[npt.NDArray[Any]] | None,
        text: npt.NDArray[np.int32] | None,
    ) -> None:
        engine, cfg = self.engine, self.engine.cfg
        caches = list(init_cache(cfg, 1, prompt.size + self.steps - 1))
        fed = [prompt.size] + [1] * (self.steps - 1)
        ends = np.cumsum(fed).tolist()
        # small arrays go to the device before the clock starts: each would cost a transfer in the middle of a pass
        starts = jax.device_put([np.full(1, end - n, np.int32) for end, n in zip(ends, fed, strict=True)])
        routing: list[_ForcedPass | None] = [None] * self.steps
        if forced is not None:
            routing = [_ForcedPass([part[end - n : end] for part in forced]) for end, n in zip(ends, fed, strict=True)]
        given = None if text is None else jax.device_put([text[None, step : step + 1] for step in range(self.steps)])
        token, good = jnp.asarray(prompt[None]), jnp.ones(1, jnp.int32)
        jax.block_until_ready((caches, token, good, starts, given))
        chosen = []
        self.tokens.append([])
        arrivals: list[float] = []
        times: list[float] = []
        begin = time.perf_counter()
        for step, start in enumerate(starts):
            state = engine._first(
                engine._inputs[0], engine.params["embed"], token, good, self._caches(caches, 0), start
            )
            end = self._pass(state, fed[step], start, caches, routing[step], arrivals if step else None, times)
            token, good = end.token if given is None else given[step], end.good
            chosen.append(end.token)
            if self.keep_logits:
                self.logits.append(np.asarray(end.logits))
        self._emit(int(np.asarray(token)[0, 0]), int(np.asarray(good)[0]), arrivals)
        if given is not None:
            self.tokens[-1] = [int(np.asarray(one)[0, 0]) for one in chosen]
        self.visit_s.extend(np.diff([*times, arrivals[-1]]).tolist())
        self.ttft_s.append(arrivals[0] - begin)
        self.tpot_s.append((arrivals[-1] - arrivals[0]) / (self.steps - 1) if self.steps > 1 else float("nan"))

    def _emit(self, token: int, good: int, arrivals: list[float]) -> None:
        request, step = len(self.tokens) - 1, len(self.tokens[-1])
        check_finite(self.engine.name, request, step, good)
        self.tokens[-1].append(token)
        arrivals.append(time.perf_counter())

    def _caches(self, caches: list[Any], span: int) -> tuple[Any, ...]:
        return tuple(caches[layer] for layer in self.engine._spans[span])

    def _pass(
        self,
        state: Gated,
        tokens: int,
        start: jax.Array,
        caches: list[Any],
        forced: _ForcedPass | None,
        arrivals: list[float] | None,
        times: list[float],
    ) -> Token:
        """One forward pass from its first gate; ``arrivals``: where to note the token that it was fed."""
        engine, decode = self.engine, arrivals is not None
        self.gates.append([])
        for layer in range(len(engine._kinds) - 1):
            kind = engine._kinds[layer]
            for number, cache in zip(engine._spans[layer], state.caches, strict=True):
                caches[number] = cache
            asked = time.perf_counter()
            ids, gates, ahead, logits, hidden, fed = programs.read_back(np.asarray(state.packed), kind, tokens)
            times.append(time.perf_counter())
            if arrivals is not None and layer == 0:
                self._emit(int(fed[0]), int(fed[1]), arrivals)
            routed = state.ids, state.gates
            if forced is not None:
                routed, (ids, gates) = forced.device[layer], forced.host[layer]
                if ahead is not None and forced.ahead is not None:
                    ahead = forced.ahead[:, layer]
            gate = GateOutput(*by_falling_gate(ids, gates), ahead, logits)
            stop = Stop(layer, self.passes, decode, gate, ids, hidden)
            ids, source = self.visits.run(stop, state.h, routed[0])
            chosen = time.perf_counter()
            state = engine._advance[layer](
                engine._inputs[layer + 1],
                engine._here[layer],
                state.x,
                state.h,
                ids,
                routed[1],
                source,
                self._caches(caches, layer + 1),
                start,
            )
            started = time.perf_counter()
            self.visits.after()
            self.gates[-1].append(gate)
            if decode:
                marks = asked, times[-1], chosen, started, time.perf_counter()
                self.host_s.append([b - a for a, b in itertools.pairwise(marks)])
        assert isinstance(state, Token)
        for number, cache in zip(engine._spans[-1], state.caches, strict=True):
            caches[number] = cache
        self.passes += 1
        return state

    def finish(self, prompt_lengths: list[int]) -> Run:
        self.visits.settle()
        engine, cfg = self.engine, self.engine.cfg
        columns = []
        for number in range(4):
            # [P][L] of [T, ...]: ids, gates, ahead, logits
            rows = [[gate[number] for gate in row] for row in self.gates]
            if rows[0][0] is None:
                columns.append(None)
                continue
            for row in rows:
                if row[-1] is None:  # the last layer has no next gate to ask
                    row[-1] = np.zeros_like(row[0])
            stacks = [np.stack([part for part in row if part is not None], axis=1) for row in rows]
            columns.append(np.concatenate(stacks))  # [N, L, ...]
        source = "specmd_jax.moe.layerwise.engine"
        trace = recorded_trace(
            engine.name, source, cfg, engine.params, engine.store.expert_bytes, prompt_lengths, self.steps, columns
        )
        if len(engine.store.levels) > 1:
            trace.meta.update(precisions=list(engine.store.precisions), level_bytes=list(engine.store.level_bytes))
        shape = len(prompt_lengths), self.steps, -1
        return Run(
            tokens=np.array(self.tokens, np.int32),
            trace=trace,
            decisions=tuple(self.visits.decisions),
            visit_s=np.array(self.visit_s),
            ttft_s=np.array(self.ttft_s),
            tpot_s=np.array(self.tpot_s),
            logits=np.stack(self.logits).reshape(shape) if self.keep_logits else None,
            most_resident=self.visits.slots.most,
            most_bytes=self.visits.slots.most_bytes,
            host_s=np.array(self.host_s).reshape(-1, 4),
        )


class _ForcedPass:
    """The routing of one pass, given: [T, L, K] ids and gates and maybe [T, L, E] ahead scores."""

    def __init__(self, columns: list[npt.NDArray[Any]]):
        layers = range(columns[0].shape[1])
        self.host = [(columns[0][:, layer], columns[1][:, layer]) for layer in layers]
        self.device = jax.device_put(self.host)
        self.ahead = columns[2] if len(columns) == 3 else None


def _spans(
    params: Params, store: PinnedStore, ahead: bool, logits: bool, hidden: bool
) -> tuple[list[Kind], list[Inputs], list[tuple[int, ...]]]:
    """The programs' static parts and arrays: of L stretches that end at a gate, and of what is left behind the last."""
    cfg = store.cfg
    fns, routed, cut = build(cfg).layers, cfg.moe_layers, spans(cfg)
    kinds, inputs = [], []
    for number, span in enumerate(cut):
        follows = routed[number + 1] if ahead and number + 1 < len(routed) else None
        kinds.append(
            Kind(
                cfg=cfg,
                layers=tuple(fns[layer] for layer in span),
                routed=number < len(routed),
                ahead=None if follows is None else fns[follows].route,
                logits=logits,
                hidden=hidden,
            )
        )
        inputs.append(
            Inputs(
                layers=tuple(params["layers"][layer] for layer in span),
                ahead=None if follows is None else params["layers"][follows],
                head=params["head"] if number == len(routed) else None,
            )
        )
    return kinds, inputs, cut
