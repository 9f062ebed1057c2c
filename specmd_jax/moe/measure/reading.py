"""A model reads text with all its experts resident: its routing as a trace, and the activations that routers follow.

Every token of a text is a decode pass of the trace. Tokens are read together, as a prompt is, which leaves routing as
it is token by token, but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.checkpoint.folder import load_config
from specmd_jax.moe.model.experts import expert_bytes, stacked
from specmd_jax.moe.model.forward import build, check_prompt, finish, init_cache, param_spec
from specmd_jax.moe.runtime.run import dense_bytes
from specmd_jax.trace.select import select_requests
from specmd_jax.types import Trace

TOGETHER = 4  # texts of a program
PRECISION = "float32"  # of the arithmetic; a trace's bytes are those of the checkpoint's own


class Reading(NamedTuple):
    """What a model did with N tokens; D is its width."""

    trace: Trace  # with router logits, and the next gate's scores
    before: npt.NDArray[np.float16]  # [N, L, D] residual stream in front of each layer's attention
    after: npt.NDArray[np.float16]  # [N, L, D] what each layer's router sees
    routers: npt.NDArray[np.float32]  # [L, E, D] the weights that make logits of it

    def of(self, requests: npt.NDArray[np.integer[Any]]) -> Reading:
        """Gives some of the texts, each whole."""
        of_request = np.repeat(np.arange(self.trace.requests), self.trace.lengths)
        rows = np.concatenate([np.flatnonzero(of_request == request) for request in requests])
        return Reading(select_requests(self.trace, requests), self.before[rows], self.after[rows], self.routers)


def read(
    folder: Path,
    texts: npt.NDArray[np.integer[Any]],
    requests: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
) -> Reading:
    """Gives what the model of a checkpoint did with ``texts`` [R, T] of token ids, each from an empty context.

    Args:
        requests: a row of the trace's meta for each text.
        meta: further keys of the trace's meta.
    Raises:
        SpecmdError: a model that cannot be read, one with dense layers or routers with a bias (their activations are
            not all that its logits follow from), or ids that it does not have.
    """
    own = load_config(folder)
    cfg, params, experts = weights.load(folder, PRECISION)
    if cfg.moe_layers != tuple(range(cfg.layers)) or cfg.router_bias or cfg.shared_width:
        raise SpecmdError(f"{folder}: expected routed experts and nothing beside them in every layer, routers unbiased")
    ids = check_prompt(cfg, texts, 1)
    net, stacks = build(cfg), jax.tree.map(jnp.asarray, experts)

    @jax.jit
    def run(params: Any, stacks: Any, ids: jax.Array) -> tuple[jax.Array, ...]:
        cache, start = init_cache(cfg, *ids.shape), jnp.zeros(ids.shape[0], jnp.int32)
        x, found = net.embed(params["embed"], ids), []
        for at, layer in enumerate(net.layers):
            mine, before = params["layers"][at], x
            assert layer.route is not None
            x, h, _ = layer.attend(mine, x, cache[at], start)
            chosen, gates, logits = layer.route(mine, h)
            following = params["layers"][min(at + 1, cfg.layers - 1)]
            ahead = jax.nn.softmax(layer.route(following, h)[2], axis=-1)
            x = finish(x, net.experts(h, chosen, gates, stacked(stacks[at])))
            halves = before.reshape(h.shape).astype(jnp.float16), h.astype(jnp.float16)
            found.append((chosen, gates, logits, ahead, *halves))
        return tuple(jnp.stack(column, axis=1) for column in zip(*found, strict=True))

    parts: list[list[npt.NDArray[Any]]] = []
    for begin in range(0, len(ids), TOGETHER):
        rows = ids[begin : begin + TOGETHER]
        full = np.resize(rows, (min(TOGETHER, len(ids)), ids.shape[1]))  # one program for all
        parts.append([np.asarray(array)[: rows.size] for array in run(params, stacks, jnp.asarray(full))])
    chosen, gates, logits, ahead, before, after = (np.concatenate(column) for column in zip(*parts, strict=True))
    trace = Trace(
        expert_ids=chosen.astype(np.uint8 if cfg.experts <= 256 else np.int16),
        lengths=np.full(len(ids), ids.shape[1], np.int32),
        prompt_lengths=np.zeros(len(ids), np.int32),
        experts=cfg.experts,
        expert_bytes=np.full(cfg.layers, expert_bytes(own, own.dtype), np.int64),
        gates=gates,
        logits=logits,
        ahead=ahead,
        meta={
            "capture": f"texts read at once, in {PRECISION}; every token is a decode pass",
            "dense_bytes": dense_bytes(own, param_spec(own)),
            "requests": [dict(row) for row in requests],
            **meta,
        },
    )
    routers = np.stack([np.asarray(params["layers"][at]["router"]["weight"], np.float32) for at in range(cfg.layers)])
    return Reading(trace, before, after, routers)
