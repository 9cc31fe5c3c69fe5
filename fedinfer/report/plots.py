"""The three plots of the evaluation, each drawn for a given width."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from fedinfer.report.markup import Node, el
from fedinfer.report.svg import Panel, drawing, label, line, marker, polyline, scale
from fedinfer.report.units import rate, significant

ALL = "All"
NARROW, WIDE = 350, 720
CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Series:
    """How one kind of method looks: classes of the style sheet and a shape, filled where there is an ε."""

    css: str
    shape: str
    legend: str


PRIVATE = {
    "together": Series(css="together", shape="circle", legend="together, by secure sums"),
    "apart": Series(css="apart", shape="wedge", legend="together, noise by each hospital"),
    "pooled": Series(css="pooled", shape="diamond", legend="pooled: one party has all rows"),
}
OPEN = {
    "alone": Series(css="alone open", shape="triangle", legend="alone, no privacy"),
    "together": Series(css="together open", shape="circle", legend="together, no privacy"),
    "pooled": Series(css="pooled open", shape="diamond", legend="pooled, no privacy"),
}
BASELINE = Series(css="baseline", shape="cross", legend="reference")


def series_of(method: Mapping[str, Any]) -> Series:
    """The look of a method, by its way to train and whether it has an ε."""
    return (OPEN if method["epsilon"] is None else PRIVATE)[method["way"]]


def cells_by_place(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(method key, site) -> cell."""
    return {(cell["method"], cell["site"]): cell for cell in evaluation["cells"]}


def epsilon_plot(evaluation: Mapping[str, Any], width: int) -> Element:
    """AUC over all sites against ε, a line for each way, and what there is without privacy in a column at the right.

    The means stand in rows below the axis, where no mark is in their way.
    """
    cells = cells_by_place(evaluation)
    methods = [method for method in evaluation["methods"] if (method["key"], ALL) in cells]
    baselines = evaluation.get("baselines") or []
    shown = [cells[method["key"], ALL] for method in methods]
    values = [cell[f"unsafe_auc_{end}"] for cell in shown for end in ("low", "high", "mean")]
    y_range, ticks = scale([*values, *(point["unsafe_auc"] for point in baselines)])
    free = [method for method in methods if method["epsilon"] is None]
    ways = {
        way: sorted((m for m in methods if m["epsilon"] is not None and m["way"] == way), key=_epsilon)
        for way in PRIVATE
        if any(m["epsilon"] is not None and m["way"] == way for m in methods)
    }
    epsilons = sorted({_epsilon(m) for line in ways.values() for m in line} | {float(p["epsilon"]) for p in baselines})
    logs = [math.log2(epsilon) for epsilon in epsilons] or [0.0]
    wide = width >= WIDE
    column = max((40 if wide else 24) * len(free), 72)
    row, rows = 18, len(ways) + bool(baselines)
    below = 28 + row * rows + 28
    height = (300 if wide else 270) + below
    panel = Panel(
        left=38,
        top=28,
        width=width - 38 - column - 16,
        height=height - 28 - below,
        x_range=(min(logs) - 0.6, max(logs) + 0.6),
        y_range=y_range,
    )
    start = panel.right + 14
    marks: list[Node] = [label((0, 14), "AUC over all hospitals, 95 % interval", "axis")]
    for tick in ticks:
        y = panel.y(tick)
        marks += [line((panel.left, y), (panel.right, y), "grid"), line((start, y), (width, y), "grid")]
        marks.append(label((panel.left - 8, y + 4), f"{tick:.2f}", "tick", anchor="end"))
    marks.append(label((panel.left - 8, panel.bottom + 18), "ε", "tick", anchor="end"))
    for epsilon in epsilons:
        x = panel.x(math.log2(epsilon))
        marks.append(label((x, panel.bottom + 18), significant(epsilon), "tick", anchor="middle"))
    middle = start + (width - start) / 2
    marks.append(label((middle, panel.bottom + 18), "no privacy", "tick", anchor="middle"))
    marks.append(label((panel.left, height - 6), "ε of one patient: less is more private", "axis"))
    for index, method in enumerate(free):
        cell, look = cells[method["key"], ALL], series_of(method)
        x, y = start + (width - start) * (index + 0.5) / len(free), panel.y(cell["unsafe_auc_mean"])
        if method["way"] != "pooled":
            marks.append(line((panel.left, y), (x, y), f"level {look.css}"))
        marks += _upright(panel, x, cell, look)
    apart = 13 if wide else 9
    for index, (way, line_methods) in enumerate(ways.items()):
        look, shift = PRIVATE[way], apart * (index - (rows - 1) / 2)
        y = panel.bottom + 28 + row * (index + 1) - 8
        marks.append(marker(look.shape, (panel.left - 14, y - 4), look.css))
        path = []
        upright: list[Node] = []
        for method in line_methods:
            cell, x = cells[method["key"], ALL], panel.x(math.log2(method["epsilon"]))
            path.append((x + shift, panel.y(cell["unsafe_auc_mean"])))
            upright += _upright(panel, x + shift, cell, look)
            marks.append(label((x, y), rate(cell["unsafe_auc_mean"]), "value", anchor="middle"))
        marks += [polyline(path, f"thick {look.css}"), *upright]
    if baselines:
        y, shift = panel.bottom + 28 + row * rows - 8, apart * (rows - 1) / 2
        marks.append(marker(BASELINE.shape, (panel.left - 14, y - 4), BASELINE.css))
        points = []
        for point in baselines:
            x = panel.x(math.log2(point["epsilon"]))
            points.append((x + shift, panel.y(point["unsafe_auc"])))
            marks.append(label((x, y), rate(point["unsafe_auc"]), "value", anchor="middle"))
        marks.append(polyline(sorted(points), f"thin {BASELINE.css}"))
        marks += [marker(BASELINE.shape, point, BASELINE.css) for point in points]
    return drawing(width, height, _css(width), "AUC over all hospitals against ε, with intervals", marks)


def site_plot(evaluation: Mapping[str, Any], width: int) -> Element:
    """One panel for each site, one row for each method: a bar from chance to the mean, a mark and an interval."""
    cells = cells_by_place(evaluation)
    sites, methods = evaluation["sites"], evaluation["methods"]
    ends = [cell[f"unsafe_auc_{end}"] for cell in cells.values() for end in ("low", "high", "mean")]
    tenths = range(math.floor(min(*ends, CHANCE) * 10 + 1e-9), 11)
    wide = width >= WIDE
    columns, names, gap, row, below = (2, 190, 28, 19, 62) if wide else (1, 186, 0, 18, 58)
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
    """One panel for each ε: mean AUC by round of each way to it, and the curve without privacy."""
    looks = {method["key"]: method for method in evaluation["methods"]}
    curves = [_trained(curve) for curve in evaluation["curves"]]
    private = [curve for curve in curves if looks[curve["method"]]["epsilon"] is not None]
    plain = next((c for c in curves if looks[c["method"]]["epsilon"] is None and c not in private), None)
    epsilons = list(dict.fromkeys(_epsilon(looks[curve["method"]]) for curve in private))
    wide = width >= WIDE
    columns, across, tall, left = (2, 312, 170, 38) if wide else (1, width - 46, 150, 38)
    drawn = [*private, *([plain] if plain else [])] or curves
    y_range, ticks = scale([mean for curve in drawn for mean in curve["unsafe_auc_mean"]])
    rounds = [value for curve in curves for value in curve["rounds"]]
    first, last = min(rounds), max(max(rounds), min(rounds) + 1)
    gap = width - left - 8 - columns * across
    marks: list[Node] = []
    for index, epsilon in enumerate(epsilons):
        panel = Panel(
            left=left + index % columns * (across + gap),
            top=28 + index // columns * (tall + 62),
            width=across,
            height=tall,
            x_range=(first, last),
            y_range=y_range,
        )
        marks.append(label((panel.left, panel.top - 12), f"ε = {significant(epsilon)}", "panel"))
        for tick in ticks:
            y = panel.y(tick)
            marks.append(line((panel.left, y), (panel.right, y), "grid"))
            if index % columns == 0:
                marks.append(label((panel.left - 8, y + 4), f"{tick:.2f}", "tick", anchor="end"))
        for value, anchor in ((first, "start"), (last, "end")):
            text = f"round {value}" if value == first else str(value)
            marks.append(label((panel.x(value), panel.bottom + 16), text, "tick", anchor=anchor))
        if plain is not None:
            css = f"dashed {series_of(looks[plain['method']]).css}"
            marks.append(polyline(_path(panel, plain["rounds"], plain["unsafe_auc_mean"]), css))
        # The first of the table comes last, on top.
        for curve in reversed([c for c in private if looks[c["method"]]["epsilon"] == epsilon]):
            look = series_of(looks[curve["method"]])
            path = _path(panel, curve["rounds"], curve["unsafe_auc_mean"])
            marks += [polyline(path, f"thick {look.css}"), marker(look.shape, path[-1], look.css)]
    height = math.ceil(len(epsilons) / columns) * (tall + 62) - 12
    return drawing(width, height, _css(width), "AUC over all hospitals by round, one panel for each ε", marks)


def swatch(series: Series) -> Element:
    """The mark of a series, for a legend."""
    attributes = {"viewBox": "0 0 16 16", "class": "swatch", "aria-hidden": "true"}
    return el("svg", attributes, marker(series.shape, (8, 8), series.css))


def _epsilon(method: Mapping[str, Any]) -> float:
    return float(method["epsilon"])


def _trained(curve: Mapping[str, Any]) -> Mapping[str, Any]:
    """The curve without round 0: chance would stretch the axis until nothing else can be told apart."""
    kept = [index for index, value in enumerate(curve["rounds"]) if value > 0] or range(len(curve["rounds"]))
    return {**curve, **{name: [curve[name][index] for index in kept] for name in ("rounds", "unsafe_auc_mean")}}


def _upright(panel: Panel, x: float, cell: Mapping[str, Any], look: Series) -> list[Node]:
    low, high = (panel.y(cell[f"unsafe_auc_{end}"]) for end in ("low", "high"))
    mark = marker(look.shape, (x, panel.y(cell["unsafe_auc_mean"])), look.css)
    return [line((x, low), (x, high), f"interval {look.css}"), mark]


def _path(panel: Panel, across: Sequence[float], up: Sequence[float]) -> list[tuple[float, float]]:
    return [(panel.x(a), panel.y(b)) for a, b in zip(across, up, strict=True)]


def _css(width: int) -> str:
    return "plot wide" if width >= WIDE else "plot narrow"
