"""Who is in the cache, pass by pass: an expert of one layer a line, and all layers above each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from specmd_jax.report.charts import Chart, Field, Record, Spec, number
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.run.table import Stay
from specmd_jax.report.rows import number as number_of

COLORS = {
    "kept": "@faint",
    "copied early": "@lilac",
    "hit": "@blue",
    "hit, was copied early": "@teal",
    "miss": "@red",
    "not copied": "@gold",
}
"""State -> colour, in the order of the legend."""
ASKED = ("hit", "hit, was copied early", "miss", "not copied")
MISSED = ("miss", "not copied")
TALL = (260, 620)  # pixels of a chart, at least and at most
LINE = 9  # pixels of an expert
WHOLE: Spec = {"tickMinStep": 1, "format": "d"}
ZOOM = "Drag to move along, hold Shift and turn the wheel to look closer."


def records(stays: Sequence[Stay]) -> list[Record]:
    """Gives the bars of the chart: a bar ends where the pass behind its last one begins."""
    return [{**stay._asdict(), "end": stay.last + 1} for stay in stays]


def by_layer(stays: Sequence[Stay], row: Row) -> list[Record]:
    """Gives what each layer asks for and lacks in each pass, and how many experts are in the cache meanwhile."""
    counts: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in ("there", "asked", "missed")}
    for stay in stays:
        cells = [(at, stay.layer) for at in range(stay.first, stay.last + 1)]
        for name, wanted in (
            ("there", stay.state != "not copied"),
            ("asked", stay.state in ASKED),
            ("missed", stay.state in MISSED),
        ):
            if wanted:
                counts[name].update(cells)
    first, shown, layers = (int(number_of(row, name)) for name in ("first_shown", "shown", "layers"))
    return [
        {"first": at, "end": at + 1, "in_layer": layer, **{name: found[at, layer] for name, found in counts.items()}}
        for layer in range(layers)
        for at in range(first, first + shown)
    ]


def charts(stays: Sequence[Stay], row: Row) -> list[Chart]:
    """Gives the two charts."""
    asked, missed = Counter[int](), Counter[int]()
    for stay in stays:
        asked[stay.layer] += (stay.last + 1 - stay.first) * (stay.state in ASKED)
        missed[stay.layer] += (stay.last + 1 - stay.first) * (stay.state in MISSED)
    worst = max(sorted(asked), key=lambda layer: missed[layer] / max(asked[layer], 1))
    share = 100 * missed[worst] / max(asked[worst], 1)
    held = arrivals(stays)
    where = f"in passes {int(number_of(row, 'first_shown'))} to {last_of(row)}"
    expert, layer, missing = Field("expert", "expert"), Field("in_layer", "layer"), Field("missed", "misses", "d")
    states = {
        "field": "state", "type": "nominal", "title": None,
        "scale": {"domain": list(COLORS), "range": list(COLORS.values())},
        "legend": {"orient": "bottom", "columns": 6},
    }  # fmt: skip
    misses = {
        "field": "missed", "type": "quantitative", "title": "misses", "scale": {"scheme": "viridis"},
        "legend": {"orient": "bottom", "gradientLength": 200, "format": "d", "tickMinStep": 1},
    }  # fmt: skip
    stay = (expert, Field("state", "what it is"), Field("first", "from pass"), Field("last", "to pass"))
    cell = (layer, Field("first", "pass"), Field("asked", "asked for", "d"), missing)
    return [
        Chart(
            f"An expert that comes in stays {sum(held) / max(len(held), 1):.1f} passes on average (simulated)",
            f"The experts of the chosen layer, a line each, {where}: when each is in the cache, and what became of it "
            f"where it was asked for. {len(held):,} times an expert of some layer came in.",
            _over_passes("stays", expert, int(number_of(row, "experts")), states, stay),
            ("stays",), wide=True, note=ZOOM,
        ),
        Chart(
            f"Layer {worst} misses most: {share:.1f} % of the experts that it asks for (simulated)",
            f"Misses of every layer in every pass, {where}.",
            _over_passes("layers", layer, int(number_of(row, "layers")), misses,
                         (*cell, Field("there", "in the cache meanwhile", "d"))),
            ("layers",), wide=True,
        ),
    ]  # fmt: skip


def arrivals(stays: Sequence[Stay]) -> list[int]:
    """Gives for each time that an expert came in for how many passes it was there, of those that are shown.

    `stays` are in order of layer, expert and pass. Of a stay of misses each pass is an arrival.
    """
    found: list[int] = []
    before: Stay | None = None
    for stay in stays:
        if stay.state == "not copied":
            before = None
            continue
        there = before is not None and before[:2] == stay[:2] and before.last + 1 == stay.first
        passes = stay.last + 1 - stay.first
        if stay.state == "miss":
            found += [1] * passes
        elif there:
            found[-1] += passes
        else:
            found.append(passes)
        before = stay
    return found


def last_of(row: Row) -> int:
    return int(number_of(row, "first_shown") + number_of(row, "shown")) - 1


def _over_passes(table: str, line: Field, lines: int, color: Spec, told: Sequence[Field]) -> Spec:
    """Gives bars over passes, from `first` to `end`: a line of the chart for each layer or expert."""
    return {
        "height": min(max(TALL[0], LINE * lines), TALL[1]),
        "data": {"name": table},
        "params": [
            {
                "name": "zoom",  # without a key the wheel moves the page
                "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.shiftKey]"},
                "bind": "scales",
            }
        ],
        "mark": {"type": "rect", "clip": True},
        "encoding": {
            "x": number(Field("first", "pass"), scale={"nice": False, "zero": False}, axis=WHOLE),
            "x2": {"field": "end"},
            "y": {
                "field": line.name, "type": "ordinal", "title": line.label,
                "scale": {"domain": [*range(lines)]}, "axis": {"labelOverlap": True},
            },
            "color": color,
            "tooltip": [it.tooltip for it in told],
        },
    }  # fmt: skip
