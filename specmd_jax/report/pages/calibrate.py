"""What `experiments.calibrate` prints: the points that it measured, the rates that follow from them, and beside those
the rates fitted to runs of the whole engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError, shown
from specmd_jax.inputs import read_json
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.reader import read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.terminal import aligned

HARDWARE, RATES = "hardware.json", "rates.json"
COLUMNS = {
    "what": Column(
        "str",
        "copy, copies: an array out of pinned memory, alone or with others in flight; dispatch: an empty program; "
        "host: an expert in float32; launch: empty operations in a loop; visit, resident: experts of one token, some "
        "missing, or fewer and all there; many resident, many missing: experts of several tokens; dense: the dense "
        "part of a layer; policy: its visit; head: from the last layer to the next token's embedding",
    ),
    "amount": Column("int", "bytes; missing experts (visit); experts (resident); operations (launch); else tokens"),
    "path": Column("str", "what ran: kernels, xla (its own operations), runtime (called from the host), numpy"),
    "seconds": Column("float", "median time of one; in a loop, an iteration of the loop included"),
    "evidence": Column("str", "measured"),
}
KEY = ("what", "amount")
TABLE = Table("calibrate", COLUMNS, KEY)
FORMAT = "specmd-jax calibration 1"
_FIELDS = ("prefill_s", "decode_s", "copy_s", "prefill_copy_s", "hidden_s")


def point(what: str, amount: int, path: str, seconds: float) -> Row:
    """Gives the row of a point."""
    return {"what": what, "amount": amount, "path": path, "seconds": seconds, "evidence": "measured"}


def draw(out: Path) -> str:
    """Points and rates as text for a terminal. Raises `SpecmdError` if one of the files is missing or damaged."""
    machine, rates = _read(out / HARDWARE, "hardware"), _read(out / RATES, "rates")
    if not isinstance(rates, dict) or rates.get("format") != FORMAT:
        raise SpecmdError(f'{out / RATES}: expected a file with "format": {json.dumps(FORMAT)}')
    try:
        hardware = [
            (name, f"{float(rate):.4g}", machine["evidence"].get(name, "not measured"))
            for name, rate in machine["hardware"].items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpecmdError(f"{out / HARDWARE}: cannot read hardware: {_line(error)}") from error
    try:
        derived = list(_derived(rates))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpecmdError(f"{out / RATES}: cannot read rates: {_line(error)}") from error
    points = [
        (str(row["what"]), f"{number(row, 'amount'):,.0f}", str(row["path"]), f"{1e6 * number(row, 'seconds'):,.2f}")
        for row in read_rows(out)
    ]
    lines = [*aligned(("measured", "amount", "path", "us"), points), ""]
    lines += [*aligned(("hardware", "rate", "evidence"), hardware), "", *derived]
    return "\n".join([*lines, str(out / HARDWARE), str(out / RATES)])


def _read(path: Path, what: str) -> Any:
    found = read_json(path)
    if not isinstance(found, dict):
        raise SpecmdError(f"{path}: cannot read {what}: expected an object, got {shown(found)}")
    return found


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _derived(rates: Any) -> Iterator[str]:
    """Gives what the points add up to, beside the whole."""
    layers, every = rates["layers"], rates["all_layers"]
    parts = [(name.removesuffix("_s"), _us(value)) for name, value in rates["parts"].items()]
    yield from [*aligned(("derived from the points", "us"), parts), ""]
    kernels = rates["kernels"]
    total = sum(kernels.values())
    if total:
        launch_s, layer_s = rates["parts"]["launch_s"], rates["layer_s"]
        listed = ", ".join(f"{name} {count}" for name, count in kernels.items())
        yield f"a layer of a decode step has {total} kernels ({listed}): at {_us(launch_s)} us for an empty launch"
        yield f"that is {_us(total * launch_s)} of its {_us(layer_s)} us"
    for part, reason in rates["reasons"].items():
        yield f"XLA's operations: {part}: {reason}"
    yield ""
    head = (
        f"seconds of a pass of {layers} layers",
        "derived from parts, us",
        "fitted to two runs, us",
        "apart",
        f"derived for all {every}, us",
    )
    table = [
        (
            name.removesuffix("_s"),
            _us(rates["derived"][name]),
            _us(rates["fitted"][name]),
            _apart(rates["derived"][name], rates["fitted"][name]),
            _us(rates["whole_model"][name]),
        )
        for name in _FIELDS
    ]
    yield from [*aligned(head, table), ""]
    kinds = ("derived", "fitted", "simulated")
    shown = [
        (
            run["capacity"],
            f"{run['copies_per_token' if name == 'tpot_s' else 'copies_per_prompt']:.1f}",
            {"tpot_s": "TPOT", "ttft_s": "TTFT"}[name],
            _us(run[name]["measured"]),
            *(f"{_us(run[name][kind])} ({_apart(run[name][kind], run[name]['measured'])})" for kind in kinds),
        )
        for run in rates["runs"]
        for name in ("tpot_s", "ttft_s")
    ]
    head = (
        "engine's run",
        "copies",
        "us",
        "measured",
        "by derived rates",
        "by fitted rates",
        "simulated: hardware.json",
    )
    yield from [*aligned(head, shown), ""]


def _us(seconds: Any) -> str:
    return f"{1e6 * float(seconds):,.2f}"


def _apart(value: Any, of: Any) -> str:
    return f"{100 * (float(value) / float(of) - 1):+.1f} %" if float(of) else "-"
