"""The hardware presets: units, validation, files, infinite rates."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.specs.hardware import (
    ENGINES,
    EVIDENCE,
    HARDWARE,
    HARDWARE_NOTES,
    OVERHEADS,
    RATES,
    SHARES,
    Hardware,
    HardwareNotes,
    hardware,
    load_hardware,
    save_hardware,
    with_storage,
)

FIELDS = [leaf.name for leaf in dataclasses.fields(Hardware)]
OWN = [name for name in FIELDS if not name.startswith("storage_")]
"""What a machine says for itself; its storage is another's link."""
NOTES = HardwareNotes("a stopwatch", {"link_bytes_per_s": "measured"})


@pytest.mark.parametrize("name", HARDWARE)
def test_every_preset_is_valid_and_every_number_has_evidence(name: str) -> None:
    assert hardware(name) is HARDWARE[name]
    assert hardware(HARDWARE[name]) is HARDWARE[name]
    notes = HARDWARE_NOTES[name]
    assert sorted(notes.evidence) == sorted(OWN)
    assert set(notes.evidence.values()) <= set(EVIDENCE)
    assert all(part in notes.source for part in ("link: ", "device: ", "host: ", "engine: "))


def test_every_field_is_a_rate_an_overhead_or_a_share() -> None:
    assert sorted(RATES + OVERHEADS + SHARES) == sorted(FIELDS)


def test_units() -> None:
    assert hardware("specmd-a100").link_bytes_per_s == 5_000_000_000
    assert hardware("phone-ufs").link_bytes_per_s == 2460 * 1024 * 1024
    assert hardware("H200-PCIe5").link_bytes_per_s == 52e9
    assert hardware("h200-pcie5").peak_flops_per_s == 989e12
    for name, preset in HARDWARE.items():
        assert preset.link_latency_s < 1e-3 and preset.launch_s < 1e-3, name
        assert preset.memory_bytes_per_s < 1e13 and preset.host_bytes_per_s < 1e12, name


def test_faster_buses_are_faster() -> None:
    rates = [hardware(f"pcie{generation}-x16").link_bytes_per_s for generation in (3, 4, 5)]
    assert rates == sorted(rates)
    assert hardware("nvme-4").link_bytes_per_s < hardware("nvme-5").link_bytes_per_s < rates[0]


def test_a_machine_is_a_pytree_of_numbers_that_vmaps_over_any_field() -> None:
    machine = hardware("rtx4090")
    assert len(jax.tree.leaves(machine)) == len(FIELDS)
    links = jnp.array([1e9, 2e9])
    axes = Hardware(**{name: 0 if name == "link_bytes_per_s" else None for name in FIELDS})  # pyright: ignore
    batch = dataclasses.replace(machine, link_bytes_per_s=links)
    seconds = jax.vmap(lambda h: h.link_latency_s + 1e9 / h.link_bytes_per_s, in_axes=(axes,))(batch)
    np.testing.assert_allclose(seconds, 10e-6 + np.array([1.0, 0.5]), rtol=1e-6)
    assert hardware(batch) is batch


def test_an_infinite_link_without_launches_gives_finite_times() -> None:
    machine = jax.tree.map(jnp.float32, hardware("infinite"))
    copy_s = machine.link_latency_s + 12e6 / machine.link_bytes_per_s
    expert_s = machine.launch_s + jnp.maximum(12e6 / machine.peak_flops_per_s, 12e6 / machine.memory_bytes_per_s)
    assert copy_s == 0
    assert 0 < expert_s < 1e-3


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, -math.inf])
def test_a_rate_that_is_not_positive_is_refused(name: str, value: float) -> None:
    with pytest.raises(SpecmdError, match=f"{name} is .*: expected a positive rate"):
        hardware(dataclasses.replace(hardware("rtx4090"), **{name: value}))


@pytest.mark.parametrize("name", OVERHEADS)
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_an_overhead_that_is_negative_or_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(SpecmdError, match=f"{name} is .*: expected a finite time"):
        hardware(dataclasses.replace(hardware("rtx4090"), **{name: value}))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(SpecmdError, match=r"overlaps is .*: expected a share, 0 to 1"):
        hardware(dataclasses.replace(hardware("rtx4090"), overlaps=value))


def test_numbers_behind_a_name_replace_the_presets(tmp_path: Path) -> None:
    machine = hardware("RTX4090:overlaps=0:host_moe_bytes_per_s=3e10")
    assert machine == hardware("rtx4090").replace(overlaps=0.0, host_moe_bytes_per_s=3e10)
    save_hardware(hardware("infinite"), tmp_path / "mine.json", NOTES)
    assert hardware(f"{tmp_path}/mine.json:sync_s=1e-4") == hardware("infinite").replace(sync_s=1e-4)
    for text, match in (
        ("rtx4090:overlap=0", "did you mean 'overlaps'"),
        ("rtx4090:overlaps=half", "overlaps is 'half', expected a number"),
        ("rtx4090:overlaps=2", "overlaps is 2.0: expected a share"),
        ("rtx409:overlaps=0", "did you mean 'rtx4090'"),
    ):
        with pytest.raises(SpecmdError, match=match):
            hardware(text)


def test_a_file_from_before_the_younger_fields_has_neutral_ones(tmp_path: Path) -> None:
    path, document = _saved(tmp_path)
    younger = ("host_moe_bytes_per_s", "handover_s", "sync_s", "layer_s", "overlaps", "storage_bytes_per_s")
    for name in younger:
        del document["hardware"][name]
    path.write_text(json.dumps(document))
    machine = hardware(path)
    assert [getattr(machine, name) for name in younger] == [math.inf, 0, 0, 0, 1, math.inf]


def test_the_bad_one_of_many_machines_is_named() -> None:
    batch = dataclasses.replace(hardware("rtx4090"), link_bytes_per_s=np.array([1e9, -2e9]))  # pyright: ignore
    with pytest.raises(SpecmdError, match=r"link_bytes_per_s is -2000000000\.0: expected a positive rate"):
        hardware(batch)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(SpecmdError, match="launch_s is 'fast': expected a number"):
        hardware(dataclasses.replace(hardware("rtx4090"), launch_s="fast"))  # pyright: ignore


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SpecmdError, match=r"unknown hardware 'rtx409'; did you mean 'rtx4090'\?.*phone-ufs"):
        hardware("rtx409")


@pytest.mark.parametrize("name", ["h200-pcie5", "infinite"])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.json"
    save_hardware(HARDWARE[name], path, HARDWARE_NOTES[name])
    assert hardware(path) == hardware(str(path)) == HARDWARE[name]
    assert load_hardware(path) == (HARDWARE[name], HARDWARE_NOTES[name])
    assert "Infinity" not in path.read_text()  # strict JSON
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    save_hardware(hardware("rtx4090"), path, NOTES)
    before = path.read_text()
    with pytest.raises(SpecmdError, match="launch_s is -1"):
        save_hardware(dataclasses.replace(hardware("rtx4090"), launch_s=-1.0), path, NOTES)
    with pytest.raises(SpecmdError, match="link_latency_s has shape"):
        save_hardware(dataclasses.replace(hardware("rtx4090"), link_latency_s=np.zeros(2)), path, NOTES)  # pyright: ignore
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_must_be_called_json(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=r"mine\.txt: a hardware file must end in \.json"):
        save_hardware(hardware("rtx4090"), tmp_path / "mine.txt", NOTES)


def test_storage_is_the_link_of_another_machine(tmp_path: Path) -> None:
    found, ssd = with_storage("rtx4090", "nvme-4"), hardware("nvme-4")
    assert (found.storage_bytes_per_s, found.storage_latency_s) == (ssd.link_bytes_per_s, ssd.link_latency_s)
    assert found.replace(storage_bytes_per_s=math.inf, storage_latency_s=0.0) == hardware("rtx4090")
    save_hardware(found, tmp_path / "mine.json", NOTES)
    assert hardware(tmp_path / "mine.json") == found


def _saved(tmp_path: Path) -> tuple[Path, dict]:
    path = tmp_path / "mine.json"
    save_hardware(hardware("rtx4090"), path, NOTES)
    return path, json.loads(path.read_text())


def _refused(path: Path, document: object, match: str) -> None:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(SpecmdError, match=match) as caught:
        hardware(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_are_refused_with_the_place(tmp_path: Path) -> None:
    path, good = _saved(tmp_path)
    values = good["hardware"]
    _refused(path, "{", "expected JSON")
    _refused(path, [1], "expected a hardware file")
    _refused(path, good | {"format": "other 1"}, "expected a hardware file")
    _refused(path, good | {"hardware": {**values, "link_gb_per_s": 5}}, "expected the fields")
    _refused(path, good | {"hardware": 5}, "expected the fields")
    _refused(path, good | {"hardware": {**values, "launch_s": None}}, "launch_s is None: expected a number")
    _refused(path, good | {"hardware": {**values, "launch_s": True}}, "launch_s is True: expected a number")
    _refused(
        path, good | {"hardware": {**values, "link_bytes_per_s": [1.0]}}, "link_bytes_per_s is .*: expected a number"
    )
    _refused(path, good | {"hardware": {**values, "host_bytes_per_s": 0}}, "host_bytes_per_s is 0: expected a positive")
    _refused(path, good | {"evidence": []}, "expected an object")
    _refused(path, good | {"evidence": {"launch_s": "guessed"}}, "evidence of launch_s is 'guessed'")
    _refused(path, good | {"evidence": {"launch": "measured"}}, "did you mean 'launch_s'")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=r"none\.json: no such file"):
        hardware(tmp_path / "none.json")


def test_an_engine_behind_a_machine() -> None:
    plain, adds = hardware("rtx4090"), hardware("rtx4090:adding")
    assert adds == plain.replace(overlaps=0.0)
    found = hardware("RTX4090:freetoken:sync_s=1e-5:overlaps=0.5")
    engine = ENGINES["FreeToken"]
    assert (found.overlaps, found.sync_s, found.layer_s) == (0.5, 1e-5, engine.layer_s)
    assert found.link_bytes_per_s == pytest.approx(engine.link_share * plain.link_bytes_per_s)
    with pytest.raises(SpecmdError, match=r"unknown engine in hardware 'rtx4090:adds': 'adds'; did you mean 'adding'"):
        hardware("rtx4090:adds")
