"""Tables of the documentation that follow from the code: machines, models, engines of others and our own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from experiments.documenting.blocks import table
from specmd_jax.engines.table import ENGINES as REPLAYERS
from specmd_jax.specs.engines import ENGINES
from specmd_jax.specs.hardware import HARDWARE, HARDWARE_NOTES
from specmd_jax.specs.models import MODELS
from specmd_jax.units import GB


def machines() -> str:
    """Gives a line per preset: its most used rates, and how each of them is known."""

    def rate(name: str, field: str) -> str:
        value = getattr(HARDWARE[name], field)
        if not math.isfinite(value):
            return "free"
        return f"{value / GB:.4g} ({HARDWARE_NOTES[name].evidence[field]})"

    head = ("name", "link, GB/s", "device memory, GB/s", "host memory, GB/s")
    fields = ("link_bytes_per_s", "memory_bytes_per_s", "host_bytes_per_s")
    return table(head, [[f"`{name}`", *(rate(name, field) for field in fields)] for name in HARDWARE])


def engines() -> str:
    """Gives a line per engine of others that may stand behind a machine's name."""
    rows = [
        [
            f"`{name}`",
            "the machine's" if engine.layer_s is None else f"{1e6 * engine.layer_s:.0f}",
            f"{100 * engine.link_share:.0f} %",
            engine.source,
        ]
        for name, engine in ENGINES.items()
    ]
    return table(("name", "time per layer, us", "of the link's rate", "where the two numbers come from"), rows)


def models() -> str:
    """Gives a line per listed model."""
    rows = [
        [
            f"`{name}`",
            f"{spec.layers} x {spec.experts}",
            str(spec.top_k),
            f"{spec.expert_bytes / 1e6:.1f}",
            f"{spec.layers * spec.experts * spec.expert_bytes / GB:.1f}",
            f"{spec.weights_bits:.3g}",
        ]
        for name, spec in MODELS.items()
    ]
    head = (
        "name",
        "layers x experts",
        "per token",
        "an expert, MB",
        "all experts, GB",
        "bits of a weight as published",
    )
    return table(head, rows)


def replayers() -> str:
    """Gives a line per engine that replays."""
    return table(("engine", "replays"), [[f"`{name}`", engine.about] for name, engine in REPLAYERS.items()])


TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = MappingProxyType(
    {
        "docs/machines.md": {"machines": machines, "engines": engines, "models": models},
        "docs/api.md": {"replayers": replayers},
    }
)
"""Page -> block -> what makes it, in no time."""
