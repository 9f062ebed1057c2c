"""The work of `experiments.quality`: a trained model reads held-out text under rules that change what it computes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.offload import weights_folder
from configs.quality import OWN, QualityConfig
from experiments.common.bars import bar as bar_of
from experiments.offloading.model import Model, source
from specmd_jax.api import run as replay
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.measure import quality
from specmd_jax.moe.model.experts import expert_bytes
from specmd_jax.moe.runtime.run import Run
from specmd_jax.reference import HeldOut, held_out_texts
from specmd_jax.replay.metrics import Metrics
from specmd_jax.replay.totals import DROPPED, FETCHED, SUBSTITUTED
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.quality.table import EVIDENCE, TABLE
from specmd_jax.report.pages.train_moe import DOMAINS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.specs.models import model as published
from specmd_jax.types import DECODE, Trace

ENGINE = "layerwise"  # compiles nothing again for another rule or cache
BITS_16 = "bfloat16"
NATIVE = ("native",)


class Rule(NamedTuple):
    """What reads the text: a miss rule or a routing with its number, and what the host holds of each expert."""

    name: str
    precisions: tuple[str, ...]
    setting: Setting
    number: float | None = None

    @property
    def lossless(self) -> bool:
        """Whether a run at any capacity has the logits of the run with all experts on the device."""
        return self.setting.mix(1).build().keeps_text


class Text(NamedTuple):
    """What is read: the same number of texts of each domain, one domain behind the other."""

    prompts: npt.NDArray[np.int32]  # [R, P]
    scored: npt.NDArray[np.int32]  # [R, S]
    domains: tuple[str, ...]  # [R]
    bytes_per_token: npt.NDArray[np.float64]  # [R] of the domain


def rules(config: QualityConfig) -> list[Rule]:
    """Gives what is compared, in the order of the settings."""
    base, one, both = Setting(), (config.high,), (config.low, config.high)

    def several(name: str, label: str, changes: dict[str, Any], key: str, values: tuple[float, ...]) -> list[Rule]:
        return [
            Rule(f"{label} {value:g}", one, base.replace(**changes, numbers={key: value}), float(value))
            for value in values
        ]

    made = {
        "precisions": [Rule(f"fetch {name}", (name,), base) for name in config.precisions],
        "lowest_bit": [Rule("fetch_lowest_bit", both, base.replace(miss="fetch_lowest_bit"))],
        "priority": [Rule("fetch_priority", both, base.replace(miss="fetch_priority"))],
        "cascade": [Rule("cascade", both, base.replace(miss="cascade"))],
        "drop": several("drop", "drop beyond", {"miss": "drop"}, "keep", config.keeps),
        "substitute": several(
            "substitute", "substitute within", {"miss": "substitute"}, "tolerance", config.tolerances
        ),
        "cache_aware": several("", "cache_aware", {"routing": "cache_aware"}, "strength", config.strengths),
    }
    return [rule for name in config.rules for rule in made[name]]


def read_text(texts: dict[str, HeldOut], config: QualityConfig) -> Text:
    """Cuts the texts. Raises `SpecmdError` if there are too few of them, or they are too short."""
    end = config.prompt_tokens + config.steps
    for name, text in texts.items():
        count, length = text.windows.shape
        if count < config.windows or length < end:
            raise SpecmdError(
                f"{config.model}: {count} held-out texts of {length} tokens of {name}, expected at least "
                f"{config.windows} of {end}"
            )
    rows = [(name, row, text.bytes_per_token) for name, text in texts.items() for row in text.windows[: config.windows]]
    whole = np.stack([row for _, row, _ in rows]).astype(np.int32)
    return Text(
        prompts=whole[:, : config.prompt_tokens],
        scored=whole[:, config.prompt_tokens : end],
        domains=tuple(name for name, _, _ in rows),
        bytes_per_token=np.array([size for _, _, size in rows]),
    )


@dataclass
class Reader:
    """The model at the precisions that are asked for, and what reads the text with it."""

    config: QualityConfig
    text: Text
    _models: dict[tuple[str, ...], Model] = field(default_factory=dict)

    def model(self, precisions: tuple[str, ...]) -> Model:
        if precisions not in self._models:
            folder = weights_folder(self.config.model, None)
            self._models[precisions] = source(self.config.model, folder).open(ENGINE, precisions=precisions)
        return self._models[precisions]

    def read(self, rule: Rule, capacity: str) -> Run:
        """Lets the model read the text, one cache for all of it."""
        engine = self.model(rule.precisions).engine(rule.setting.replace(capacity=capacity))
        scored = self.text.scored
        return engine.generate(list(self.text.prompts), scored.shape[1], keep_logits=True, text=scored)

    def read_at(self, rule: Rule, pct: float) -> Run:
        """The same with so many % cached; a rule that loses nothing reads the same with everything on the device."""
        if rule.lossless:
            return self.resident if rule.precisions == NATIVE else self.read(rule, "100%")
        return self.read(rule, f"{self.slots(rule, pct)} slots")

    @cached_property
    def resident(self) -> Run:
        """The run with all experts on the device as they are in the checkpoint."""
        return self.read(Rule("", NATIVE, Setting()), "100%")

    @cached_property
    def own_bytes(self) -> int:
        """Bytes of an expert at 16 bits."""
        return expert_bytes(self.model(NATIVE).cfg, BITS_16)

    def slots(self, rule: Rule, pct: float) -> int:
        """How many experts at the rule's best precision fit in so many % of all experts' bytes at 16 bits."""
        model = self.model(rule.precisions)
        experts = len(model.cfg.moe_layers) * model.cfg.experts
        return min(max(int(pct * experts * self.own_bytes / 100) // model.experts.expert_bytes, 1), experts)


def run(config: QualityConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Computes the rows that the table in `out` lacks."""
    folder = weights_folder(config.model, None)
    assert folder is not None
    text = read_text(held_out_texts(Path(folder)), config)
    digest = hashlib.sha256(text.prompts.tobytes() + text.scored.tobytes()).hexdigest()
    reader, wanted = Reader(config, text), rules(config)
    name = config.model if Path(config.model).name == config.model else Path(config.model).resolve().name
    with (
        ResultWriter(out, asdict(config), TABLE, overwrite, resume, digest) as writer,
        bar_of(len(wanted) * len(config.capacities_pct), "read") as bar,
    ):
        for rule in wanted:
            kept: Run | None = None
            for pct in config.capacities_pct:
                bar.set_postfix_str(f"{rule.name}, {pct:g} %", refresh=False)
                key = {"model": name, "rule": rule.name, "precisions": "+".join(rule.precisions), "capacity_pct": pct}
                if not writer.has(key):
                    if kept is None or not rule.lossless:
                        kept = reader.read_at(rule, pct)
                    writer.write(key | row(reader, rule, pct, kept))
                bar.update()


def row(reader: Reader, rule: Rule, pct: float, found: Run) -> Row:
    """Gives what the run read, and what a replay of its routing takes on the machine."""
    model, text, slots = reader.model(rule.precisions), reader.text, reader.slots(rule, pct)
    timed = simulated(reader, rule, found.trace, slots)
    cfg, demand_bytes = model.cfg, reader.own_bytes * model.cfg.top_k * len(model.cfg.moe_layers)
    copied = timed.bytes_demand / _sized(reader)[0] / timed.tokens
    return {
        "miss": str(rule.setting.miss),
        "routing": str(rule.setting.routing),
        "number": rule.number,
        "capacity_slots": slots,
        "experts_pct": 100 * slots / (len(cfg.moe_layers) * cfg.experts),
        "cycles": slots / (len(cfg.moe_layers) * cfg.top_k),
        "hit_rate": timed.hit_rate,
        "copies_per_token": timed.loads_per_token,
        "copied_share": copied / demand_bytes,
        "mean_bits": timed.mean_bits,
        **_lost(rule, found),
        **_scores(text, quality.places(found, reader.resident, text.scored)),
        "tpot_s": timed.tpot_s,
        "events_equal": None if rule.lossless else _counts(found) == _counted(timed),
        "evidence": EVIDENCE,
    }


def simulated(reader: Reader, rule: Rule, trace: Trace, slots: int) -> Metrics:
    """Replays the routing of a run on the machine, with experts and dense layers of the size that is asked for."""
    scale, meta = _sized(reader)
    levels = reader.model(rule.precisions).experts.level_bytes
    bits = [16 * size / reader.own_bytes for size in levels]
    if reader.config.sizes == OWN:
        meta["dense_bytes"] = trace.meta["dense_bytes"]
    sized = dataclasses.replace(  # slots are counted in experts at the highest precision, as the run's are
        trace,
        expert_bytes=np.full(trace.layers, scale * levels[-1], np.int64),
        meta=meta | {"weights_bits": bits[-1]},
    )
    return replay(
        sized, rule.setting, capacity=f"{slots} slots", precisions=tuple(bits), hardware=reader.config.hardware
    )


def _sized(reader: Reader) -> tuple[int, dict[str, Any]]:
    """Gives how many times as large experts are in the times, and the name that brings the dense layers."""
    if reader.config.sizes == OWN:
        return 1, {"model": OWN}
    spec = published(reader.config.sizes)
    return max(round(spec.expert_bytes_at(16) / reader.own_bytes), 1), {"model": spec.name}


def _counts(found: Run) -> tuple[int, ...]:
    """Gives demand, hits, dropped and moved experts of a run."""
    outcome = np.stack([decision.outcome for decision in found.decisions])
    hits = ((outcome > 0) & (outcome < FETCHED)).sum()
    return tuple(
        int(n) for n in ((outcome > 0).sum(), hits, (outcome == DROPPED).sum(), (outcome == SUBSTITUTED).sum())
    )


def _counted(timed: Metrics) -> tuple[int, ...]:
    return timed.demand, timed.hits, timed.dropped, timed.substituted


def _lost(rule: Rule, found: Run) -> Row:
    """Gives the shares of the gate mass that decode passes lost or moved."""
    if rule.setting.mix(1).build().miss.fetches_all:
        return {"dropped_share": 0.0, "moved_share": 0.0}
    schedule = prepare(found.trace).schedule
    dropped, moved = quality.lost_share(found, schedule.mass, np.flatnonzero(schedule.phase == DECODE))
    return {"dropped_share": dropped, "moved_share": moved}


def _scores(text: Text, found: quality.Places) -> Row:
    """Gives bits per byte by domain and as their plain mean, against the resident model's, with standard errors."""
    per_byte = 1 / (math.log(2) * text.bytes_per_token[:, None])
    bits, resident = found.nll_nats * per_byte, found.resident_nll_nats * per_byte
    of_domain = {name: np.array([name == it for it in text.domains]) for name in dict.fromkeys(text.domains)}
    mean = float(np.mean([bits[rows].mean() for rows in of_domain.values()]))
    whole = float(np.mean([resident[rows].mean() for rows in of_domain.values()]))
    spread = [_error(bits[rows] - resident[rows]) for rows in of_domain.values()]
    return {
        "places": bits.size,
        "bits_per_byte": mean,
        "resident_bits_per_byte": whole,
        "change_pct": 100 * (mean / whole - 1),
        "change_se_pct": 100 * math.hypot(*spread) / len(spread) / whole,
        "perplexity": math.exp(found.nll_nats.mean()),
        "resident_perplexity": math.exp(found.resident_nll_nats.mean()),
        "kl_nats": max(float(found.kl_nats.mean()), 0.0),
        "kl_se_nats": _error(found.kl_nats),
        "changed_tokens": float(found.changed.mean()),
        **{
            f"bits_{name}": float(bits[of_domain[name]].mean()) if name in of_domain else None for name in DOMAINS
        },
    }  # fmt: skip


def _error(values: npt.NDArray[np.float64]) -> float:
    """Gives the standard error of a mean, of values that are taken as independent."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0
