"""What the plots are drawn with: a panel with two scales, and marks that take their colours from the page.

Drawn by hand because the page's style sheet can then serve light and dark, the text stays text in the reader's own
font, and a plot is a few kilobytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fedinfer.report.markup import Node, el

Point = tuple[float, float]
STEPS, MOST_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), 6


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A rectangle of the drawing, in pixels, with a linear scale along each side."""

    left: float
    top: float
    width: float
    height: float
    x_range: Point
    y_range: Point

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - self.height * (value - low) / (high - low)


def drawing(width: float, height: float, css: str, label: str, marks: Sequence[Node]) -> Element:
    """The plot as one image with a name; the numbers themselves stand in the tables."""
    attributes = {"viewBox": f"0 0 {width:g} {height:g}", "class": css, "role": "img", "aria-label": label}
    return el("svg", attributes, *marks)


def scale(values: Sequence[float]) -> tuple[Point, list[float]]:
    """A range around `values` that ends on round numbers, and at most `MOST_STEPS` + 1 ticks.

    >>> scale([0.834, 0.921])
    ((0.82, 0.94), [0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94])
    """
    low, high = min(values), max(values)
    for step in STEPS:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= MOST_STEPS:
            break
    last = max(last, first + 1)
    ticks = [round(index * step, 4) for index in range(first, last + 1)]
    return (ticks[0], ticks[-1]), ticks


def line(start: Point, end: Point, css: str) -> Element:
    ends = {"x1": number(start[0]), "y1": number(start[1]), "x2": number(end[0]), "y2": number(end[1])}
    return el("line", ends | {"class": css})


def polyline(points: Sequence[Point], css: str) -> Element:
    return el("polyline", {"points": _points(points), "class": css})


def polygon(points: Sequence[Point], css: str) -> Element:
    return el("polygon", {"points": _points(points), "class": css})


def label(at: Point, text: str, css: str, *, anchor: str = "start") -> Element:
    return el("text", {"x": number(at[0]), "y": number(at[1]), "text-anchor": anchor, "class": css}, text)


def marker(shape: str, at: Point, css: str) -> Element:
    """A `circle`, `diamond`, `triangle`, `wedge` or `cross`: shapes tell the series apart where colours do not."""
    x, y = at
    if shape == "circle":
        return el("circle", {"cx": number(x), "cy": number(y), "r": "4.5", "class": css})
    offsets: Mapping[str, Sequence[Point]] = {
        "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
        "triangle": [(0, -5.6), (5.4, 4.2), (-5.4, 4.2)],
        "wedge": [(0, 5.6), (5.4, -4.2), (-5.4, -4.2)],
        "cross": [(-4, -4), (0, 0), (4, -4), (0, 0), (4, 4), (0, 0), (-4, 4), (0, 0)],
    }
    return polygon([(x + dx, y + dy) for dx, dy in offsets[shape]], css)


def number(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)
