"""The work of `experiments.hidden_prefetch`: texts are read, predictors trained, judged and replayed."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.hidden_prefetch import HiddenPrefetchConfig
from experiments.common.evaluate_rows import machine_of
from experiments.offloading.reading import held_out_texts, read_texts
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.evaluation import ratio, recall_by_request
from specmd_jax.learn.hidden import Fitted, Shown, fit_maps, predicted, recalled, shown
from specmd_jax.learn.settings import Settings as Training
from specmd_jax.learn.splits import Split
from specmd_jax.learn.stall import Cost, cost, layer_time_s, seconds_by_request
from specmd_jax.learn.training import card, export, fit
from specmd_jax.moe.checkpoint.text import TOKENIZER
from specmd_jax.moe.measure.reading import Reading
from specmd_jax.moe.training.corpus import open_data
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.trained import load
from specmd_jax.reference import REFERENCE, reference_folder
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.hidden_prefetch import table
from specmd_jax.report.pages.hidden_prefetch.table import AFTER, BEFORE, BOUND, COLUMNS, DONE, GATE, IDS, NONE, TABLE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.types import Trace

MEASURED, SIMULATED, ESTIMATED = "measured", "simulated", "estimated"
IDS_FILE = "prefetcher.npz"


def run(config: HiddenPrefetchConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Adds what the table in `out` lacks, study by study."""
    texts, parts = gather(config)
    digest = hashlib.sha256(b"".join(rows.tobytes() for rows in texts.values())).hexdigest()
    told = dataclasses.asdict(config) | {"data": None if config.data is None else Path(config.data).name}
    work = Work(config, out, texts, parts)
    studies: dict[str, Callable[[], Iterator[Row]]] = {
        "texts": work.read, "training": work.trained, "recall": work.recalls, "cost": work.costs,
        "replay": work.replays,
    }  # fmt: skip
    with ResultWriter(out, told, TABLE, overwrite, resume, digest) as writer:
        if overwrite:
            shutil.rmtree(out / "run", ignore_errors=True)
        for name, rows in studies.items():
            if writer.has(_row(DONE, name)):
                continue
            began = time.perf_counter()
            for row in rows():
                writer.write(row)
            writer.write(_row(DONE, name, value=1.0))
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def gather(config: HiddenPrefetchConfig) -> tuple[dict[str, npt.NDArray[np.uint16]], Split]:
    """Gives texts of each domain, and which of all of them train, choose the epoch, and judge.

    Raises SpecmdError for a data folder of another tokenizer.
    """
    own = held_out_texts([*config.train, *config.validation, *config.test], config.tokens)
    kinds = [0] * len(config.train) + [1] * len(config.validation) + [2] * len(config.test)
    if config.data is not None:
        folder = Path(config.data)
        data = open_data(folder)
        if (folder / TOKENIZER).read_bytes() != (reference_folder() / TOKENIZER).read_bytes():
            raise SpecmdError(f"{folder}: its {TOKENIZER} is not that of {REFERENCE}")
        draw, more = np.random.default_rng(config.maps.seed), {}
        for name, domain in data.domains.items():
            if name not in own:
                raise SpecmdError(f"{folder}: {REFERENCE} has no domain {name!r}")
            begins = draw.integers(domain.train.begin, domain.train.end - config.tokens, config.texts)
            more[name] = np.stack([data.train[begin : begin + config.tokens] for begin in begins])
        own = {name: np.concatenate([more[name], rows]) for name, rows in own.items() if name in more}
        kinds = [0] * config.texts + kinds
    kind = np.tile(kinds, len(own))
    return own, Split(*(np.flatnonzero(kind == part) for part in range(3)))


class Work:
    """What the studies share; each part is made when it is first asked for."""

    def __init__(self, config: HiddenPrefetchConfig, out: Path, texts: dict[str, npt.NDArray[np.uint16]], parts: Split):
        self.config, self.out, self.texts, self.parts = config, out, texts, parts

    @cached_property
    def reading(self) -> Reading:
        return read_texts(self.texts, "text of its corpus")

    @cached_property
    def test(self) -> Reading:
        return self.reading.of(self.parts.test)

    @cached_property
    def maps(self) -> dict[tuple[str, int], Fitted]:
        """Gives the trained maps by what they are called and how far they look ahead."""
        config, whole = self.config, self.reading
        train, validation = whole.of(self.parts.train), whole.of(self.parts.validation)
        wanted = [(AFTER, 1, 0), *((BEFORE, ahead, 0) for ahead in config.aheads)]
        wanted += [(table.low_rank(rank), 1, rank) for rank in config.ranks]
        found = {}
        for name, ahead, rank in wanted:
            settings = dataclasses.replace(config.maps, rank=rank)
            examples, judges = _shown(name, train, ahead), _shown(name, validation, ahead)
            found[name, ahead] = fit_maps(examples, judges, whole.routers[ahead:], settings)
        return found

    @cached_property
    def ids_file(self) -> Path:
        """Trains the predictor that sees ids and gates alone on the same texts, or goes on with it; gives its file."""
        path, trace = self.out / "run" / IDS_FILE, self.reading.trace
        if not path.exists():
            seed, epochs = self.config.maps.seed, self.config.ids_epochs
            # every token teaches, as it does the maps that it stands beside
            settings = Training("prefetcher", split="request", epochs=epochs, seed=seed, engine="jax")
            done = fit(trace, settings, self.out / "run" / "ids", lambda line: print(line, file=sys.stderr), self.parts)
            export(path, done.weights, "prefetcher", card(trace, settings, done))
        return path

    def scored(self, name: str, ahead: int = 1) -> npt.NDArray[np.float32]:
        """Gives the probabilities [N, s, E] that a trained map gives on the texts that judge."""
        layers = self.test.trace.layers - ahead
        return predicted(self.maps[name, ahead].maps, _seen(name, self.test)[:, :layers])

    # -------------------------------------------------------------------------------------------------------- studies

    def read(self) -> Iterator[Row]:
        for name, requests in self.parts._asdict().items():
            yield _row("texts", f"{name} texts", value=float(len(requests)), evidence=MEASURED)
            tokens = int(self.reading.trace.lengths[requests].sum())
            yield _row("texts", f"{name} tokens", value=float(tokens), evidence=MEASURED)

    def trained(self) -> Iterator[Row]:
        for (name, ahead), fitted in self.maps.items():
            shared = {"predictor": name, "ahead": ahead, "evidence": MEASURED}
            yield _row("training", "best epoch", value=float(fitted.epoch), **shared)
            yield _row("training", "validation recall", value=fitted.validation_recall, **shared)

    def recalls(self) -> Iterator[Row]:
        """Gives recall of the predicted layers' experts: of the next layer's all but the first are predicted."""
        trace, config = self.test.trace, self.config
        counts = [min(trace.experts, int(trace.top_k * count + 0.5)) for count in config.counts]
        judged = [name for name in config.predictors if name not in (NONE, BOUND)]
        found = {(name, 1): recall_by_request(trace, name, counts)[:, :, 1:] for name in judged}
        if config.ids_epochs:
            found[IDS, 1] = recall_by_request(trace, "learned", counts, {"checkpoint": str(self.ids_file)})[:, :, 1:]
        for name, ahead in self.maps:
            ids = trace.expert_ids[:, ahead:].astype(np.int64)
            found[name, ahead] = recalled(self.scored(name, ahead), ids, trace.lengths, counts)
        for (name, ahead), each in found.items():
            for count, right in zip(config.counts, each, strict=False):
                shared = {"predictor": name, "ahead": ahead, "count": count, "evidence": SIMULATED}
                interval = ratio(right.sum(axis=1), each[-1].sum(axis=1))
                yield _row("recall", "recall", **shared, **interval._asdict())
                for layer, (part, whole) in enumerate(zip(right.sum(axis=0), each[-1].sum(axis=0), strict=True)):
                    place = trace.layers - right.shape[1] + layer
                    yield _row("recall", "recall", layer=place, value=float(part / whole), **shared)

    def spent(self) -> dict[str, Cost]:
        """Gives the work of the predictors that compute, at each visit. The others look things up, and cost nothing."""
        trace, width = self.test.trace, self.test.before.shape[-1]
        router = width * trace.experts
        found = {GATE: Cost(2 * router, 2 * router)}
        files = {"learned": ""} | ({IDS: str(self.ids_file)} if self.config.ids_epochs else {})
        for name, file in files.items():
            found[name] = cost(load("prefetcher", file), trace.layers, trace.experts)
        return found | {name: fitted.maps.cost for (name, ahead), fitted in self.maps.items() if ahead == 1}

    def costs(self) -> Iterator[Row]:
        machine = machine_of(self.config.hardware, self.config.hardware, prepare(self.test.trace))
        for name, one in self.spent().items():
            shared = {"predictor": name, "ahead": 1, "evidence": ESTIMATED}
            yield _row("cost", "multiply-adds", value=one.flops / 2, **shared)
            yield _row("cost", "bytes read", value=float(one.read_bytes), **shared)
            yield _row("cost", "s a visit", value=one.seconds(machine, launched=False), **shared)

    def replays(self) -> Iterator[Row]:
        """Gives hits and stall with each predictor: its work in no kernel of its own, in one, and for nothing."""
        config, trace = self.config, self.test.trace
        spent, maps = self.spent(), [name for name, ahead in self.maps if ahead == 1]
        plain, tokens = prepare(trace, reset_per_request=True), trace.lengths.astype(np.float64)
        visits = tokens * trace.layers
        base: dict[Any, Any] = {}
        names = [NONE, *config.predictors, *([IDS] if config.ids_epochs else []), *maps]
        for name in dict.fromkeys(names):
            fed = prepare(self.fed(name), reset_per_request=True) if name in maps else plain
            mix = self.mix(name, name in maps)
            for link, capacity in product(config.links, config.capacities):
                machine = machine_of(link, config.hardware, plain)
                budget = Setting(capacity=capacity, scope=config.scope).budget(trace)
                shared = {"predictor": name, "capacity": capacity, "link": link, "evidence": SIMULATED}
                work_s = spent[name].seconds(machine, launched=False) if name in spent else 0.0
                charges = {"free": 0.0, "charged": work_s, "launched": work_s + config.launch_us * 1e-6}
                for said, charge in charges.items():
                    if said != "free" and name not in spent:
                        continue
                    done = seconds_by_request(fed, mix, budget, machine, charge)
                    stall_s = done.stall_s + charge * visits  # the predictor makes the device wait as well
                    if name == NONE:
                        base[link, capacity] = stall_s
                    yield _row("replay", f"stall, s a token, {said}", **shared, **_of(ratio(stall_s, tokens)))
                    saved = base[link, capacity] - stall_s
                    yield _row("replay", f"stall saved, {said}", **shared, **_of(ratio(saved, base[link, capacity])))
                    if said == "free":
                        asked = visits * trace.top_k
                        yield _row("replay", "hit rate", **shared, **_of(ratio(done.hits, asked)))
                        yield _row("replay", "s a token, free", **shared, **_of(ratio(done.total_s, tokens)))
        for link in config.links:
            machine = machine_of(link, config.hardware, plain)
            yield _row("replay", "layer time, s", link=link, value=layer_time_s(plain, machine), evidence=SIMULATED)
            rate = float(machine.link_latency_s + trace.expert_bytes.mean() / machine.link_bytes_per_s)
            yield _row("replay", "copy, s", link=link, value=rate, evidence=SIMULATED)

    def fed(self, name: str) -> Trace:
        """Gives the texts that judge with a map's predictions as the next gate's scores, which `gate_ahead` reads."""
        trace = self.test.trace
        scores = self.scored(name)
        last = np.zeros((trace.tokens, 1, trace.experts), scores.dtype)  # nothing comes behind the last layer
        return dataclasses.replace(trace, ahead=np.concatenate([scores, last], axis=1))

    def mix(self, name: str, is_map: bool) -> Mix:
        prefetch = GATE if is_map else "learned" if name == IDS else name
        numbers: dict[str, Any] = {"selection": {"count": self.test.trace.top_k * self.config.overfetch}}
        if name == IDS:
            numbers["prefetch"] = {"checkpoint": str(self.ids_file)}
        return Mix.of(self.config.eviction, prefetch, numbers=numbers)


def _seen(name: str, part: Reading) -> npt.NDArray[np.float16]:
    return part.after if name == AFTER else part.before


def _shown(name: str, part: Reading, ahead: int) -> Shown:
    logits = part.trace.logits
    assert logits is not None
    return shown(_seen(name, part), logits, part.trace.expert_ids, ahead)


def _of(interval: Any) -> Row:
    return {name: None if np.isnan(value) else value for name, value in interval._asdict().items()}


def _row(study: str, measure: str, **given: Any) -> Row:
    return dict.fromkeys(COLUMNS) | {"study": study, "measure": measure} | given
