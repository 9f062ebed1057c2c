"""The work of `experiments.calibrate`: what is measured, and the rates that follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from configs.calibrate import CalibrateConfig
from experiments.calibration.engine import compared, runs
from experiments.calibration.host import by_numpy, copies, dispatch
from experiments.calibration.passes import kernels_of_pass, passes
from experiments.calibration.rates import EVIDENCE, hardware_of, pass_rates, points_of, prompt_demand
from experiments.calibration.subject import Subject, few_layers, make_subject, model_config
from experiments.calibration.visits import kernels_of_visit, visits
from experiments.common.command_line import output_paths
from specmd_jax.files import replace_text
from specmd_jax.moe.fused.engine import why_not
from specmd_jax.moe.measure import predict
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.calibrate import FORMAT, HARDWARE, RATES, TABLE
from specmd_jax.report.reader import MANIFEST, ROWS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.specs.hardware import Hardware, HardwareNotes, save_hardware


def run(config: CalibrateConfig, out: Path, *, overwrite: bool) -> None:
    """Measures, and writes the rates that follow."""
    path, rates_path, _, _ = output_paths(out, overwrite, HARDWARE, RATES, ROWS, MANIFEST)
    whole = model_config(config.model)
    own = make_subject(config.model, whole, few_layers(whole, config.layers), config.capacity)
    points = []
    with ResultWriter(out, asdict(config), TABLE, overwrite) as writer:
        for row in measure(own, config):
            writer.write(row)
            points.append(row)
    machine = hardware_of(own, config, points)
    kind = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    notes = HardwareNotes(
        f"experiments.calibrate with the shapes of {config.model} on {kind}, jax {jax.__version__}; how each number "
        "follows from the points: experiments/calibration/rates.py, hardware_of",
        EVIDENCE,
    )
    save_hardware(machine, path, notes)
    replace_text(rates_path, json.dumps(rates(own, config, points, machine), indent=2) + "\n")


def measure(own: Subject, config: CalibrateConfig) -> Iterator[Row]:
    """Gives all points as they come."""
    yield from copies(config)
    yield from dispatch(config)
    yield from by_numpy(own, config)
    yield from passes(own, config)
    yield from visits(own, config)


def rates(
    own: Subject, config: CalibrateConfig, points: list[Row], machine: Hardware, kernels: bool | None = None
) -> dict[str, Any]:
    """Gives the document of rates.json: what the points add up to, and the whole beside it. ``kernels``: as
    `make_subject`."""
    parts, count = points_of(points, config.prompt), prompt_demand(own, config)
    derived, every = (pass_rates(parts, layers, count) for layers in (own.layers, len(own.whole.moe_layers)))
    found = runs(own, config, kernels)
    (_, resident), (_, missing) = found.values()
    fitted = predict.fit_passes(resident, missing)
    return {
        "format": FORMAT,
        "model": own.name,
        "layers": own.layers,
        "all_layers": len(own.whole.moe_layers),
        "prompt_tokens": config.prompt,
        "parts": parts._asdict(),
        "layer_s": parts.loop_s + parts.dense_s + parts.policy_s + parts.visit_s,
        "kernels": {**kernels_of_pass(own, config), "experts": kernels_of_visit(own)},
        "reasons": why_not(own.cfg, own.policy, own.store.stack) if any(own.kernels[:3]) else {},
        "derived": derived._asdict(),
        "fitted": fitted._asdict(),
        "whole_model": every._asdict(),
        "runs": compared(found, {"derived": derived, "fitted": fitted}, machine),
    }
