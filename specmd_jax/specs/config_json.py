"""A model from its ``config.json``, listed or not: shapes, and the precision that the file says weights have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from specmd_jax.errors import SpecmdError, shown
from specmd_jax.inputs import read_json
from specmd_jax.specs.parameters import count, form_of
from specmd_jax.specs.reading import EXPERTS, Json, get, whole
from specmd_jax.specs.spec import BF16, MXFP4, ModelSpec

MOST_BYTES = 64 << 20
"""No ``config.json`` is larger."""

_TEXT = ("text_config", "language_config", "llm_config", "thinker_config")
_FLOAT_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "float8_e4m3fn": 8.0}


def model_from_config(path: str | Path) -> ModelSpec:
    """Gives the model that a Hugging Face ``config.json`` describes.

    A family that is not known is counted as a plain one: gated experts, root-mean-square norms, no biases but those
    that the file mentions; its notes say so. Quantised weights take the bits that ``quantization_config`` says.

    Args:
      path: the file, or a folder that has it.

    Raises:
      SpecmdError: a file that cannot be read, one without the numbers of a mixture of experts (the message names the
        key), or numbers that cannot be.
    """
    path = Path(path)
    path = path / "config.json" if os.path.isdir(path) else path
    hf = read_json(path, MOST_BYTES)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    try:
        if not isinstance(hf, dict):
            raise SpecmdError(f"config.json: expected an object, got {shown(hf)}")
        return spec_of(hf, name, str(path))
    except SpecmdError as error:
        raise SpecmdError(str(error).replace("config.json", str(path), 1)) from None


def spec_of(hf: Json, name: str, source: str) -> ModelSpec:
    """Gives the model of the dictionary of a ``config.json``; raises SpecmdError naming a key that is amiss."""
    text = _text_part(hf)
    counts = count(text)
    stored = _precision(text)
    notes = [] if form_of(text) else [f"family {shown(text.get('model_type'))} is not known: counted as a plain one"]
    notes += [stored.note] if stored.note else []
    if counts.hashed:
        notes.append(f"the first {counts.hashed} layers choose experts by a hash of the token")
    return ModelSpec(
        name=name,
        layers=counts.layers,
        experts=counts.experts,
        top_k=counts.top_k,
        d_model=counts.d_model,
        d_ff=counts.d_ff,
        dense_params=counts.dense,
        head_params=counts.head,
        embed_params=counts.embed,
        source=source,
        weights_bits=stored.experts,
        expert_bias_params=counts.expert_bias,
        dense_bits=stored.dense,
        head_bits=stored.rest,
        embed_bits=stored.rest,
        notes="; ".join(notes),
        shared_params=counts.shared,
        leading_params=counts.leading,
        attention=counts.attention,
        hashed_layers=counts.hashed,
    )


def _text_part(hf: Json) -> Json:
    """Gives the part that describes the language model: of models that see and hear it lies inside."""
    if any(hf.get(name) is not None for name in EXPERTS):
        return hf
    for key in _TEXT:
        inner = hf.get(key)
        if isinstance(inner, Mapping):
            outside = {k: hf[k] for k in ("quantization_config", "quantization", "tie_word_embeddings") if k in hf}
            return _text_part({**outside, **inner})
    return hf


class _Precision(NamedTuple):
    """Bits of a weight, scales included."""

    experts: float
    dense: float
    rest: float  # head and embedding
    note: str = ""  # what had to be assumed


def _precision(hf: Json) -> _Precision:
    name = hf.get("dtype") or hf.get("torch_dtype")
    plain = _FLOAT_BITS.get(name, BF16) if isinstance(name, str) else BF16
    quantised = hf.get("quantization_config") or hf.get("quantization") or {}
    if not isinstance(quantised, Mapping):
        raise SpecmdError(f"config.json: 'quantization_config' is {shown(quantised)}, expected an object")
    if not quantised:
        return _Precision(plain, plain, plain)
    method = str(quantised.get("quant_method") or quantised.get("quant_algo") or "").lower()
    bits = _quantised_bits(quantised, method)
    if bits is None:
        note = f"quantised by {shown(method)}, whose bits are not said: counted as {plain:g}-bit"
        return _Precision(plain, plain, plain, note)
    kept = str(quantised.get("modules_to_not_convert") or quantised.get("ignore") or "")
    dense = plain if "attn" in kept or "attention" in kept else bits
    return _Precision(bits, dense, plain if method else bits)  # MLX, which names no method, quantises all of it


def _quantised_bits(how: Json, method: str) -> float | None:
    """Gives the bits of a quantised weight with its scales; None where they are not said."""
    if method == "mxfp4":
        return MXFP4
    if method in ("fp8", "fbgemm_fp8"):
        block = get(how, "weight_block_size", list, [])
        sides = [whole({"weight_block_size": side}, "weight_block_size") for side in block]
        return 8.0 + (32.0 / (sides[0] * sides[1]) if len(sides) == 2 else 0.0)
    if method == "nvfp4":
        return 4.5  # an 8-bit scale for every 16
    if method == "bitsandbytes":
        return 8.0 if get(how, "load_in_8bit", bool, False) else 4.5  # a float32 scale for every 64
    if isinstance(how.get("config_groups"), Mapping):
        groups = list(how["config_groups"].values())
        weights = groups[0].get("weights") if groups and isinstance(groups[0], Mapping) else None
        return _grouped_bits(weights, "num_bits", 16) if isinstance(weights, Mapping) else None
    # a 16-bit scale for every group; an asymmetric one has a zero point of as many bits as a weight, MLX a 16-bit bias
    return _grouped_bits(how, "bits", 32 if not method else 16)


def _grouped_bits(how: Json, key: str, scale_bits: int) -> float | None:
    if how.get(key) is None:
        return None
    bits, group = whole(how, key, most=64), get(how, "group_size", int, 0)
    zero = bits if how.get("zero_point") is True or how.get("sym") is False or how.get("symmetric") is False else 0
    return bits + ((scale_bits + zero) / group if group > 0 else 0.0)
