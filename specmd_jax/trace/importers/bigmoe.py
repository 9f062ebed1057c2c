"""``bigmoe-csv``: ``--route-trace`` v1 of BigMoeOnEdge, plain or packed with gzip or xz.

A ``#`` preamble (model, sizes, bytes per layer), then one row per routed expert. Columns are read by name, as the
format only ever appends some. ``step`` is the absolute context position: a later turn of a session does not begin at 0.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, check_cells, read_text
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.validate import validate
from specmd_jax.types import Trace

_CSV_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency")


def is_bigmoe(peek: Peek) -> bool:
    return bool(peek.first_lines) and peek.first_lines[0].split()[:2] == ["#", "route_trace"]


def import_bigmoe(path: str | os.PathLike[str]) -> Trace:
    """Reads a BigMoeOnEdge route trace (see `read_bigmoe`)."""
    return read_bigmoe(path)[0]


def read_bigmoe(path: str | os.PathLike[str]) -> tuple[Trace, npt.NDArray[np.int8]]:
    """Reads a BigMoeOnEdge route trace and what its engine found in its cache.

    A turn becomes a request: its prefill tokens, then its decoded ones. Cells that the engine skipped are -1 (llama.cpp
    runs the last layer only for the last prompt token). Model layers without experts are left out, and
    ``meta["layer_numbers"]`` then tells which ones the others are. Experts that the engine routed to but dropped stay
    in the demand, and ``meta["dropped"]`` counts them.

    Returns:
      The trace, and the residency [N, L, K] int8: 0 miss, 1 hit, 2 first hit of a prefetch, -1 absent.

    Raises:
      SpecmdError: with the file and the line.
    """
    path = Path(path)
    lines = read_text(path).splitlines()
    n_preamble = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = _preamble(path, lines[:n_preamble])
    columns, rows = _rows(path, lines, n_preamble)
    line_of_row = n_preamble + 2  # 1-based; the header stands between

    def fail(bad: npt.NDArray[np.bool_], name: str, expected: str) -> None:
        for row in np.flatnonzero(bad)[:1]:
            value = rows[row, columns[name]]
            raise SpecmdError(f"{path}, line {row + line_of_row}: {name} is {value:g}, expected {expected}")

    def whole(name: str, limit: int) -> npt.NDArray[np.int64]:
        values = rows[:, columns[name]]
        fail(
            ~((values >= 0) & (values < limit) & (values == np.floor(values))),
            name,
            f"an integer from 0 to {limit - 1}",
        )
        return values.astype(np.int64)

    limits = {"turn": 1 << 31, "phase": 2, "step": 1 << 31, "layer": head["n_layer"], "slot": head["n_expert_used"]}
    limits |= {"expert": head["n_expert"], "residency": 3}
    turn, phase, step, layer, slot, expert, residency = (whole(name, limit) for name, limit in limits.items())
    moe_layers = np.flatnonzero(head["expert_bytes"])
    fail(head["expert_bytes"][layer] == 0, "layer", "a layer whose expert_bytes in the preamble is above 0")

    # A token is a (turn, step); np.unique sorts them into request and context order.
    key, first_row, token = np.unique((turn << 32) | step, return_index=True, return_inverse=True)
    token_turn, token_step, token_phase = key >> 32, key & 0xFFFFFFFF, phase[first_row]
    fail(phase != token_phase[token], "phase", "the phase of the other rows of its turn and step")
    same_turn = np.diff(token_turn) == 0
    gap = np.append(False, same_turn & (np.diff(token_step) != 1))
    for bad in np.flatnonzero(gap)[:1]:
        raise SpecmdError(
            f"{path}, line {first_row[bad] + line_of_row}: step is {token_step[bad]} in turn {token_turn[bad]}, "
            f"expected {token_step[bad - 1] + 1} to come next"
        )
    back = np.append(False, same_turn & (np.diff(token_phase) < 0))
    for bad in np.flatnonzero(back)[:1]:
        raise SpecmdError(
            f"{path}, line {first_row[bad] + line_of_row}: prefill step {token_step[bad]} of turn {token_turn[bad]} "
            "comes after a decode step, expected prefill first"
        )
    dense_layer = np.searchsorted(moe_layers, layer)
    cell = (token * moe_layers.size + dense_layer) * head["n_expert_used"] + slot
    order = np.argsort(cell, kind="stable")
    twice = np.zeros(cell.size, np.bool_)
    twice[order[1:]] = cell[order[1:]] == cell[order[:-1]]
    fail(twice, "slot", "one row a turn, step, layer and slot")

    shape = (key.size, moe_layers.size, head["n_expert_used"])
    check_cells(path, math.prod(shape), len(rows))

    def dense(values: npt.NDArray[Any], dtype: type, absent: int) -> npt.NDArray[Any]:
        out = np.full(math.prod(shape), absent, dtype)
        out[cell] = values
        return out.reshape(shape)

    weight = rows[:, columns["weight"]]
    gates = None  # "nan" in every row: the engine's graph showed no weights
    if not np.isnan(weight).all():
        fail(~(np.isfinite(weight) & (weight >= 0)), "weight", "a finite number >= 0 (or nan in every row)")
        gates = dense(weight, np.float32, 0)
    turns, lengths = np.unique(token_turn, return_counts=True)
    prompts = np.array([(token_phase[token_turn == t] == 0).sum() for t in turns])
    meta: dict[str, Any] = {
        "model": Path(head["model"]).stem,
        "source": f"BigMoeOnEdge route trace {path.name}",
        "licence": "unknown",
        "capture": "--route-trace v1; expert bytes are those of the file's preamble",
        "arch": head["arch"],
        "dense_bytes": head["dense_bytes"][moe_layers].tolist(),
        "requests": [{"turn": int(t)} for t in turns],
    }
    if moe_layers.size < head["n_layer"]:
        meta["layer_numbers"] = moe_layers.tolist()
    if "dropped" in columns:
        meta["dropped"] = int(whole("dropped", 2).sum())
    trace = Trace(
        expert_ids=dense(expert, np.int16, -1),
        lengths=lengths.astype(np.int32),
        prompt_lengths=prompts.astype(np.int32),
        experts=head["n_expert"],
        expert_bytes=head["expert_bytes"][moe_layers],
        gates=gates,
        meta=meta,
    )
    validate(trace, str(path))
    return trace, dense(residency, np.int8, -1)


def _preamble(path: Path, lines: list[str]) -> dict[str, Any]:
    if not lines or lines[0].split()[:3] != ["#", "route_trace", "v1"]:
        raise SpecmdError(f"{path}, line 1: expected '# route_trace v1'")
    head: dict[str, Any] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for number, line in enumerate(lines[1:], 2):
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        try:
            if line.startswith("# layer="):
                sizes[int(fields["layer"])] = (int(fields["expert_bytes"]), int(fields["dense_bytes"]))
            elif "n_layer" in fields:
                # The model is a path and may hold blanks: everything up to the next key.
                match = re.search(r"model=(.*?)\s+arch=(\S*)", line)
                head = {"model": match[1] if match else "unknown", "arch": match[2] if match else "unknown"}
                head |= {key: int(fields[key]) for key in ("n_layer", "n_expert", "n_expert_used")}
        except KeyError as error:
            raise SpecmdError(f"{path}, line {number}: {error.args[0]}= is missing") from error
        except ValueError as error:
            raise SpecmdError(f"{path}, line {number}: {' '.join(str(error).split())}") from error
    if not head:
        raise SpecmdError(f"{path}: the preamble has no line with n_layer=, n_expert= and n_expert_used=")
    for key in ("n_layer", "n_expert", "n_expert_used"):
        if not 1 <= head[key] < 1 << 16:
            raise SpecmdError(f"{path}: {key} is {head[key]} in the preamble, expected 1 to 65535")
    for layer in range(head["n_layer"]):
        if layer not in sizes:
            raise SpecmdError(
                f"{path}: the preamble has no line for layer {layer}, expected 0 to {head['n_layer'] - 1}"
            )
    extra = sorted(set(sizes) - set(range(head["n_layer"])))
    if extra:
        raise SpecmdError(f"{path}: the preamble has layer {extra[0]}, expected 0 to {head['n_layer'] - 1}")
    table = np.array([sizes[layer] for layer in range(head["n_layer"])], np.int64)
    if (table < 0).any() or not table[:, 0].any():
        raise SpecmdError(f"{path}: expert_bytes and dense_bytes of the preamble: expected >= 0, and > 0 in a layer")
    return head | {"expert_bytes": table[:, 0], "dense_bytes": table[:, 1]}


def _rows(path: Path, lines: list[str], n_preamble: int) -> tuple[dict[str, int], npt.NDArray[np.float64]]:
    """Column name -> index, and the rows as floats (exact for the integers here)."""
    header = lines[n_preamble].split(",") if n_preamble < len(lines) else []
    columns = {name.strip(): i for i, name in enumerate(header)}
    for name in _CSV_COLUMNS:
        if name not in columns:
            raise SpecmdError(f"{path}, line {n_preamble + 1}: column {name!r} is missing (found: {','.join(header)})")
    body = lines[n_preamble + 1 :]
    if not body:
        raise SpecmdError(f"{path}: no rows after the header")
    try:
        rows = np.loadtxt(body, delimiter=",", ndmin=2, comments=None)
        if rows.shape == (len(body), len(header)):
            return columns, rows
    except ValueError:
        pass  # the loop below finds the line
    for number, line in enumerate(body, n_preamble + 2):
        fields = line.split(",")
        if len(fields) != len(header):
            raise SpecmdError(f"{path}, line {number}: {len(fields)} fields, expected {len(header)}")
        for name, field in zip(header, fields, strict=True):
            try:
                float(field)
            except ValueError:
                raise SpecmdError(f"{path}, line {number}: {name} is {brief(field)}, expected a number") from None
    raise SpecmdError(f"{path}: cannot read the rows")
