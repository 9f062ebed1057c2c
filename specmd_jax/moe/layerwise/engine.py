"""A model whose experts live in host memory, run layer by layer: the device holds as many as the cache policy keeps.

`Offloaded.generate` stops at every gate, reads the chosen ids back, copies the experts that are missing, and lets the
simulator's own step (`specmd_jax.moe.runtime.decider`) say which leave and which to prefetch. Its text equals the
all-resident model's at every capacity and policy (README.md says for which models and machines bit for bit), and its
events equal `specmd_jax.replay.step` on the trace it records.

The slots are device arrays, one set per expert, so a copy is one transfer into its final place. Copies go over the link
first come, first served. One decoded token's experts run in one program when all have arrived; a prefill runs them one
after the other as they arrive, so a demand larger than the cache passes through. While a visit is under way its missing
experts take places beyond the capacity: `staging` of them, which is one token's demand.

A miss rule other than `fetch` runs as `specmd_jax.moe.layerwise.visit` says, on experts that the store holds at the
precisions that the rule chooses from. Its text is then not the all-resident model's; `measure.quality` tells how far it
is off.

Under cache-aware routing the policy chooses the experts on the host, before anything else is decided, and a program of
the device weighs them by the model's own rule. The trace has what the router would have chosen.

Oracles and batches are left to the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.layerwise.generation import Generation
from specmd_jax.moe.layerwise.stretches import stretches
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime.decider import Decider
from specmd_jax.moe.runtime.memory import Beside, cache_bytes, dense_spec, work_bytes
from specmd_jax.moe.runtime.policy import make_policy
from specmd_jax.moe.runtime.run import OnToken, Run, forced_routing, prompt_rows, text_rows
from specmd_jax.moe.runtime.slots import warm
from specmd_jax.moe.runtime.store import PinnedStore
from specmd_jax.setting import Setting
from specmd_jax.types import Trace


class Offloaded:
    """The layerwise engine; see the module.

    Args:
        params: dense parameters on the device; ``store``: all experts, pinned, at one or more precisions.
        setting, changes: as in `specmd_jax.run`, of the fields that a running model obeys (`runtime.policy.OBEYED`);
            the precisions are the store's. Prefetching is limited by how many experts the selection asks for, not by
            time. A rule that reads logits sees the router's own, also where its routing is replaced; routing by the
            cache chooses by those of the replayed trace.
        name: the model's name in the recorded trace; None: its family. A name of `specmd_jax.specs.models.MODELS`
            gives the simulator that model's computation.
        keep_logits: also record the router's logits.

    Raises:
        SpecmdError: a setting that makes no sense for a running model (see `runtime.policy.make_policy`), or a batch.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        params: Params,
        store: PinnedStore,
        setting: Setting | None = None,
        /,
        *,
        name: str | None = None,
        keep_logits: bool = False,
        **changes: Any,
    ):
        self.cfg, self.params, self.store, self.name = cfg, params, store, name or cfg.family
        self.policy = make_policy(cfg, store.level_bytes, setting, **changes)
        if self.policy.batch > 1:
            raise SpecmdError(
                f"batch is {self.policy.batch}, which the layerwise engine does not do: expected 1, or the fused engine"
            )
        self.decider = Decider(self.policy)
        self.staging = cfg.top_k
        warm(store, cfg.top_k)
        hosts = self.policy.policies.miss.hosts
        if hosts:
            _ = store.host_experts  # made, or refused, before the first run
        reads = self.policy.needs_ahead, keep_logits or self.policy.needs_logits, hosts
        self._stretches = stretches(params, cfg, *reads)

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
        on_token: OnToken | None = None,
    ) -> Run:
        """Generates greedy text for each prompt in turn, from an empty cache that later prompts find as it was left.

        Args:
            prompts: R rows of token ids, of any lengths (each length is compiled once).
            steps: tokens per prompt, S >= 1.
            replay: a trace of the same L, E and K whose routing is used in place of the model's own, request by
                request (and its `ahead` scores for the prefetcher, if it has them): to time a shape with real locality
                but made-up weights. Under routing by the cache, its logits are then the router's.
            keep_logits: also return the logits of every token.
            text: [R, S] tokens to go on with in place of those that the model makes (the last of a row is not fed).
            on_token: called with (request, step, token) when the host knows the token, which is at the first gate of
                the next pass. If it gives True the request ends there, and the run with it: S is then what was made.
                Only a run of one prompt may end early.

        Raises:
            SpecmdError: bad prompts or text; a replayed trace of other shape, or too short; logits that are not finite;
                ``on_token`` beside a given text, or one that ends one of several requests early.
        """
        rows = prompt_rows(self.cfg, prompts, steps)
        fed = [row.size + steps - 1 for row in rows]
        forced = None if replay is None else forced_routing(self.cfg, replay, fed, self.policy.reroutes)
        given = text_rows(self.cfg, text, len(rows), steps, on_token)
        self.decider.reset()
        generation = Generation(
            self.name, self.params, self.store, self.decider, self._stretches, self.staging, (len(rows), steps),
            keep_logits, on_token,
        )  # fmt: skip
        at = 0
        for row, count, goes_on in zip(rows, fed, given, strict=True):
            generation.request(row, None if forced is None else forced.cut(at, at + count), goes_on)
            at += count
        return generation.finish([row.size for row in rows])


def beside(cfg: MoEConfig, prompt: int, steps: int) -> Beside:
    """Gives what the device holds for a prompt of so many tokens and so many steps, beside the cache's experts."""
    positions = prompt + steps - 1
    return Beside(
        dense_bytes=tree_bytes(dense_spec(cfg)),
        cache_bytes=cache_bytes(cfg, positions),
        record_bytes=0,
        work_bytes=work_bytes(cfg, prompt, positions),
        experts=cfg.top_k,
    )
