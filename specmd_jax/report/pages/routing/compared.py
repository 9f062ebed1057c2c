"""The first trace of `experiments.routing` held against the others, measure by measure.

The rule: it is *like* the others in a measure if its number lies between their least and their largest, or no further
than a tenth beyond. A measure that no other trace has is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.routing.table import found, traces_of, value
from specmd_jax.report.rows import number

BEYOND = 0.1
CYCLES = 2.0  # the cache size at which traces are compared, in token cycles: what K of E is differs
QUARTER = 0.25


class Measure(NamedTuple):
    """What is compared: its words go behind "in", a number is written with `unit`."""

    words: str
    of: Callable[[Sequence[Row], str], float]  # rows, trace -> number
    evidence: str
    digits: int = 0
    unit: str = " %"

    def text(self, number: float) -> str:
        return "-" if math.isnan(number) else f"{number:.{self.digits}f}{self.unit}"


class Compared(NamedTuple):
    """A measure of the first trace, and of the others that have it."""

    measure: Measure
    own: float
    others: dict[str, float]

    @property
    def like(self) -> bool:
        low, high = min(self.others.values()), max(self.others.values())
        return low - BEYOND * abs(low) <= self.own <= high + BEYOND * abs(high)

    @property
    def sentence(self) -> str:
        low, high = min(self.others.values()), max(self.others.values())
        digits, text = self.measure.digits, self.measure.text
        between = text(low) if text(low) == text(high) else f"{low:.{digits}f} to {text(high)}"
        return f"{self.measure.words}, {text(self.own)} (others {between})"


def _pct(measure: str, **wanted: object) -> Callable[[Sequence[Row], str], float]:
    return lambda rows, trace: 100 * value(rows, measure, trace=trace, **wanted)


def at_cycles(rows: Sequence[Row], trace: str) -> str | None:
    """Gives the cache size of a trace that is `CYCLES` large."""
    sizes = found(rows, "cycles", trace=trace)
    return next(
        (str(row["capacity"]) for row in sizes if math.isclose(number(row, "value"), CYCLES, rel_tol=0.01)), None
    )


def _at_cycles(measure: str, policy: str) -> Callable[[Sequence[Row], str], float]:
    return lambda rows, trace: 100 * value(rows, measure, trace=trace, policy=policy, capacity=at_cycles(rows, trace))


def _reuse_share(rows: Sequence[Row], trace: str) -> float:
    experts = value(rows, "experts", trace=trace)
    return 100 * value(rows, "reuse, experts", trace=trace, place=0.5) / experts


def _over_chance(rows: Sequence[Row], trace: str) -> float:
    return value(rows, "overlap", trace=trace, place=1.0) / value(rows, "overlap by chance", trace=trace)


MEASURES = (
    Measure("the median distance to an expert's last use, of its layer's experts", _reuse_share, "measured"),
    Measure("uses whose last use is within a quarter of the experts", _pct("reuse within", place=QUARTER), "measured"),
    Measure("a token's experts that the token before used, too", _pct("overlap", place=1.0), "measured"),
    Measure("that overlap over what popularity alone gives", _over_chance, "measured", 1, " times"),
    Measure("the evenness of use over all tokens", _pct("evenness"), "measured"),
    Measure("the evenness of use in a few tokens", _pct("evenness of a few tokens"), "measured"),
    Measure("recall of the last token's experts (previous)", _pct("recall", policy="previous", place=1.0), "simulated"),
    Measure("recall of transition", _pct("recall", policy="transition", place=1.0), "simulated"),
    Measure("recall of adaptive", _pct("recall", policy="adaptive", place=1.0), "simulated"),
    Measure("recall of online", _pct("recall", policy="online", place=1.0), "simulated"),
    Measure("recall of learned, trained on gpt-oss-20b", _pct("recall", policy="learned", place=1.0), "simulated"),
    Measure("hits of lru at two token cycles", _at_cycles("hit rate", "lru"), "simulated"),
    Measure("hits of belady at two token cycles", _at_cycles("hit rate", "belady"), "simulated"),
    Measure("the gap that lfu_decay closes there", _at_cycles("gap closed", "lfu_decay"), "simulated"),
    Measure("the gap that adaptive closes there", _at_cycles("gap closed", "adaptive"), "simulated"),
    Measure("the gap that online closes there", _at_cycles("gap closed", "online"), "simulated"),
    Measure("what experts say about the domain", _pct("specialisation"), "measured", 1),
)


def off(told: Sequence[Compared], other: str) -> float:
    """Gives how far the first trace's numbers are from another's, as shares of the latter: the median over measures."""
    return median(abs(it.own / it.others[other] - 1) for it in told if it.others.get(other))


def compare(rows: Sequence[Row]) -> list[Compared]:
    """Gives each measure that the first trace and another one have."""
    first, *rest = traces_of(rows)
    told = []
    for measure in MEASURES:
        own = measure.of(rows, first)
        others = {trace: at for trace in rest if not math.isnan(at := measure.of(rows, trace))}
        if others and not math.isnan(own):
            told.append(Compared(measure, own, others))
    return told
