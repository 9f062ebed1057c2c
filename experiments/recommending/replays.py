"""The replays of a question: first those that the answer needs, then the studies beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import jax

from configs.recommend import LOSSY
from experiments.common.bars import bar as bar_of
from experiments.recommending.question import Question
from specmd_jax.api import DRAFT_NOTE
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.requests import Spent, replay_requests
from specmd_jax.engines.sizes import native_bits
from specmd_jax.errors import SpecmdError
from specmd_jax.replay.metrics import Metrics
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.recommend.ties import best_of
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.setting import Setting
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.specs.hardware import Hardware
from specmd_jax.timelines.parts import Timeline
from specmd_jax.timelines.record import timeline
from specmd_jax.trace import first_tokens
from specmd_jax.trace.profile import Profile, profile_of
from specmd_jax.types import DECODE, PREFILL, Trace

SAME = (
    "hit_rate", "hits_late", "misses", "collisions", "bytes_demand", "bytes_prefetch_used", "bytes_prefetch_wasted",
    "lost_mass", "mean_bits", "tokens", "ttft_s", "tpot_s", "tokens_per_s", "link_utilisation", "host_misses",
    "storage_utilisation",
)  # fmt: skip
"""Metrics that are columns of the same name."""
NO_NUMBERS: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Replays:
    """Makes the rows of a question."""

    question: Question

    @cached_property
    def event(self) -> Prepared:
        """The schedule as asked."""
        return self._prepare(self.question.routing.trace)

    @cached_property
    def native(self) -> float:
        """Bits of an expert's weight as asked."""
        return native_bits(self.question.routing.trace)

    @cached_property
    def often(self) -> Profile:
        """How often the requests before those that are counted use each expert."""
        return profile_of(first_tokens(self.question.routing.trace, self.question.routing.warmup_tokens))

    def answer(self) -> Iterator[Row]:
        """Gives the cells that the answer is chosen from: every eviction policy without prefetching, then every
        predictor with the fastest of them and with LRU; at the capacity asked for, and with all experts cached.
        """
        question = self.question
        plain, *ahead = sorted(question.prefetches, key=lambda name: name != "none")
        evictions = question.config.evictions
        steps = len(evictions) + 2 * len(ahead)
        with bar_of(steps, "mix") as bar:
            first: list[Row] = []
            for eviction in evictions:
                rows = self._grid(bar, eviction, plain, (question.budget_bytes, question.all_expert_bytes))
                first += rows[:1]
                yield from rows
            best = best_of(first)
            for eviction in dict.fromkeys((str(best["eviction"]), evictions[0])):
                for prefetch in ahead:
                    yield from self._grid(bar, eviction, prefetch, (question.budget_bytes, question.all_expert_bytes))

    def beside(self, answer: Sequence[Row]) -> dict[str, Callable[[], Iterable[Row]]]:
        """Gives the studies beside the answer, by what to call them; `answer` has the rows that it rests on."""
        question, config = self.question, self.question.config
        here = [row for row in answer if row["capacity_bytes"] == question.budget_bytes]
        best = best_of(here)
        eviction, prefetch = str(best["eviction"]), str(best["prefetch"])
        mixes = dict.fromkeys([(eviction, prefetch), (config.evictions[0], "none")])

        def curve() -> Iterator[Row]:
            largest = max(self.event.trace.expert_bytes)
            sizes = [int(question.all_expert_bytes * share / 100) for share in config.shares_pct]
            most = question.host.get("host_capacity", question.all_expert_bytes)
            budgets = sorted({size for size in sizes if largest <= size <= most} - {question.budget_bytes})
            count = max(2, len(jax.devices()))
            for mix in mixes:
                for start in range(0, len(budgets), count):
                    yield from self._cells("grid", "as asked", self.event, *mix, budgets[start : start + count])

        def cold() -> Iterator[Row]:
            prepared = self._prepare(question.routing.cold, warmup_tokens=0)
            for mix in mixes:
                yield from self._cells("cold", "first request", prepared, *mix)

        def bound() -> Iterator[Row]:
            yield from self._cells("bound", "knows the future", self.event, "belady", "none")

        def links() -> Iterator[Row]:
            for factor in config.link_factors:
                rate = float(question.machine.link_bytes_per_s) * factor
                machine = question.machine.replace(link_bytes_per_s=rate)
                name = f"{factor:g} x the link's rate"
                yield from self._cells("link", name, self.event, eviction, prefetch, machine=machine)

        def contract() -> Iterator[Row]:
            sequential = self._prepare(question.routing.trace, contract="sequential")
            yield from self._cells("contract", "sequential", sequential, eviction, prefetch)

        def readings() -> Iterator[Row]:
            for reading in config.readings:
                yield from self._cells(
                    "reading", reading, self.event, "least_stale", prefetch, numbers={"reading": reading}
                )

        def precisions() -> Iterator[Row]:
            for bits in neighbours(self.native, config.other_bits):
                stored = self._prepare(question.routing.trace, precisions=(bits,))
                how: dict[str, Any] = {"slot_bits": bits, "evidence": f", experts stored in {bits:g} bits"}
                yield from self._cells("precision", f"{bits:g} bits", stored, eviction, prefetch, **how)

        def kept() -> Iterator[Row]:
            cell = partial(self._cells, "kept", prepared=self.event, eviction=eviction, prefetch=prefetch)
            note = ", pins from the requests before"
            yield from cell(variant="half of it pinned", pin_share=0.5, pin_profile=self.often, evidence=note)
            yield from cell(variant="copies compete for their place", admission="compete")

        def host_rules() -> Iterator[Row]:
            cell = partial(self._cells, "tier", prepared=self.event, eviction=eviction, prefetch=prefetch)
            for rule in config.host_evictions:
                yield from cell(variant=f"host memory by {rule}", host_eviction=rule)
            yield from cell(variant="host memory hears all uses", host_hears="uses")
            yield from cell(variant="host memory without what is cached", inclusion="exclusive")
            for name in question.prefetches:
                if name != "none":
                    variant = f"what {name} foresees goes to host memory alone"
                    yield from self._cells("tier", variant, self.event, eviction, name, prefetch_to="host")

        def on_host() -> Iterator[Row]:
            note = ", misses on the host's processor"
            yield from self._cells(
                "host", "a fixed set, the rest on the host", self.event, "lru", "none", miss="cpu",
                warm_start=self.often, evidence=f"{note}, the set from the requests before",
            )  # fmt: skip
            yield from self._cells(
                "host", "misses copied or on the host", self.event, eviction, "none", miss="split", evidence=note
            )

        def lossy() -> Iterator[Row]:
            both = self._prepare(question.routing.trace, precisions=(self.native / 2, self.native))
            name = f"{self.native / 2:.3g} and {self.native:.3g} bits"
            for miss in LOSSY:
                how: dict[str, Any] = {"miss": miss, "evidence": ", lossy: quality by proxies only"}
                yield from self._cells("lossy", name, both, eviction, prefetch, **how)

        reads = eviction == "least_stale"
        return {
            "what more or less memory buys": curve,
            "the cold start": cold,
            "the bound": bound,
            "other links": links,
            "pins and admission": kept,
            **({"other rules of host memory": host_rules} if question.host else {}),
            "misses on the host": on_host,
            "one expert at a time": contract,
            **({"readings of Least-Stale": readings} if reads and config.readings else {}),
            "other precisions": precisions,
            **({"rules that change the output": lossy} if config.lossy else {}),
        }

    def drawn(self, answer: Sequence[Row], passes: int) -> Timeline:
        """Gives some counted passes of the best mix at the cache that fits."""
        question = self.question
        best = best_of([row for row in answer if row["capacity_bytes"] == question.budget_bytes])
        setting = Setting(
            eviction=str(best["eviction"]),
            prefetch=str(best["prefetch"]),
            capacity=question.budget_bytes,
            hardware=question.machine,
            batch=question.config.batch,
            context=question.context,
            warmup_tokens=question.routing.warmup_tokens,
            **question.host,
            **question.config.drafting,
        )
        return timeline(question.routing.trace, setting, passes=passes)

    def _prepare(self, trace: Trace, **changes: Any) -> Prepared:
        routing, drafting = self.question.routing, self.question.config.drafting
        given = {
            "warmup_tokens": routing.warmup_tokens,
            "batch": self.question.config.batch,
            "context": self.question.context,
            "drafts": Drafts(*drafting.values()) if drafting else None,
        }
        return prepare(trace, **{**given, **changes})

    def _grid(self, bar: Any, eviction: str, prefetch: str, budgets: Sequence[int]) -> list[Row]:
        bar.set_postfix_str(f"{eviction} + {prefetch}", refresh=True)
        apart = [budgets] if not self.question.host else [(budget,) for budget in budgets]  # 100 % needs no storage
        rows = [row for some in apart for row in self._cells("grid", "as asked", self.event, eviction, prefetch, some)]
        bar.update()
        return rows

    def _cells(
        self,
        study: str,
        variant: str,
        prepared: Prepared,
        eviction: str,
        prefetch: str,
        budgets: Sequence[int] = (),
        *,
        machine: Hardware | None = None,
        slot_bits: float | None = None,
        evidence: str = "",
        numbers: Mapping[str, Any] = NO_NUMBERS,
        **fields: Any,
    ) -> list[Row]:
        """Gives a row of each budget; none: that of the question. Several cost as much as one where there are so many
        devices, and share its compile. `fields` of `Setting` replace what is asked.
        """
        question = self.question
        wanted = list(dict.fromkeys(budgets or (question.budget_bytes,)))
        host = {} if max(wanted) >= question.all_expert_bytes else question.host
        cell = Setting(
            eviction=eviction, prefetch=prefetch, numbers=numbers, capacity=max(wanted),
            hardware=machine or question.machine, **{**host, **fields},
        )  # fmt: skip
        assert cell.machine is not None
        shape = max(2, len(jax.devices()))
        padded = [*wanted, *[wanted[-1]] * (-len(wanted) % shape)]
        room = cell.host_budget(prepared.trace)
        mix = cell.mix(question.spec.top_k)
        found = replay_requests(prepared, mix, padded, cell.machine, host_budget=room, **cell.options)
        shared: Row = {
            "study": study,
            "variant": variant,
            "model": question.spec.name,
            "hardware": question.config.hardware,
            "batch": question.config.batch,
            "eviction": eviction,
            "prefetch": prefetch,
            "miss": fields.get("miss", "fetch"),
            "slot_bits": self.native if slot_bits is None else slot_bits,
            "fixed_bytes": question.fixed_bytes,
            "evidence": question.routing.evidence + evidence + (f", {DRAFT_NOTE}" if question.config.drafts else ""),
            "host_bytes": question.host.get("host_capacity"),
        }
        numbers_of = _first if study == "cold" else _steady
        return [
            shared | self._sizes(size) | numbers_of(prepared, *one) for size, one in zip(wanted, found, strict=False)
        ]

    def _sizes(self, size: int) -> Row:
        question = self.question
        trace = question.routing.trace
        shown = describe_capacity(size, expert_bytes=trace.expert_bytes, experts=trace.experts, top_k=trace.top_k)
        asked = size == question.budget_bytes
        return {
            "capacity_bytes": size,
            "memory_bytes": question.memory_bytes if asked else size + question.fixed_bytes,
            "capacity_pct": float(shown["percent"]),
            "cycles": float(shown["cycles"]),
        }


def neighbours(native: float, bits: Sequence[float]) -> list[float]:
    """Gives the nearest precisions clearly below and clearly above `native`."""
    below = [b for b in bits if b < 0.9 * native]
    above = [b for b in bits if b > 1.1 * native]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def guarded(name: str, study: Callable[[], Iterable[Row]], failed: Callable[[str], None]) -> Iterator[Row]:
    """Gives a study's rows; one that ends in an error is told of in a line, and the rest goes on."""
    try:
        yield from study()
    except (SpecmdError, ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        failed(f"not answered: {name} ({why})")


def _steady(prepared: Prepared, cell: Metrics, spent: Spent) -> Row:
    schedule = prepared.schedule
    counted = schedule.starts_pass & schedule.counted
    decodes = int((counted & (schedule.phase == DECODE)).sum()) * (cell.acceptance_length or 1.0)
    prompts = len(set(schedule.request[counted & (schedule.phase == PREFILL)].tolist()))
    total_s = (cell.ttft_s or 0.0) * prompts + (cell.tpot_s or 0.0) * decodes
    copied = cell.bytes_demand + cell.bytes_prefetch_used + cell.bytes_prefetch_wasted
    return {name: getattr(cell, name) for name in SAME} | {
        "bytes_per_token": copied / cell.tokens,
        "stall_share": (cell.stall_s or 0.0) / total_s if total_s else 0.0,
        "request_decode_s": " ".join(f"{s:.7g}" for s in spent.decode_s),
        "request_decodes": " ".join(map(str, spent.decodes)),
        "request_prefill_s": " ".join(f"{s:.7g}" for s in spent.prefill_s),
    }


def _first(prepared: Prepared, cell: Metrics, spent: Spent) -> Row:
    """Gives what the first request took from an empty cache; what is counted over all requests stays empty."""
    del prepared, cell
    empty: Row = dict.fromkeys(SAME)
    return empty | {
        "ttft_s": float(spent.prefill_s[0]),
        "tpot_s": float(spent.decode_s[0] / max(float(spent.decodes[0]), 1.0)),
        "misses": int(spent.misses[0]),
        "bytes_per_token": None,
        "stall_share": None,
        "request_decode_s": None,
        "request_decodes": None,
        "request_prefill_s": None,
    }
