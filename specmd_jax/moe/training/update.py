"""One update of the weights, and many of them as one program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.training import network
from specmd_jax.moe.training.parameters import Weights, decayed, initial, matrices
from specmd_jax.moe.training.schedule import decaying, learning_rate
from specmd_jax.training import Training

ADAM_B2 = 0.95
MUON_RMS = 0.2  # of an update's entries at rate 1, as AdamW's are in practice (arXiv:2502.16982)


class State(NamedTuple):
    """What an update changes."""

    step: jax.Array  # int32: updates so far
    weights: Weights  # float32
    optimizer: Any
    bias: jax.Array  # [L, E] float32: of the choice of experts, zeros unless balance is "bias"


class Told(NamedTuple):
    """Means over the steps of a dispatch; arrays or numbers."""

    loss: Any  # nats per token, without what is added to it
    balance: Any  # E * sum over experts of share of choices * mean probability; 1: even
    router_z: Any  # mean square of the log of the sum of the exponentials of a router's logits
    router_entropy: Any  # nats, of a token's probabilities over the experts
    busiest: Any  # choices of a layer's most chosen expert over the mean
    idle: Any  # experts of a layer that no token of a batch chooses, share
    slope: Any  # global norm of the gradient before it is clipped


def start(cfg: MoEConfig, settings: Training) -> State:
    """Gives the state before the first update."""
    return _start(cfg, settings, jax.random.key(settings.seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(cfg: MoEConfig, settings: Training, key: jax.Array) -> State:
    weights = initial(cfg, key)
    memory = optimizer(settings, weights).init(weights)
    return State(jnp.int32(0), weights, memory, jnp.zeros((cfg.layers, cfg.experts), jnp.float32))


def optimizer(settings: Training, weights: Weights) -> optax.GradientTransformation:
    """Gives the optimizer at rate 1: whoever applies its updates scales them. ``weights`` may be shapes."""
    if settings.optimizer == "muon":
        axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
        marked = jax.tree.map(lambda yes: axes if yes else None, matrices(weights))
        rule = optax.contrib.muon(
            1.0, weight_decay=settings.weight_decay, adam_b2=ADAM_B2, consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=marked,
        )  # fmt: skip
    else:
        rule = optax.adamw(1.0, b2=ADAM_B2, weight_decay=settings.weight_decay, mask=decayed(weights))
    return optax.chain(optax.clip_by_global_norm(settings.clip), rule)


def objective(
    cfg: MoEConfig, settings: Training, attention: str, weights: Weights, windows: jax.Array, key: jax.Array,
    bias: jax.Array | None,
) -> tuple[jax.Array, tuple[Told, jax.Array]]:  # fmt: skip
    """Gives what is minimised on ``windows`` [B, T + 1], what is told of it, and the choices of each expert [L, E]."""
    x, routed = network.hidden(
        cfg, weights, windows[:, :-1], rows=settings.block_rows, attention=attention,
        dropout=settings.dropout, key=key, bias=bias,
    )  # fmt: skip
    scores = network.logits(cfg, weights, x.reshape(-1, cfg.width))
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, windows[:, 1:].reshape(-1)).mean()
    counts = jax.vmap(lambda ids: jax.nn.one_hot(ids, cfg.experts, dtype=jnp.float32).sum(axis=(0, 1)))(routed.ids)
    share = counts / (routed.ids.shape[1] * routed.ids.shape[2])
    chances = jax.nn.softmax(routed.logits, axis=-1)
    even = cfg.experts * (share * chances.mean(axis=1)).sum(axis=-1).mean()
    log_sum = jax.nn.logsumexp(routed.logits, axis=-1)
    router_z = (log_sum**2).mean()
    entropy = (log_sum - (chances * routed.logits).sum(axis=-1)).mean()
    total = loss + settings.router_z_weight * router_z
    if settings.balance == "loss":
        total = total + settings.balance_weight * even
    told = Told(
        loss, even, router_z, entropy, (share.max(axis=-1) * cfg.experts).mean(), (counts == 0).mean(), jnp.float32(0)
    )
    return total, (told, counts)


@functools.lru_cache(maxsize=8)
def make_update(cfg: MoEConfig, settings: Training, attention: str) -> Callable[..., tuple[State, Told]]:
    """Gives the program ``(state, text [tokens] uint16, starts [S, B] int32, steps) -> (state, told)`` of S updates.

    ``steps`` is the run's number of steps, which the learning rate needs; the state is given up.
    """

    def one(text: jax.Array, steps: jax.Array, state: State, starts: jax.Array) -> tuple[State, Told]:
        at = starts[:, None] + jnp.arange(settings.sequence + 1, dtype=jnp.int32)[None, :]
        windows = text[at].astype(jnp.int32)
        # a generator that hardware has: drawing for the dropout would be a good part of a step
        key = jax.random.fold_in(jax.random.key(settings.seed, impl="rbg"), state.step)
        left = decaying(settings, state.step, steps)
        # the model that is exported chooses without a bias: it fades with the learning rate
        bias = state.bias * left if settings.balance == "bias" else None

        def of(weights: Weights) -> tuple[jax.Array, tuple[Told, jax.Array]]:
            return objective(cfg, settings, attention, weights, windows, key, bias)

        (_, (told, counts)), slope = jax.value_and_grad(of, has_aux=True)(state.weights)
        change, memory = optimizer(settings, state.weights).update(slope, state.optimizer, state.weights)
        rate = learning_rate(settings, state.step, steps)
        weights = jax.tree.map(lambda leaf, by: leaf + rate * by, state.weights, change)
        moved = state.bias
        if settings.balance == "bias":  # without a loss for it: arXiv:2408.15664
            moved = moved + settings.bias_rate * jnp.sign(counts.mean(axis=-1, keepdims=True) - counts)
        told = told._replace(slope=optax.tree.norm(slope))
        return State(state.step + 1, weights, memory, moved), told

    def many(state: State, text: jax.Array, starts: jax.Array, steps: jax.Array) -> tuple[State, Told]:
        state, told = lax.scan(lambda state, rows: one(text, steps, state, rows), state, starts)
        return state, jax.tree.map(lambda column: column.mean(axis=0), told)

    return jax.jit(many, donate_argnums=0)


def attention_of(settings: Training, cfg: MoEConfig) -> tuple[str, str]:
    """Gives the attention's implementation, and why: with "auto" cuDNN's if it runs here, forward and backward."""
    if settings.attention != "auto":
        return settings.attention, "as asked for"
    if jax.default_backend() != "gpu" or settings.compute != "bfloat16":
        return "xla", "cudnn needs a GPU and bfloat16"
    shape = (settings.batch, settings.sequence)
    query = jnp.ones((*shape, cfg.heads, cfg.head_dim), cfg.np_dtype)
    key = jnp.ones((*shape, cfg.kv_heads, cfg.head_dim), cfg.np_dtype)

    def total(query: jax.Array, key: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(query, key, key, is_causal=True, implementation="cudnn")
        return y.astype(jnp.float32).sum()

    try:
        slopes = jax.block_until_ready(jax.jit(jax.grad(total, argnums=(0, 1)))(query, key))
    except Exception as error:  # whatever the library, its version or the card lacks
        return "xla", f"cudnn does not run here: {str(error).splitlines()[0][:200]}"
    if not all(bool(jnp.isfinite(slope.astype(jnp.float32)).all()) for slope in slopes):
        return "xla", "cudnn's gradient is not finite here"
    return "cudnn", "it runs here"
