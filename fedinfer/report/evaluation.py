"""The section of raw metrics on public data: three plots and the tables with the same numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from fedinfer.report import plots
from fedinfer.report.markup import Node, el, section, table
from fedinfer.report.units import rate, signed

SMALL_SITE = "Switzerland"
NOTHING = "–"


def evaluation_section(evaluation: Mapping[str, Any] | None) -> Element | None:
    """Plots and tables; each is left out if the evaluation has nothing for it."""
    if not evaluation or not evaluation.get("cells"):
        return None
    has_all = any(cell["site"] == plots.ALL for cell in evaluation["cells"])
    note = f"{evaluation['splits']} splits from {evaluation['seeds']} seeds; report.json names these figures unsafe_."
    return section(
        "evaluation",
        "Evaluation on public data",
        el(
            "div",
            {"class": "note", "role": "note"},
            el("p", {}, el("strong", {}, "Not part of a deployment. "), str(evaluation["note"]), " ", note),
        ),
        _epsilon_figure(evaluation) if has_all else None,
        _site_figure(evaluation),
        _curve_figure(evaluation) if evaluation.get("curves") else None,
        el("h3", {}, "The same in numbers"),
        _score_table(
            evaluation, "auc", "AUC: mean ± standard deviation over the splits, and 95 % interval of the mean"
        ),
        _score_table(evaluation, "accuracy", "Accuracy: mean ± standard deviation over the splits"),
        *_paired_tables(evaluation),
    )


def _epsilon_figure(evaluation: Mapping[str, Any]) -> Element:
    cells = plots.cells_by_place(evaluation)
    looks = _looks([m for m in evaluation["methods"] if (m["key"], plots.ALL) in cells])
    legend = [(look, look.legend) for look in looks]
    caption = (
        "What privacy costs: the distance from a dot to the dashed line of federated training without privacy. "
        "Numbers beside the dots are mean AUC, bars are 95 % intervals of the mean. The vertical axis starts above 0."
    )
    if plots.ALONE in looks:
        caption += " The dotted line is each hospital on its own."
    if baselines := evaluation.get("baselines"):
        name = str(baselines[0]["label"]).partition(", ε")[0]
        legend.append((plots.BASELINE, f"reference: {name}"))
        points = ", ".join(f"{rate(point['unsafe_auc'])} at ε = {point['epsilon']:g}" for point in baselines)
        caption += f" Rings are a reference ({name}): {points}."
    return _figure("AUC against ε", legend, plots.epsilon_plot, evaluation, caption)


def _site_figure(evaluation: Mapping[str, Any]) -> Element:
    legend = [(look, look.legend) for look in _looks(evaluation["methods"])]
    caption = (
        "Compare the triangle, a hospital on its own, with the marks below it: further right is better. Bars reach "
        "from chance, the dotted line at 0.5, to the mean; the thin lines are 95 % intervals of the mean."
    )
    if SMALL_SITE in evaluation["sites"]:
        caption += f" {SMALL_SITE} has only eight healthy patients, two in a test quarter: its intervals are wide."
    return _figure("AUC in each hospital", legend, plots.site_plot, evaluation, caption)


def _curve_figure(evaluation: Mapping[str, Any]) -> Element:
    caption = (
        "AUC over all hospitals after a round; the untrained model of round 0, which is chance, is left out, and the "
        "vertical axis starts above 0. Bands are one standard deviation over the splits; the dashed line, "
        "the same in each panel, is federated training without privacy: the gap to it is what the noise costs."
    )
    return _figure("AUC by round", [], plots.curve_plot, evaluation, caption)


def _looks(methods: Sequence[Mapping[str, Any]]) -> list[plots.Series]:
    return list(dict.fromkeys(plots.series_of(method) for method in methods))


def _figure(
    title: str,
    legend: Sequence[tuple[plots.Series, str]],
    draw: Callable[[Mapping[str, Any], int], Element],
    evaluation: Mapping[str, Any],
    caption: str,
) -> Element:
    """The plot for a wide and for a narrow screen; the style sheet shows one of them."""
    entries = [el("li", {}, plots.swatch(look), text) for look, text in legend]
    return el(
        "figure",
        {},
        el("h3", {}, title),
        el("ul", {"class": "legend"}, *entries) if entries else None,
        draw(evaluation, plots.WIDE),
        draw(evaluation, plots.NARROW),
        el("figcaption", {}, caption),
    )


def _score_table(evaluation: Mapping[str, Any], score: str, caption: str) -> Element:
    cells = plots.cells_by_place(evaluation)

    def show(method: str, site: str) -> Node:
        cell = cells.get((method, site))
        if cell is None:
            return NOTHING
        text = f"{rate(cell[f'unsafe_{score}_mean'])} ± {rate(cell[f'unsafe_{score}_std'])}"
        return _with_interval(text, cell, f"unsafe_{score}_", rate)

    rows = [[m["label"], *(show(m["key"], site) for site in evaluation["sites"])] for m in evaluation["methods"]]
    return table(caption, ("Method", *evaluation["sites"]), rows)


def _paired_tables(evaluation: Mapping[str, Any]) -> list[Element]:
    labels = {method["key"]: method["label"] for method in evaluation["methods"]}
    paired = evaluation.get("paired") or []
    tables = []
    for against in dict.fromkeys(pair["against"] for pair in paired):
        pairs = {(pair["method"], pair["site"]): pair for pair in paired if pair["against"] == against}
        sites = [site for site in evaluation["sites"] if any(place[1] == site for place in pairs)]
        rows = [
            [labels[method], *(_difference(pairs.get((method, site))) for site in sites)]
            for method in dict.fromkeys(place[0] for place in pairs)
        ]
        caption = (
            f"Difference in AUC to “{labels[against]}” on the same splits; bold where the 95 % interval leaves out 0"
        )
        tables.append(table(caption, ("Method", *sites), rows))
    return tables


def _difference(pair: Mapping[str, Any] | None) -> Node:
    if pair is None:
        return NOTHING
    clear = pair["low"] > 0 or pair["high"] < 0
    text = signed(pair["difference"])
    return _with_interval(el("strong", {}, text) if clear else text, pair, "", signed)


def _with_interval(text: Node, holder: Mapping[str, Any], prefix: str, show: Callable[[float], str]) -> Node:
    if f"{prefix}low" not in holder:
        return text
    ends = f"{show(holder[f'{prefix}low'])} to {show(holder[f'{prefix}high'])}"
    return el("span", {}, text, el("span", {"class": "under"}, ends))
