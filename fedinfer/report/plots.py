"""The three plots of the evaluation, each drawn for a given width."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from fedinfer.report.markup import Node, el
from fedinfer.report.svg import Panel, drawing, label, line, marker, polygon, polyline, scale
from fedinfer.report.units import rate, significant

ALL = "All"
NARROW, WIDE = 350, 720
CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Series:
    """How one kind of method looks: a class of the style sheet and a shape."""

    css: str
    shape: str
    legend: str


PRIVATE = Series(css="private", shape="circle", legend="federated, with differential privacy")
OPEN = Series(css="open", shape="square", legend="federated, no privacy")
POOLED = Series(css="pooled", shape="diamond", legend="pooled, no privacy")
ALONE = Series(css="alone", shape="triangle", legend="alone, no privacy")
BASELINE = Series(css="baseline", shape="ring", legend="reference")


def series_of(method: Mapping[str, Any]) -> Series:
    """The look of a method: private ones by their ε, the others by their key."""
    if method["epsilon"] is not None:
        return PRIVATE
    return {"alone": ALONE, "pooled": POOLED}.get(method["key"], OPEN)


def cells_by_place(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(method key, site) -> cell."""
    return {(cell["method"], cell["site"]): cell for cell in evaluation["cells"]}


def epsilon_plot(evaluation: Mapping[str, Any], width: int) -> Element:
    """AUC over all sites against ε, with the methods without privacy in a column of their own at the right."""
    cells = cells_by_place(evaluation)
    methods = [method for method in evaluation["methods"] if (method["key"], ALL) in cells]
    baselines = evaluation.get("baselines") or []
    shown = [cells[method["key"], ALL] for method in methods]
    values = [cell[f"unsafe_auc_{end}"] for cell in shown for end in ("low", "high", "mean")]
    y_range, ticks = scale([*values, *(point["unsafe_auc"] for point in baselines)])
    private = sorted((m for m in methods if m["epsilon"] is not None), key=lambda m: float(m["epsilon"]))
    free = [method for method in methods if method["epsilon"] is None]
    epsilons = sorted({float(m["epsilon"]) for m in private} | {float(point["epsilon"]) for point in baselines})
    logs = [math.log2(epsilon) for epsilon in epsilons] or [0.0]
    wide = width >= WIDE
    column = max((40 if wide else 24) * len(free), 72)
    height = 340 if wide else 320
    panel = Panel(
        left=38,
        top=28,
        width=width - 38 - column - 16,
        height=height - 28 - 46,
        x_range=(min(logs) - 0.75, max(logs) + 0.4),
        y_range=y_range,
    )
    start = panel.right + 14
    marks: list[Node] = [label((0, 14), "AUC over all hospitals, 95 % interval", "axis")]
    for tick in ticks:
        y = panel.y(tick)
        marks += [line((panel.left, y), (panel.right, y), "grid"), line((start, y), (width, y), "grid")]
        marks.append(label((panel.left - 8, y + 4), f"{tick:.2f}", "tick", anchor="end"))
    for epsilon in epsilons:
        x = panel.x(math.log2(epsilon))
        marks.append(label((x, panel.bottom + 18), significant(epsilon), "tick", anchor="middle"))
    middle = start + (width - start) / 2
    marks.append(label((middle, panel.bottom + 18), "no privacy", "tick", anchor="middle"))
    marks.append(label((panel.left, height - 6), "ε of one patient: less is more private", "axis"))
    for index, method in enumerate(free):
        cell, look = cells[method["key"], ALL], series_of(method)
        x, y = start + (width - start) * (index + 0.5) / len(free), panel.y(cell["unsafe_auc_mean"])
        if look is not POOLED:
            marks.append(line((panel.left, y), (x, y), f"level {look.css}"))
        marks += _upright(panel, x, cell, look)
    shift = 9 if wide else 6
    points = [(panel.x(math.log2(p["epsilon"])) - shift, panel.y(p["unsafe_auc"])) for p in baselines]
    marks.append(polyline(sorted(points), "thin baseline"))
    marks += [marker(BASELINE.shape, point, BASELINE.css) for point in points]
    path = []
    for method in private:
        cell, x = cells[method["key"], ALL], panel.x(math.log2(method["epsilon"])) + shift
        path.append((x, panel.y(cell["unsafe_auc_mean"])))
        marks += _upright(panel, x, cell, PRIVATE)
        marks.append(label((x - 7, path[-1][1] - 8), rate(cell["unsafe_auc_mean"]), "value", anchor="end"))
    marks.append(polyline(path, "thick private"))
    return drawing(width, height, _css(width), "AUC over all hospitals against ε, with intervals", marks)


def site_plot(evaluation: Mapping[str, Any], width: int) -> Element:
    """One panel for each site, one row for each method: a bar from chance to the mean, a mark and an interval."""
    cells = cells_by_place(evaluation)
    sites, methods = evaluation["sites"], evaluation["methods"]
    ends = [cell[f"unsafe_auc_{end}"] for cell in cells.values() for end in ("low", "high", "mean")]
    tenths = range(math.floor(min(*ends, CHANCE) * 10 + 1e-9), 11)
    wide = width >= WIDE
    columns, names, gap, row, below = (3, 146, 28, 22, 62) if wide else (1, 146, 0, 20, 58)
    tall = row * len(methods)
    across = (width - names - gap * (columns - 1) - 8) / columns
    marks: list[Node] = [label((0, 16), "AUC", "axis")]
    for index, site in enumerate(sites):
        panel = Panel(
            left=names + index % columns * (across + gap),
            top=28 + index // columns * (tall + below),
            width=across,
            height=tall,
            x_range=(tenths[0] / 10, 1.0),
            y_range=(0, len(methods)),
        )
        marks.append(label((panel.left, panel.top - 12), "All hospitals" if site == ALL else site, "panel"))
        for tenth in tenths:
            x = panel.x(tenth / 10)
            marks.append(line((x, panel.top), (x, panel.bottom), "chance" if tenth == 5 else "grid"))
            if tenth % 2 == 0:
                marks.append(label((x, panel.bottom + 16), f"{tenth / 10:g}", "tick", anchor="middle"))
        for position, method in enumerate(methods):
            y = panel.top + (position + 0.5) * row
            if index % columns == 0:
                marks.append(label((names - 10, y + 4), method["label"], "tick", anchor="end"))
            if cell := cells.get((method["key"], site)):
                look = series_of(method)
                low, high = (panel.x(cell[f"unsafe_auc_{end}"]) for end in ("low", "high"))
                marks.append(line((panel.x(CHANCE), y), (panel.x(cell["unsafe_auc_mean"]), y), f"bar {look.css}"))
                marks.append(line((low, y), (high, y), f"interval {look.css}"))
                marks.append(marker(look.shape, (panel.x(cell["unsafe_auc_mean"]), y), look.css))
    height = math.ceil(len(sites) / columns) * (tall + below) - 12
    return drawing(width, height, _css(width), "AUC in each hospital by method, with intervals", marks)


def curve_plot(evaluation: Mapping[str, Any], width: int) -> Element:
    """One panel for each method: mean AUC by round, a band of one standard deviation, and the noise-free curve."""
    curves = [_trained(curve) for curve in evaluation["curves"]]
    wide = width >= WIDE
    columns, across, tall, left = (3, 204, 120, 38) if wide else (2, 142, 104, 38)
    ends = [
        mean + sign * std
        for curve in curves
        for mean, std in zip(curve["unsafe_auc_mean"], curve["unsafe_auc_std"], strict=True)
        for sign in (-1, 1)
    ]
    y_range, ticks = scale([min(1.0, max(0.0, end)) for end in ends], most=5)
    rounds = [value for curve in curves for value in curve["rounds"]]
    first, last = min(rounds), max(max(rounds), min(rounds) + 1)
    looks = {method["key"]: series_of(method) for method in evaluation["methods"]}
    plain = next((curve for curve in curves if looks[curve["method"]] is OPEN), None)
    gap = (width - left - 8 - columns * across) / (columns - 1)
    marks: list[Node] = []
    for index, curve in enumerate(curves):
        panel = Panel(
            left=left + (index % columns) * (across + gap),
            top=28 + (index // columns) * (tall + 62),
            width=across,
            height=tall,
            x_range=(first, last),
            y_range=y_range,
        )
        marks.append(label((panel.left, panel.top - 12), curve["label"], "panel"))
        for tick in ticks:
            y = panel.y(tick)
            marks.append(line((panel.left, y), (panel.right, y), "grid"))
            if index % columns == 0:
                marks.append(label((panel.left - 8, y + 4), f"{tick:.2f}", "tick", anchor="end"))
        for value, anchor in ((first, "start"), (last, "end")):
            text = f"round {value}" if value == first else str(value)
            marks.append(label((panel.x(value), panel.bottom + 16), text, "tick", anchor=anchor))
        css = looks[curve["method"]].css
        upper = [min(m + s, 1.0) for m, s in zip(curve["unsafe_auc_mean"], curve["unsafe_auc_std"], strict=True)]
        lower = [max(m - s, 0.0) for m, s in zip(curve["unsafe_auc_mean"], curve["unsafe_auc_std"], strict=True)]
        band = _path(panel, curve["rounds"], upper) + _path(panel, curve["rounds"], lower)[::-1]
        marks.append(polygon(band, f"band {css}"))
        if plain is not None and plain is not curve:
            marks.append(polyline(_path(panel, plain["rounds"], plain["unsafe_auc_mean"]), "dashed open"))
        marks.append(polyline(_path(panel, curve["rounds"], curve["unsafe_auc_mean"]), f"thick {css}"))
    height = math.ceil(len(curves) / columns) * (tall + 62) - 12
    return drawing(width, height, _css(width), "AUC over all hospitals by round, one panel for each method", marks)


def swatch(series: Series) -> Element:
    """The mark of a series, for a legend."""
    attributes = {"viewBox": "0 0 16 16", "class": "swatch", "aria-hidden": "true"}
    return el("svg", attributes, marker(series.shape, (8, 8), series.css))


def _trained(curve: Mapping[str, Any]) -> Mapping[str, Any]:
    """The curve without round 0: chance would stretch the axis until nothing else can be told apart."""
    kept = [index for index, value in enumerate(curve["rounds"]) if value > 0] or range(len(curve["rounds"]))
    series = ("rounds", "unsafe_auc_mean", "unsafe_auc_std")
    return {**curve, **{name: [curve[name][index] for index in kept] for name in series}}


def _upright(panel: Panel, x: float, cell: Mapping[str, Any], look: Series) -> list[Node]:
    low, high = (panel.y(cell[f"unsafe_auc_{end}"]) for end in ("low", "high"))
    mark = marker(look.shape, (x, panel.y(cell["unsafe_auc_mean"])), look.css)
    return [line((x, low), (x, high), f"interval {look.css}"), mark]


def _path(panel: Panel, across: Sequence[float], up: Sequence[float]) -> list[tuple[float, float]]:
    return [(panel.x(a), panel.y(b)) for a, b in zip(across, up, strict=True)]


def _css(width: int) -> str:
    return "plot wide" if width >= WIDE else "plot narrow"
