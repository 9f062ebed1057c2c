"""The learning rate over a run, and how many steps fit in its time."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from specmd_jax.errors import SpecmdError
from specmd_jax.training import Training

SPARE_SHARE = 0.05  # of the time for steps, kept back: steps are not all as fast as those that were measured


def learning_rate(settings: Training, step: jax.Array, steps: jax.Array) -> jax.Array:
    """Gives the rate of update ``step`` (from 0) of ``steps``: a linear warm-up, then `Training.schedule` down to zero.

    wsd: constant, and over the last ``decay_share`` of the run linear (warm-up, stable, decay: arXiv:2404.06395).
    """
    rise = jnp.minimum((step + 1) / settings.warmup_steps, 1.0)
    if settings.schedule == "wsd":
        fall = jnp.clip((steps - step) / jnp.maximum(settings.decay_share * steps, 1.0), 0.0, 1.0)
    else:
        past = jnp.clip((step - settings.warmup_steps) / jnp.maximum(steps - settings.warmup_steps, 1), 0.0, 1.0)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * past))
    return jnp.float32(settings.learning_rate) * rise * fall


def decaying(settings: Training, step: jax.Array, steps: jax.Array) -> jax.Array:
    """Gives how much of the last stretch is left: 1 before it, 0 at the end."""
    return jnp.clip((steps - step) / jnp.maximum(settings.decay_share * steps, 1.0), 0.0, 1.0)


def most_steps(settings: Training, train_tokens: int) -> int:
    """Gives the steps that ``steps`` or ``epochs`` ask for, in whole dispatches, at least one."""
    steps = settings.steps or math.floor(settings.epochs * train_tokens / settings.tokens_per_step)
    return max(steps // settings.dispatch, 1) * settings.dispatch


def fitting_steps(settings: Training, done: int, left_s: float, step_s: float, evaluation_s: float) -> int:
    """Gives the steps of a run, ``done`` included, that fit in what is left of its time, in whole dispatches.

    Raises SpecmdError if not even as many fit as the warm-up has.
    """
    for_steps = (left_s - (settings.evaluations + 2) * evaluation_s) * (1 - SPARE_SHARE)
    steps = done + math.floor(for_steps / step_s / settings.dispatch) * settings.dispatch
    if steps <= max(settings.warmup_steps, done):
        raise SpecmdError(
            f"{left_s:.0f} s are left, a step takes {1000 * step_s:.0f} ms and an evaluation {evaluation_s:.1f} s: "
            f"no {settings.warmup_steps} steps fit, expected a longer --time-limit"
        )
    return steps
