"""How well does the timing model predict what others measured? Published tokens per second beside predicted ones.

    python -m experiments.validate                                # every cell of the table
    python -m experiments.validate --smoke                        # three engines
    python -m experiments.validate --engines imp,streamlx

The table has measurements of other engines, each with its source and with what had to be assumed
(experiments/validation/cells.csv). A prediction is the closed form of the contract's section 5 for one decoded token:
the model's bytes, the machine's rates and the misses that were published. Where none were, LRU on synthetic routing
with the model's locality gives them; the column `misses_from` says which. Two predictions are made: as shipped, with
nothing fitted; and with two constants of the engine (a layer's fixed time, the share of its link or host that it
reaches), fitted by least squares on that engine's cells of another model or capacity, for engines with three cells or
more. Cells that cannot be expressed stay in the table with the reason.

Writes rows.csv, manifest.json, a figure, report.md and report.html (self-contained) to results/validate. Takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from configs.validate import ValidateConfig
from experiments.common.command_line import main_guard, parser, results_folder
from experiments.common.options import options_of, settings_of
from experiments.validation.cells import Cell, digest, published_cells
from experiments.validation.fitting import LEAST_CELLS, fitted, held_out, terms_of
from experiments.validation.prediction import machine_of, token_seconds, work_of
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.validate import TABLE, draw
from specmd_jax.report.writer import ResultWriter


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "validate")
    options_of(options, ValidateConfig())
    args = options.parse_args(argv)
    config = settings_of(args, ValidateConfig())
    out = results_folder(options, args)
    cells = [cell for cell in published_cells() if not config.engines or cell.engine in config.engines]
    with ResultWriter(out, asdict(config), TABLE, args.overwrite, trace_sha256=digest()) as writer:
        for row in rows_of(cells):
            writer.write(row)
    print(draw(out))


def rows_of(cells: Sequence[Cell]) -> Iterator[Row]:
    """Gives a row for each cell, engine by engine."""
    for engine in dict.fromkeys(cell.engine for cell in cells):
        mine = [cell for cell in cells if cell.engine == engine]
        told = [cell for cell in mine if not cell.reason]
        machines = [machine_of(cell) for cell in told]
        works = [work_of(cell, machine) for cell, machine in zip(told, machines, strict=True)]
        found: dict[str, Row] = {}
        for cell, work, machine in zip(told, works, machines, strict=True):
            found[cell.id] = {
                "misses_per_token": work.layers * work.top_k * work.missing,
                **_predicted(cell, "shipped", token_seconds(work, machine)),
            }
        # least squares in these two constants is linear only where one place serves all misses
        kinds = [(cell.model, cell.capacity) for cell in told]
        left = min((len(told) - kinds.count(kind) for kind in kinds), default=0)
        if len(told) >= LEAST_CELLS and left >= 2 and all(cell.miss != "split" for cell in told):
            terms = [
                terms_of(work, machine, cell.tokens_per_s)
                for cell, work, machine in zip(told, works, machines, strict=True)
            ]
            profile = fitted(terms)
            for cell, seconds in zip(told, held_out(terms, kinds), strict=True):
                found[cell.id] |= _predicted(cell, "held_out", seconds)
                found[cell.id] |= {"layer_s": profile.layer_s, "rate_share": profile.share}
        for cell in mine:
            facts = {name: value if value != "" else None for name, value in asdict(cell).items()}
            values = facts | found.get(cell.id, {}) | {"evidence": "measured (published) and predicted"}
            yield {name: values.get(name) for name in TABLE.columns}


def _predicted(cell: Cell, how: str, seconds: float) -> Row:
    return {f"{how}_tokens_per_s": 1 / seconds, f"{how}_error": 1 / seconds / cell.tokens_per_s - 1}


if __name__ == "__main__":
    main_guard(main)
