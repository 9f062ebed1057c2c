"""Charts of a page, as Vega-Lite specifications that the page's script fills with the rows that its filters leave.

Colours are names that begin with @: the script puts in those of the light or the dark theme. A row's ``series`` is what
the page's checkboxes choose: chosen ones have their colour and dash and are named, the others are grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from specmd_jax.report.columns import Scalar

SERIES = "series"
CHOSEN = f"indexof(named, datum.{SERIES}) >= 0"
COLOR = {"field": SERIES, "type": "nominal", "scale": {"domain": "@names", "range": "@colors"}, "legend": None}
DASH = {"field": SERIES, "type": "nominal", "scale": {"domain": "@names", "range": "@dashes"}, "legend": None}
HEIGHT = 320

Spec = dict[str, Any]
Record = Mapping[str, Scalar]


class Field(NamedTuple):
    """A column of a page's table: its name, what to call it, and how its numbers are written (d3-format)."""

    name: str
    label: str
    format: str = ""

    @property
    def tooltip(self) -> Spec:
        told = {"field": self.name, "title": self.label}
        return told | ({"format": self.format, "type": "quantitative"} if self.format else {"type": "nominal"})


@dataclass(frozen=True)
class Chart:
    """A chart: its title states what is found, `words` say what it shows to who does not see it.

    Args:
      tables: names of the page's tables that it draws, as its specification calls them.
      ends: if lines are named where they end: the fields {"table", "x", "y"} of the lines.
      note: what must be read with it.
    """

    title: str
    words: str
    spec: Spec
    tables: tuple[str, ...] = ("rows",)
    ends: Mapping[str, str] | None = None
    wide: bool = False
    note: str = ""


def number(it: Field, **more: Any) -> Spec:
    """Gives a numeric channel."""
    axis = more.pop("axis", {})
    scale = more.pop("scale", {})
    return {"field": it.name, "type": "quantitative", "title": it.label, "axis": axis, "scale": scale} | more


def lines(
    x: Field,
    y: Field,
    told: Sequence[Field],
    *,
    table: str = "rows",
    x_axis: Spec | None = None,
    x_scale: Spec | None = None,
    y_scale: Spec | None = None,
    y_axis: Spec | None = None,
    marks: str = "",
    bands: str = "",
    dots: bool = False,
    height: int = HEIGHT,
) -> Spec:
    """Gives a line for each series: grey, or in its colour and dash where it is chosen, and named where it ends.

    Args:
      told: what a tooltip says.
      marks: a table of {`at`, `text`}: places on the x axis with a name.
      bands: a table of {x, `low`, `high`, `text`}: areas behind the lines.
      dots: whether measured points are shown.
    """
    at = number(x, axis=x_axis or {}, scale={"nice": False} | (x_scale or {}))
    height_of = number(y, axis=y_axis or {}, scale=y_scale or {})
    place = {"x": at, "y": height_of}
    line = {"type": "line", "interpolate": "linear", "clip": True}
    layers: list[Spec] = []
    if bands:
        layers.append({
            "data": {"name": bands},
            "mark": {"type": "area", "opacity": 0.22, "clip": True},
            "encoding": {
                "x": at, "y": height_of | {"field": "low"}, "y2": {"field": "high"},
                "fill": {  # a scale of its own, beside the colours of the series
                    "field": "text", "type": "nominal", "sort": None, "scale": {"range": ["@gold", "@quiet"]},
                    "legend": {"title": None, "orient": "bottom", "direction": "vertical", "symbolOpacity": 0.4,
                               "labelLimit": 330},
                },
            },
        })  # fmt: skip
    if marks:
        mark_at = number(Field("at", x.label), scale={"nice": False} | (x_scale or {}))
        layers += [
            {"data": {"name": marks}, "mark": {"type": "rule", "strokeDash": [2, 3], "color": "@quiet"},
             "encoding": {"x": mark_at}},
            {"data": {"name": marks},
             "mark": {"type": "text", "align": "right", "dx": -3, "dy": 8, "fontSize": 10, "color": "@quiet"},
             "encoding": {"x": mark_at, "y": {"value": 0}, "text": {"field": "text"}}},
        ]  # fmt: skip
    plain = place | {"detail": {"field": SERIES}}
    colored = place | {"color": COLOR, "strokeDash": DASH, "detail": {"field": SERIES}}
    layers += [
        {"data": {"name": table}, "transform": [{"filter": f"!({CHOSEN})"}],
         "mark": line | {"color": "@faint", "strokeWidth": 1.2}, "encoding": plain},
        {"data": {"name": table}, "transform": [{"filter": CHOSEN}],
         "mark": line | {"strokeWidth": 2.2}, "encoding": colored},
    ]  # fmt: skip
    if dots:
        layers.append({
            "data": {"name": table}, "transform": [{"filter": CHOSEN}],
            "mark": {"type": "point", "filled": True, "size": 28, "opacity": 1, "clip": True},
            "encoding": place | {"color": COLOR},
        })  # fmt: skip
    layers += [_hover(table, place, told), _names()]
    return {"height": height, "layer": layers}


def _hover(table: str, place: Spec, told: Sequence[Field]) -> Spec:
    """Shows the nearest point and says its numbers."""
    return {
        "data": {"name": table},
        "params": [
            {"name": "near", "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}}
        ],
        "mark": {"type": "point", "filled": True, "size": 70},
        "encoding": place
        | {
            "color": COLOR,
            "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
            "tooltip": [it.tooltip for it in told],
        },
    }


def _names() -> Spec:
    """Names lines to the right of where they end; the script spreads the names so that they do not overlap."""
    return {
        "data": {"name": "ends"},
        "mark": {"type": "text", "align": "left", "baseline": "middle", "dx": 5, "fontSize": 11, "fontWeight": 600},
        "encoding": {
            "x": {"value": "width"},
            "y": {"field": "at", "type": "quantitative", "scale": None, "axis": None},
            "text": {"field": "name"},
            "color": COLOR,
        },
    }


def heat(
    x: Field,
    y: Field,
    value: Field,
    told: Sequence[Field],
    *,
    table: str = "rows",
    scale: Spec | None = None,
    sort: bool = False,
    height: int = HEIGHT,
    text: str = "",
    x_axis: Spec | None = None,
    y_axis: Spec | None = None,
) -> Spec:
    """Gives a tile for each pair of x and y, coloured by a number. `text` is a field that is written on it."""
    order = {} if sort else {"sort": None}
    axes = {
        "x": {"field": x.name, "type": "ordinal", "title": x.label, "axis": {"labelOverlap": True} | (x_axis or {})}
        | order,
        "y": {"field": y.name, "type": "ordinal", "title": y.label, "axis": {"labelOverlap": True} | (y_axis or {})}
        | order,
    }
    tile = {
        "mark": {"type": "rect"},
        "encoding": axes
        | {
            "color": {
                "field": value.name, "type": "quantitative", "title": value.label,
                "scale": {"scheme": "viridis"} | (scale or {}),
                "legend": {"orient": "bottom", "gradientLength": 200, "titleLimit": 320},
            },
            "tooltip": [it.tooltip for it in told],
        },
    }  # fmt: skip
    written = {
        "mark": {"type": "text", "fontSize": 10, "fontWeight": 600, "color": "@ink"},
        "encoding": axes | {"text": {"field": text}},
    }
    return {"data": {"name": table}, "height": height, "layer": [tile, *([written] if text else [])]}


def tiles(x: Field, y: Field, told: Sequence[Field], *, table: str, text: str = "", height: int = HEIGHT) -> Spec:
    """Gives a tile for each pair of x and y in the colour of its series; one without a series (a tie) is grey."""
    axes = {
        "x": {"field": x.name, "type": "ordinal", "title": x.label, "sort": None, "axis": {"labelOverlap": True}},
        "y": {"field": y.name, "type": "ordinal", "title": y.label, "sort": None, "axis": {"labelOverlap": True}},
    }
    tile = {
        "mark": {"type": "rect", "stroke": "@paper", "strokeWidth": 1},
        "encoding": axes
        | {
            "color": {"condition": {"test": f"datum.{SERIES} != null"} | COLOR, "value": "@faint"},
            "tooltip": [it.tooltip for it in told],
        },
    }
    written = {
        "mark": {"type": "text", "fontSize": 10, "fontWeight": 600},
        "encoding": axes
        | {
            "text": {"field": text},
            "color": {"condition": {"test": f"datum.{SERIES} != null", "value": "@paper"}, "value": "@ink"},
        },
    }
    return {"data": {"name": table}, "height": height, "layer": [tile, *([written] if text else [])]}


def bars(
    label: Field,
    value: Field,
    told: Sequence[Field],
    *,
    table: str = "rows",
    low: str = "",
    high: str = "",
    group: Field | None = None,
    colors: Sequence[str] = ("@blue", "@gold", "@teal"),
    x_scale: Spec | None = None,
    step: int = 22,
    order: str | Sequence[Any] | Mapping[str, str] | None = None,
) -> Spec:
    """Gives a bar for each label, longest label to the left; `low` and `high` are ends of an interval.

    With `group` there are bars side by side, coloured by it.
    """
    y: Spec = {"field": label.name, "type": "nominal", "title": None, "sort": order, "axis": {"labelLimit": 190}}
    x = number(value, scale=x_scale or {})
    color: Spec = {"value": "@blue"}
    beside: Spec = {}
    if group is not None:
        beside = {"yOffset": {"field": group.name, "sort": None}}
        color = {
            "field": group.name, "type": "nominal", "title": group.label or None, "sort": None,
            "scale": {"range": list(colors)}, "legend": {"orient": "bottom"},
        }  # fmt: skip
    encoding = {"y": y, "x": x, "color": color, "tooltip": [it.tooltip for it in told], **beside}
    layers: list[Spec] = [{"mark": {"type": "bar"}, "encoding": encoding}]
    if low:
        ends = {"x": {"field": low, "type": "quantitative", "title": value.label}, "x2": {"field": high}}
        layers.append({"mark": {"type": "rule", "color": "@ink"}, "encoding": {"y": y, **ends, **beside}})
    return {"data": {"name": table}, "height": {"step": step}, "layer": layers}


def dots(
    x: Field,
    y: Field,
    told: Sequence[Field],
    *,
    table: str = "rows",
    color: Field | None = None,
    x_scale: Spec | None = None,
    y_scale: Spec | None = None,
    names: str = "",
    ideal: str = "",
    height: int = HEIGHT,
) -> Spec:
    """Gives a dot for each row, in the colour of its series or of another field.

    Args:
      names: a field that is written beside a dot.
      ideal: a table of {x, `low`, `high`, `text`} whose areas are drawn behind: where a dot should lie.
    """
    place = {"x": number(x, scale=x_scale or {}), "y": number(y, scale=y_scale or {})}
    paint: Spec = {"condition": {"test": CHOSEN} | COLOR, "value": "@faint"}
    shape: Spec = {}
    if color is not None:
        paint = {
            "field": color.name, "type": "nominal", "title": color.label,
            "scale": {"range": "@hues"}, "legend": {"orient": "bottom", "columns": 2, "labelLimit": 160},
        }  # fmt: skip
        shape = {"shape": {"field": color.name, "type": "nominal", "title": color.label}}
    layers: list[Spec] = []
    if ideal:
        layers += [
            {
                "data": {"name": ideal}, "mark": {"type": "area", "opacity": 0.16, "color": "@blue"},
                "encoding": {
                    "x": place["x"] | {"field": "at"}, "y": place["y"] | {"field": "low"}, "y2": {"field": "high"},
                    "detail": {"field": "text"},
                },
            },
            {
                "data": {"name": ideal}, "mark": {"type": "line", "color": "@quiet", "strokeWidth": 1},
                "encoding": {"x": place["x"] | {"field": "at"}, "y": place["y"] | {"field": "at"}},
            },
        ]  # fmt: skip
    layers.append({
        "data": {"name": table}, "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.9},
        "encoding": place | {"color": paint, **shape, "tooltip": [it.tooltip for it in told]},
    })  # fmt: skip
    if names:
        layers.append({
            "data": {"name": table}, "mark": {"type": "text", "align": "left", "dx": 7, "fontSize": 11},
            "encoding": place | {"text": {"field": names}, "color": {"value": "@ink"}},
        })  # fmt: skip
    return {"height": height, "layer": layers}
