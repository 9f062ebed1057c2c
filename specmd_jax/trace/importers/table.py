"""The table of foreign trace formats: one file per format, and a line here adds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from specmd_jax.errors import SpecmdError, find
from specmd_jax.trace.importers.allenai import import_allenai, is_allenai
from specmd_jax.trace.importers.bigmoe import import_bigmoe, is_bigmoe, read_bigmoe
from specmd_jax.trace.importers.cache_eval import import_cache_eval, is_cache_eval
from specmd_jax.trace.importers.cache_lab import import_cache_lab, is_cache_lab
from specmd_jax.trace.importers.counts import PROFILES
from specmd_jax.trace.importers.fingerprint import import_fingerprint, is_fingerprint
from specmd_jax.trace.importers.flame import import_flame, is_flame
from specmd_jax.trace.importers.imp import import_imp, is_imp
from specmd_jax.trace.importers.joining import Sizes
from specmd_jax.trace.importers.lattice import import_lattice, is_lattice
from specmd_jax.trace.importers.layer_lists import import_layer_lists, is_layer_lists
from specmd_jax.trace.importers.llamacpp import import_llamacpp, is_llamacpp
from specmd_jax.trace.importers.meaning import STRIPPABLE, examined, strip_kinds
from specmd_jax.trace.importers.mer import import_mer, is_mer
from specmd_jax.trace.importers.moe_beyond import import_moe_beyond, is_moe_beyond
from specmd_jax.trace.importers.moe_sim import import_moe_sim, is_moe_sim
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.policylang import import_policylang, is_policylang
from specmd_jax.trace.importers.rollouts import import_rollouts, is_rollouts
from specmd_jax.trace.importers.rtrace import import_rtrace, is_rtrace
from specmd_jax.trace.importers.sglang import import_sglang, is_sglang
from specmd_jax.trace.importers.sglang_responses import import_sglang_responses, is_sglang_responses
from specmd_jax.trace.importers.verify_steps import import_verify_steps, is_verify_steps
from specmd_jax.trace.importers.vference import import_vference, is_vference
from specmd_jax.trace.importers.vllm import import_vllm, is_vllm
from specmd_jax.types import Trace

__all__ = [
    "IMPORTERS",
    "PROFILES",
    "STRIPPABLE",
    "Importer",
    "import_bigmoe",
    "import_fingerprint",
    "import_trace",
    "read_bigmoe",
    "recognise",
]


class Importer(NamedTuple):
    """A foreign format."""

    read: Callable[..., Trace]  # of a path, and unless the format has sizes of `Sizes` and of kinds to strip
    recognises: Callable[[Peek], bool]
    about: str  # what is read, on one line
    has_sizes: bool = False  # the file says how many experts there are and how large


IMPORTERS: Mapping[str, Importer] = {
    "vllm": Importer(import_vllm, is_vllm, "responses with routed_experts, as .jsonl, .json or .npz"),
    "sglang-responses": Importer(
        import_sglang_responses, is_sglang_responses, "responses of SGLang, sglang-jax and LMDeploy, .jsonl or .json"
    ),
    "rollouts": Importer(
        import_rollouts, is_rollouts, "records of prime-rl, verifiers, NeMo-RL or Dynamo with routed_experts"
    ),
    "sglang": Importer(
        import_sglang, is_sglang, "a per_token dump of the expert recorder: .pt (with torch), .json or .npz"
    ),
    "bigmoe-csv": Importer(import_bigmoe, is_bigmoe, "a BigMoeOnEdge route trace, also .gz or .xz", has_sizes=True),
    "gpt-oss-fingerprint": Importer(
        import_fingerprint,
        is_fingerprint,
        "an *_examples.json, a folder of them, or the .npz that packs them",
        has_sizes=True,
    ),
    "moe-sim": Importer(import_moe_sim, is_moe_sim, "JSON Lines, a row per token and layer"),
    "moe-policylang": Importer(
        import_policylang, is_policylang, "its JSON Lines or parquet, a row per token and layer"
    ),
    "moe-cache-lab": Importer(import_cache_lab, is_cache_lab, "its routing JSON Lines, version 1 or 2"),
    "moe-cache-eval": Importer(import_cache_eval, is_cache_eval, "the manifest.json of an event trace, or its folder"),
    "llamacpp-csv": Importer(import_llamacpp, is_llamacpp, "layer,expert lines of llama-moe-trace (needs --top-k)"),
    "flame-moe": Importer(import_flame, is_flame, "a folder of parquet, a file or more a layer"),
    "allenai": Importer(import_allenai, is_allenai, "JSON Lines with input_ids and exp_ids"),
    "moe-beyond": Importer(import_moe_beyond, is_moe_beyond, "a CSV per prompt, or a folder of them"),
    "imp-json": Importer(import_imp, is_imp, "a moe_expert_trace, flat or nested"),
    "lattice": Importer(import_lattice, is_lattice, "its JSON Lines, a row per token and layer"),
    "mer": Importer(import_mer, is_mer, "a --trace-out of MER, JSON Lines"),
    "vference": Importer(import_vference, is_vference, "a vference.route-trace.v1, JSON"),
    "router-trace": Importer(import_rtrace, is_rtrace, "a binary RTRACE01 with every probability (needs --top-k)"),
    "layer-lists": Importer(import_layer_lists, is_layer_lists, "JSON with lists of experts by layer"),
    "verify-steps": Importer(import_verify_steps, is_verify_steps, "JSON steps of speculative decoding"),
}
"""Format name -> how it is read, the most used ones first."""


def recognise(path: str | os.PathLike[str]) -> str:
    """Gives the format of a file or folder by what is in it: a name of `IMPORTERS`, or of `PROFILES` for counts.

    Raises:
      SpecmdError: a file that cannot be read, that no format fits (it lists them) or that several do (it lists those).
    """
    peek, known = Peek(Path(path)), {**IMPORTERS, **PROFILES}
    found = [name for name, importer in known.items() if importer.recognises(peek)]
    if not found:
        raise SpecmdError(f"{path}: not of a known format, expected one of: {', '.join(known)}")
    if len(found) > 1:
        raise SpecmdError(f"{path}: may be of the formats {', '.join(found)}: expected one of them to be named")
    return found[0]


def import_trace(
    path: str | os.PathLike[str],
    fmt: str = "auto",
    *,
    model: str | None = None,
    experts: int | None = None,
    expert_bytes: int | None = None,
    top_k: int | None = None,
    strip: str | Collection[str] = (),
) -> Trace:
    """Reads ``path`` in the foreign format ``fmt`` (a key of `IMPORTERS`, in any case; "auto" recognises it).

    What the file does not have or has wrong without harm is in ``meta["warnings"]`` of the trace, a line each.

    Args:
      model: the model in `specmd_jax.specs.models.MODELS`, for formats that do not say its sizes.
      experts, expert_bytes, top_k: the same in numbers, for other models: experts of a layer, bytes of one, and for
        formats that do not show it how many experts a token uses.
      strip: what to take out, of `STRIPPABLE` ("all": every kind).
    Raises:
      SpecmdError: an unknown format, a bad file, sizes that nobody says or that the format says itself.
    """
    kinds = strip_kinds(strip)
    fmt = find("trace format", fmt, (*IMPORTERS, *PROFILES, "auto"))
    fmt = recognise(path) if fmt == "auto" else fmt
    if fmt in PROFILES:
        raise SpecmdError(f"{path}: counts ({fmt}), of which no trace can be made: load_profile reads them")
    importer, sizes = IMPORTERS[fmt], Sizes(model, experts, expert_bytes, top_k)
    extra: dict[str, Any] = {name: value for name, value in sizes._asdict().items() if value is not None}
    if importer.has_sizes:
        if extra:
            raise SpecmdError(f"{next(iter(extra))} is given, expected none: files of {fmt} say the model's sizes")
        return examined(importer.read(path), str(path), kinds)
    return importer.read(path, sizes, kinds)
