"""What a visit asked for, in seconds, from the events that the scan gives in full."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.engines.prepared import Prepared
from specmd_jax.replay.state import Numbers
from specmd_jax.replay.timing import dense
from specmd_jax.replay.totals import FETCHED, LATE, Events
from specmd_jax.replay.totals import HOST as ON_HOST
from specmd_jax.timelines.course import Host, Load
from specmd_jax.types import DECODE


@dataclass(frozen=True)
class Replayed:
    """A visit as it was replayed."""

    index: int
    layer: int
    count: npt.NDArray[np.int32]  # [E] tokens routed to each expert
    mass: npt.NDArray[np.float32]  # [E]
    events: Events

    @property
    def by_mass(self) -> list[int]:
        """The demanded experts by falling gate mass (ties: lower id)."""
        order = np.argsort(-self.mass, kind="stable")
        return [int(expert) for expert in order if self.events.outcome[expert]]


class Loads:
    """Gives the load of each visit."""

    def __init__(self, prepared: Prepared, numbers: Numbers) -> None:
        assert numbers.costs is not None
        # the seconds that the scan adds up in float32, added up in float64 here
        self.costs = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), numbers.costs)
        self.prepared, self.numbers = prepared, numbers
        self.dense_s: dict[tuple[int, int, bool, int], tuple[float, float]] = {}

    def of(self, visit: Replayed) -> Load:
        costs, layer, events, s = self.costs, visit.layer, visit.events, self.prepared.schedule
        assert events.row is not None
        row, outcome, tokens = events.row.astype(int), events.outcome, self._device_tokens(visit)
        early = None if events.tier is None else events.tier.early
        demanded, others = visit.by_mass, np.flatnonzero(outcome == 0).tolist()

        def run_s(expert: int) -> float:
            read_s = costs.expert_read_s[row[expert] - 1, layer]
            return roofline(int(tokens[expert]), costs.expert_flop_s[layer], read_s, costs.launch_s)

        def host_s(expert: int) -> float:
            return roofline(int(visit.count[expert]), costs.host_flop_s[layer], costs.host_read_s[layer], 0.0)

        missing = sorted(demanded) if events.stream else demanded
        hosted = {e: host_s(e) for e in missing if outcome[e] == ON_HOST}
        dense_s = 0.0
        if s.ends_layer[visit.index]:
            of_pass = int(s.tokens[visit.index])
            per_token_s, read_s = self._dense(
                layer, of_pass, bool(s.phase[visit.index] == DECODE), int(s.served[visit.index])
            )
            dense_s = roofline(of_pass, per_token_s, read_s, costs.launch_s + costs.layer_s)
        return Load(
            copies={e: float(costs.copy_s[row[e] - 1, layer]) for e in missing if outcome[e] == FETCHED},
            runs={e: run_s(e) for e in [*demanded, *others] if tokens[e] > 0},
            hosted=hosted,
            dense_s=dense_s,
            late=next((e for e in demanded if outcome[e] == LATE), -1),
            host=self._host(layer, sum(hosted.values()), len(hosted)),
            adds=float(costs.adds),
            reads={} if events.tier is None else {e: self.read_s(layer) for e in missing if events.tier.read[e]},
            arriving=next((e for e in demanded if early is not None and early.late[e]), -1),
        )

    def read_s(self, layer: int) -> float:
        """Gives what a read from storage takes."""
        return float(self.costs.read_s[layer])

    def _host(self, layer: int, work_s: float, experts: int) -> Host:
        """Gives how so much work on so many experts and the link disturb each other."""
        costs = self.costs
        own, link = (
            experts * float(costs.host_least_s[layer]) / work_s if work_s else 0.0,
            float(costs.link_load[layer]),
        )
        spare = max(1.0 - own, 0.0)
        left = spare / link if spare < link else 1.0
        return Host(float(costs.handover_s), max(own + link - 1.0, 0.0), left)

    def _dense(self, layer: int, tokens: int, decode: bool, turns: int) -> tuple[float, float]:
        """Gives the seconds of the dense part per token, and of its reading."""
        at = layer, tokens, decode, turns
        if at not in self.dense_s:
            found = dense(self.numbers.costs, layer, jnp.int32(tokens), jnp.asarray(decode), jnp.int32(turns))
            self.dense_s[at] = float(found.flop_s), float(found.read_s)
        return self.dense_s[at]

    def _device_tokens(self, visit: Replayed) -> npt.NDArray[np.int64]:
        """Gives the tokens that each expert computes on the device, [E]: its own, and of those it stands in for."""
        outcome, instead = visit.events.outcome, visit.events.instead
        assert instead is not None
        own = np.where((outcome > 0) & (outcome <= FETCHED), visit.count, 0)
        moved = np.zeros(len(own), np.int64)
        gone = instead >= 0
        np.add.at(moved, instead[gone], visit.count[gone])
        # a token that loses several experts to one stand-in runs it once
        return own + np.minimum(moved, int(self.prepared.schedule.tokens[visit.index]))


def roofline(tokens: int, flop_s: npt.ArrayLike, read_s: npt.ArrayLike, launch_s: npt.ArrayLike) -> float:
    """Gives max(arithmetic, memory) + launch, or nothing for no tokens."""
    return float(np.maximum(tokens * np.asarray(flop_s), read_s) + launch_s) if tokens > 0 else 0.0
