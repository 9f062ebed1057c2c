"""What `experiments.calibrate` prints: the points that it measured and the rates of the hardware file beside them."""

from __future__ import annotations

import json
from pathlib import Path

from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Column, Table
from specmd_jax.report.reader import read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.terminal import aligned

HARDWARE = "hardware.json"
COLUMNS = {
    "what": Column("str", "copy, expert, dense, dispatch or host"),
    "amount": Column("int", "bytes of a copy; tokens of an expert or a dense part"),
    "seconds": Column("float", "median time of one, copies in flight shared out"),
    "evidence": Column("str", "measured"),
}
KEY = ("what", "amount")
TABLE = Table("calibrate", COLUMNS, KEY)


def draw(out: Path) -> str:
    """Points and rates as text for a terminal. Raises `SpecmdError` if there is no hardware file, or a damaged one."""
    path = out / HARDWARE
    try:
        rates = json.loads(path.read_text(encoding="utf-8"))["hardware"]
        fitted = [(name, f"{float(rate):.4g}") for name, rate in rates.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecmdError(f"{path}: cannot read hardware: {str(error).splitlines()[0]}") from error
    points = [
        (str(row["what"]), f"{number(row, 'amount'):,.0f}", f"{1e6 * number(row, 'seconds'):,.2f}")
        for row in read_rows(out)
    ]
    lines = aligned(("measured", "bytes or tokens", "us"), points)
    return "\n".join([*lines, "", *aligned(("fitted to it", "rate"), fitted), str(path)])
