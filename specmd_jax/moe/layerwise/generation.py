"""One run of the layerwise engine: the passes of its requests from gate to gate, timed, and what they record."""

from __future__ import annotations

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.layerwise import programs
from specmd_jax.moe.layerwise.programs import Gated, Token
from specmd_jax.moe.layerwise.stretches import Stretches
from specmd_jax.moe.layerwise.visit import Stop, Visits
from specmd_jax.moe.model.forward import Params, init_cache
from specmd_jax.moe.runtime.decider import Decider, GateOutput
from specmd_jax.moe.runtime.run import Forced, OnToken, Run, by_falling_gate, check_finite, ends, recorded_trace
from specmd_jax.moe.runtime.store import PinnedStore


class Generation:
    """One `Offloaded.generate`: its requests in turn, then the `Run` that `finish` makes of them."""

    def __init__(
        self,
        name: str,
        params: Params,
        store: PinnedStore,
        decider: Decider,
        cut: Stretches,
        staging: int,
        size: tuple[int, int],
        keep_logits: bool,
        on_token: OnToken | None,
    ):
        self.name, self.params, self.store, self.cfg, self.cut = name, params, store, store.cfg, cut
        (self.requests, self.steps), self.keep_logits, self.on_token = size, keep_logits, on_token
        self.visits = Visits(decider, store, cut.kinds[0], staging)
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
        forced: Forced | None,
        text: npt.NDArray[np.int32] | None,
    ) -> None:
        cut, cfg = self.cut, self.cfg
        caches = list(init_cache(cfg, 1, prompt.size + self.steps - 1))
        fed = [prompt.size] + [1] * (self.steps - 1)
        ends = np.cumsum(fed).tolist()
        # small arrays go to the device before the clock starts: each would cost a transfer in the middle of a pass
        starts = jax.device_put([np.full(1, end - n, np.int32) for end, n in zip(ends, fed, strict=True)])
        routing: list[_ForcedPass | None] = [None] * self.steps
        if forced is not None:
            routing = [_ForcedPass(forced.cut(end - n, end)) for end, n in zip(ends, fed, strict=True)]
        given = None if text is None else jax.device_put([text[None, step : step + 1] for step in range(self.steps)])
        token, good = jnp.asarray(prompt[None]), jnp.ones(1, jnp.int32)
        jax.block_until_ready((caches, token, good, starts, given))
        chosen = []
        self.tokens.append([])
        arrivals: list[float] = []
        times: list[float] = []
        begin = time.perf_counter()
        for step, start in enumerate(starts):
            state = cut.first(cut.inputs[0], self.params["embed"], token, good, self._caches(caches, 0), start)
            end = self._pass(state, fed[step], start, caches, routing[step], arrivals if step else None, times)
            if end is None:
                self.steps = step
                break
            token, good = end.token if given is None else given[step], end.good
            chosen.append(end.token)
            if self.keep_logits:
                self.logits.append(np.asarray(end.logits))
        else:
            self._emit(int(np.asarray(token)[0, 0]), int(np.asarray(good)[0]), arrivals)
        if given is not None:
            self.tokens[-1] = [int(np.asarray(one)[0, 0]) for one in chosen]
        self.visit_s.extend(np.diff([*times, arrivals[-1]]).tolist())
        self.ttft_s.append(arrivals[0] - begin)
        later = len(arrivals) - 1
        self.tpot_s.append((arrivals[-1] - arrivals[0]) / later if later else float("nan"))

    def _emit(self, token: int, good: int, arrivals: list[float]) -> bool:
        """Takes a token as it arrives, and says whether the request ends with it."""
        request, step = len(self.tokens) - 1, len(self.tokens[-1])
        check_finite(self.name, request, step, good)
        self.tokens[-1].append(token)
        arrivals.append(time.perf_counter())
        return ends(self.on_token, (request, step), (self.requests, self.steps), token)

    def _caches(self, caches: list[Any], span: int) -> tuple[Any, ...]:
        return tuple(caches[layer] for layer in self.cut.layers[span])

    def _pass(
        self,
        state: Gated,
        tokens: int,
        start: jax.Array,
        caches: list[Any],
        forced: _ForcedPass | None,
        arrivals: list[float] | None,
        times: list[float],
    ) -> Token | None:
        """Runs one forward pass from its first gate; None if the request ends with the token that it was fed, which it
        notes in ``arrivals``: the pass is then as if it had not begun."""
        cut, decode = self.cut, arrivals is not None
        self.gates.append([])
        for layer in range(len(cut.kinds) - 1):
            kind = cut.kinds[layer]
            for number, cache in zip(cut.layers[layer], state.caches, strict=True):
                caches[number] = cache
            asked = time.perf_counter()
            ids, gates, ahead, logits, hidden, fed = programs.read_back(np.asarray(state.packed), kind, tokens)
            times.append(time.perf_counter())
            if arrivals is not None and layer == 0 and self._emit(int(fed[0]), int(fed[1]), arrivals):
                self.gates.pop()
                times.pop()
                return None
            routed = state.ids, state.gates
            if forced is not None:
                routed, (ids, gates) = forced.device[layer], forced.host[layer]
                if ahead is not None and forced.ahead is not None:
                    ahead = forced.ahead[:, layer]
                if forced.logits is not None:
                    logits = forced.logits[:, layer]
            own = gate = GateOutput(*by_falling_gate(ids, gates), ahead, logits)
            if self.visits.reroutes:
                gate, routed = self.visits.reroute(layer, own)
                ids = gate.ids
            stop = Stop(layer, self.passes, decode, gate, ids, hidden)
            ids, source = self.visits.run(stop, state.h, routed[0])
            chosen = time.perf_counter()
            state = cut.behind[layer](
                cut.inputs[layer + 1],
                cut.shared[layer],
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
            self.gates[-1].append(own)
            if decode:
                marks = asked, times[-1], chosen, started, time.perf_counter()
                self.host_s.append([b - a for a, b in itertools.pairwise(marks)])
        assert isinstance(state, Token)
        for number, cache in zip(cut.layers[-1], state.caches, strict=True):
            caches[number] = cache
        self.passes += 1
        return state

    def finish(self, prompt_lengths: list[int]) -> Run:
        self.visits.settle()
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
            self.name, source, self.cfg, self.params, self.store, prompt_lengths, self.steps, columns
        )
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
    """The routing of one pass, given."""

    def __init__(self, given: Forced):
        self.host = [(given.ids[:, layer], given.gates[:, layer]) for layer in range(given.ids.shape[1])]
        self.device = jax.device_put(self.host)
        self.ahead, self.logits = given.ahead, given.logits
