"""The option `--timeline FILE.json`, which several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from specmd_jax.errors import SpecmdError
from specmd_jax.timelines.chrome import check_timeline_path, write_chrome_trace
from specmd_jax.timelines.parts import PASSES, PASSES_SHOWN, Timeline


def timeline_options(parser: argparse._ActionsContainer, of: str) -> None:
    """Adds the options; `of` says what is drawn."""
    parser.add_argument("--timeline", type=Path, metavar="FILE.json", help=f"draw {of} over time, for ui.perfetto.dev")
    parser.add_argument(
        "--timeline-passes",
        type=int,
        metavar="N",
        help="how much of it: the first N passes that are counted; a prompt is a pass, a decoded token another "
        f"(default: {PASSES_SHOWN})",
    )


def timeline_path(args: argparse.Namespace) -> Path | None:
    """Gives where to write a timeline; None: nowhere. Raises `SpecmdError` before any work."""
    if args.timeline is None:
        if args.timeline_passes is not None:
            raise SpecmdError("--timeline-passes has no effect without --timeline FILE.json")
        return None
    if args.timeline_passes is not None and args.timeline_passes < 1:
        raise SpecmdError(f"--timeline-passes is {args.timeline_passes}, expected at least 1")
    return check_timeline_path(args.timeline)


def passes_shown(args: argparse.Namespace) -> int:
    """Gives how many passes a timeline shows at most."""
    return PASSES_SHOWN if args.timeline_passes is None else args.timeline_passes


def write_timelines(path: Path, *timelines: Timeline) -> str:
    """Writes a file, and gives the line that says what is in it and how to see it."""
    write_chrome_trace(path, *timelines)
    shown = " beside ".join(f"{one.evidence} {len(one.on(PASSES))} passes" for one in timelines)
    whole = timelines[0].about.get("passes of the replay")
    part = f" of {whole:,}" if whole is not None and whole > len(timelines[0].on(PASSES)) else ""
    return f"{path}: {shown}{part}; open it at https://ui.perfetto.dev"
