"""From points to rates: the machine's for the simulator, and those of the fused engine's passes.

Nothing is measured here. Points of parts in a loop contain an iteration of that loop (`Points.loop_s`), which a pass
has once in a layer, whatever the number of its parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from configs.calibrate import CalibrateConfig
from experiments.calibration.subject import Subject
from experiments.calibration.visits import demanded
from specmd_jax import moe
from specmd_jax.moe.measure.predict import PassRates
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import param_spec
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.report.columns import Row
from specmd_jax.report.rows import number, values
from specmd_jax.specs.hardware import Evidence, Hardware

EVIDENCE: dict[str, Evidence] = {
    "link_bytes_per_s": "measured",
    "link_latency_s": "estimated",
    "peak_flops_per_s": "measured",
    "memory_bytes_per_s": "measured",
    "launch_s": "estimated",
    "host_flops_per_s": "measured",
    "host_bytes_per_s": "estimated",
    "host_moe_bytes_per_s": "measured",
}
"""How each field of the hardware file is known: `hardware_of` says how it follows from the points."""


class Points(NamedTuple):
    """What the points say of the fused engine's parts: seconds, each without the loop that it was measured in."""

    loop_s: float  # an iteration of a loop
    launch_s: float  # an empty operation in it
    visit_s: float  # one token's experts, all on the device
    missing_s: float  # ... what each missing one adds
    first_s: float  # ... what a visit that misses takes beside them
    expert_s: float  # one expert on the device
    dense_s: float
    policy_s: float
    head_s: float
    many_s: float  # a prompt's experts, all on the device
    many_missing_s: float  # ... all missing
    many_dense_s: float
    many_policy_s: float


def line(rows: list[Row], what: str, least: int = 0) -> tuple[float, float]:
    """Fits (seconds at nothing, seconds per unit) to the points of a kind from an amount on, by least squares of
    relative errors. Where they do not rise, the largest amount bounds the unit from above."""
    found = [(number(row, "amount"), number(row, "seconds")) for row in rows if row["what"] == what]
    points = np.array([pair for pair in found if pair[0] >= least], np.float64)
    design = np.stack([np.ones(len(points)), points[:, 0]], axis=1) / points[:, 1:]
    start_s, unit_s = np.linalg.lstsq(design, np.ones(len(points)), rcond=None)[0]
    most = points[points[:, 0].argmax()]
    if len(points) == 1 or unit_s <= 0:
        return 0.0, float(most[1] / most[0])
    return max(float(start_s), 0.0), float(unit_s)


def _seconds(rows: list[Row]) -> dict[tuple[Any, Any], float]:
    return {(row["what"], row["amount"]): number(row, "seconds") for row in rows}


def points_of(rows: list[Row], prompt: int) -> Points:
    """Reads the points of one calibration, ``prompt`` the tokens of its prompts."""
    took_s = _seconds(rows)
    loop_s, launch_s = line(rows, "launch")
    first_s, missing_s = line(rows, "visit", 1)

    def alone(what: str, amount: int) -> float:
        return max(took_s[what, amount] - loop_s, 0.0)

    return Points(
        loop_s=loop_s,
        launch_s=launch_s,
        visit_s=alone("visit", 0),
        missing_s=missing_s,
        first_s=max(first_s - loop_s, 0.0),
        expert_s=line(rows, "resident")[1],
        dense_s=alone("dense", 1),
        policy_s=alone("policy", 1),
        head_s=alone("head", 1),
        many_s=alone("many resident", prompt),
        many_missing_s=alone("many missing", prompt),
        many_dense_s=alone("dense", prompt),
        many_policy_s=alone("policy", prompt),
    )


def prompt_demand(own: Subject, config: CalibrateConfig) -> int:
    """Gives how many experts a visit of the prompt demands."""
    return demanded(own.cfg, config.prompt)


def pass_rates(points: Points, layers: int, experts: int) -> PassRates:
    """Adds the parts up to rates of a model with so many layers.

    Args:
        experts: that a prompt's visit demands.
    """
    layer_s = points.loop_s + points.dense_s + points.policy_s + points.visit_s
    prompt_layer_s = points.loop_s + points.many_dense_s + points.many_policy_s + points.many_s
    return PassRates(
        prefill_s=layers * prompt_layer_s + points.head_s,
        decode_s=layers * layer_s + points.head_s,
        copy_s=points.missing_s,
        prefill_copy_s=max(points.many_missing_s - points.many_s, 0.0) / experts,
        hidden_s=max(points.visit_s - points.first_s, 0.0),
    )


def dense_bytes(cfg: MoEConfig) -> tuple[float, float]:
    """Gives the bytes of what is dense in a layer with experts, on average, and of the head."""
    spec = param_spec(cfg)
    return tree_bytes([spec["layers"][layer] for layer in cfg.moe_layers]) / len(cfg.moe_layers), tree_bytes(
        spec["head"]
    )


def hardware_of(own: Subject, config: CalibrateConfig, rows: list[Row]) -> Hardware:
    """Gives the rates with which CONTRACT.md's section 5 gives the measured times.

    The link's is that of a missing expert inside a visit. The memory's is that of experts on the device. ``launch_s``
    is what is left of a pass without copies beside reading at that rate, shared out among its experts and dense parts,
    which is where the contract has it. So the contract hides a part of what is dense behind copies, which no engine
    does: ``link_latency_s`` is what a visit that misses takes beyond what all the others say, per copy, by least
    squares of relative errors over the visits measured. The peak gives the time of the largest prompt's experts, and no
    less than one token's; where memory bounds these, it is a lower bound. The host's are numpy's; that work there and
    copies do not slow each other down is taken for granted, as they are not timed together.
    """
    points, cfg = points_of(rows, config.prompt), own.cfg
    size, flops, layers = moe.expert_bytes(cfg), 6.0 * cfg.width * cfg.expert_width, len(own.whole.moe_layers)
    layer_bytes, head_bytes = dense_bytes(cfg)
    rate = size / points.expert_s
    whole_s = pass_rates(points, layers, 1).decode_s
    read_s = (layers * (cfg.top_k * size + layer_bytes) + head_bytes) / rate
    launch_s = max(whole_s - read_s, 0.0) / (layers * (cfg.top_k + 1))
    beside_s = whole_s / layers - points.visit_s + points.first_s  # of a visit that misses, in a pass
    beside_s -= (size + layer_bytes + head_bytes / layers) / rate + 2 * launch_s
    misses = [row for row in rows if row["what"] == "visit" and row["amount"]]
    copies = values(misses, "amount")
    weight = (values(misses, "seconds") + points.dense_s + points.policy_s) ** -2
    per_copy = float((weight * copies).sum() / (weight * copies**2).sum())
    most = max(config.tokens)
    count = demanded(cfg, most)
    many_s = _seconds(rows)["many resident", most] - points.loop_s
    arithmetic_s = max(many_s - count * launch_s, count * points.expert_s)
    host_start_s, host_token_s = line(rows, "host")
    host_s = min(number(row, "seconds") for row in rows if row["what"] == "host")
    link, host = size / points.missing_s, 4 * flops / 2 / max(host_start_s, host_s / 2)
    return Hardware(
        link_bytes_per_s=link,
        link_latency_s=max(beside_s, 0.0) * per_copy,
        peak_flops_per_s=flops * max(most * cfg.top_k / arithmetic_s, 1 / points.expert_s),
        memory_bytes_per_s=rate,
        launch_s=launch_s,
        host_flops_per_s=flops / host_token_s,
        host_bytes_per_s=link + host,
        host_moe_bytes_per_s=host,
    )
