"""What the engines that keep experts in host memory have in common: the run they report and the input they take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params, check_prompt
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime.decider import Decision
from specmd_jax.moe.runtime.store import PinnedStore, StackedStore
from specmd_jax.replay.totals import Events
from specmd_jax.types import Trace

OnToken = Callable[[int, int, int], bool | None]
"""Hears (request, step, token) as each token comes; True ends the request, and its record, with this token."""


@dataclass(frozen=True)
class Run:
    """What one `generate` did: requests R, tokens made for each S, visits V as in the trace's schedule."""

    tokens: npt.NDArray[np.int32]  # [R, S] the most likely ones, also where a given text was fed in their place
    trace: Trace  # every fed token, with gates; `ahead` and `logits` where the engine read them
    decisions: tuple[Decision, ...]  # [V]
    visit_s: npt.NDArray[np.float64]  # [V] from this gate to the next, or to the request's last token
    # [R] from a request's arrival to its first token. Requests of a batch have all arrived when the run begins, so this
    # is also the time that a request waits for a place. Without batches a request arrives when the one before has ended
    ttft_s: npt.NDArray[np.float64]
    # [R] mean time of the later tokens; NaN where there is none. Prompts of others that run in between count
    tpot_s: npt.NDArray[np.float64]
    logits: npt.NDArray[np.float32] | None  # [R, S, V] on request
    most_resident: int  # experts on the device at once, those of the visit under way included
    most_bytes: int  # what they took at most
    # [visits of decode passes, 4] what the host did between gates: waited for the read-back, chose the experts and
    # started copies, started their program, began what can be decided late; None where it does nothing in between
    host_s: npt.NDArray[np.float64] | None = None
    batch: int = 1  # requests decoded together

    @property
    def tokens_per_s(self) -> float:
        """Tokens made per second, over all requests."""
        ended_s = self.ttft_s + np.nan_to_num(self.tpot_s) * (self.tokens.shape[1] - 1)
        return float(self.tokens.size / (ended_s.sum() if self.batch == 1 else ended_s.max()))

    def events_equal(self, events: Events) -> bool:
        """Whether every decision is that of a replay (`Policy.replay`): residency and precisions, outcomes, collisions,
        evictions, stand-ins, and prefetches in their order."""
        names = ["level", "outcome", "collision", "evictions", "row", "instead"]
        names += [] if events.prefetched is None else ["prefetched"]
        return all(
            np.array_equal(np.stack([getattr(d, name) for d in self.decisions]), getattr(events, name))
            for name in names
        )


def prompt_rows(cfg: MoEConfig, prompts: Sequence[npt.ArrayLike], steps: int) -> list[npt.NDArray[np.int32]]:
    """Gives the prompts as rows of token ids, or raises SpecmdError."""
    rows = [check_prompt(cfg, np.asarray(prompt)[None], steps)[0] for prompt in prompts]
    if not rows:
        raise SpecmdError("prompts: expected at least one")
    return rows


def text_rows(
    cfg: MoEConfig, text: npt.ArrayLike | None, requests: int, steps: int, on_token: OnToken | None
) -> list[npt.NDArray[np.int32] | None]:
    """Gives the text to be fed to each request, [S]; None: what the model makes. Raises SpecmdError for a text of
    another size, or beside a listener."""
    if text is None:
        return [None] * requests
    if on_token is not None:
        raise SpecmdError("on_token hears the tokens that the model goes on with, expected no text in their place")
    rows = np.asarray(text)
    if rows.shape != (requests, steps):
        raise SpecmdError(f"text: expected token ids of shape {[requests, steps]}, got {list(rows.shape)}")
    return list(check_prompt(cfg, rows, 1))


def ends(on_token: OnToken | None, at: tuple[int, int], of: tuple[int, int], token: int) -> bool:
    """Tells ``on_token`` of the token made ``at`` (request, step), and says whether the request is to end with it.

    Args:
        of: how many requests and steps the run has.
    Raises:
        SpecmdError: one of several requests is to end early, which would leave a ragged record.
    """
    stop = on_token is not None and bool(on_token(*at, token))
    if stop and of[0] > 1 and at[1] + 1 < of[1]:
        raise SpecmdError(
            f"on_token ends request {at[0]} of {of[0]} at step {at[1]}: only a run of one prompt may end early"
        )
    return stop


def check_finite(name: str, request: int, step: int, good: int) -> None:
    """Raises SpecmdError if the logits of a token were not all finite (``good`` 0)."""
    if not good:
        raise SpecmdError(
            f"{name}: request {request}: the logits of generated token {step} are not finite "
            "(check the weights for NaN; float16 overflows where bfloat16 does not)"
        )


def spans(cfg: MoEConfig) -> list[tuple[int, ...]]:
    """Cuts the model at its gates: the layers of L stretches that end at one, and of what is left behind the last."""
    if not cfg.moe_layers:
        raise SpecmdError(f"{cfg.family}: the model has no routed experts to keep elsewhere")
    return [tuple(range(a + 1, b + 1)) for a, b in itertools.pairwise([-1, *cfg.moe_layers, cfg.layers - 1])]


def dense_bytes(cfg: MoEConfig, params: Params) -> list[int]:
    """Gives [L] bytes of what one pass reads beside routed experts, up to each gate; the last layer adds the rest."""
    found = [sum(tree_bytes(params["layers"][layer]) for layer in span) for span in spans(cfg)]
    rest = found.pop()
    found[-1] += rest + tree_bytes(params["head"])
    return found


def recorded_trace(
    name: str,
    source: str,
    cfg: MoEConfig,
    params: Params,
    store: PinnedStore | StackedStore,
    prompt_lengths: Sequence[int],
    steps: int,
    columns: Sequence[npt.NDArray[Any] | None],
) -> Trace:
    """Makes a run's trace of its ``columns``: ids and gates [N, L, K], ahead scores and logits [N, L, E] or None.
    Where the store has several precisions, the trace says which, and what an expert takes at each."""
    ids, gates, ahead, logits = columns
    assert ids is not None
    meta = {"model": name, "source": f"recorded by {source}", "dense_bytes": dense_bytes(cfg, params)}
    if len(store.levels) > 1:
        meta |= {"precisions": list(store.precisions), "level_bytes": list(store.level_bytes)}
    return Trace(
        expert_ids=ids.astype(np.int16 if cfg.experts < 1 << 15 else np.int32),
        lengths=np.array([length + steps - 1 for length in prompt_lengths], np.int32),
        prompt_lengths=np.array(prompt_lengths, np.int32),
        experts=cfg.experts,
        expert_bytes=np.full(len(cfg.moe_layers), store.expert_bytes, np.int64),
        gates=gates,
        logits=logits,
        ahead=ahead,
        meta=meta,
    )


def by_falling_gate(
    ids: npt.NDArray[np.int32], gates: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Sorts a token's choices [.., K] as traces have them (most routers give that; sparsemixer does not)."""
    if (gates[..., 1:] <= gates[..., :-1]).all():
        return ids, gates
    order = np.argsort(-gates, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, axis=-1), np.take_along_axis(gates, order, axis=-1)


class Forced(NamedTuple):
    """Routing to use in place of the model's own: n tokens."""

    ids: npt.NDArray[np.int32]  # [n, L, K] by falling gate
    gates: npt.NDArray[np.float32]  # [n, L, K]
    ahead: npt.NDArray[np.float32] | None  # [n, L, E]; None: the trace has none
    logits: npt.NDArray[np.float32] | None  # [n, L, E]; None: nobody chooses by them

    def cut(self, first: int, last: int) -> Forced:
        """Gives the tokens first..last - 1."""
        ahead, logits = (None if column is None else column[first:last] for column in (self.ahead, self.logits))
        return Forced(self.ids[first:last], self.gates[first:last], ahead, logits)


def forced_routing(cfg: MoEConfig, replay: Trace, lengths: list[int], reroutes: bool) -> Forced:
    """Gives the routing of the first requests of a trace, cut to `lengths`.

    Args:
        reroutes: the policy chooses the experts by the trace's logits.
    Raises:
        SpecmdError: a trace of another shape, too short, with layers skipped, or without logits to choose by.
    """
    shape, wanted = (replay.layers, replay.experts, replay.top_k), (len(cfg.moe_layers), cfg.experts, cfg.top_k)
    if shape != wanted:
        raise SpecmdError(f"replay: the trace has (layers, experts, top k) {shape}, the model {wanted}")
    if replay.requests < len(lengths):
        raise SpecmdError(f"replay: the trace has {replay.requests} requests, expected at least {len(lengths)}")
    if reroutes and replay.logits is None:
        raise SpecmdError("replay: routing by the cache needs the router's full logits, and the trace has none")
    starts = np.cumsum(replay.lengths) - replay.lengths
    for request, length in enumerate(lengths):
        if replay.lengths[request] < length:
            raise SpecmdError(
                f"replay: request {request} has {replay.lengths[request]} tokens, {length} are fed to the model"
            )
    rows = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=False)])
    ids = replay.expert_ids[rows].astype(np.int32)
    if (ids < 0).any():
        raise SpecmdError("replay: the trace skips layers, expected every token to have K experts at each layer")
    gates = np.full(ids.shape, 1 / cfg.top_k, np.float32) if replay.gates is None else replay.gates[rows]
    ahead = None if replay.ahead is None else replay.ahead[rows].astype(np.float32)
    logits = replay.logits[rows].astype(np.float32) if reroutes and replay.logits is not None else None
    return Forced(*by_falling_gate(ids, gates.astype(np.float32)), ahead, logits)
