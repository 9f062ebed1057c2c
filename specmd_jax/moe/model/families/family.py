"""What is known of a family, and the names that several of them give their experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Json = Mapping[str, Any]

SPLIT = ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight")
NUMBERED = tuple(f"block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3", "w2"))


class Family(NamedTuple):
    """How a family's ``config.json`` and tensor names read.

    extra: what the family adds to the common reading of its config.
    theta: default base of the rotary embedding.
    router, shared: where a layer keeps its router and its shared expert.
    experts: names of an expert's (gate, up, down) with ``{e}``, or of the layer's (gate_up, down) when ``stacked``.
    stacked: whether a layer's experts are stored together.
    tiny: a small config.json for tests.
    quantised: the ``quant_method`` of its published checkpoints that is read as it is; None: none is.
    """

    extra: Callable[[Json], dict[str, Any]]
    theta: float
    router: str
    experts: tuple[str, ...]
    shared: str
    stacked: bool
    tiny: dict[str, Any]
    quantised: str | None = None
