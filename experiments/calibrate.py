"""What do a copy, an expert and the rest of a layer cost on this machine? Writes a hardware file for the simulator.

    python -m experiments.calibrate                                     # a small model
    python -m experiments.calibrate --model OLMoE-1B-7B                 # a published shape, made-up weights
    python -m experiments.sweep --hardware results/calibrate/hardware.json

Measures copies from pinned host memory by size (a least-squares line gives latency and bandwidth), one expert by number
of tokens, the dense part of a layer, and the start of an empty program; writes hardware.json (rates as
`specmd_jax.specs.hardware` reads them), rows.csv and manifest.json. Every number is measured here, but for the host's
rates, which are numpy's on one expert. A rate that launches hide is a lower bound: measure with the shapes to be
simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.calibrate import CalibrateConfig
from experiments.common.command_line import main_guard, output_paths, parser, results_folder
from experiments.common.options import options_of, settings_of
from experiments.common.timing import median_s
from specmd_jax import moe
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.random_weights import random_experts
from specmd_jax.moe.runtime import store
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.calibrate import HARDWARE, TABLE, draw
from specmd_jax.report.reader import MANIFEST, ROWS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.specs.hardware import Hardware, HardwareNotes, save_hardware


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "calibrate")
    options_of(options, CalibrateConfig())
    args = options.parse_args(argv)
    config = settings_of(args, CalibrateConfig())
    cfg = model_config(config.model)
    out = results_folder(options, args)
    path, _, _ = output_paths(out, args.overwrite, HARDWARE, ROWS, MANIFEST)
    points = measure(cfg, config)
    machine = fit(cfg, points)
    with ResultWriter(out, asdict(config), TABLE, args.overwrite) as writer:
        for row in points:
            writer.write(row)
    kind = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    notes = HardwareNotes(
        f"experiments.calibrate with the shapes of {config.model} on {kind}, jax {jax.__version__}",
        dict.fromkeys(asdict_fields(machine), "measured"),
    )
    save_hardware(machine, path, notes)
    print(draw(out))


def asdict_fields(machine: Hardware) -> tuple[str, ...]:
    return tuple(machine.__dataclass_fields__)


def model_config(name: str) -> MoEConfig:
    """Gives the tiny model of the smoke runs, or a published shape."""
    return moe.tiny("olmoe", "float32") if name == "tiny" else moe.published(name)


def measure(cfg: MoEConfig, config: CalibrateConfig) -> list[Row]:
    """Measures all points, each the median of `config.repeats`."""
    rows: list[Row] = []

    def add(what: str, amount: int, call: Callable[[], Any], times: int = 1) -> None:
        seconds = median_s(call, config.repeats, unmeasured=2) / times
        rows.append({"what": what, "amount": amount, "seconds": seconds, "evidence": "measured"})

    host, device = store.sharding(store.PINNED), store.sharding(store.DEVICE)
    for size in config.copy_bytes:
        # several in flight, as a visit with several misses has them
        arrays = [jax.device_put(np.ones(size, np.uint8), host) for _ in range(config.in_flight)]
        add("copy", size, lambda arrays=arrays: jax.device_put(arrays, device), config.in_flight)
    empty, nothing = jax.jit(lambda x: x + 1), jnp.zeros(())
    add("dispatch", 0, lambda: empty(nothing))

    key, net = jax.random.key(0), moe.build(cfg)
    expert = jax.tree.map(lambda leaf: leaf[0], random_experts(cfg, key, 0))
    run = jax.jit(lambda h, e: moe_experts.apply(cfg, e, h))
    layer, weights = net.layers[cfg.moe_layers[0]], moe.random_params(cfg, key)["layers"][cfg.moe_layers[0]]

    @jax.jit
    def dense(params: Any, x: jax.Array, cache: Any) -> Any:
        x, h, _ = layer.attend(params, x, cache, jnp.zeros(1, jnp.int32))
        assert layer.route is not None
        return x, layer.route(params, h), None if layer.shared is None else layer.shared(params, h)

    for tokens in config.tokens:
        h = jax.random.normal(key, (tokens, cfg.width)).astype(cfg.np_dtype)
        cache = moe.init_cache(cfg, 1, max(config.tokens))[cfg.moe_layers[0]]
        add("expert", tokens, lambda h=h: run(h, expert))
        add("dense", tokens, lambda h=h, cache=cache: dense(weights, h[None], cache))
    plain = [np.asarray(leaf, np.float32) for leaf in (expert.gate_up, expert.down)]
    for tokens in (1, max(config.tokens)):
        rows_in = np.ones((tokens, cfg.width), np.float32)
        add("host", tokens, lambda x=rows_in: (x @ plain[0].T)[:, : cfg.expert_width] @ plain[1].T)
    return rows


def line(rows: list[Row], what: str) -> tuple[float, float]:
    """Fits (seconds at nothing, seconds per unit) to one kind of points by least squares of relative errors."""
    points = np.array([(row["amount"], row["seconds"]) for row in rows if row["what"] == what], np.float64)
    design = np.stack([np.ones(len(points)), points[:, 0]], axis=1) / points[:, 1:]
    start_s, unit_s = np.linalg.lstsq(design, np.ones(len(points)), rcond=None)[0]
    most = points[points[:, 0].argmax()]
    if unit_s <= 0:  # hidden by the launch: the largest amount bounds the rate from below
        unit_s = most[1] / most[0]
    return max(float(start_s), 0.0), float(unit_s)


def fit(cfg: MoEConfig, rows: list[Row]) -> Hardware:
    """Gives the rates of the simulator's cost model that give the measured times."""
    latency_s, byte_s = line(rows, "copy")
    first_s = {str(row["what"]): float(row["seconds"] or 0) for row in reversed(rows)}  # the smallest amount of each
    size, flops = moe.expert_bytes(cfg), 6.0 * cfg.width * cfg.expert_width
    launch_s = min(first_s["dispatch"], first_s["expert"])
    _, token_s = line(rows, "expert")
    host_start_s, host_token_s = line(rows, "host")
    return Hardware(
        link_bytes_per_s=1 / byte_s,
        link_latency_s=latency_s,
        peak_flops_per_s=flops / token_s,
        memory_bytes_per_s=size / max(first_s["expert"] - launch_s, 1e-9),
        launch_s=launch_s,
        host_flops_per_s=flops / host_token_s,
        host_bytes_per_s=2 * size / max(host_start_s, first_s["host"] / 2),
    )


if __name__ == "__main__":
    main_guard(main)
