"""What `experiments.bench_offload` draws: the fused engine's times per token and to the first one, beside their bounds
and what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from specmd_jax.errors import SpecmdError
from specmd_jax.inputs import read_json
from specmd_jax.report.figures import save
from specmd_jax.report.style import looks

NAME = "offload"
FILE = "bench.json"


def draw(out: Path) -> list[Path]:
    """Draws each precision that was measured into ``figures/`` of a result folder; gives the paths.

    Raises `SpecmdError` if its results cannot be read.
    """
    path = out / FILE
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("setting"), dict):
        raise SpecmdError(f"{path}: expected the results of bench_offload, an object with 'setting'")
    return [
        save(_figure(name, facts, result["setting"]), out, f"{NAME}_{name}")
        for name, facts in result.items()
        if isinstance(facts, dict) and "resident_none" in facts
    ]


def _figure(precision: str, facts: dict[str, Any], setting: dict[str, Any]) -> Figure:
    rows = [row for row in facts["rows"] if row["prefetch"] == "none" and "predicted_tpot_s" in row]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, rows, "tpot", "link", facts["resident_none"]["tpot_s"])
    left.set_title("Time per token")
    _panel(right, rows, "ttft", "prompt_link", facts["resident_none"]["ttft_s"])
    right.set_title(f"Time to the first token, {setting['prompt_tokens']} prompt tokens")
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{facts['model']}, {precision} experts in host memory, {setting['device']}, link {facts['link_GB_per_s']:.1f}"
        " GB/s: measured, with both bounds and what the simulator predicted",
        fontsize=10,
    )
    return figure


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], what: str, link: str, resident_s: float) -> None:
    policies = list(dict.fromkeys(row["eviction"] for row in rows))
    for number, (policy, look) in enumerate(looks(policies).items()):
        own = sorted((_share(row), row) for row in rows if row["eviction"] == policy)
        x = [share for share, _ in own]
        first = number == 0
        measured = [1e3 * row[f"{what}_s"] for _, row in own]
        marker = look.marker or "o"  # policies of a family have one colour
        axes.plot(x, measured, marker, color=look.color, label=f"{policy}, measured")
        guess = [1e3 * row[f"predicted_{what}_s"] for _, row in own]
        axes.plot(x, guess, "-", color=look.color, lw=1, label="predicted" if first else None)
        alone = [1e3 * row[f"{link}_s"] for _, row in own]
        axes.plot(x, alone, ":", color=look.color, lw=1, alpha=0.6, label="link alone" if first else None)
    axes.axhline(1e3 * resident_s, color="0.4", lw=1, ls="--", label="everything on the device")
    axes.set(xlabel="experts on the device (%)", ylabel="ms", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)


def _share(row: dict[str, Any]) -> float:
    return float(str(row["capacity"]).removesuffix("%"))
