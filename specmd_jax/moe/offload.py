"""A model whose experts live in host memory, driven layer by layer: the device holds as many as the cache policy keeps.

`Offloaded.generate` stops at every gate, reads the chosen ids back, copies the experts that are missing, and lets the
simulator's own step (`specmd_jax.moe.keeper`) say which leave and which to prefetch. Its text equals the all-resident
model's at every capacity and policy (README.md says for which models and machines bit for bit), and its events equal
`specmd_jax.simulate` on the trace it records.

The slots are device arrays, one set an expert, so a copy is one transfer into its final place. Copies go over the link
first come, first served. One decoded token's experts run in one program when all have arrived; a prefill runs them one
after the other as they arrive, so a demand larger than the cache passes through. While a visit is under way its missing
experts take places beyond the capacity: `staging` of them, which is one token's demand.

Left to the simulator: miss rules other than `fetch`, routing other than the model's own, oracles, batches.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.moe import programs
from specmd_jax.moe.config import MoEConfig
from specmd_jax.moe.experts import Expert
from specmd_jax.moe.keeper import Decision, Gate, Keeper, make_policy
from specmd_jax.moe.model import Params, build, init_cache
from specmd_jax.moe.programs import Gated, Inputs, Kind, Token
from specmd_jax.moe.session import (
    Run,
    by_falling_gate,
    check_finite,
    forced_routing,
    prompt_rows,
    recorded_trace,
    spans,
)
from specmd_jax.moe.store import DEVICE, PinnedStore, sharding
from specmd_jax.types import Trace

_AT_ONCE = 8


@functools.cache
def _fetch(device: Any) -> Any:
    return jax.jit(lambda rows: jax.tree.map(lambda leaf: jax.device_put(leaf, device), rows))


class Slots:
    """The experts on the device, by flat id."""

    def __init__(self, store: PinnedStore):
        self._store, self._device = store, sharding(DEVICE)
        self._fetch = _fetch(self._device)
        self._held: dict[int, Expert] = {}
        self._here = np.zeros(len(store.experts) * store.cfg.experts, bool)  # the keys of `_held`
        self.most = 0

    def __contains__(self, flat: int) -> bool:
        return flat in self._held

    def __getitem__(self, flat: int) -> Expert:
        return self._held[flat]

    def __len__(self) -> int:
        return len(self._held)

    def copy(self, flats: Sequence[int], idle: bool = False) -> None:
        """Starts the copies, in this order; returns at once.

        Args:
            idle: the device has nothing to do before they have come. One program then starts them all, which takes the
                host less time; it would hold up programs that follow it.
        """
        if not flats:
            return
        experts = self._store.cfg.experts
        rows = [self._store.experts[flat // experts][flat % experts] for flat in flats]
        if idle:
            self._held.update(zip(flats, self._fetch(rows), strict=True))
        for start in range(0, 0 if idle else len(rows), _AT_ONCE):  # the first are on their way while the host goes on
            some = slice(start, start + _AT_ONCE)
            self._held.update(zip(flats[some], jax.device_put(rows[some], self._device), strict=True))
        self._here[flats] = True
        self.most = max(self.most, len(self._held))

    def keep(self, level: npt.NDArray[np.int8], but: Sequence[int] = ()) -> None:
        """Drops what `level` [L, E] does not hold, ``but`` some. Programs under way keep what they use."""
        for flat in np.flatnonzero(self._here & (level.reshape(-1) == 0)).tolist():
            if flat not in but:
                self.drop(flat)

    def drop(self, flat: int) -> None:
        del self._held[flat]
        self._here[flat] = False


class Offloaded:
    """The driven engine; see the module.

    Args:
        params: dense parameters on the device; ``store``: all experts, pinned.
        eviction, capacity, scope, prefetch, selection, overfetch, percentile, horizon, may_evict, numbers: as in
            `specmd_jax.run`. Prefetching is limited by how many experts the selection asks for, not by time.
        name: the model's name in the recorded trace; None: its family. A name of `specmd_jax.models.MODELS` gives the
            simulator that model's computation.
        keep_logits: also record the router's logits.

    Raises:
        SpecmdError: a setting that makes no sense for a running model; see `keeper.make_policy`.
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
        self.policy = make_policy(cfg, store.expert_bytes, eviction, capacity, **policy)
        self.keeper = Keeper(self.policy, store.expert_bytes)
        self.staging = cfg.top_k
        self._kinds, self._inputs, self._spans = _spans(params, store, self.policy.needs_ahead, keep_logits)
        self._part = programs.part(self._kinds[0])
        self._first = programs.first(self._kinds[0])
        self._advance, self._here = [], []  # the program behind each gate, and what it needs of the gate's own layer
        for kind, layer in zip(self._kinds[1:], cfg.moe_layers, strict=True):
            shared = build(cfg).layers[layer].shared
            self._advance.append(programs.advance(kind, shared))
            self._here.append(None if shared is None else params["layers"][layer])

    @property
    def capacity_slots(self) -> int:
        """Experts that the cache holds, over all layers."""
        return self.keeper.slots

    def generate(
        self, prompts: Sequence[npt.ArrayLike], steps: int, replay: Trace | None = None, keep_logits: bool = False
    ) -> Run:
        """Greedy text of each prompt in turn, starting from an empty cache that later prompts find as it was left.

        Args:
            prompts: R rows of token ids, of any lengths (each length is compiled once).
            steps: tokens a prompt, S >= 1.
            replay: a trace of the same L, E and K whose routing is used in place of the model's own, request by
                request (and its `ahead` scores for the prefetcher, if it has them): to time a shape with real locality
                but made-up weights.
            keep_logits: also return the logits of every token.

        Raises:
            SpecmdError: bad prompts; a replayed trace of other shape, or too short; logits that are not finite.
        """
        rows = prompt_rows(self.cfg, prompts, steps)
        forced = None if replay is None else forced_routing(self.cfg, replay, [row.size + steps - 1 for row in rows])
        self.keeper.reset()
        session = _Session(self, steps, keep_logits)
        at = 0
        for row in rows:
            fed = row.size + steps - 1
            session.request(row, None if forced is None else [part[at : at + fed] for part in forced])
            at += fed
        return session.finish([row.size for row in rows])


class _Session:
    """One `generate`: what is recorded, and the passes."""

    def __init__(self, engine: Offloaded, steps: int, keep_logits: bool):
        self.engine, self.steps, self.keep_logits = engine, steps, keep_logits
        self.slots = Slots(engine.store)
        self.passes = 0
        self.gates: list[list[tuple[Any, ...]]] = []  # [P][L] (ids, gates, ahead, logits)
        self.decisions: list[Decision] = []
        self.visit_s: list[float] = []
        self.tokens: list[list[int]] = []
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        self.logits: list[Any] = []

    def request(self, prompt: npt.NDArray[np.int32], forced: list[npt.NDArray[Any]] | None) -> None:
        engine, cfg = self.engine, self.engine.cfg
        caches = list(init_cache(cfg, 1, prompt.size + self.steps - 1))
        fed = [prompt.size] + [1] * (self.steps - 1)
        ends = np.cumsum(fed).tolist()
        # small arrays go to the device before the clock starts: each would cost a transfer in the middle of a pass
        starts = jax.device_put([np.full(1, end - n, np.int32) for end, n in zip(ends, fed, strict=True)])
        routing: list[_Forced | None] = [None] * self.steps
        if forced is not None:
            routing = [_Forced([part[end - n : end] for part in forced]) for end, n in zip(ends, fed, strict=True)]
        token, good = jnp.asarray(prompt[None]), jnp.ones(1, jnp.int32)
        jax.block_until_ready((caches, token, good, starts))
        self.tokens.append([])
        arrivals: list[float] = []
        times: list[float] = []
        begin = time.perf_counter()
        for step, start in enumerate(starts):
            state = engine._first(
                engine._inputs[0], engine.params["embed"], token, good, self._caches(caches, 0), start
            )
            end = self._pass(state, fed[step], start, caches, routing[step], arrivals if step else None, times)
            token, good = end.token, end.good
            if self.keep_logits:
                self.logits.append(np.asarray(end.logits))
        self._emit(int(np.asarray(token)[0, 0]), int(np.asarray(good)[0]), arrivals)
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
        forced: _Forced | None,
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
            ids, gates, ahead, logits, fed = programs.read_back(np.asarray(state.packed), kind, tokens)
            times.append(time.perf_counter())
            if arrivals is not None and layer == 0:
                self._emit(int(fed[0]), int(fed[1]), arrivals)
            routed = state.ids, state.gates
            if forced is not None:
                routed, (ids, gates) = forced.device[layer], forced.host[layer]
                if ahead is not None and forced.ahead is not None:
                    ahead = forced.ahead[:, layer]
            gate = Gate(*by_falling_gate(ids, gates), ahead)
            if tokens == 1:
                source = self._decode(layer, gate, ids[0], decode)
            else:
                source = self._prefill(layer, gate, state.h, routed[0], decode)
            state = engine._advance[layer](
                engine._inputs[layer + 1],
                engine._here[layer],
                state.x,
                state.h,
                *routed,
                source,
                self._caches(caches, layer + 1),
                start,
            )
            self._after()
            self.gates[-1].append((*gate, logits))
        assert isinstance(state, Token)
        for number, cache in zip(engine._spans[-1], state.caches, strict=True):
            caches[number] = cache
        self.passes += 1
        return state

    def _decide(self, layer: int, gate: Gate, decode: bool) -> Decision:
        decision = self.engine.keeper.visit(layer, self.passes, decode, gate)
        self.decisions.append(decision)
        return decision

    def _prefetches(self, layer: int, decision: Decision) -> list[int]:
        """Flat ids of the copies that the decision asks for, in order."""
        layers, experts = decision.level.shape
        order = decision.prefetched.reshape(-1)
        wanted = np.flatnonzero(order)
        wanted = wanted[np.argsort(order[wanted])]
        return ((layer + 1 + wanted // experts) % layers * experts + wanted % experts).tolist()

    def _decode(self, layer: int, gate: Gate, ids: npt.NDArray[np.int32], decode: bool) -> tuple[Expert, ...]:
        """The K experts of one token in the order of ``ids``; missing ones set off before anything is decided."""
        flats = (layer * self.engine.cfg.experts + ids).tolist()
        self.slots.copy([flat for flat in flats if flat not in self.slots], idle=True)
        experts = tuple(self.slots[flat] for flat in flats)
        if self.engine.policy.mix.prefetch == "none":
            self._pending = layer, gate, decode  # decided while the device works
            return experts
        decision = self._decide(layer, gate, decode)
        self.slots.keep(decision.level)
        # before the layer's own program: a copy that is asked for later would wait for it
        self.slots.copy(self._prefetches(layer, decision))
        return experts

    _pending: tuple[int, Gate, bool] | None = None

    def _after(self) -> None:
        """What of a visit can be done while its program runs."""
        if self._pending is not None:
            self.slots.keep(self._decide(*self._pending).level)
            self._pending = None

    def _prefill(self, layer: int, gate: Gate, h: jax.Array, ids: Any, decode: bool) -> jax.Array:
        """The experts of many tokens, one by one: the resident ones first, then as their copies arrive."""
        cfg, slots = self.engine.cfg, self.slots
        base = layer * cfg.experts
        decision = self._decide(layer, gate, decode)
        level = decision.level.reshape(-1)
        mass = np.zeros(cfg.experts, np.float32)
        np.add.at(mass, gate.ids.reshape(-1), gate.gates.reshape(-1))
        demand = np.unique(gate.ids)
        streams = not level[base + demand].all()  # larger than its pool: it passes through in id order
        order = (base + (demand if streams else demand[np.argsort(-mass[demand], kind="stable")])).tolist()
        hits = [flat for flat in order if flat in slots]
        misses = deque(flat for flat in order if flat not in slots)
        prefetches = self._prefetches(layer, decision)
        slots.keep(decision.level, but=hits)
        out = jnp.zeros((gate.ids.shape[0], cfg.top_k, cfg.width), jnp.float32)
        waiting: deque[int] = deque()

        def run(flat: int) -> None:
            nonlocal out
            out = self.engine._part(h, ids, np.int32(flat - base), slots[flat], out)
            if not level[flat]:
                slots.drop(flat)

        def copy_ahead() -> None:
            """Starts what there is room for: all of a demand that stays, `staging` of one that passes through."""
            nonlocal prefetches
            room = self.engine.staging - len(waiting) if streams else len(misses)
            ready = [misses.popleft() for _ in range(min(len(misses), room))]
            waiting.extend(ready)
            slots.copy(ready)
            if not misses and not any(not level[flat] for flat in waiting):
                slots.copy(prefetches)
                prefetches = []

        leaving = [flat for flat in hits if not level[flat]]
        for flat in leaving:  # makes room first
            run(flat)
        copy_ahead()
        for flat in hits:
            if level[flat]:
                run(flat)
        while waiting:
            run(waiting.popleft())
            copy_ahead()
        slots.copy(prefetches)
        return out

    def finish(self, prompt_lengths: list[int]) -> Run:
        engine, cfg = self.engine, self.engine.cfg
        columns = []
        for number in range(4):
            rows = [[gate[number] for gate in row] for row in self.gates]  # [P][L] of [T, ...]
            if rows[0][0] is None:
                columns.append(None)
                continue
            for row in rows:
                if row[-1] is None:  # the last layer has no next gate to ask
                    row[-1] = np.zeros_like(row[0])
            columns.append(np.concatenate([np.stack(row, axis=1) for row in rows]))  # [N, L, ...]
        source = "specmd_jax.moe.offload"
        trace = recorded_trace(
            engine.name, source, cfg, engine.params, engine.store.expert_bytes, prompt_lengths, self.steps, columns
        )
        shape = len(prompt_lengths), self.steps, -1
        return Run(
            tokens=np.array(self.tokens, np.int32),
            trace=trace,
            decisions=tuple(self.decisions),
            visit_s=np.array(self.visit_s),
            ttft_s=np.array(self.ttft_s),
            tpot_s=np.array(self.tpot_s),
            logits=np.stack(self.logits).reshape(shape) if self.keep_logits else None,
            most_resident=self.slots.most,
        )


class _Forced:
    """The routing of one pass, given: [T, L, K] ids and gates and maybe [T, L, E] ahead scores."""

    def __init__(self, columns: list[npt.NDArray[Any]]):
        layers = range(columns[0].shape[1])
        self.host = [(columns[0][:, layer], columns[1][:, layer]) for layer in layers]
        self.device = jax.device_put(self.host)
        self.ahead = columns[2] if len(columns) == 3 else None


def _spans(
    params: Params, store: PinnedStore, ahead: bool, logits: bool
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
