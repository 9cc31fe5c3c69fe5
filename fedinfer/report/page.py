"""The page: what happened and its key figures first, then one section for each part of the run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from fedinfer.report.evaluation import evaluation_section
from fedinfer.report.markup import Node, el, facts, section, serialise
from fedinfer.report.plots import ALL, cells_by_place
from fedinfer.report.style import STYLE
from fedinfer.report.training import training_section
from fedinfer.report.units import NO_BREAK, milliseconds, privacy_loss, rate, seconds, significant, size

MOST_NAMES = 6


def render_page(report: Mapping[str, Any]) -> str:
    """The whole document as text."""
    sections = [
        training_section(report.get("headline"), report.get("ledgers"), report.get("ledger_note")),
        evaluation_section(report.get("evaluation")),
        _local_section(report.get("local_inference")),
        _encrypted_section(report.get("encrypted_query")),
        _again_section(report),
    ]
    title = str(report.get("title") or "fedinfer report")
    head = el(
        "head",
        {},
        el("meta", {"charset": "utf-8"}),
        el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("title", {}, title),
        # An empty icon of its own keeps the browser from asking for one.
        el("link", {"rel": "icon", "href": "data:,"}),
        el("style", {}, STYLE),
    )
    shown = [part for part in sections if part is not None]
    body = el("body", {}, _header(report, title, shown), el("main", {}, *shown), _footer())
    return serialise(el("html", {"lang": "en"}, head, body))


def _header(report: Mapping[str, Any], title: str, sections: Sequence[Element]) -> Element:
    made = [f"fedinfer {report['fedinfer']}"] if report.get("fedinfer") else []
    if report.get("created"):
        made.append(str(report["created"]).replace("T", " ", 1).replace("+00:00", " UTC"))
    links = [el("li", {}, el("a", {"href": f"#{part.get('id')}"}, part[0].text)) for part in sections]
    return el(
        "header",
        {},
        el("p", {"class": "eyebrow"}, " · ".join(made)),
        el("h1", {}, title),
        el("p", {"class": "lead"}, _opening(report)),
        _banner(report.get("headline")),
        _figures(report),
        el("nav", {"aria-label": "Sections"}, el("ul", {}, *links)),
    )


def _opening(report: Mapping[str, Any]) -> str:
    sentences = []
    if headline := report.get("headline"):
        names = [hospital["name"] for hospital in headline["hospitals"]]
        who = f"{len(names)} sites" if len(names) > MOST_NAMES else " and ".join([", ".join(names[:-1]), *names[-1:]])
        sentences.append(f"{who.removeprefix(' and ')} trained one model in {len(headline['rounds'])} rounds.")
        protected = headline["epsilon"] is not None and not headline["epsilon_void"]
        left = "clipped and noised updates" if protected else "updates"
        if protected and headline.get("min_honest") is not None:
            left = "masked updates, each with a share of the noise,"
        sentences.append(f"Their patients’ rows stayed where they were; only {left} left.")
    if report.get("local_inference"):
        sentences.append("The finished model answers on one’s own computer, offline.")
    if report.get("encrypted_query"):
        sentences.append("A server that owns the model can answer too, without seeing the question or the answer.")
    return " ".join(sentences)


def _banner(headline: Mapping[str, Any] | None) -> Element | None:
    if not headline:
        return None
    if headline["epsilon_void"]:
        text = "The noise of this run was seeded: whoever knows the seed can take it away. No ε of this run counts."
        return _note("banner", "ε is void.", text)
    if headline["epsilon"] is None:
        return _note("banner", "No privacy.", "The updates of this run were sent without noise.")
    return None


def _note(css: str, strong: str, text: str) -> Element:
    return el("div", {"class": css, "role": "note"}, el("p", {}, el("strong", {}, strong), " " + text))


def _figures(report: Mapping[str, Any]) -> Element | None:
    headline, local = report.get("headline"), report.get("local_inference")
    evaluation, encrypted = report.get("evaluation"), report.get("encrypted_query")
    tiles: list[tuple[str, str, str]] = []
    if headline and headline["epsilon"] is not None:
        void = headline["epsilon_void"]
        delta = f"δ{NO_BREAK}={NO_BREAK}{significant(headline['delta'])}"
        promise = f"for one {headline['unit']} ({headline['relation']}), {delta}"
        tiles.append(
            (f"ε = {privacy_loss(headline['epsilon'])}", "void: seeded noise" if void else promise, "void" * void)
        )
        if evaluation and (found := _auc_at(evaluation, headline)) is not None:
            label = f"AUC over all hospitals at ε = {significant(found[0])}; an evaluation on public data"
            tiles.append((rate(found[1]), label, ""))
    if local:
        tiles.append((milliseconds(local["p50_ms"]), "one answer offline, median", ""))
    if encrypted:
        tiles.append((milliseconds(encrypted["p50_ms"]), "one encrypted query over HTTP, median", ""))
    if headline and headline["hospitals"]:
        sent = math.fsum(hospital["bytes_up"] for hospital in headline["hospitals"]) / len(headline["hospitals"])
        tiles.append((size(sent), "sent by a site in the whole training", ""))
    if not tiles:
        return None
    return el(
        "dl",
        {"class": "figures"},
        *(
            el("div", {"class": css} if css else {}, el("dt", {}, what), el("dd", {}, figure))
            for figure, what, css in tiles
        ),
    )


def _auc_at(evaluation: Mapping[str, Any], headline: Mapping[str, Any]) -> tuple[float, float] | None:
    """ε and AUC of the method of the evaluation that was asked for the same ε as the run, and trains as it did."""
    cells = cells_by_place(evaluation)
    way = "apart" if headline.get("min_honest") is None else "together"
    for method in evaluation["methods"]:
        if method["epsilon"] is None or method["way"] != way or (method["key"], ALL) not in cells:
            continue
        # A plan stops just below the ε that it was asked for.
        if math.isclose(method["epsilon"], headline["epsilon"], rel_tol=0.02):
            return method["epsilon"], cells[method["key"], ALL]["unsafe_auc_mean"]
    return None


def _local_section(local: Mapping[str, Any] | None) -> Element | None:
    if not local:
        return None
    examples: list[tuple[str, Node]] = [
        (f"Row {index}", f"{answer['label']}, confidence {rate(answer['confidence'])}")
        for index, answer in enumerate(local["examples"], 1)
    ]
    return section(
        "offline",
        "Predicting offline",
        el("p", {}, "The model file and one row are all it takes: encode, predict, label. Nothing is sent."),
        facts(
            [
                ("One row, median", milliseconds(local["p50_ms"])),
                ("One row, 99th percentile", milliseconds(local["p99_ms"])),
                ("Rows held out", f"{local['rows']:,}"),
                ("Decision threshold", significant(local["threshold"])),
                ("Model file", size(local["model_bytes"])),
            ]
        ),
        el("h3", {}, "Its first answers") if examples else None,
        facts(examples) if examples else None,
    )


def _encrypted_section(encrypted: Mapping[str, Any] | None) -> Element | None:
    if not encrypted:
        return None
    equal = "yes, all of them" if encrypted["labels_equal"] else el("span", {"class": "bad"}, "no")
    rows: list[tuple[str, Node]] = [
        ("Queries asked", f"{encrypted['queries']:,}"),
        ("One query, median", milliseconds(encrypted["p50_ms"])),
        ("One query, 99th percentile", milliseconds(encrypted["p99_ms"])),
        ("Making the keys, once", milliseconds(encrypted["keygen_ms"])),
        ("Evaluation keys sent, once", size(encrypted["key_bytes"])),
        ("Sent for one query", size(encrypted["bytes_up"])),
        ("Received for one query", size(encrypted["bytes_down"])),
        ("Largest error of a logit", significant(encrypted["max_error"], 2)),
        ("Same labels as in the clear", equal),
        ("Parameters", str(encrypted["parameters"])),
    ]
    text = (
        "The client encrypts a row under CKKS, the server computes on the ciphertext, and only the client can decrypt. "
        "The server sees who asks, when, and how much, but neither the row nor the answer."
    )
    return section(
        "encrypted",
        "Asking under encryption",
        el("p", {}, text),
        facts(rows),
    )


def _again_section(report: Mapping[str, Any]) -> Element | None:
    environment, command = report.get("environment"), report.get("command")
    if not environment and not command:
        return None
    parts: list[Node] = []
    if command:
        parts += [
            el("pre", {}, el("code", {}, str(command))),
        ]
    if environment:
        names = {"python": "Python", "torch": "PyTorch", "flwr": "Flower", "tenseal": "TenSEAL", "cores": "CPU cores"}
        pairs: list[tuple[str, Node]] = [("fedinfer", str(report["fedinfer"]))] if report.get("fedinfer") else []
        pairs += [(name, str(environment[key])) for key, name in names.items() if key in environment]
        if "seconds_total" in environment:
            pairs.append(("Whole run", seconds(environment["seconds_total"])))
        if "peak_memory_mb" in environment:
            pairs.append(("Most memory of a process", size(environment["peak_memory_mb"] * 2**20)))
        parts.append(facts(pairs))
    return section("again", "Running it again", *parts)


def _footer() -> Element:
    text = "All figures of this page are in report.json beside it. The page asks no server for anything."
    return el("footer", {}, el("p", {}, text))
