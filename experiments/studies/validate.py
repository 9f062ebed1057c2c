"""The work of `experiments.validate`: a row for each published cell, with its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from configs.validate import ValidateConfig
from experiments.validation.cells import Cell, digest, published_cells
from experiments.validation.fitting import LEAST_CELLS, fitted, held_out, terms_of
from experiments.validation.prediction import machine_of, token_seconds, work_of
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.validate import TABLE
from specmd_jax.report.writer import ResultWriter


def run(config: ValidateConfig, out: Path, *, overwrite: bool) -> None:
    """Writes a row for each cell of the engines that are asked for."""
    cells = [cell for cell in published_cells() if not config.engines or cell.engine in config.engines]
    with ResultWriter(out, asdict(config), TABLE, overwrite, trace_sha256=digest()) as writer:
        for row in rows_of(cells):
            writer.write(row)


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
