"""`MODELS`: published mixture-of-experts models, each with its source; `model` finds one, or reads a ``config.json``.

Every number comes from the model's ``config.json`` (`specmd_jax.specs.published`); the tests add them up to the
parameter count of the published weights, and hold them to the shapes of the models that can be run. Of attention over
the context it is known what it keeps and reads (`specmd_jax.specs.attention`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from specmd_jax.errors import find
from specmd_jax.specs.config_json import model_from_config, spec_of
from specmd_jax.specs.published import PUBLISHED
from specmd_jax.specs.spec import BF16, FP8_BLOCK, MXFP4, ModelSpec

__all__ = ["BF16", "FP8_BLOCK", "MODELS", "MXFP4", "ModelSpec", "model", "model_from_config"]


def model(name: str | Path) -> ModelSpec:
    """Gives the model called `name`, in any case, or the one that a ``config.json`` describes.

    Args:
      name: in `MODELS`, or the path of a ``.json`` file or of a folder that has a ``config.json``.

    Raises:
      SpecmdError: an unknown name, with the known ones, or what `model_from_config` raises.
    """
    text = str(name)
    if isinstance(name, Path) or text.lower().endswith(".json") or os.path.isfile(Path(text) / "config.json"):
        return model_from_config(text)
    return MODELS[find("model", name, MODELS)]


def _published(name: str, repository: str, **how: Any) -> ModelSpec:
    """Gives a row of `PUBLISHED`; ``how``: what its weights are stored as, and notes."""
    source = f"https://huggingface.co/{repository}/blob/main/config.json"
    return replace(spec_of(PUBLISHED[name], name, source), **how)


_GPT_OSS: dict[str, Any] = {"weights_bits": MXFP4, "notes": "experts in MXFP4, everything else in bf16"}

_DEEPSEEK = (
    "one shared expert per layer counts as dense; the module that predicts several tokens is left out; the bf16 router "
    "and norms are counted as fp8"
)
_QWEN_NEXT = (
    "three of four layers are gated delta nets; the shared expert and its gate count as dense; the module that "
    "predicts several tokens is left out"
)
_GLM = "one shared expert per layer counts as dense; the module that predicts several tokens is left out"

_QWEN_38 = ModelSpec(
    name="Qwen3.8-Flash-Next",
    layers=48,
    experts=512,
    top_k=10,
    d_model=2560,
    d_ff=640,
    dense_params=(125e9 - 2 * 248_320 * 2560) / 48 - 512 * 3 * 2560 * 640,
    head_params=248_320 * 2560,
    embed_params=248_320 * 2560,
    shared_params=3 * 2560 * 640 + 2560,
    source="https://github.com/Avarok-Cybersecurity/atlas/issues/753",
    notes="experts as in its config (width: github.com/ROCm/aiter/pull/5379); the dense part is what 125 B parameters "
    "leave, as its config was not at hand; its table of n-grams, 51 B parameters that stay in host memory, and "
    "attention over the context are left out",
)

_SPECS = (
    _published("OLMoE-1B-7B", "allenai/OLMoE-1B-7B-0924"),
    _published("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
    _published(
        "Qwen1.5-MoE-A2.7B",
        "Qwen/Qwen1.5-MoE-A2.7B",
        notes="the shared expert (width 5632) and its gate count as dense",
    ),
    _published("Phi-3.5-MoE", "microsoft/Phi-3.5-MoE-instruct", notes="layer norms with biases; the head has a bias"),
    _published("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
    _published("gpt-oss-20b", "openai/gpt-oss-20b", **_GPT_OSS),
    _published("gpt-oss-120b", "openai/gpt-oss-120b", **_GPT_OSS),
    _published(
        "DeepSeek-V2-Lite",
        "deepseek-ai/DeepSeek-V2-Lite",
        notes="layer 0 of 27 is dense; two shared experts per layer count as dense",
    ),
    _published(
        "DeepSeek-V3",
        "deepseek-ai/DeepSeek-V3",
        weights_bits=FP8_BLOCK,
        dense_bits=FP8_BLOCK,
        notes=f"layers 0-2 of 61 are dense; {_DEEPSEEK}",
    ),
    _published(
        "Kimi-K2",
        "moonshotai/Kimi-K2-Instruct",
        weights_bits=FP8_BLOCK,
        dense_bits=FP8_BLOCK,
        notes=f"layer 0 of 61 is dense; {_DEEPSEEK}",
    ),
    _published(
        "DeepSeek-V4-Flash",
        "deepseek-ai/DeepSeek-V4-Flash",
        weights_bits=MXFP4,
        dense_bits=FP8_BLOCK,
        notes="experts in MXFP4; layers 0-2 of 43 choose experts by a hash of the token, not by a router: they are "
        f"known as soon as the token is; {_DEEPSEEK}",
    ),
    _published("Qwen3-235B-A22B", "Qwen/Qwen3-235B-A22B"),
    _published("Qwen3-Next-80B-A3B", "Qwen/Qwen3-Next-80B-A3B-Instruct", notes=_QWEN_NEXT),
    _published("Qwen3.5-35B-A3B", "Qwen/Qwen3.5-35B-A3B", notes=f"the text part; {_QWEN_NEXT}"),
    _published("Qwen3.6-35B-A3B", "Qwen/Qwen3.6-35B-A3B", notes=f"the shapes of Qwen3.5-35B-A3B; {_QWEN_NEXT}"),
    _QWEN_38,
    _published("GLM-4.5-Air", "zai-org/GLM-4.5-Air", notes=f"layer 0 of 46 is dense; {_GLM}"),
    _published("GLM-4.6", "zai-org/GLM-4.6", notes=f"layers 0-2 of 92 are dense; {_GLM}"),
    _published("GLM-4.7", "zai-org/GLM-4.7", notes=f"the shapes of GLM-4.6; {_GLM}"),
    _published("GLM-5", "zai-org/GLM-5", notes=f"layers 0-2 of 78 are dense; an indexer in every layer; {_GLM}"),
    _published(
        "MiniMax-M2",
        "MiniMaxAI/MiniMax-M2",
        weights_bits=FP8_BLOCK,
        dense_bits=FP8_BLOCK,
        notes="the modules that predict several tokens are left out; the router and norms are counted as fp8",
    ),
    _published(
        "gemma-4-26B-A4B",
        "google/gemma-4-26B-A4B-it",
        notes="the text part; a feed-forward block beside the experts of every layer counts as a shared expert; "
        "25 of 30 layers see 1024 tokens",
    ),
    _published(
        "Llama-4-Scout",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        notes="the text part; one shared expert per layer counts as dense; 36 of 48 layers see the 8192 tokens of "
        "their chunk: counted as a window",
    ),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}
