"""What the paper claims, and the cases that the rows of `experiments.paper` make of it.

The rules that turn cases into verdicts are those of `specmd_jax.report.claims`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from configs import paper_numbers as paper
from experiments.common.paper_plan import EVICTIONS, MISS_RULES, MIXES, PREDICTORS, RECORDED, SYSTEMS, Point
from specmd_jax.report.claims import Case, Judged, cut_pct, held, judge, kendall, ratio
from specmd_jax.report.series import number
from specmd_jax.report.table import Row

ONLINE = tuple(name for name in EVICTIONS if name != "belady")
SMALL, MIDDLE, LARGE = paper.CAPACITIES_PCT


class Results:
    """The rows of whole models, found by trace, point and capacity."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.evidence: dict[str, str] = {}
        self.bits: list[str] = []
        self._rows: dict[tuple[object, ...], Row] = {}
        self._layers: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            key = self._key(str(row["trace"]), row, number(row, "capacity_pct"))
            if row["layer"] is not None:
                self._layers.setdefault(key, []).append(row)
                continue
            self._rows[key] = row
            self.evidence.setdefault(str(row["trace"]), str(row["evidence"]))
            if row["bits"] in ("4", "8") and row["bits"] not in self.bits:
                self.bits.append(str(row["bits"]))

    @staticmethod
    def _key(trace: str, names: Row, pct: float) -> tuple[object, ...]:
        return (trace, *(names[name] for name in Point().columns()), pct)

    def get(self, trace: str, point: Point, pct: float) -> Row | None:
        """The row of a point, or of what stands in for it on recorded routing, which has no scores."""
        if self.evidence.get(trace) == RECORDED:
            point = point.on(ahead=False, logits=False)
        return self._rows.get(self._key(trace, point.columns(), pct))

    def layers(self, trace: str, point: Point, pct: float) -> list[Row]:
        """Rows of the layers of a point, in order."""
        return self._layers.get(self._key(trace, point.columns(), pct), [])

    def pairs(self, one: Point, other: Point, pct: float, traces: Sequence[str]) -> Iterator[tuple[str, Row, Row]]:
        """(trace, row of `one`, row of `other`) where both are there and not the same."""
        for trace in traces:
            a, b = self.get(trace, one, pct), self.get(trace, other, pct)
            if a is not None and b is not None and a is not b:
                yield trace, a, b


class Claim(NamedTuple):
    """One claim: the paper's words in short, what is computed for it, and its cases on some traces."""

    section: str
    text: str
    paper: str
    measure: str
    cases: Callable[[Results, Sequence[str]], list[Case]]
    with_number: bool = True
    unit: str = ""

    def judge(self, results: Results, traces: Sequence[str]) -> Judged:
        return judge(self.cases(results, traces), with_number=self.with_number)


GATE, SCORED, SCORED_8 = (
    PREDICTORS["gate, top-k"],
    PREDICTORS["gate, percentile 80"],
    replace(PREDICTORS["gate, percentile 80"], bits=(8.0,)),
)


def settings(point: Point) -> Iterator[tuple[str, Point]]:
    """The point under both precision readings, without prefetching and with the paper's."""
    for bits in ((4.0,), (8.0,)):
        for prefetch, base in (("no prefetch", Point()), ("prefetch", GATE)):
            yield f"{bits[0]:g} bit, {prefetch}", replace(base, eviction=point.eviction, bits=bits)


def compared(
    eviction: str,
    column: str,
    compare: Callable[[float, float], float],
    found: paper.Range,
    none: float | None,
    pct: float,
    with_: str = "least_stale",
) -> Callable[[Results, Sequence[str]], list[Case]]:
    """Cases that compare a column of `eviction` with that of Least-Stale, in every setting."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        both = zip(settings(Point(eviction)), settings(Point(with_)), strict=True)
        return [
            Case(f"{trace}, {label}", compare(number(a, column), number(b, column)), found.low, found.high, none)
            for (label, one), (_, other) in both
            for trace, a, b in results.pairs(one, other, pct, traces)
        ]

    return cases


def most(cases: Callable[[Results, Sequence[str]], list[Case]]) -> Callable[[Results, Sequence[str]], list[Case]]:
    """ "Up to": the single largest case."""

    def largest(results: Results, traces: Sequence[str]) -> list[Case]:
        found = [case for case in cases(results, traces) if not math.isnan(case.value)]
        return [max(found, key=lambda case: case.value)] if found else []

    return largest


def level(
    eviction: str, column: str, found: paper.Range, *, miss: bool = False
) -> Callable[[Results, Sequence[str]], list[Case]]:
    """Cases of one column in % at 5 %; `miss`: of what it lacks to 100."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        rows = [
            (f"{trace}, {label}", results.get(trace, point, MIDDLE))
            for label, point in settings(Point(eviction))
            for trace in traces
        ]
        values = [(label, 100 * number(row, column)) for label, row in rows if row is not None]
        return [Case(label, 100 - value if miss else value, *found, None) for label, value in values]

    return cases


def drop_in(system: str, trace: str, results: Results) -> float:
    """TTFT that Least-Stale saves in a system, in % (where a trace has no prompt: TPOT); NaN without rows."""
    point = SYSTEMS[system]
    for _, before, after in results.pairs(point, replace(point, eviction="least_stale"), MIDDLE, [trace]):
        column = "ttft_s" if before["ttft_s"] is not None else "tpot_s"
        return cut_pct(number(before, column), number(after, column))
    return math.nan


def paper_drop_in(system: str, trace: str) -> float:
    """The paper's saving on the model, or the mean over its models for a trace of another one."""
    cuts = {model: cut_pct(*times) for model, times in paper.TTFT_MS[system].items()}
    return cuts.get(trace, sum(cuts.values()) / len(cuts))


def dropped_in(systems: Sequence[str]) -> Callable[[Results, Sequence[str]], list[Case]]:
    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        return [
            Case(
                f"{system}, {trace}",
                drop_in(system, trace, results),
                paper_drop_in(system, trace),
                paper_drop_in(system, trace),
                0.0,
            )
            for system in systems
            for trace in traces
        ]

    return cases


def mean_drop_in(results: Results, traces: Sequence[str]) -> list[Case]:
    found = [drop_in(system, trace, results) for system in SYSTEMS for trace in traces]
    found = [value for value in found if not math.isnan(value)]
    target = paper.MEAN_TTFT_CUT_PCT
    return [Case("mean", sum(found) / len(found), target, target, 0.0)] if found else []


def scored_against_topk(column: str, sign: int) -> Callable[[Results, Sequence[str]], list[Case]]:
    """Whether score-based prefetch is higher (sign 1) or lower (-1) than top-k, except on Mixtral."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        found = []
        for pct in (SMALL, MIDDLE):
            for one, other in ((GATE, SCORED), (replace(GATE, bits=(8.0,)), SCORED_8)):
                for trace, a, b in results.pairs(one, other, pct, traces):
                    if not trace.startswith("Mixtral"):
                        label = f"{trace}, {pct:g} %, {a['bits']} bit"
                        found.append(held(label, sign * (number(b, column) - number(a, column)) > 0))
        return found

    return cases


def best(results: Results, trace: str, base: Point, pct: float, column: str = "misses") -> tuple[str, ...] | None:
    """The best online evictions at a capacity, fewest first; None where they do not differ or are not all there."""
    rows = {name: results.get(trace, replace(base, eviction=name), pct) for name in ONLINE}
    found = {name: number(row, column) for name, row in rows.items() if row is not None}
    if len(found) < 2 or len(set(found.values())) == 1:
        return None
    least = min(found.values())
    return tuple(name for name, value in found.items() if value == least)


def small_differs(results: Results, traces: Sequence[str]) -> list[Case]:
    cases = []
    for trace in traces:
        for label, base in settings(Point()):
            small, *larger = (best(results, trace, base, pct) for pct in paper.CAPACITIES_PCT)
            others = [set(names) for names in larger if names is not None]
            if small is not None and others:
                cases.append(held(f"{trace}, {label}", all(not set(small) & names for names in others)))
    return cases


def run_bits(row: Row) -> float:
    """Mean precision of all experts that ran: on the device, or on the host at the highest stored precision."""
    host = number(row, "on_host")
    device = number(row, "demand") - number(row, "dropped") - host
    highest = float(str(row["bits"]).split(":")[0])
    return (number(row, "mean_bits") * device + highest * host) / max(1.0, device + host)


def on_frontier(results: Results, traces: Sequence[str]) -> list[Case]:
    """Whether no other rule of the paper is as fast and precise with as little gate mass lost, and better in one."""

    def measure(row: Row) -> tuple[float, float, float]:
        return number(row, "tpot_s"), -run_bits(row), number(row, "lost_mass")

    cases = []
    for trace in traces:
        for pct in (SMALL, MIDDLE):
            rows = {
                rule: results.get(trace, Point(miss=rule, bits=(4.0, 8.0)), pct) for rule in MISS_RULES if rule != "cpu"
            }
            found = {rule: measure(row) for rule, row in rows.items() if row is not None}
            if len(found) == len(rows):
                mine = found["fetch_priority"]
                beaten = any(all(a <= b for a, b in zip(it, mine, strict=True)) and it != mine for it in found.values())
                cases.append(held(f"{trace}, {pct:g} %", not beaten))
    return cases


def cache_aware(column: str) -> Callable[[Results, Sequence[str]], list[Case]]:
    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        found = paper.CACHE_AWARE_SPEED_UP_PCT
        return [
            Case(trace, 100 * (ratio(number(a, column), number(b, column)) - 1), *found, 0.0)
            for trace, a, b in results.pairs(Point(), SYSTEMS["MixtureCache"], MIDDLE, traces)
            if a[column] is not None
        ]

    return cases


def mix_rows(results: Results, trace: str) -> dict[str, Row]:
    """Rows of the mixes at 5 %; empty unless all are there as the paper has them."""
    rows = {name: results.get(trace, point, MIDDLE) for name, point in MIXES.items()}
    found = {name: row for name, row in rows.items() if row is not None}
    return found if len({id(row) for row in found.values()}) == len(MIXES) else {}


def mix_order(column: str, position: int) -> Callable[[Results, Sequence[str]], list[Case]]:
    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        found = []
        for trace in traces:
            rows = mix_rows(results, trace)
            if rows and trace in paper.MODELS:
                theirs = [paper.MIX_TTFT_MS_AND_TOKENS_PER_S[name][trace][position] for name in MIXES]
                ours = [number(rows[name], column) for name in MIXES]
                found.append(Case(trace, kendall(theirs, ours), 1.0, 1.0, 0.0))
        return found

    return cases


def mix_change(results: Results, traces: Sequence[str]) -> list[Case]:
    found = []
    for trace in traces:
        rows = mix_rows(results, trace)
        for name in MIXES if rows and trace in paper.MODELS else ():
            if name != "#1":
                table = paper.MIX_TTFT_MS_AND_TOKENS_PER_S
                theirs = -cut_pct(table["#1"][trace][0], table[name][trace][0])
                ours = -cut_pct(number(rows["#1"], "ttft_s"), number(rows[name], "ttft_s"))
                found.append(Case(f"{name}, {trace}", ours, theirs, theirs, 0.0))
    return found


def nothing(results: Results, traces: Sequence[str]) -> list[Case]:
    """No case: a simulator cannot test it."""
    del results, traces
    return []


def _range(found: paper.Range, unit: str = "") -> str:
    return f"{found.low:g} to {found.high:g}{unit}"


_RATES = paper.COLLISION_RATE_PCT_5PCT
CLAIMS = (
    Claim(
        "Collisions",
        "At 5 % Least-Stale (cyclic) has fewer collisions than LRU",
        f"{_range(paper.LRU_OVER_LEAST_STALE_5PCT)} times fewer",
        "LRU's collisions / Least-Stale's",
        compared("lru", "collisions", ratio, paper.LRU_OVER_LEAST_STALE_5PCT, 1.0, MIDDLE),
        unit="x",
    ),
    Claim(
        "Collisions",
        "The same for the literal reading",
        f"{_range(paper.LRU_OVER_LEAST_STALE_5PCT)} times fewer",
        "LRU's collisions / literal Least-Stale's",
        compared("lru", "collisions", ratio, paper.LRU_OVER_LEAST_STALE_5PCT, 1.0, MIDDLE, "least_stale_literal"),
        unit="x",
    ),
    Claim(
        "Collisions",
        "At 5 % Least-Stale has far fewer collisions than SB",
        f"{_range(paper.SCORE_OVER_LEAST_STALE_5PCT)} times fewer",
        "SB's collisions / Least-Stale's",
        compared("score", "collisions", ratio, paper.SCORE_OVER_LEAST_STALE_5PCT, 1.0, MIDDLE),
        unit="x",
    ),
    Claim(
        "Collisions",
        "At 1 % up to 85 times fewer collisions than LRU",
        "up to 85 times",
        "largest ratio of collisions at 1 %",
        most(compared("lru", "collisions", ratio, paper.Range(85.0, 85.0), 1.0, SMALL)),
        unit="x",
    ),
    *(
        Claim(
            "Collisions",
            f"Collision rate of {name} at 5 %",
            _range(_RATES[name], " %"),
            "collisions / misses",
            level(name, "collision_rate", _RATES[name]),
            unit="%",
        )
        for name in _RATES
    ),
    Claim(
        "Collisions",
        "At 5 % Least-Stale also misses less than LRU (implied by its rates and counts)",
        f"{_range(paper.FEWER_MISSES_PCT_5PCT)} % fewer misses",
        "total misses that Least-Stale saves against LRU",
        compared("lru", "misses", cut_pct, paper.FEWER_MISSES_PCT_5PCT, 0.0, MIDDLE),
        unit="%",
    ),
    Claim(
        "Collisions",
        "The literal reading also misses less than LRU",
        f"{_range(paper.FEWER_MISSES_PCT_5PCT)} % fewer misses",
        "total misses that literal Least-Stale saves against LRU",
        compared("lru", "misses", cut_pct, paper.FEWER_MISSES_PCT_5PCT, 0.0, MIDDLE, "least_stale_literal"),
        unit="%",
    ),
    Claim(
        "Collisions",
        "Least-Stale hits 88 to 92 % at 5 %",
        _range(paper.MISS_RATE_PCT, " % misses"),
        "misses / demand",
        level("least_stale", "hit_rate", paper.MISS_RATE_PCT, miss=True),
        unit="%",
    ),
    *(
        Claim(
            "Prefetch",
            f"Score-based prefetch has {word} than top-k (except on Mixtral)",
            word.split()[0],
            f"{column} of percentile 80 against top-k at 1 and 5 %, LRU",
            scored_against_topk(column, sign),
            with_number=False,
        )
        for word, column, sign in (
            ("lower precision", "prefetch_precision", -1),
            ("lower recall", "prefetch_recall", -1),
            ("more hits", "hits", 1),
            ("less stall", "stall_s", -1),
        )
    ),
    Claim(
        "Miss rules",
        "fetch-priority lies on the frontier of quality and speed",
        "on the frontier",
        "not dominated in TPOT, mean bits and lost mass (proxies of quality)",
        on_frontier,
        with_number=False,
    ),
    Claim(
        "Miss rules",
        "Substitution collapses quality; dropping is safe from rank 3 on",
        "accuracy of tasks",
        "needs the model's text: only the lost gate mass is shown, as a proxy",
        nothing,
    ),
    Claim(
        "Five mixes",
        "Order of the mixes by TTFT",
        "as in its table",
        "Kendall's tau with the paper's order",
        mix_order("ttft_s", 0),
    ),
    Claim(
        "Five mixes",
        "Order of the mixes by tokens a second",
        "as in its table",
        "Kendall's tau with the paper's order",
        mix_order("tokens_per_s", 1),
    ),
    Claim(
        "Five mixes",
        "TTFT of each mix against #1",
        "as in its table",
        "change of TTFT against #1",
        mix_change,
        unit="%",
    ),
    Claim(
        "Five mixes",
        "Milliseconds of its tables",
        "see the tables",
        "they contain 1 to 2.4 ms of software overhead an expert: only ratios and orders are compared",
        nothing,
    ),
    *(
        Claim(
            "Drop-in",
            f"Least-Stale in {system} lowers TTFT at 5 %",
            _range(paper.Range(min(cuts), max(cuts)), " %"),
            "TTFT saved (without prompts: TPOT)",
            dropped_in([system]),
            unit="%",
        )
        for system in SYSTEMS
        for cuts in [[round(cut_pct(*times), 1) for times in paper.TTFT_MS[system].values()]]
    ),
    Claim(
        "Drop-in",
        "17 % less TTFT on average over systems and models",
        f"{paper.MEAN_TTFT_CUT_PCT:g} %",
        "mean of TTFT saved",
        mean_drop_in,
        unit="%",
    ),
    Claim(
        "Drop-in",
        "Up to 34.7 % less TTFT (its headline; 44.1 % stands in its table)",
        f"{paper.MOST_TTFT_CUT_PCT:g} %",
        "largest TTFT saved",
        most(
            lambda results, traces: [
                case._replace(low=paper.MOST_TTFT_CUT_PCT, high=paper.MOST_TTFT_CUT_PCT)
                for case in dropped_in(tuple(SYSTEMS))(results, traces)
            ]
        ),
        unit="%",
    ),
    Claim(
        "Routing",
        "Cache-aware routing gives 10 to 20 % of the speed-up (read as: of TTFT)",
        _range(paper.CACHE_AWARE_SPEED_UP_PCT, " %"),
        "TTFT without it / with it - 1 (LRU, no prefetch, 5 %)",
        cache_aware("ttft_s"),
        unit="%",
    ),
    Claim(
        "Routing",
        "The same, read as: of decoding",
        _range(paper.CACHE_AWARE_SPEED_UP_PCT, " %"),
        "TPOT without it / with it - 1 (LRU, no prefetch, 5 %)",
        cache_aware("tpot_s"),
        unit="%",
    ),
    Claim(
        "Regimes",
        "The best eviction at 1 % is not the best at 5 or 25 %",
        "differs",
        "fewest misses among online policies; capacities where all tie are left out",
        small_differs,
        with_number=False,
    ),
)
"""Every claim. `nothing` marks those that a simulator cannot test."""
