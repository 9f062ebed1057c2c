"""`hardware`: a machine by name, from a file, or with some of its numbers replaced.

A preset is a starting point: `HARDWARE_NOTES` says for each of its numbers where it comes from and whether it was
``measured``, is ``nominal`` (a data sheet) or ``estimated``. Change a number with ``hardware("rtx4090").replace(...)``;
keep calibrated ones in a JSON file with `save_hardware` and pass its path wherever a name is accepted.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np

from specmd_jax.errors import SpecmdError, find, shown, unknown
from specmd_jax.files import replace_text
from specmd_jax.inputs import read_json
from specmd_jax.specs.engines import ENGINES
from specmd_jax.specs.machine import (
    EVIDENCE,
    OVERHEADS,
    RATES,
    SHARES,
    Evidence,
    Hardware,
    HardwareNotes,
    check_machine,
    check_notes,
    items_of,
)
from specmd_jax.specs.machines import HARDWARE, HARDWARE_NOTES

__all__ = [
    "ENGINES",
    "EVIDENCE",
    "HARDWARE",
    "HARDWARE_NOTES",
    "MARK",
    "OVERHEADS",
    "RATES",
    "SHARES",
    "Evidence",
    "Hardware",
    "HardwareNotes",
    "hardware",
    "load_hardware",
    "save_hardware",
    "with_storage",
]

MARK = ":"  # between the name of a preset, that of an engine, and numbers that replace its own
_FORMAT = "specmd-jax hardware 1"
MOST_BYTES = 1 << 20
"""No hardware file is larger."""


def hardware(machine: str | Path | Hardware) -> Hardware:
    """`machine` itself (its fields may be arrays, but not traced), the preset of that name (in any case), or the preset
    in a ``.json`` file. Behind a name an engine of `ENGINES` may stand, and numbers that replace the preset's:
    ``rtx4090:FreeToken``, ``rtx4090:overlaps=0:handover_s=3e-5``. They apply from left to right.

    Raises `SpecmdError` naming the field if a rate is not positive, an overhead is negative or not finite, or a share
    is not within 0..1.
    """
    if isinstance(machine, Hardware):
        check_machine(machine, "hardware")
        return machine
    whole = isinstance(machine, Path) or machine.lower().endswith(".json")  # a file's name may have the mark in it
    name, *changes = [str(machine)] if whole else str(machine).split(MARK)
    if isinstance(machine, Path) or name.lower().endswith(".json"):
        found = load_hardware(name)[0]
    else:
        found = HARDWARE[find("hardware", name, HARDWARE)]
    return _changed(found, changes, str(machine)) if changes else found


def _changed(machine: Hardware, changes: list[str], place: str) -> Hardware:
    """Gives the machine with what engines or "field=number" change, from left to right."""
    found = machine
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            found = ENGINES[find(f"engine in hardware {place!r}:", name, ENGINES)].on(found)
            continue
        if name not in (names := [leaf.name for leaf in fields(Hardware)]):
            raise unknown(f"field in hardware {place!r}:", name, names)
        try:
            found = found.replace(**{name: float(text)})
        except ValueError:
            raise SpecmdError(f"hardware {place!r}: {name} is {text!r}, expected a number") from None
    check_machine(found, f"hardware {place!r}")
    return found


def with_storage(machine: str | Path | Hardware, storage: str | Path | Hardware) -> Hardware:
    """Gives `machine` with the link of `storage` (such as the preset "nvme-4") between its storage and host memory.

    Raises SpecmdError as `hardware` does.
    """
    found = hardware(storage)
    return hardware(machine).replace(storage_bytes_per_s=found.link_bytes_per_s, storage_latency_s=found.link_latency_s)


def save_hardware(machine: Hardware, path: str | Path, notes: HardwareNotes) -> None:
    """Writes a preset that ``hardware(path)`` reads; `notes` say where the numbers come from.

    Raises `SpecmdError` if a number is out of range, or if `path` does not end in ``.json``.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise SpecmdError(f"{path}: a hardware file must end in .json")
    check_machine(machine, "hardware")
    check_notes(notes, "hardware notes")
    values: dict[str, float | str] = {}
    for name, value in items_of(machine):
        if np.ndim(value):
            raise SpecmdError(f"{path}: {name} has shape {np.shape(value)}: a hardware file holds one machine")
        values[name] = float(value) if math.isfinite(value) else "inf"  # JSON has no infinity
    document = {
        "format": _FORMAT,
        "hardware": values,
        "source": notes.source,
        "evidence": dict(notes.evidence),
    }
    replace_text(path, json.dumps(document, indent=2) + "\n")


def load_hardware(path: str | Path) -> tuple[Hardware, HardwareNotes]:
    """Reads a preset that `save_hardware` wrote, and its notes. A field with a default may be missing: the file may be
    older. Raises `SpecmdError` naming the file and the field.
    """
    document = read_json(path, MOST_BYTES)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise SpecmdError(f'{path}: expected a hardware file with "format": {json.dumps(_FORMAT)}')

    values, names = document.get("hardware"), [leaf.name for leaf in fields(Hardware)]
    needed = [leaf.name for leaf in fields(Hardware) if leaf.default is MISSING]
    if not isinstance(values, dict) or not set(needed) <= set(values) <= set(names):
        got = shown(sorted(values) if isinstance(values, dict) else values, 500)
        optional = ", ".join(sorted(set(names) - set(needed)))
        raise SpecmdError(
            f'{path}: expected the fields {", ".join(sorted(needed))} in "hardware", and perhaps {optional}; got {got}'
        )
    for name, value in values.items():
        if isinstance(value, list | dict):
            raise SpecmdError(f"{path}: {name} is {shown(value)}: expected a number")
    machine = Hardware(**{name: math.inf if value == "inf" else value for name, value in values.items()})
    check_machine(machine, str(path))

    evidence = document.get("evidence", {})
    if not isinstance(evidence, dict):
        raise SpecmdError(f'{path}: expected an object in "evidence", got {shown(evidence)}')
    notes = HardwareNotes(str(document.get("source", "")), evidence)
    check_notes(notes, str(path))
    return machine, notes
