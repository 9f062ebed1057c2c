"""The model cut at its gates: what each compiled program takes, and which comes behind which gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from specmd_jax.moe.layerwise import programs
from specmd_jax.moe.layerwise.programs import Inputs, Kind
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params, build
from specmd_jax.moe.runtime.run import spans


class Stretches(NamedTuple):
    """L stretches that end at a gate, and what is left behind the last."""

    layers: list[tuple[int, ...]]  # [L + 1] numbers of the model's layers
    kinds: list[Kind]  # [L + 1]
    inputs: list[Inputs]  # [L + 1]
    first: Callable[..., Any]  # the program to the first gate
    behind: list[Callable[..., Any]]  # [L] the program behind each gate
    shared: list[Any]  # [L] parameters of the gate's own layer; None where it has no shared expert


def stretches(params: Params, cfg: MoEConfig, ahead: bool, logits: bool, hidden: bool) -> Stretches:
    """Cuts a model.

    Args:
        ahead: ask the next gate with each one's input. ``logits``: read the router's logits back.
        hidden: read back what the experts get, for those that run on the host.
    """
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
    return Stretches(
        layers=cut,
        kinds=kinds,
        inputs=inputs,
        first=programs.first(kinds[0]),
        behind=[programs.advance(kind, fns[layer].shared) for kind, layer in zip(kinds[1:], routed, strict=True)],
        shared=[None if fns[layer].shared is None else params["layers"][layer] for layer in routed],
    )
