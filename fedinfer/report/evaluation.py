"""The section of raw metrics on public data: whose ε it is, three plots, and the tables with the same numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from fedinfer.report import plots
from fedinfer.report.markup import Node, el, facts, section, table
from fedinfer.report.units import NO_BREAK, rate, signed

SMALL_SITE = "Switzerland"
NOTHING = "–"
SAME = "at the same ε"


def evaluation_section(evaluation: Mapping[str, Any] | None) -> Element | None:
    """Plots and tables; each is left out if the evaluation has nothing for it."""
    if not evaluation or not evaluation.get("cells"):
        return None
    has_all = any(cell["site"] == plots.ALL for cell in evaluation["cells"])
    seeds = f"{evaluation['seeds']} seed{'s' * (evaluation['seeds'] != 1)}"
    note = f"{evaluation['splits']} splits from {seeds}; report.json names these figures unsafe_."
    return section(
        "evaluation",
        "Evaluation on public data",
        el(
            "div",
            {"class": "note", "role": "note"},
            el("p", {}, el("strong", {}, "Not part of a deployment. "), str(evaluation["note"]), " ", note),
        ),
        *_promises(evaluation),
        _epsilon_figure(evaluation) if has_all else None,
        _site_figure(evaluation),
        _curve_figure(evaluation) if _private_curves(evaluation) else None,
        el("h3", {}, "The same in numbers"),
        _score_table(
            evaluation, "auc", "AUC: mean ± standard deviation over the splits, and 95 % interval of the mean"
        ),
        _score_table(evaluation, "accuracy", "Accuracy: mean ± standard deviation over the splits"),
        *_paired_tables(evaluation),
    )


def _promises(evaluation: Mapping[str, Any]) -> list[Node]:
    """Against whom each ε holds: the ways to it differ in that, and not only in accuracy."""
    if not evaluation.get("against"):
        return []
    text = "Each ε is of one patient and all releases of a training. Against whom it holds is not the same."
    if sums := evaluation.get("secure_sums"):
        text += (
            f" The rows “together” took {sums['count']:,} secure sums of {sums['members']} hospitals, with "
            f"{sums['bits']} bits a coordinate."
        )
    return [el("p", {}, text), facts((promise["label"], promise["text"]) for promise in evaluation["against"])]


def _epsilon_figure(evaluation: Mapping[str, Any]) -> Element:
    cells = plots.cells_by_place(evaluation)
    looks = _looks([m for m in evaluation["methods"] if (m["key"], plots.ALL) in cells])
    legend = [(look, look.legend) for look in looks]
    caption = (
        "What privacy costs: the distance to the dashed line, which is training together without privacy. The rows "
        "below the axis are mean AUCs; bars are 95 % intervals of the mean, drawn side by side. The vertical axis "
        "starts above 0."
    )
    if plots.OPEN["alone"] in looks:
        caption += " The dotted line is each hospital on its own."
    if baselines := evaluation.get("baselines"):
        name = str(baselines[0]["label"]).partition(", ε")[0]
        legend.append((plots.BASELINE, f"reference: {name}"))
        caption += f" Crosses are a reference: {name}."
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
    methods = {method["key"]: method for method in evaluation["methods"]}
    legend = [(look, look.legend) for look in _looks([methods[c["method"]] for c in _private_curves(evaluation)])]
    caption = (
        "Mean AUC over all hospitals after a round; the untrained model of round 0, which is chance, is left out, and "
        "the vertical axis starts above 0. The dashed line, the same in each panel, is training together without "
        "privacy: the gap to it is what the noise costs."
    )
    return _figure("AUC by round", legend, plots.curve_plot, evaluation, caption)


def _private_curves(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    private = {method["key"] for method in evaluation["methods"] if method["epsilon"] is not None}
    return [curve for curve in evaluation.get("curves") or [] if curve["method"] in private]


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

    rows = [[_label(m), *(show(m["key"], site) for site in evaluation["sites"])] for m in evaluation["methods"]]
    return table(caption, ("Method", *evaluation["sites"]), rows)


def _paired_tables(evaluation: Mapping[str, Any]) -> list[Element]:
    """One table for each method without an ε that others are compared with, and one for all at the same ε."""
    methods = {method["key"]: method for method in evaluation["methods"]}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for pair in evaluation.get("paired") or []:
        against = methods[pair["against"]]
        groups.setdefault(against["label"] if against["epsilon"] is None else SAME, []).append(pair)
    tables = []
    for name, pairs in groups.items():
        by_place = {(pair["method"], pair["against"], pair["site"]): pair for pair in pairs}
        sites = [site for site in evaluation["sites"] if any(place[2] == site for place in by_place)]
        rows = []
        for method, against in dict.fromkeys(place[:2] for place in by_place):
            label: Node = _label(methods[method])
            if name is SAME:
                label = el("span", {}, label, el("span", {"class": "under"}, f"to {_label(methods[against])}"))
            rows.append([label, *(_difference(by_place.get((method, against, site))) for site in sites)])
        start = "Difference in AUC " + ("at the same ε" if name is SAME else f"to “{name}”")
        caption = (
            f"{start}, on the same splits ± its paired standard error; below, the 95 % interval with the patients that "
            "splits share counted; bold where that leaves out 0"
        )
        tables.append(table(caption, ("Method", *sites), rows))
    return tables


def _label(method: Mapping[str, Any]) -> str:
    """The label, which breaks at its comma alone."""
    return str(method["label"]).replace(" = ", f"{NO_BREAK}={NO_BREAK}")


def _difference(pair: Mapping[str, Any] | None) -> Node:
    if pair is None:
        return NOTHING
    clear = pair["low"] > 0 or pair["high"] < 0
    text = f"{signed(pair['difference'])} ± {rate(pair['standard_error'])}"
    return _with_interval(el("strong", {}, text) if clear else text, pair, "", signed)


def _with_interval(text: Node, holder: Mapping[str, Any], prefix: str, show: Callable[[float], str]) -> Node:
    if f"{prefix}low" not in holder:
        return text
    ends = f"{show(holder[f'{prefix}low'])} to {show(holder[f'{prefix}high'])}"
    return el("span", {}, text, el("span", {"class": "under"}, ends))
