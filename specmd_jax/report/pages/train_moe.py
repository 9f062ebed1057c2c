"""What `experiments.train_moe` prints, from its tables alone: the course of the run, and held-out text by domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specmd_jax.report.columns import Column, Table
from specmd_jax.report.reader import ROWS, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.terminal import aligned

RESULTS = "results.json"
DOMAINS = ("prose", "chinese", "code", "maths", "dialogue")
COLUMNS = {
    "step": Column("int", "updates so far"),
    "tokens": Column("int", "tokens that they saw"),
    "epochs": Column("float", "the same over the tokens of the training split"),
    "learning_rate": Column("float", "of the last update"),
    "loss": Column("float", "nats per training token since the row before, with dropout"),
    "balance": Column("float", "E * sum over experts of share of choices * mean probability; 1: even"),
    "router_z": Column("float", "mean square of the log of the sum of the exponentials of a router's logits"),
    "router_entropy": Column("float", "nats, of a token's probabilities over the experts of a layer"),
    "busiest": Column("float", "choices of a layer's most chosen expert over the mean"),
    "idle": Column("float", "experts that no token of a batch chooses, share"),
    "slope": Column("float", "norm of the gradient"),
    "held_out": Column("float", "bits per byte of held-out text, plain mean of the domains"),
    **{f"held_out_{name}": Column("float", f"bits per byte of held-out {name}") for name in DOMAINS},
    "tokens_per_s": Column("float", "training tokens per second since the row before; empty: it was compiling"),
    "flops_per_s": Column("float", "operations of the model's products at that speed"),
    "elapsed_s": Column("float", "seconds since the process began"),
    "evidence": Column("str", "measured"),
}
TABLE = Table("train_moe", COLUMNS, ("step",), beside=(RESULTS,))


def draw(out: Path) -> str:
    """Gives the course of a run as text for a terminal, and its last evaluation if it has ended."""
    rows = read_rows(out)
    head = ["step", "epochs", "loss", "held out", "balance", "busiest", "entropy", "k tokens/s"]
    lines: list[list[str]] = []
    for row in rows:
        speed = row["tokens_per_s"]
        lines.append(
            [
                str(row["step"]), f"{number(row, 'epochs'):.2f}", f"{number(row, 'loss'):.4f}",
                f"{number(row, 'held_out'):.4f}", f"{number(row, 'balance'):.3f}", f"{number(row, 'busiest'):.2f}",
                f"{number(row, 'router_entropy'):.2f}", "" if speed is None else f"{float(speed) / 1e3:.1f}",
            ]
        )  # fmt: skip
    text = "\n".join(aligned(head, lines))
    path = out / RESULTS
    if path.exists():
        text = f"{text}\n\n{_results(json.loads(path.read_text(encoding='utf-8')))}"
    return f"{text}\n{out / ROWS}"


def _results(found: dict[str, Any]) -> str:
    head, lines = ["held-out text", "tokens", "bits per byte", "gzip -9", "xz -9e"], []
    for name, one in found["domains"].items():
        each = [f"{one[key]:.4f}" for key in ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte")]
        lines.append([name, str(one["tokens"]), *each])
    return "\n".join(aligned(head, lines))
