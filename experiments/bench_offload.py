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

Prints one table, writes bench.json after every row (what is measured is kept if a later step fails or time ends), and
draws the first three.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# pinned host memory is limited to 64 GB by default, and torch needs its share of the device's
os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax

from experiments.benchmarks.offloading import engines, hardware, host, streaming, variants
from experiments.benchmarks.offloading.bench import Bench, Result, line
from experiments.benchmarks.offloading.cpu_offload import accelerated
from experiments.common.command_line import main_guard, output_paths, parser, results_folder
from experiments.common.options import names
from specmd_jax.errors import SpecmdError, find
from specmd_jax.report.pages.bench_offload import FILE, draw
from specmd_jax.report.provenance import versions
from specmd_jax.report.terminal import aligned

SECTIONS: dict[str, Callable[[Bench], Result]] = {
    "bfloat16": streaming.bfloat16,
    "int4": streaming.int4,
    "mxfp4": streaming.mxfp4,
    "copies": hardware.copies,
    "resident": hardware.resident,
    "engines": engines.fused_beside_layerwise,
    "accelerate": accelerated,
    "layerwise": engines.layerwise,
    "equality": engines.equality,
    "host": host.host,
    "batches": variants.batches,
    "precisions": variants.precisions,
    "by_cache": variants.by_cache,
}


def table(result: Result) -> str:
    """Gives everything measured: a table per section, and one more of its rows where it has some."""
    lines = []
    for section, values in result.items():
        facts = values if isinstance(values, dict) else {"": values}
        body = [(name, _shown(value)) for name, value in facts.items() if name != "rows"]
        lines += [*aligned((section, ""), body), ""]
        rows = facts.get("rows", [])
        head = list(dict.fromkeys(name for row in rows for name in row))
        if rows:
            lines += [*aligned(head, [[_shown(row.get(name)) for name in head] for row in rows]), ""]
    return "\n".join(lines).rstrip()


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _draw(out: Path) -> None:
    for figure in draw(out):
        print(figure)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "bench_offload")
    options.add_argument(
        "--seconds", type=float, metavar="X", default=420.0, help="leave out what would take longer (default: 420)"
    )
    options.add_argument(
        "--host-gb",
        type=float,
        metavar="X",
        help="host memory to use, where the system says less than it gives (default: what the system says)",
    )
    options.add_argument(
        "--only", type=names, metavar="A,B", help=f"sections; some of: {', '.join(SECTIONS)} (default: all)"
    )
    options.add_argument("--redraw", type=Path, metavar="DIR", help="measure nothing: draw the results in DIR again")
    args = options.parse_args(argv)
    if args.redraw is not None:
        _draw(args.redraw)
        return
    sections = [find("section", name, SECTIONS) for name in args.only or SECTIONS]
    for name in ("seconds", "host_gb"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise SpecmdError(f"{name} is {value}, expected a finite number above 0")
    (path,) = output_paths(results_folder(options, args), args.overwrite, FILE)
    bench = Bench(args.smoke, args.seconds, None if args.host_gb is None else int(args.host_gb * 1e9))
    path.parent.mkdir(parents=True, exist_ok=True)
    bench.path = path
    bench.result["setting"] = {
        "model": bench.name,
        "device": str(jax.devices()[0].device_kind),
        "versions": versions(),
        "prompt_tokens": bench.prompt,
        "decoded_tokens": bench.steps,
        "requests": bench.requests,
        "made_s": time.perf_counter() - bench.begin_s,
    }
    for name in sections:
        begin = time.perf_counter()
        try:
            bench.result[name] = SECTIONS[name](bench)
        except Exception as error:  # the other steps' numbers are worth keeping
            bench.result[f"{name} failed"] = line(error)
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        bench.save()
    print(table(bench.result))
    _draw(path.parent)


if __name__ == "__main__":
    main_guard(main)
