"""A model with its experts in host memory, timed, and the simulator's prediction beside it.

    python -m experiments.offload                                   # the model that comes with this package writes text
    python -m experiments.offload --model tiny                      # a tiny model's table, on any machine
    python -m experiments.offload --smoke
    python -m experiments.offload --engine fused                    # one program per pass; default: layer by layer
    python -m experiments.offload --engine fused --batch 4 --requests 12
    python -m experiments.offload --model OLMoE-1B-7B               # a published shape in bf16, made-up weights
    python -m experiments.offload --model specmd-reference          # trained weights: hit rates mean something
    python -m experiments.offload --model FOLDER                    # config.json and safetensors
    python -m experiments.offload --miss cascade --precisions int4,int8,native    # by either engine
    python -m experiments.offload --miss drop --miss-numbers keep=1
    python -m experiments.offload --routing cache_aware --routing-numbers strength=0.2
    python -m experiments.offload --model FOLDER --memory 6GiB --prompt "Once upon a time"

Without any option the trained model that comes with this package, specmd-reference, completes a text while the device
holds a quarter of its experts: seconds on two cores, and below the text how fast it was, measured beside simulated.

With --model or another option it runs every eviction policy at every capacity, with and without prefetching, on the
same prompts. Rates come from runs of other prompts on the spot (`specmd_jax.moe.measure.predict`); each run's recorded
routing is then replayed by the simulator under the run's policy, which must find the same events, and gives the
predicted times. Weights that are made up route without locality: times and predictions are real, hit rates mean
nothing.

A miss rule or a routing that changes what is computed is also compared with the all-resident model: both read the
resident model's text, and the table says how often the next token differs, the KL divergence, and the text's perplexity
under each (of made-up weights they show that it is measured, not what it costs).

Writes rows.csv, manifest.json and one trace (trace.npz) to results/offload, and prints a table. Prompts are random
token ids. The first request of a run fills the cache and is not counted, but for tokens per second, which are those of
the whole run. In a batch all requests have arrived when the run begins: the time to a first token has their waiting.

--timeline FILE.json draws the first run of the table, or the prompt's, over time: measured, and below it simulated.

With a prompt nothing of this is run: a checkpoint completes it in so much device memory, greedily, and the text is
printed as it comes; then how fast it was, measured and as the simulator has it on the routing of this very text. Unless
another is named, the checkpoint is specmd-reference.
Without a tokenizer.json, give --prompt-ids. Files are written only with --out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.completion import PROMPTS, SHOWN_PROMPT, Completion
from configs.offload import OffloadConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import declared, options_of, settings_of
from experiments.common.timelines import passes_shown, timeline_options, timeline_path
from specmd_jax.errors import SpecmdError


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "offload")
    options_of(options, OffloadConfig())
    of_study, of_prompt = ({one.name for one in declared(kind)} for kind in (OffloadConfig(), Completion()))
    options_of(options.add_argument_group("to complete a prompt"), Completion(), but=of_study)
    timeline_options(options, "a run")
    args = options.parse_args(argv)
    timeline, passes = timeline_path(args), passes_shown(args)
    if not args.smoke and timeline is None and all(getattr(args, name) is None for name in of_study | of_prompt):
        args.prompt = SHOWN_PROMPT
        print(args.prompt, end="", flush=True)
    with_prompt = any(getattr(args, name) is not None for name in PROMPTS)
    if with_prompt:
        _refuse(args, of_study - of_prompt, "with a prompt", "see 'to complete a prompt' in --help")
        out = None if args.out is options.get_default("out") else args.out
        if out is None and args.format != "table":
            raise SpecmdError(f"--format {args.format} with a prompt prints the table of --out, expected --out DIR")
        prompt = settings_of(args, Completion())
        from experiments.offloading.completed import complete

        with printing(args, out):
            complete(prompt, out, args.overwrite, timeline, passes)
        return
    _refuse(args, of_prompt - of_study, "without a prompt", "--prompt TEXT, --prompt-file FILE or --prompt-ids N,N")
    config = settings_of(args, OffloadConfig())
    from experiments.studies import offload as work
    from specmd_jax.report.pages.offload import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, timeline=timeline, passes=passes)
        print(draw(out))


def _refuse(args: Any, names: set[str], when: str, expected: str) -> None:
    """Raises `SpecmdError` for an option that would have no effect."""
    for name in sorted(names):
        if getattr(args, name) is not None:
            raise SpecmdError(f"--{name.replace('_', '-')} has no effect {when}, expected {expected}")


if __name__ == "__main__":
    main_guard(main)
