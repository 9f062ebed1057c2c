"""How fast is the offloaded model on this machine, and what stands between it and the hardware?

    python -m experiments.bench_offload --smoke              # the same steps at toy size, on any machine
    python -m experiments.bench_offload --out results/bench  # OLMoE-1B-7B's shape in bf16, a GPU with 40 GB
    python -m experiments.bench_offload --only bfloat16      # one section
    python -m experiments.bench_offload --redraw results/bench

Weights are made up. Routing of the timed runs is synthetic with locality (`specmd_jax.trace.synthesize`), fed to the
model in place of its own, because the routing of random weights has none. Sections:

* bfloat16, int4, mxfp4: the fused engine over policies x capacities x prefetch, beside what link and memory allow and
  beside predicted times; the text's equality with the all-resident model's (mxfp4: gpt-oss-20b's shape)
* copies, resident: copy rates (against torch if it is there), everything on the device in one program
* engines, layerwise: both engines side by side; layerwise runs with predicted times
* accelerate: its cpu_offload of the same shape, if it is installed
* equality: offloaded and resident text of both engines
* host: missing experts by the host's processor, beside those that are copied: each alone, both at once, the way between
  them, and the best splits that follow
* batches, precisions, by_cache: requests decoded together; rules over several precisions; cache-aware routing
* predictors: policies that predict beside classics, on gpt-oss-20b's recorded routing, with what their own work takes,
  and from which link on they no longer gain

Prints one table, writes bench.json after every row (what is measured is kept if a later step fails or time ends), and
draws the first three.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.options import Names
from experiments.common.command_line import main_guard, output_paths, parser, print_settings, printing, results_folder
from experiments.common.options import names
from specmd_jax.errors import SpecmdError

SECTIONS = Names("section", "experiments.studies.bench_offload", "SECTIONS")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "bench_offload", formats=("table", "json"))
    known = ", ".join(SECTIONS.known())
    options.add_argument(
        "--seconds", type=float, metavar="X", default=420.0, help="leave out what would take longer (default: 420)"
    )
    options.add_argument(
        "--host-gb",
        type=float,
        metavar="X",
        help="host memory to use, where the system says less than it gives (default: what the system says)",
    )
    options.add_argument("--only", type=names, metavar="A,B", help=f"sections; some of: {known} (default: all)")
    options.add_argument("--redraw", type=Path, metavar="DIR", help="measure nothing: draw the results in DIR again")
    args = options.parse_args(argv)
    sections = [SECTIONS.find(name) for name in args.only or SECTIONS.known()]
    for name in ("seconds", "host_gb"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise SpecmdError(f"{name} is {value}, expected a finite number above 0")
    print_settings(args)
    from specmd_jax.report.pages.bench_offload import FILE, draw

    if args.redraw is not None:
        print("\n".join(map(str, draw(args.redraw))))
        return
    (path,) = output_paths(results_folder(options, args), args.overwrite, FILE)
    from experiments.studies import bench_offload as work

    with printing(args, path):
        work.run(sections, path, smoke=args.smoke, seconds=args.seconds, host_gb=args.host_gb)
        print("\n".join(map(str, draw(path.parent))))


if __name__ == "__main__":
    main_guard(main)
