"""Writes a trace as the accesses of a cache, for another simulator.

    python -m experiments.export_trace TRACE OUT
    python -m experiments.export_trace gpt-oss-20b gpt-oss.oracleGeneral.bin --unit bytes

TRACE is the name of a bundled trace or a trace file. An access is one expert that a pass demands at a layer, in the
order of the contract "sequential", so libCacheSim's LRU, FIFO and Belady hit exactly as often as ours do under
--contract sequential --prefetch none, at the same number of experts. Takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.common.command_line import (
    bare_parser,
    config_options,
    file_of,
    file_options,
    main_guard,
    print_settings,
)
from specmd_jax.files import file_sha256
from specmd_jax.schedule.export import EXPORTERS, UNITS, export_trace
from specmd_jax.trace import as_trace


def main(argv: Sequence[str] | None = None) -> None:
    formats = "\n".join(f"  {name:20} {about}" for name, (_, about) in EXPORTERS.items())
    parser = bare_parser(f"{(__doc__ or '').strip()}\n\nFormats:\n{formats}", "export_trace")
    parser.add_argument("source", metavar="TRACE", help="a trace file, or the name of a bundled trace")
    file_options(parser, "the file to write")
    parser.add_argument("--format", default="oracle-general", metavar="NAME", help=f"one of: {', '.join(EXPORTERS)}")
    parser.add_argument("--unit", default="experts", metavar="UNIT", help=f"of sizes, one of: {', '.join(UNITS)}")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests decoded together (default: 1)")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt tokens of a pass (default: all)")
    config_options(parser)
    args = parser.parse_args(argv)
    print_settings(args)
    target = file_of(args)
    trace = as_trace(args.source)
    done = export_trace(
        trace,
        target,
        args.format,
        unit=args.unit,
        batch=args.batch,
        prefill_chunk=args.prefill_chunk,
        overwrite=args.overwrite,
    )
    print(f"accesses      {done.accesses}")
    print(f"objects       {done.objects} of {trace.layers * trace.experts} experts")
    print(f"sizes         in {args.unit}, the largest {done.largest}")
    print(f"sha256        {file_sha256(target)}")


if __name__ == "__main__":
    main_guard(main)
