"""One setting says everything, `grid` makes many of them, and cells that can share a launch do."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
from parity import LINK, small_trace

import specmd_jax
from specmd_jax import explain, run, sweep
from specmd_jax.engines.table import ENGINES
from specmd_jax.errors import SpecmdError
from specmd_jax.launches import Cell, by_schedule, launches
from specmd_jax.policies.eviction import lfu_decay
from specmd_jax.setting import FIELDS, Setting, grid, make_setting
from specmd_jax.trace import save_trace
from specmd_jax.trace.profile import Profile

TRACE = small_trace(3)


def _one_line(act: Any, *messages: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        act()
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def cells(settings: list[Setting]) -> list[Cell]:
    return [
        Cell(number, setting, setting.mix(TRACE.top_k), setting.budget(TRACE), setting.machine)
        for number, setting in enumerate(settings)
    ]


def test_names_in_any_case_are_the_tables_own() -> None:
    cell = Setting(eviction="LRU", scope="Layer", contract="EVENT", hardware="RTX4090", phase="Decode")
    assert cell == Setting(eviction="lru", scope="layer", contract="event", hardware="rtx4090", phase="decode")


def test_every_field_is_a_column_of_a_row() -> None:
    row = Setting(eviction=partial(lfu_decay, decay=0.5), hardware=LINK, precisions=(4, 16), numbers={}).row()
    assert row.keys() == {f.name for f in fields(Setting)} - {"capacity", "host_capacity", "numbers"}
    assert (row["eviction"], row["hardware"], row["precisions"]) == ("lfu_decay", "custom", "4:16")


PROFILE = Profile(np.ones((2, 4)), "counts")


def test_a_grid_varies_every_field_in_the_order_of_the_fields() -> None:
    found = grid(capacity=["5%", "25%"], horizon=range(1, 3), eviction=["lru", "lfu"], batch=1)
    assert [(s.eviction, s.capacity, s.horizon) for s in found] == [
        (eviction, capacity, horizon) for eviction in ("lru", "lfu") for capacity in ("5%", "25%") for horizon in (1, 2)
    ]
    every = {
        "eviction": ["lru", "lfu"], "capacity": ["5%", "9%"], "scope": ["global", "layer"],
        "contract": ["event", "sequential"], "hardware": ["rtx4090", None], "batch": [1, 2],
        "reset_per_request": [False], "phase": ["all", "decode"], "warmup_tokens": [0, 3],
        "prefetch": ["none", "popular"], "selection": ["topk", "percentile"], "overfetch": [1.0, 1.5],
        "percentile": [50.0, 90.0], "horizon": [1, 2], "may_evict": [True, False], "miss": ["fetch", "cpu"],
        "routing": ["standard", "cache_aware"], "precisions": [None, (4, 16)], "oversize": ["stream", "hold"],
        "prefill_chunk": [None, 4], "numbers": [{}], "context": [0, 64], "warm_start": [None, PROFILE],
        "pin_share": [0.0], "pin_profile": [None], "admission": ["always", "compete"], "drafts": [0, 2],
        "acceptance": [None, 0.5], "draft_seed": [0, 1], "draft_s": [0.0, 1e-3], "host_capacity": [None, "50%"],
        "host_scope": ["global", "layer"], "host_eviction": ["lru", "lfu"],
        "host_hears": ["misses", "uses"], "inclusion": ["inclusive", "exclusive"],
        "storage": ["nvme-4", "nvme-5"], "prefetch_to": ["device"],
    }  # fmt: skip
    assert every.keys() == set(FIELDS)
    for name, values in every.items():
        storage = {} if name == "storage" else {"storage": "nvme-4"}
        assert [getattr(setting, name) for setting in grid(**{name: values}, **storage)] == values, name


def test_one_value_is_no_axis() -> None:
    assert len(grid(eviction="lru", hardware=LINK, precisions=(4, 8, 16), capacity=np.array(["5%"]))) == 1
    assert [s.precisions for s in grid(precisions=[(4, 16), None])] == [(4, 16), None]
    assert [row["capacity_pct"] for row in sweep(TRACE, evictions="lru", capacities="50%")] == [50.0]


def test_numbers_vary_where_a_policy_takes_them() -> None:
    found = grid(eviction=["lru", "lfu_decay", "slru"], decay=np.linspace(0.5, 0.9, 3), protected=[0.5, 0.8])
    assert [(s.eviction, dict(s.numbers)) for s in found] == [
        ("lru", {}),
        *(("lfu_decay", {"decay": decay}) for decay in (0.5, 0.7, 0.9)),
        *(("slru", {"protected": share}) for share in (0.5, 0.8)),
    ]


def test_cells_of_one_program_share_a_launch() -> None:
    settings = grid(
        eviction=["lru", "lfu_decay"], capacity=["25%", "50%", "75%"], hardware=["rtx4090", "rtx3090"], decay=[0.5, 0.9]
    )
    found = launches(cells(settings))
    assert [(launch.mix.eviction.name, len(launch.budgets), len(launch.machines)) for launch in found] == [
        ("lru", 3, 2), ("lfu_decay", 3, 2),
    ]  # fmt: skip
    np.testing.assert_array_equal(found[1].mix.eviction.numbers["decay"], [0.5, 0.9])
    placed = [(cell.number, at) for launch in found for cell, at in launch.cells]
    assert sorted(number for number, _ in placed) == list(range(len(settings)))
    # every launch is a full grid: as many cells as places
    assert [len({at for _, at in launch.cells}) for launch in found] == [6, 12]


def test_cells_that_make_no_grid_are_cut_into_grids() -> None:
    settings = [
        *grid(capacity=["25%", "50%"], hardware=["rtx4090", "rtx3090"]),
        *grid(capacity=["75%"], hardware="rtx4090"),
        Setting(capacity="25%", hardware="rtx4090"),  # once more
        Setting(capacity="25%", hardware=None),
        Setting(capacity="25%", hardware="rtx4090", scope="layer"),
    ]
    found = launches(cells(settings))
    assert sum(len(launch.cells) for launch in found) == len(settings)
    for launch in found:
        assert len(launch.cells) == len(launch.budgets) * len(launch.machines)


def test_schedules_are_apart() -> None:
    found = by_schedule(cells(grid(contract=["event", "sequential"], batch=[1, 2], eviction=["lru", "lfu"])))
    assert [(schedule["contract"], schedule["batch"], len(group)) for schedule, group in found] == [
        ("event", 1, 2), ("event", 2, 2), ("sequential", 1, 2), ("sequential", 2, 2),
    ]  # fmt: skip


def test_a_trace_is_taken_in_every_form(tmp_path: Any) -> None:
    path = tmp_path / "mine.npz"
    save_trace(TRACE, path)
    cell = Setting(capacity="50%", hardware=None)
    whole = run(TRACE, cell)
    for form in (str(path), path, specmd_jax.open_trace(path)):
        assert run(form, cell) == whole
    assert specmd_jax.explain("GPT-OSS-20b", hardware=None).engine == "curves"


def test_explain_says_why_not() -> None:
    timed = explain(TRACE, prefetch="previous", hardware=LINK)
    assert timed.engine == "scan" and timed.refusals.keys() == ENGINES.keys()
    assert timed.refusals["curves"] == "they keep no seconds: give hardware=None"
    assert timed.refusals["gpu"] == "there is no GPU here, and a CPU only interprets it"
    assert str(timed).splitlines()[0].startswith("scan: replays it (")
    assert explain(TRACE, eviction="slru", hardware=None).engine == "curves"
    lossy = explain(TRACE, miss="drop", hardware=None)
    assert lossy.engine == "scan" and "miss 'drop'" in str(lossy.refusals["curves"])


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"evictions": ["lru"]}, ("unknown setting 'evictions'", "did you mean 'eviction'?")),
        ({"capacty": "5%"}, ("did you mean 'capacity'?",)),
        ({"capacity": "0.25"}, ("'25%'",)),
        ({"capacity": "300%"}, ("above everything",)),
        ({"horizon": 1.5}, ("horizon is 1.5, expected a whole number",)),
        ({"batch": 1000}, ("batch is 1000, expected at most the 2 request(s) of the trace",)),
        ({"batch": True}, ("batch is True, expected a whole number",)),
        ({"may_evict": "no"}, ("may_evict is 'no', expected True or False",)),
        ({"overfetch": "much"}, ("overfetch is 'much', expected a number",)),
        ({"numbers": [1]}, ("numbers is [1], expected numbers of the policies by name",)),
        ({"eviction": "lfu_decay", "decay": [0.5, 0.9]}, ("decay",)),
        ({"eviction": "lfu_decay", "decay": np.array([0.5, 0.9])}, ("decay has 2 values, expected one",)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_run_refuses(given: dict[str, Any], messages: tuple[str, ...]) -> None:
    _one_line(lambda: run(TRACE, hardware=None, **given), *messages)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evictions": ["lru"], "eviction": "lru"}, "evictions and eviction are both given"),
        ({"numbers": {"lfu_decy": {"decay": 0.5}}}, "numbers has 'lfu_decy'"),
        ({"numbers": {"lru": 3}}, "numbers of 'lru' is 3"),
        ({"evictions": []}, "eviction is empty, expected at least one value"),
        ({"evictions": ["lru"], "decay": [0.5]}, "unknown policy number 'decay'"),
        ({"eviction": ["lru", "lfru_"]}, "did you mean 'lfru'?"),
        ({"capacities": np.ones((2, 2))}, "capacity has shape (2, 2), expected a list of values"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sweep_refuses_before_the_first_row(given: dict[str, Any], message: str) -> None:
    _one_line(lambda: sweep(TRACE, **given), message)


def test_what_is_no_setting_is_said() -> None:
    no: Any = "lru"
    _one_line(lambda: run(TRACE, no), "the setting is 'lru', expected a Setting, or its fields by name")
    _one_line(lambda: sweep(TRACE, [Setting(), no]), "settings[1] is 'lru', expected a Setting")
    _one_line(lambda: sweep(TRACE, []), "there are no settings")
    _one_line(lambda: sweep(TRACE, [Setting()], eviction="lru"), "eviction is given beside a list of settings")
    _one_line(lambda: make_setting(Setting(), eviction="lru", protected=0.5), "unknown policy number 'protected'")
    _one_line(lambda: run(TRACE, engine="scn"), "unknown engine 'scn'; did you mean 'scan'?")
