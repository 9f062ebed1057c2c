"""What other engines would have to be told for the same memory. Their nearest setting, from sizes alone.

The options are those of llama.cpp (``--n-cpu-moe``: the experts of the first N layers stay with the CPU), KTransformers
with SGLang (``--kt-num-gpu-experts``: experts of each layer that lie on the GPU) and vLLM (``--cpu-offload-gb``: GiB of
weights that lie in the host's memory), as their documentation has them.
"""

from __future__ import annotations

from typing import NamedTuple

from specmd_jax.units import GIB


class Holdings(NamedTuple):
    """What fits."""

    layers: int
    experts: int  # E
    expert_bytes: int
    cache_bytes: int  # for experts
    fixed_bytes: int  # weights besides them


def elsewhere(held: Holdings) -> list[str]:
    """Gives a line for each engine."""
    layer_bytes = held.experts * held.expert_bytes
    whole = min(held.cache_bytes // layer_bytes, held.layers)
    each = min(held.cache_bytes // (held.layers * held.expert_bytes), held.experts)
    outside = max(held.layers * layer_bytes - held.cache_bytes, 0)
    weights = held.layers * layer_bytes + held.fixed_bytes
    return [
        f"llama.cpp      -ngl 99 --n-cpu-moe {held.layers - whole}   the experts of {whole} of {held.layers} MoE "
        "layers fit, the CPU computes the others (add dense layers in front to N)",
        f"KTransformers  --kt-num-gpu-experts {each}   {each} of {held.experts} experts of every layer fit, the CPU "
        "computes the others",
        f"vLLM           --cpu-offload-gb {-(-outside // GIB)}   {outside / GIB:.1f} GiB of the "
        f"{weights / GIB:.1f} GiB of weights do not fit, and are read over the link in every pass",
    ]
