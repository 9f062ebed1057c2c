"""Converts routing that another tool recorded into a trace file.

    python -m experiments.import_trace IN OUT [--overwrite]
    python -m experiments.import_trace --model Qwen3-30B-A3B responses.jsonl OUT
    python -m experiments.import_trace --format sglang --experts 64 --expert-bytes 12582912 recorder.pt OUT
    python -m experiments.import_trace --strip padding,shared --model DeepSeek-V3 responses.jsonl OUT

The format is recognised, or named. Formats that do not say how many experts the model has and how large they are need
--model, or both numbers. Prints what the trace holds and the sha256 of the file, and on the other stream a warning for
each thing that the recording lacks or has wrong; they are in the trace, too (meta key "warnings"). Takes seconds.

Counts of uses are no trace: they become a profile (.npz or .json), from which caches may start (--warm-start).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.command_line import (
    bare_parser,
    config_options,
    file_of,
    file_options,
    main_guard,
    print_settings,
)
from specmd_jax.errors import find
from specmd_jax.files import file_sha256
from specmd_jax.specs.models import MODELS
from specmd_jax.trace import IMPORTERS, PROFILES, STRIPPABLE, import_trace, recognise, save_trace
from specmd_jax.trace.profile import load_profile, save_profile
from specmd_jax.types import Trace


def summary(trace: Trace) -> str:
    """Gives what a trace holds, one fact per line."""
    prompt = int(trace.prompt_lengths.sum())
    low, high = int(trace.expert_bytes.min()), int(trace.expert_bytes.max())
    carried = [name for name in ("gates", "logits", "ahead") if getattr(trace, name) is not None]
    return "\n".join(
        (
            f"model         {trace.model}",
            f"requests      {trace.requests}",
            f"tokens        {trace.tokens} ({prompt} prompt, {trace.tokens - prompt} decode)",
            f"layers        {trace.layers}",
            f"experts       {trace.experts}",
            f"top-k         {trace.top_k}",
            f"expert bytes  {low if low == high else f'{low} to {high}'}",
            f"carries       {', '.join(carried) or 'expert ids only'}",
        )
    )


def warn(warnings: list[str]) -> None:
    """Prints what is to be known of a recording beside its numbers."""
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)


def write_profile(source: Path, target: Path, named: str) -> None:
    """Makes a profile of counts, and prints what it holds."""
    profile = load_profile(source)
    save_profile(profile, target)
    print(f"format        {named}: counts, a profile and no trace")
    print(f"layers        {profile.layers}")
    print(f"experts       {profile.experts}")
    print(f"uses          {profile.counts.sum():g}")
    print(f"source        {profile.source}")
    print(f"sha256        {file_sha256(target)}")


def main(argv: Sequence[str] | None = None) -> None:
    formats = "\n".join(f"  {name:20} {importer.about}" for name, importer in IMPORTERS.items())
    counts = "\n".join(f"  {name:20} {found.about}" for name, found in PROFILES.items())
    kinds = "\n".join(f"  {name:20} {what}" for name, what in STRIPPABLE.items())
    parser = bare_parser(
        f"{(__doc__ or '').strip()}\n\nFormats:\n{formats}\n\nFormats of counts:\n{counts}\n\n"
        f"What --strip takes out:\n{kinds}",
        "import_trace",
    )
    parser.add_argument(
        "--format",
        default="auto",
        metavar="NAME",
        help=f"auto (the default), or one of: {', '.join((*IMPORTERS, *PROFILES))}",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="what to read")
    file_options(parser, "the trace (.npz) or profile to write")
    named = f"the model: a config.json, its folder, or one of: {', '.join(MODELS)}"
    parser.add_argument("--model", metavar="NAME", help=named)
    parser.add_argument("--experts", type=int, metavar="E", help="experts of a layer, for another model")
    parser.add_argument("--expert-bytes", type=int, metavar="B", help="bytes of one expert, for another model")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts of a token, where the format does not show it")
    parser.add_argument("--strip", default="", metavar="KINDS", help=f"all, or of: {', '.join(STRIPPABLE)}")
    config_options(parser)
    args = parser.parse_args(argv)
    print_settings(args)
    target = file_of(args)
    named = find("trace format", args.format, ("auto", *IMPORTERS, *PROFILES))
    named = recognise(args.source) if named == "auto" else named
    if named in PROFILES:
        write_profile(args.source, target, named)
        return
    trace = import_trace(
        args.source,
        named,
        model=args.model,
        experts=args.experts,
        expert_bytes=args.expert_bytes,
        top_k=args.top_k,
        strip=args.strip,
    )
    save_trace(trace, target, args.overwrite)
    warn(trace.meta.get("warnings", []))
    print(f"format        {named}")
    print(summary(trace))
    print(f"sha256        {file_sha256(target)}")


if __name__ == "__main__":
    main_guard(main)
