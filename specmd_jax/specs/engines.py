"""`ENGINES`: how engines of others spend a machine, by name: ``hardware("rtx4090:FreeToken")``.

The published engines add: they compute a layer's experts when all of its copies have arrived. The two constants of each
are least squares over its published tokens per second, as `experiments.validate` fits them. An engine stands here if at
least three cells can be expressed, its constants predict cells of other models and capacities within 10 % (median), and
it is not faster than the link that its machine is said to have.
"""

from __future__ import annotations

from dataclasses import dataclass

from specmd_jax.specs.machine import Hardware


@dataclass(frozen=True)
class Engine:
    """What an engine makes of a machine; the numbers are estimated, by a fit to measured ones."""

    layer_s: float | None  # fixed time of a layer; None: the machine's own
    link_share: float  # of the link's rate that its copies reach, 0 to 1
    source: str

    def on(self, machine: Hardware) -> Hardware:
        """Gives the machine as this engine uses it."""
        return machine.replace(
            overlaps=0.0,
            layer_s=machine.layer_s if self.layer_s is None else self.layer_s,
            link_bytes_per_s=machine.link_bytes_per_s * self.link_share,
            link_latency_s=machine.link_latency_s / self.link_share,
        )


ENGINES: dict[str, Engine] = {
    "adding": Engine(None, 1.0, "computes when all copies have arrived; launches and link are the machine's"),
    "moe-speed-of-light": Engine(
        23.1e-6,
        1.0,
        "16 cells, gpt-oss-120b and Qwen3-30B-A3B on desktops with an RTX 5090, all by the engine's author",
    ),
    "FreeToken": Engine(21.3e-6, 0.745, "8 cells, gpt-oss-120b and Qwen3-30B-A3B on RTX 5090 and RTX PRO 6000"),
    "vllm-expert-cache": Engine(300e-6, 0.619, "4 cells on an MI210, by the engine's author"),
    "streamlx": Engine(372e-6, 0.477, "4 cells, Qwen3-30B-A3B from an Apple SSD; the device was not stated"),
}
"""`experiments/validation/cells.csv` has the cells and their sources."""
