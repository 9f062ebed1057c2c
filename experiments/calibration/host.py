"""What the host does: copies of arrays by size, the start of a program, one expert by numpy."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from configs.calibrate import CalibrateConfig
from experiments.calibration.subject import Subject
from experiments.common.timing import median_s
from specmd_jax.moe.runtime import store
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.calibrate import point


def copies(config: CalibrateConfig) -> Iterator[Row]:
    """Times copies of single arrays out of pinned memory, one at a time and several in flight (shared out)."""
    host, device = store.sharding(store.PINNED), store.sharding(store.DEVICE)
    for size in config.copy_bytes:
        arrays = [jax.device_put(np.ones(size, np.uint8), host) for _ in range(config.in_flight)]
        for name, some in (("copy", arrays[:1]), ("copies", arrays)):
            took_s = median_s(lambda some=some: jax.device_put(some, device), config.repeats, unmeasured=2)
            yield point(name, size, "runtime", took_s / len(some))


def dispatch(config: CalibrateConfig) -> Iterator[Row]:
    """Times the start of an empty program, until it has run."""
    empty, nothing = jax.jit(lambda x: x + 1), jnp.zeros(())
    yield point("dispatch", 0, "runtime", median_s(lambda: empty(nothing), config.repeats, unmeasured=2))


def by_numpy(own: Subject, config: CalibrateConfig) -> Iterator[Row]:
    """Times one expert by numpy, in float32."""
    cfg = own.cfg
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((2 * cfg.expert_width, cfg.width), np.float32)
    down = rng.standard_normal((cfg.width, cfg.expert_width), np.float32)
    for tokens in (1, max(config.tokens)):
        rows = np.ones((tokens, cfg.width), np.float32)

        def call(rows: np.ndarray = rows) -> np.ndarray:
            return (rows @ gate_up.T)[:, : cfg.expert_width] @ down.T

        yield point("host", tokens, "numpy", median_s(call, config.repeats, unmeasured=2))
