"""The loop of a training run: dispatches, evaluations, checkpoints from which a killed run goes on bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmd_jax.checkpoints import Checkpoints, checkpoints
from specmd_jax.errors import SpecmdError
from specmd_jax.files import claim, replace_text
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.families import from_hf
from specmd_jax.moe.training import held_out
from specmd_jax.moe.training.batches import Batches
from specmd_jax.moe.training.corpus import Data
from specmd_jax.moe.training.held_out import Score, mean_bits
from specmd_jax.moe.training.parameters import Weights, active_matmul_weights
from specmd_jax.moe.training.schedule import fitting_steps, learning_rate, most_steps
from specmd_jax.moe.training.update import State, Told, attention_of, make_update, start
from specmd_jax.training import Training

PLAN, SETTINGS, CHECKPOINTS = "plan.json", "settings.json", "checkpoints"


@dataclass(frozen=True)
class Limits:
    """How long a run and this process may take, in seconds from ``began`` (`time.perf_counter`); None: no limit."""

    began: float
    process_s: float | None = None  # then it stops and saves, to go on later
    run_s: float | None = None  # the steps of the whole run are chosen to fit; None: as process_s


@dataclass(frozen=True)
class Plan:
    """What was chosen when the run began; one that goes on keeps it."""

    steps: int
    step_s: float | None  # measured; None: nothing was to be fitted
    attention: str
    device: str
    chosen: str  # how


class Point(NamedTuple):
    """What is known at an evaluation."""

    step: int
    told: Told  # means since the last evaluation
    rate: float
    scores: dict[str, Score]
    tokens_per_s: float | None  # of the updates since the last evaluation
    flops_per_s: float | None  # of the model's products at that speed
    elapsed_s: float


class Finished(NamedTuple):
    """Where a process ended."""

    cfg: MoEConfig
    plan: Plan
    state: State
    best: Weights
    best_bits: float
    done: bool  # False: the process's time was up, the same command goes on


def fit(
    data: Data, settings: Training, folder: Path, limits: Limits, hear: Callable[[Point], object],
    report: Callable[[str], object] = print,
) -> Finished:  # fmt: skip
    """Trains, or goes on from the last checkpoint in ``folder``; ``hear`` is called at every evaluation.

    Raises SpecmdError for settings out of range, a folder that another run began, or a time too short for a run.
    """
    settings.check()
    cfg = from_hf(settings.hf(data.vocabulary), settings.compute)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / SETTINGS, {**asdict(settings), "data": data.fingerprint})
    with checkpoints(folder / CHECKPOINTS) as kept:
        return _Run(cfg, data, settings, folder, limits, hear, report, kept).go()


class _Run:
    def __init__(
        self, cfg: MoEConfig, data: Data, settings: Training, folder: Path, limits: Limits,
        hear: Callable[[Point], object], report: Callable[[str], object], kept: Checkpoints,
    ):  # fmt: skip
        self.cfg, self.data, self.settings, self.folder = cfg, data, settings, folder
        self.limits, self.hear, self.report, self.kept = limits, hear, report, kept
        self.batches = Batches(data, settings.sequence, settings.batch, settings.seed)
        self.text = jnp.asarray(np.asarray(data.train))
        self.attention, why = attention_of(settings, cfg)
        self.device = jax.devices()[0].device_kind
        report(f"device {self.device}, attention {self.attention} ({why})")
        self.update = make_update(cfg, settings, self.attention)
        self.state = start(cfg, settings)
        # a copy: a dispatch gives the state's own arrays up
        self.best, self.best_bits = jax.tree.map(jnp.copy, self.state.weights), float("inf")
        self.saved_s = 0.0

    def go(self) -> Finished:
        plan, step = self._restored()
        if plan is None:
            plan, step = self._planned()
            replace_text(self.folder / PLAN, json.dumps(asdict(plan), indent=2) + "\n")
            millions = plan.steps * self.settings.tokens_per_step / 1e6
            self.report(f"{plan.steps} steps, {millions:.1f} M tokens: {plan.chosen}")
        each = self.settings.dispatch
        stretch = max(round(plan.steps / self.settings.evaluations / each), 1) * each
        told: list[Told] = []
        spent_s, first = 0.0, True
        while step < plan.steps:
            began = time.perf_counter()
            if self._out_of_time(spent_s / max(len(told), 1)):
                self._save(step)
                self.report(f"stopped at step {step} of {plan.steps}: the time is up, the same command goes on")
                return Finished(self.cfg, plan, self.state, self.best, self.best_bits, False)
            found = self._dispatch(step, plan.steps)
            step += each
            if not (first and plan.step_s is None):  # that one compiled
                told, spent_s = [*told, found], spent_s + time.perf_counter() - began
            first = False
            if step % stretch == 0 or step == plan.steps:
                self._evaluate(step, plan.steps, told or [found], spent_s, each * len(told))
                told, spent_s = [], 0.0
        return Finished(self.cfg, plan, self.state, self.best, self.best_bits, True)

    def _planned(self) -> tuple[Plan, int]:
        """Chooses the number of steps: as many as asked for, or fewer if the first ones are too slow for the time."""
        most, each = most_steps(self.settings, len(self.data.train)), self.settings.dispatch
        limit_s = self.limits.run_s or self.limits.process_s
        if limit_s is None:
            return Plan(most, None, self.attention, self.device, "as the settings ask for"), 0
        if 3 * each > self.settings.warmup_steps:  # later steps would depend on what is being chosen
            raise SpecmdError(f"3 dispatches of {each} steps are longer than the warm-up, expected that to be longer")
        self._dispatch(0, most)
        compiled_s = self._elapsed()
        began = time.perf_counter()
        for step in (each, 2 * each):
            self._dispatch(step, most)
        step_s = (time.perf_counter() - began) / (2 * each)
        self._scores(self.settings.evaluation_windows)  # compiles
        began = time.perf_counter()
        self._scores(self.settings.evaluation_windows)
        self._save(3 * each)
        evaluation_s = time.perf_counter() - began
        fit = fitting_steps(self.settings, 3 * each, limit_s - self._elapsed(), step_s, evaluation_s)
        chosen = (
            f"{'the time' if fit < most else 'the settings'} set that; compiled after {compiled_s:.0f} s, a step takes "
            f"{1000 * step_s:.1f} ms, an evaluation with its checkpoint {evaluation_s:.1f} s"
        )
        return Plan(min(fit, most), step_s, self.attention, self.device, chosen), 3 * each

    def _dispatch(self, step: int, steps: int) -> Told:
        rows = [self.batches.starts(step + i) for i in range(self.settings.dispatch)]
        starts = jnp.asarray(np.stack(rows).astype(np.int32))
        self.state, told = self.update(self.state, self.text, starts, jnp.int32(steps))
        told = jax.tree.map(float, jax.device_get(told))
        if not np.isfinite(told.loss):
            raise SpecmdError(f"the loss is {told.loss} between steps {step} and {step + self.settings.dispatch}")
        return told

    def _scores(self, most: int | None) -> dict[str, Score]:
        return held_out.scores(self.cfg, self.settings, self.state.weights, self.data, self.attention, most)

    def _evaluate(self, step: int, steps: int, told: list[Told], spent_s: float, updates: int) -> None:
        found = self._scores(self.settings.evaluation_windows)
        bits = mean_bits(found)
        if bits < self.best_bits:
            self.best, self.best_bits = jax.tree.map(jnp.copy, self.state.weights), bits
        self._save(step)
        speed = updates * self.settings.tokens_per_step / spent_s if updates else None
        mean = Told(*(float(np.mean(column)) for column in zip(*told, strict=True)))
        rate = float(learning_rate(self.settings, jnp.int32(step - 1), jnp.int32(steps)))
        flops = None if speed is None else speed * flops_per_token(self.cfg, self.settings.sequence)
        self.hear(Point(step, mean, rate, found, speed, flops, self._elapsed()))
        left = "" if speed is None else f", {(steps - step) * self.settings.tokens_per_step / speed:.0f} s left"
        said = "" if speed is None else f"; {speed / 1e3:.0f} k tokens/s"
        parts = " ".join(f"{name} {score.bits_per_byte:.3f}" for name, score in found.items())
        self.report(
            f"step {step} of {steps}: loss {mean.loss:.4f}; held out, bits per byte: {bits:.4f} ({parts}); "
            f"busiest {mean.busiest:.2f}, entropy {mean.router_entropy:.2f}{said}{left}"
        )

    def _save(self, step: int) -> None:
        began = time.perf_counter()
        tree = (self.state, self.best, jnp.float32(self.best_bits))
        # by number: the optimizer's own records change with its library, their leaves do not
        leaves = {f"{number:04}": leaf for number, leaf in enumerate(jax.tree.leaves(tree))}
        self.kept.save(step, leaves)  # there may be one of a process that was ended before its run was planned
        self.saved_s = time.perf_counter() - began

    def _restored(self) -> tuple[Plan | None, int]:
        """Takes up the last checkpoint, if there is one and the run was planned."""
        path, latest = self.folder / PLAN, self.kept.latest
        if latest is None or not path.exists():
            return None, 0
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
        if plan.attention != self.attention:
            raise SpecmdError(f"{path}: the run began with attention {plan.attention}, which is {self.attention} here")
        leaves, tree = jax.tree.flatten((self.state, self.best, jnp.float32(0)))
        like = {f"{number:04}": leaf for number, leaf in enumerate(leaves)}
        found = self.kept.restore(like)
        self.state, self.best, bits = jax.tree.unflatten(tree, [found[name] for name in sorted(found)])
        self.best_bits = float(bits)
        self.report(f"goes on after step {latest} of {plan.steps}")
        return plan, latest

    def _out_of_time(self, dispatch_s: float) -> bool:
        limit = self.limits.process_s
        return limit is not None and self._elapsed() + dispatch_s + 2 * self.saved_s + 1 > limit

    def _elapsed(self) -> float:
        return time.perf_counter() - self.limits.began


def flops_per_token(cfg: MoEConfig, sequence: int) -> float:
    """Gives the operations of a token's products, forward and backward: six per active weight, and causal attention.

    The embedding's look-up and what is computed again or for nothing (rows that fill a block) do not count.
    """
    return 6.0 * (active_matmul_weights(cfg) + cfg.layers * cfg.heads * cfg.head_dim * sequence)
