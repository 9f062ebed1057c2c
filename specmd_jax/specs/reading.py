"""Reading the keys of a ``config.json``, each checked. Families call the same thing by several names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from specmd_jax.errors import SpecmdError, shown

Json: TypeAlias = Mapping[str, Any]

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "moe_top_k", "num_experts_per_token")
MOST = 1 << 32
"""No number of a model is larger."""
MOST_LAYERS = MOST_EXPERTS = 1 << 16

_MISSING = object()


def get(hf: Json, key: str, kind: type, default: Any = _MISSING) -> Any:
    """Gives a value of the config, checked; a key that is absent or null takes the default."""
    value = hf.get(key)
    if value is None:
        if default is _MISSING:
            family = shown(hf.get("model_type")).strip("'")
            raise SpecmdError(f"config.json: {key!r} is missing ({family}), expected {kind.__name__}")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 64 else value
    wrong = kind is float and isinstance(value, float) and not math.isfinite(value)
    if wrong or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SpecmdError(f"config.json: {key!r} is {shown(value)}, expected {kind.__name__}")
    return value


def table(hf: Json, key: str) -> dict[str, Any]:
    """Gives an object of the config; {} if it is absent or null."""
    return get(hf, key, dict, {})


def number(hf: Json, key: str, default: Any = _MISSING, above: float | None = None, most: float = 1e12) -> float:
    """Gives a finite number of at least 0, or `above` a bound."""
    found = get(hf, key, float, default)
    if hf.get(key) is not None and not ((found >= 0 if above is None else found > above) and found <= most):
        least = "at least 0" if above is None else f"above {above:g}"
        raise SpecmdError(f"config.json: {key!r} is {shown(found)}, expected a number {least} and at most {most:g}")
    return found


def whole(hf: Json, key: str, default: Any = _MISSING, least: int = 1, most: int = MOST) -> int:
    """Gives a whole number within a range; a list of one number again and again is that number."""
    value = hf.get(key)
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        hf = {**hf, key: value[0]}
    found = get(hf, key, int, default)
    if value is not None and not least <= found <= most:
        raise SpecmdError(f"config.json: {key!r} is {shown(found)}, expected {least} to {most}")
    return found


def first_of(hf: Json, names: Sequence[str]) -> str:
    """Gives the first of these keys that the config has, or the first of all."""
    return next((name for name in names if hf.get(name) is not None), names[0])


def expert_count(hf: Json) -> int:
    """Gives the number of routed experts, under any of the names that configs use for it."""
    return whole(hf, first_of(hf, EXPERTS), most=MOST_EXPERTS)


def layer_count(hf: Json) -> int:
    """Gives the number of layers."""
    return whole(hf, "num_hidden_layers", most=MOST_LAYERS)


def sparse_layers(hf: Json) -> tuple[int, ...]:
    """Gives the layers that have routed experts, by all the ways in which configs say it.

    Some layers in front are dense (``first_k_dense_replace``, ``moe_layer_start_index``), only every so many have
    experts (``decoder_sparse_step``, ``interleave_moe_layer_step``, ``moe_layer_freq``), or they are listed
    (``mlp_only_layers``, ``moe_layers``, ``mlp_layer_types``, or ``moe_layer_freq`` with a flag for each).
    """
    layers = layer_count(hf)
    found = set(range(layers))
    for key in ("first_k_dense_replace", "moe_layer_start_index"):
        found -= set(range(min(layers, whole(hf, key, 0, least=0))))
    for key in ("decoder_sparse_step", "interleave_moe_layer_step"):
        step = whole(hf, key, 1)
        found = {layer for layer in found if (layer + 1) % step == 0}
    if isinstance(hf.get("moe_layer_freq"), list):
        flags = listed(hf, "moe_layer_freq", layers)
        found = {layer for layer in found if flags[layer]}
    else:
        step = whole(hf, "moe_layer_freq", 1)
        found = {layer for layer in found if layer % step == 0}
    found -= {layer for layer in get(hf, "mlp_only_layers", list, []) if isinstance(layer, int)}
    if hf.get("moe_layers") is not None:
        found &= {layer for layer in get(hf, "moe_layers", list) if isinstance(layer, int)}
    if hf.get("mlp_layer_types") is not None:
        kinds = listed(hf, "mlp_layer_types", layers)
        found = {layer for layer in found if kinds[layer] != "dense"}
    return tuple(sorted(found))


def listed(hf: Json, key: str, layers: int) -> list[Any]:
    """Gives a list that has an entry for each layer."""
    values = get(hf, key, list)
    if len(values) != layers:
        raise SpecmdError(f"config.json: {key!r} has {len(values)} entries, expected one for each of {layers} layers")
    return values
