"""Groups settings: those with the same schedule share its visits, those with the same program share a launch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from specmd_jax.policies.choice import Mix
from specmd_jax.setting import Setting
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware

MOST_CELLS = 4096
"""Configurations of one launch: their tables lie in memory side by side."""


class Cell(NamedTuple):
    """A setting with everything resolved for one trace."""

    number: int  # in the order in which the settings were given
    setting: Setting
    mix: Mix  # its numbers are scalars
    budget: Budget
    machine: Hardware | None
    host_budget: Budget | None = None  # of the host tier; None: there is none


class Launch(NamedTuple):
    """Cells that one program replays at once: all budgets x all machines x all values."""

    mix: Mix  # a number that varies is a row of values
    budgets: list[Budget]
    machines: list[Hardware | None]
    options: dict[str, Any]  # the rest of `Setup`
    cells: list[tuple[Cell, tuple[int, ...]]]  # with the place of each in the totals
    host_budget: Budget | None = None


def by_schedule(cells: Iterable[Cell]) -> list[tuple[dict[str, Any], list[Cell]]]:
    """Groups cells that replay the same visits, with the arguments of those, in the order of their first cells."""
    groups: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.setting.schedule.items()), []).append(cell)
    return [(group[0].setting.schedule, group) for group in groups.values()]


def launches(cells: Sequence[Cell]) -> list[Launch]:
    """Gives launches for cells of one schedule, in the order of their first cells.

    Cells of one program differ in budget, machine and policy numbers. They are cut so that each launch is a full grid
    of those three: no cell is computed twice, and none in vain.
    """
    programs: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        static = jax.tree.structure(cell.mix), tuple(cell.setting.options.items())
        host = None if cell.host_budget is None else key_of(cell.host_budget)  # a launch has one, a program any
        programs.setdefault((*static, cell.machine is None, np.ndim(cell.budget), host), []).append(cell)
    found: list[Launch] = []
    for program in programs.values():
        for grid in _grids(program):
            found += _cut(grid)
    return found


_Grid = list[list[list[Cell]]]  # [value][budget][machine]
_Place = tuple[Hashable, Hashable]  # budget and machine, as something to compare by
_Places = tuple[tuple[Hashable, ...], tuple[Hashable, ...]]  # budgets and machines of a full grid


def _grids(program: Sequence[Cell]) -> list[_Grid]:
    """Gives the full grids of the cells of one program."""
    points: dict[Hashable, dict[_Place, Cell]] = {}
    again: list[Cell] = []
    for cell in program:
        point = points.setdefault(tuple(map(key_of, jax.tree.leaves(cell.mix))), {})
        place = key_of(cell.budget), machine_key(cell.machine)
        if place in point:
            again.append(cell)  # the same setting twice: a grid of its own
        else:
            point[place] = cell
    alike: dict[_Places, list[dict[_Place, Cell]]] = {}
    for point in points.values():
        for places in _full(list(point)):
            alike.setdefault(places, []).append({place: point[place] for place in _product(places)})
    grids = [
        [[[point[budget, machine] for machine in places[1]] for budget in places[0]] for point in members]
        for places, members in alike.items()
    ]
    return [*grids, *([[[cell]]] for cell in again)]


def _full(places: Sequence[_Place]) -> list[_Places]:
    """Cuts (budget, machine) pairs into full grids: machines that have the same budgets go together."""
    budgets: dict[Hashable, tuple[Hashable, ...]] = {}
    for budget, machine in places:
        budgets[machine] = (*budgets.get(machine, ()), budget)
    together: dict[tuple[Hashable, ...], tuple[Hashable, ...]] = {}
    for machine, mine in budgets.items():
        together[mine] = (*together.get(mine, ()), machine)
    return list(together.items())


def _product(places: _Places) -> list[_Place]:
    return [(budget, machine) for budget in places[0] for machine in places[1]]


def _cut(grid: _Grid) -> list[Launch]:
    """Gives the launches of a grid, of some budgets each if it is large."""
    values, machines = len(grid), len(grid[0][0])
    width = max(1, MOST_CELLS // (values * machines))
    return [_launch([point[first : first + width] for point in grid]) for first in range(0, len(grid[0]), width)]


def _launch(grid: _Grid) -> Launch:
    first = grid[0][0][0]
    mixes = [point[0][0].mix for point in grid]
    mix = first.mix
    if len(grid) > 1:
        mix = jax.tree.map(lambda *leaves: _row(leaves), *mixes)
    varied, timed = len(grid) > 1, first.machine is not None
    cells = [
        (cell, (b, *([m] if timed else []), *([v] if varied else [])))
        for v, point in enumerate(grid)
        for b, row in enumerate(point)
        for m, cell in enumerate(row)
    ]
    return Launch(
        mix=mix,
        budgets=[row[0].budget for row in grid[0]],
        machines=[cell.machine for cell in grid[0][0]],
        options=first.setting.options,
        cells=sorted(cells, key=lambda entry: entry[0].number),
        host_budget=first.host_budget,
    )


def _row(leaves: Sequence[Any]) -> Any:
    """Gives the values of a number: one if they are all the same."""
    return leaves[0] if len(set(map(key_of, leaves))) == 1 else np.array(leaves)


def key_of(value: Any) -> Hashable:
    """Gives a number or an array as something to compare by."""
    array = np.asarray(value)
    return (array.dtype.kind, array.item()) if array.ndim == 0 else (array.shape, array.tobytes())


def machine_key(machine: Hardware | None) -> Hashable:
    """Gives a machine as something to compare by."""
    return None if machine is None else tuple(map(key_of, jax.tree.leaves(machine)))
