"""What the layerwise engine does at a gate: asks the policy, starts copies, runs the experts as the miss rule says.

Under `fetch` a decoded token's missing experts set off before anything is decided, and its K experts run in the program
that goes on to the next gate. Under every other rule the decision comes first. What then happens to a choice:

=============  =========================================================================================
outcome        what runs
=============  =========================================================================================
hit, fetched   the expert at the precision at which the device has it (`Decision.row`)
dropped        nothing; its gate's share of the sum is left out, the other gates stay as they are
substituted    the expert named in its place (`Decision.instead`), weighed by the gate of the missing one
host           the expert at the highest precision on the host's processor, while the device runs the others
=============  =========================================================================================

Experts of one token at one precision are one program with what follows; of several precisions, one program each.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.layerwise import programs
from specmd_jax.moe.layerwise.programs import Kind
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.runtime.decider import Decider, Decision, GateOutput, read
from specmd_jax.moe.runtime.slots import Slots
from specmd_jax.moe.runtime.store import DEVICE, PinnedStore, sharding
from specmd_jax.replay.totals import DROPPED, FETCHED, HOST, SUBSTITUTED


class Stop(NamedTuple):
    """The model stopped at a gate, as the host knows it."""

    layer: int
    pass_id: int
    decode: bool
    gate: GateOutput
    ids: npt.NDArray[np.int32]  # [T, K] in the router's order
    hidden: npt.NDArray[np.float32] | None  # [T, D] what the experts get, if some may run on the host


class Visits:
    """The visits of one run, in their order."""

    def __init__(self, decider: Decider, store: PinnedStore, kind: Kind, staging: int):
        self._decider, self._store, self._staging = decider, store, staging
        policies, self.reroutes = decider.policy.policies, decider.policy.reroutes
        self._cfg, self._fetches = store.cfg, policies.miss.fetches_all
        self._decides_late = self._fetches and policies.prefetch is None
        self._part, self._pairs, self._alone = programs.part(kind), programs.pairs(kind), programs.alone(kind)
        self._late: Stop | None = None  # to be decided while its program runs
        self._started: Decision | None = None  # being decided
        self.slots = Slots(store)
        self.decisions: list[Decision] = []

    def reroute(self, layer: int, gate: GateOutput) -> tuple[GateOutput, tuple[jax.Array, jax.Array]]:
        """Lets the policy choose the experts, in place of the router: the gate as the policies see it; and ids and the
        gates that weigh the experts, [T, K] both, on the device."""
        assert gate.logits is not None
        chosen, seen_gates = self._decider.choose(layer, gate.logits)
        ids, logits = jax.device_put((chosen, gate.logits), sharding(DEVICE))
        return gate._replace(ids=chosen, gates=seen_gates), (ids, programs.weights(self._cfg)(logits, ids))

    def run(self, stop: Stop, h: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
        """Gives (ids, source) for the program from this gate to the next (`programs.advance`).

        Args:
            h, ids: of the gate, on the device: [T, D], and [T, K] in the router's order.
        """
        self.settle()
        if stop.ids.shape[0] > 1:
            return ids, self._prefill(stop, h, ids)
        return (ids, self._fetched(stop)) if self._fetches else self._ruled(stop, h, ids)

    def after(self) -> None:
        """Does what of a visit can be done while its program runs: call it when that has started."""
        if self._late is not None:
            stop, self._late = self._late, None
            self._started = self._decider.start(stop.layer, stop.pass_id, stop.decode, stop.gate)

    def settle(self) -> None:
        """Obeys a decision that was made meanwhile. The last visit of a run needs it, too."""
        if self._started is not None:
            decision, self._started = read(self._started), None
            self.decisions.append(decision)
            self.slots.keep(decision.level)

    def _decide(self, stop: Stop) -> Decision:
        decision = self._decider.visit(stop.layer, stop.pass_id, stop.decode, stop.gate)
        self.decisions.append(decision)
        return decision

    def _prefetches(self, layer: int, decision: Decision) -> list[int]:
        """Gives the flat ids of the copies that the decision asks for, in order."""
        layers, experts = decision.level.shape
        order = decision.prefetched.reshape(-1)
        wanted = np.flatnonzero(order)
        wanted = wanted[np.argsort(order[wanted])]
        return ((layer + 1 + wanted // experts) % layers * experts + wanted % experts).tolist()

    def _fetched(self, stop: Stop) -> tuple[Expert, ...]:
        """Gives the K experts of one token in the order of its ids; missing ones set off before anything is decided."""
        flats = (stop.layer * self._cfg.experts + stop.ids[0]).tolist()
        self.slots.copy([flat for flat in flats if flat not in self.slots], idle=True)
        experts = tuple(self.slots[flat] for flat in flats)
        if self._decides_late:
            self._late = stop
            return experts
        decision = self._decide(stop)
        self.slots.keep(decision.level)
        # before the layer's own program: a copy that is asked for later would wait for it
        self.slots.copy(self._prefetches(stop.layer, decision))
        return experts

    def _ruled(self, stop: Stop, h: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
        """Gives one token's experts under a rule that needs the decision first."""
        base, slots, own = stop.layer * self._cfg.experts, self.slots, stop.ids[0]
        decision = self._decide(stop)
        outcome = decision.outcome[own]
        runs = np.where(outcome == SUBSTITUTED, decision.instead[own], own)
        runs = np.where((outcome == DROPPED) | (outcome == HOST), -1, runs).astype(np.int32)  # [K] on the device
        level = np.where(runs >= 0, decision.row[runs], 0)
        slots.keep(decision.level, but=(base + runs[runs >= 0]).tolist())
        missing = own[outcome == FETCHED]
        slots.copy((base + missing).tolist(), decision.row[missing].tolist(), idle=True)
        here = {expert: slots[base + expert] for expert in runs[runs >= 0].tolist()}
        slots.keep(decision.level)
        slots.copy(self._prefetches(stop.layer, decision))

        def in_order(row: npt.NDArray[np.int32]) -> tuple[Expert, ...]:
            """Gives the experts of a row of ids; where it is -1, any other of the row (it has one)."""
            spare = here[int(row.max())]
            return tuple(here.get(expert, spare) for expert in row.tolist())

        on_host, present = outcome == HOST, np.unique(level[level > 0])
        if len(present) == 1 and not on_host.any():
            same = bool((runs == own).all())
            return ids if same else jax.device_put(runs[None], sharding(DEVICE)), in_order(runs)
        out = jnp.zeros((1, own.size, self._cfg.width), jnp.float32)
        for one in present:
            row = np.where(level == one, runs, -1)
            out = self._pairs(h, row[None], in_order(row), out)
        if on_host.any():
            out = programs.merge(out, self._on_host(stop, base, own, on_host)[None], on_host[None])
        return ids, out  # nothing was computed for a dropped choice: it adds zero

    def _on_host(
        self, stop: Stop, base: int, own: npt.NDArray[np.int32], there: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Gives [K, D], outputs on one token of the experts that run on the host."""
        experts, hidden = self._store.host_experts, stop.hidden
        assert hidden is not None
        h = hidden.astype(self._cfg.np_dtype)
        rows = {k: self._alone(h, experts[base + int(own[k])]) for k in np.flatnonzero(there).tolist()}
        out = np.zeros((own.size, self._cfg.width), np.float32)
        for k, row in rows.items():
            out[k] = np.asarray(row)[0]
        return out

    def _prefill(self, stop: Stop, h: jax.Array, ids: jax.Array) -> jax.Array:
        """Runs the experts of many tokens one by one: the resident ones first, then as their copies arrive."""
        cfg, slots, gate = self._cfg, self.slots, stop.gate
        base = stop.layer * cfg.experts
        decision = self._decide(stop)
        level = decision.level.reshape(-1)
        mass = np.zeros(cfg.experts, np.float32)
        np.add.at(mass, gate.ids.reshape(-1), gate.gates.reshape(-1))
        demand = np.unique(gate.ids)
        on_host = demand[decision.outcome[demand] == HOST]
        # stand-ins are for passes of one token only
        demand = demand[(decision.outcome[demand] != HOST) & (decision.outcome[demand] != DROPPED)]
        streams = not level[base + demand].all()  # larger than its pool: it passes through in id order
        order = demand if streams else demand[np.argsort(-mass[demand], kind="stable")]
        fetched = decision.outcome[order] == FETCHED
        hits, misses = (base + order[~fetched]).tolist(), deque((base + order[fetched]).tolist())
        prefetches = self._prefetches(stop.layer, decision)
        slots.keep(decision.level, but=hits)
        out = jnp.zeros((gate.ids.shape[0], cfg.top_k, cfg.width), jnp.float32)
        waiting: deque[int] = deque()

        def run(flat: int) -> None:
            nonlocal out
            out = self._part(h, ids, np.int32(flat - base), slots[flat], out)
            if not level[flat]:
                slots.drop(flat)

        def copy_ahead() -> None:
            """Starts what there is room for: all of a demand that stays, `staging` of one that passes through."""
            nonlocal prefetches
            room = self._staging - len(waiting) if streams else len(misses)
            ready = [misses.popleft() for _ in range(min(len(misses), room))]
            waiting.extend(ready)
            slots.copy(ready, [int(decision.row[flat - base]) for flat in ready])
            if not misses and not any(not level[flat] for flat in waiting):
                slots.copy(prefetches)
                prefetches = []

        for flat in [flat for flat in hits if not level[flat]]:  # makes room first
            run(flat)
        copy_ahead()
        for flat in hits:
            if level[flat]:
                run(flat)
        while waiting:
            run(waiting.popleft())
            copy_ahead()
        slots.copy(prefetches)
        return self._with_host(stop, base, on_host, out) if on_host.size else out

    def _with_host(self, stop: Stop, base: int, on_host: npt.NDArray[np.int32], out: jax.Array) -> jax.Array:
        """Adds to [T, K, D] the outputs of the experts that run on the host."""
        experts, hidden = self._store.host_experts, stop.hidden
        assert hidden is not None
        h, other = hidden.astype(self._cfg.np_dtype), np.zeros(out.shape, np.float32)
        for expert in on_host.tolist():
            other = self._part(h, stop.ids, np.int32(expert), experts[base + expert], other)
        return programs.merge(out, np.asarray(other), np.isin(stop.ids, on_host))
