"""What `experiments.calibrate` prints: the points that it measured, the rates that follow from them, and beside those
the rates fitted to runs of the whole engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError, shown
from specmd_jax.inputs import read_json
from specmd_jax.report.charts import Chart, Field, dots
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import categories
from specmd_jax.report.terminal import aligned
from specmd_jax.units import GB

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
    """Writes report.md and report.html into `out`; gives points and rates as text for a terminal.

    Raises `SpecmdError` if one of the files is missing or damaged.
    """
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
    rows = read_rows(out)
    points = [
        (str(row["what"]), f"{number(row, 'amount'):,.0f}", str(row["path"]), f"{1e6 * number(row, 'seconds'):,.2f}")
        for row in rows
    ]
    lines = [*aligned(("measured", "amount", "path", "us"), points), ""]
    lines += [*aligned(("hardware", "rate", "evidence"), hardware), "", *derived]
    page = Document(_title(rates), read_manifest(out))
    page.answer(_answer(rates, machine))
    page.data(
        "rows",
        [
            {"series": str(row["what"]), "amount": number(row, "amount"), "us": 1e6 * number(row, "seconds")}
            | {"path": str(row["path"])}
            for row in rows
            if number(row, "amount") > 0 and number(row, "seconds") > 0
        ],
    )
    page.filters(path="what ran")
    style = categories(str(row["what"]) for row in rows)
    page.series(style, list(style), "what was measured")
    told = (Field("series", "what"), Field("amount", "bytes, experts or tokens", ",d"), Field("us", "us", ",.3~f"))
    log = {"type": "log"}
    page.chart(
        Chart(
            f"{len(rows)} points were measured", "Median time of each point against its amount.",
            dots(told[1], told[2], (*told, Field("path", "what ran")), x_scale=log, y_scale=log, height=380), wide=True,
        )
    )  # fmt: skip
    page.heading("Hardware")
    page.table(("hardware", "rate", "evidence"), hardware)
    page.heading("What the points add up to")
    page.verbatim("\n".join(derived).strip())
    page.rows("rows", [*told, Field("path", "what ran")], "Every point")
    return "\n".join([*lines, str(out / HARDWARE), str(out / RATES), *map(str, page.save(out))])


def _title(rates: Any) -> str:
    """States how far what parts add up to is from the engine's own runs."""
    off = [
        abs(float(run["tpot_s"]["derived"]) / float(run["tpot_s"]["measured"]) - 1)
        for run in rates["runs"]
        if float(run["tpot_s"]["measured"])
    ]
    if not off:
        return "The rates of this machine (measured)"
    return f"Measured parts add up to a token's time within {100 * max(off):.0f} % in {len(off)} runs of the engine"


def _answer(rates: Any, machine: Any) -> list[Said]:
    """Gives the rates that matter most, and each run beside what the parts give."""
    hardware, evidence = machine["hardware"], machine["evidence"]
    said = [
        Said(f"{words}: {float(hardware[name]) / GB:.3g} GB/s.", str(evidence.get(name, "")))
        for name, words in (
            ("link_bytes_per_s", "The link from host memory"),
            ("memory_bytes_per_s", "The device's memory"),
            ("host_moe_bytes_per_s", "Experts on the host"),
        )
        if math.isfinite(float(hardware.get(name) or math.inf))
    ]
    for run in rates["runs"]:
        times = run["tpot_s"]
        said.append(
            Said(
                f"A token at {run['capacity']}: {_us(times['measured'])} us measured, {_us(times['derived'])} us from "
                f"the parts, {_us(times['simulated'])} us simulated with this machine's preset.",
                "measured and simulated",
            )
        )
    return said


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
