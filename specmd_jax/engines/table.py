"""The table of engines: who replays what. All give the same counts; "auto" takes the first that serves.

To add one: write a module with `serves` and a function that makes its replayer, and give it a line in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specmd_jax.engines import curves, gpu, gpu_columns
from specmd_jax.engines.asked import Asked, points
from specmd_jax.engines.devices import devices, everywhere, replay_spread
from specmd_jax.engines.prepared import Prepared
from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.metrics import Metrics, metrics_of
from specmd_jax.replay.state import Setup
from specmd_jax.replay.totals import Totals
from specmd_jax.schedule.counted import counted_of
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware

Replayer = Callable[[Sequence[Budget]], Totals]
"""Totals (numpy) with leading axes [budget], then [machine] if there is hardware, then [value] if a number varies."""
Grid = list[list[Metrics]]  # [budget][machine]


class Engine(NamedTuple):
    """A way to replay."""

    about: str  # what it serves and how fast, in one sentence
    serves: Callable[[Asked], str | None]  # None, or the reason why not
    here: Callable[[], str | None]  # None, or why "auto" leaves it alone on this machine
    replayer: Callable[[Prepared, Setup, Mix, Sequence[Hardware | None], Mesh | None, Budget | None], Replayer]


def _always() -> str | None:
    return None


def _needs_gpu() -> str | None:
    return None if jax.default_backend() == "gpu" else "there is no GPU here, and a CPU only interprets it"


def _by_columns(
    columns_of: Callable[[Prepared, Setup, Mix], Any],
    prepared: Prepared,
    setup: Setup,
    mix: Mix,
    machines: Sequence[Hardware | None],
    mesh: Mesh | None,
    host_budget: Budget | None,
) -> Replayer:
    """Gives what replays columns of visits. Everything that no budget decides is worked out once, here."""
    given = mix.traced()
    visits = columns_of(prepared, setup, given)
    costs, axes = None, ("budget",)
    if machines[0] is not None:
        each = [prepared.costs(machine, reads=host_budget is not None) for machine in machines]
        costs, axes = jax.tree.map(lambda *x: jnp.stack(x), *each), ("budget", "hardware")
    if points(mix) is not None:
        axes = (*axes, "policy")
    mesh = mesh or devices()
    placed, shared = everywhere(visits, mesh), prepared.numbers(0, None, host_budget)._replace(costs=costs)

    def replay(budgets: Sequence[Budget]) -> Totals:
        sizes = np.stack([prepared.sizes.budget(b) for b in budgets])
        return replay_spread(setup, axes, shared._replace(budget=jnp.asarray(sizes)), given, placed, mesh)

    return replay


ENGINES: Mapping[str, Engine] = {
    "curves": Engine(
        "every capacity of a demand-only replay without seconds in one compiled pass on the host, or one pass for each "
        "capacity where the policy's order depends on who is resident",
        curves.serves,
        _always,
        curves.replayer,
    ),
    "gpu": Engine(
        "one GPU program for each configuration and one launch for a grid, with prefetching and seconds",
        gpu.serves,
        _needs_gpu,
        partial(_by_columns, gpu_columns.columns_of),
    ),
    "scan": Engine(
        "everything the contract has, as one compiled XLA program for each static choice, on any device",
        lambda asked: None,
        _always,
        partial(_by_columns, Prepared.visits),
    ),
}
"""In the order in which "auto" asks them."""


def refusals(asked: Asked) -> dict[str, str | None]:
    """Says why each engine would not be taken by "auto": None for those that could be."""
    return {name: engine.serves(asked) or engine.here() for name, engine in ENGINES.items()}


def choose_engine(asked: Asked, engine: str = "auto") -> str:
    """Names the engine that replays what is asked; raises SpecmdError for one that is unknown or cannot serve it."""
    if engine == "auto":
        return next(name for name, reason in refusals(asked).items() if reason is None)
    if engine not in ENGINES:
        raise unknown("engine", engine, ("auto", *ENGINES))
    reason = ENGINES[engine].serves(asked)
    if reason is not None:
        raise SpecmdError(f"engine {engine!r} does not serve this: {reason}")
    return engine


def replayer(
    prepared: Prepared,
    mix: Mix,
    machines: Sequence[Hardware | None],
    engine: str = "auto",
    mesh: Mesh | None = None,
    host_budget: Budget | None = None,
    **options: Any,
) -> Replayer:
    """Gives what replays one mix at any budgets.

    Args:
      mix: its numbers are scalars, or rows of one length: the axis [value] of the totals.
      machines: all hardware, or [None].
      mesh: the devices that budgets are dealt to; None: all there are.
      host_budget: of the host tier; None: there is none.
      options: the rest of `Setup`.
    """
    setup = prepared.setup(mix, machines[0], **options)
    chosen = choose_engine(Asked(setup, mix, len(prepared.sizes.level_bytes)), engine)
    return ENGINES[chosen].replayer(prepared, setup, mix, machines, mesh, host_budget)


def replay_grid(
    prepared: Prepared,
    mix: Mix,
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
    engine: str = "auto",
    **options: Any,
) -> Grid:
    """Gives [budget][machine] metrics of one mix, whose numbers are scalars; arguments as for `replayer`."""
    totals = replayer(prepared, mix, machines, engine, **options)(budgets)
    measure = partial(metrics_of, counted_of(prepared.schedule), prepared.sizes.level_bytes)
    return grid_of(measure, totals, prepared.bits, budgets, machines)


def grid_of(
    measure: Callable[..., Metrics],
    totals: Totals,
    bits: tuple[float, ...],
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
) -> Grid:
    """Gives the metrics of all cells of totals [budget, machine], or [budget] without hardware."""
    timed = machines[0] is not None
    cells = [[(i, j) if timed else (i,) for j in range(len(machines))] for i in range(len(budgets))]
    return [[measure(jax.tree.map(lambda x, at=at: x[at], totals), bits, timed) for at in row] for row in cells]
