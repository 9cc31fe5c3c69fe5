"""The report as a file: self-contained, escaped, whole, and the same for the same run."""

import doctest
import json
import math
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.cli.evaluation import Evaluation
from fedinfer.errors import NonFinite
from fedinfer.report import markup, svg, units, write_report
from fedinfer.report.units import privacy_loss

SITES = ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"]
METHODS: list[tuple[str, str, float | None, float]] = [
    ("alone", "alone", None, 0.838),
    ("together", "together", None, 0.912),
    *(
        ("together", "together", epsilon, auc)
        for epsilon, auc in ((8.0, 0.911), (4.0, 0.908), (2.0, 0.902), (1.0, 0.89))
    ),
    *(
        ("apart", "noise by each hospital", e, auc)
        for e, auc in ((8.0, 0.907), (4.0, 0.901), (2.0, 0.886), (1.0, 0.853))
    ),
    *(("pooled", "pooled", epsilon, auc) for epsilon, auc in ((8.0, 0.912), (4.0, 0.909), (2.0, 0.903), (1.0, 0.892))),
    ("pooled", "pooled", None, 0.913),
]
OFFSET = {"Cleveland": -0.003, "Hungary": 0.004, "Switzerland": -0.207, "VA Long Beach": -0.134, "All": 0.0}
SPREAD = {"Cleveland": 0.021, "Hungary": 0.024, "Switzerland": 0.132, "VA Long Beach": 0.047, "All": 0.011}
SECTIONS = {
    "headline": "Training together",
    "evaluation": "Evaluation on public data",
    "local_inference": "Predicting offline",
    "encrypted_query": "Asking under encryption",
}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def key_of(way: str, epsilon: float | None) -> str:
    return way if epsilon is None else f"{way}{epsilon:g}"


def evaluation() -> dict[str, Any]:
    """Plausible, not measured."""
    methods, cells, curves, paired = [], [], [], []
    for way, name, epsilon, auc in METHODS:
        key, label = key_of(way, epsilon), f"{name}, " + ("no privacy" if epsilon is None else f"ε = {epsilon:g}")
        methods.append({"key": key, "label": label, "way": way, "epsilon": epsilon})
        for site in [*SITES, "All"]:
            if (key, site) == ("alone", "All"):
                continue
            mean = auc + OFFSET[site] + (0.03 if key == "alone" and site in SITES[:2] else 0.0)
            half = SPREAD[site] * (1.35 if epsilon == 1.0 else 0.9)
            cells.append(
                {
                    "method": key,
                    "site": site,
                    "unsafe_auc_mean": mean,
                    "unsafe_auc_std": SPREAD[site],
                    "unsafe_auc_low": mean - half,
                    "unsafe_auc_high": min(1.0, mean + half),
                    "unsafe_accuracy_mean": mean - 0.07,
                    "unsafe_accuracy_std": SPREAD[site] * 0.8,
                }
            )
            if key != "alone":
                difference = auc - 0.838 - (0.03 if site in SITES[:2] else 0.0)
                paired.append(pair(site, key, "alone", difference, half))
            if way in ("apart", "pooled") and epsilon is not None:
                paired.append(pair(site, key_of("together", epsilon), key, 0.0123 / epsilon, half / 8))
        if key != "alone":
            rounds = list(range(0, 41, 2))
            wobble = 0.0 if epsilon is None else 0.02 / epsilon
            means = [
                0.5 + (auc - 0.5) * (1 - math.exp(-r / 4)) + (wobble * math.sin(1.7 * r) if r else 0) for r in rounds
            ]
            stds = [0.011 + (0.06 * wobble * 50 * math.exp(-r / 12)) if r else 0.0 for r in rounds]
            curves.append(
                {"method": key, "label": label, "rounds": rounds, "unsafe_auc_mean": means, "unsafe_auc_std": stds}
            )
    return {
        "note": "An evaluation on public data: scratch ledgers, raw metrics on held-out rows. A deployment may not see "
        "these numbers without paying for them.",
        "splits": 20,
        "seeds": 5,
        "sites": [*SITES, "All"],
        "secure_sums": {
            "members": 4,
            "min_honest": 3,
            "colluders": 1,
            "bits": 24,
            "overshoot": 4 / 3,
            "count": 3200,
        },
        "against": [
            {"way": "together", "label": "together", "text": "the server with 1 of the 4 hospitals"},
            {"way": "apart", "label": "noise by each hospital", "text": "the server and all other hospitals"},
            {"way": "pooled", "label": "pooled", "text": "whoever sees what the one party releases"},
        ],
        "methods": methods,
        "cells": cells,
        "paired": paired,
        "curves": curves,
        "baselines": [
            {"label": f"each hospital adds all its own noise, ε = {epsilon}", "epsilon": epsilon, "unsafe_auc": auc}
            for epsilon, auc in ((8, 0.900), (4, 0.893), (2, 0.877), (1, 0.840))
        ],
    }


def pair(site: str, method: str, against: str, difference: float, half: float) -> dict[str, Any]:
    return {
        "site": site,
        "method": method,
        "against": against,
        "difference": difference,
        "standard_error": half / 4,
        "low": difference - half / 2,
        "high": difference + half / 2,
    }


def sample() -> dict[str, Any]:
    """A whole report, as `fedinfer demo` hands it over."""
    return {
        "title": "Four hospitals, one heart-disease model",
        "created": "2026-02-03T10:11:12+00:00",
        "command": "fedinfer demo --out fedinfer-demo",
        "fedinfer": "0.1.0",
        "environment": {
            "python": "3.11.7",
            "torch": "2.9.0+cpu",
            "flwr": "1.41.0",
            "tenseal": "0.3.16",
            "cores": 2,
            "seconds_total": 218.4,
            "peak_memory_mb": 742.1,
        },
        "headline": {
            "hospitals": [
                {"name": name, "releases": 40, "bytes_up": 11_240 + i, "bytes_down": 31_400}
                for i, name in enumerate(SITES)
            ],
            "epsilon": 1.99987,
            "delta": 1e-5,
            "unit": "patient",
            "relation": "add or remove one patient",
            "adversary": "the server, which sees every sum, together with 1 of the hospitals",
            "min_honest": 3,
            "overshoot": 4 / 3,
            "bits": 24,
            "sampling_rate": 0.5,
            "noise_multiplier": 9.4173,
            "clip_norm": 1.0,
            "rounds": [
                {"round": r, "devices": 4, "update_norm": 0.41 * 0.93**r + 0.05, "seconds": 0.061 + 0.0007 * (r % 5)}
                for r in range(1, 41)
            ],
            "seconds": 2.61,
            "resumed_from": None,
            "epsilon_void": False,
            "model": "fedinfer-demo/model.safetensors",
        },
        "ledgers": [
            {
                "device": name,
                "path": f"fedinfer-demo/devices/5f1c-seed0/{name.lower().replace(' ', '-')}/ledger.sqlite",
                "budget_epsilon": 2.0,
                "budget_delta": 1e-5,
                "spent_epsilon": 1.99987,
                "spent_delta": 1e-5,
                "releases": 40,
                "unfinished": 0,
                "plan_releases": 42,
                "verified": True,
                "void": False,
            }
            for name in SITES
        ],
        "evaluation": evaluation(),
        "local_inference": {
            "rows": 230,
            "p50_ms": 0.2134,
            "p99_ms": 0.391,
            "threshold": 0.5,
            "model_bytes": 3412,
            "examples": [{"label": "disease", "confidence": 0.91}, {"label": "no disease", "confidence": 0.77}],
        },
        "encrypted_query": {
            "queries": 32,
            "p50_ms": 34.2,
            "p99_ms": 51.8,
            "keygen_ms": 412.0,
            "bytes_up": 334_212,
            "bytes_down": 84_120,
            "key_bytes": 18_403_220,
            "max_error": 3.1e-7,
            "labels_equal": True,
            "parameters": "CKKS, ring degree 8192, modulus 60+40+40+60 bits, 128-bit security",
        },
    }


def page(report: dict[str, Any], folder: Path) -> str:
    return write_report(report, folder)[1].read_text("utf-8")


class Balance(HTMLParser):
    """Every element closed in order, ids unique, and all addresses and element names collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Balance:
    balance = Balance()
    balance.feed(text)
    balance.close()
    assert balance.open == []
    assert len(balance.ids) == len(set(balance.ids))
    return balance


def test_the_page_is_well_formed_and_asks_nobody(tmp_path: Path) -> None:
    text = page(sample(), tmp_path)
    balance = parsed(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not balance.names & {"script", "iframe", "object", "embed", "img"}
    assert all(address == "data:," or address.removeprefix("#") in balance.ids for address in balance.addresses)
    assert "http" not in text.replace("over HTTP", "")
    assert "url(" not in text
    assert "@import" not in text


def test_both_files_hold_the_report(tmp_path: Path) -> None:
    json_path, html_path = write_report(sample(), tmp_path / "new")
    assert json.loads(json_path.read_text("utf-8")) == sample()
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["report.html", "report.json"]
    assert html_path.stat().st_size < 150_000


def test_every_number_of_the_table_appears(tmp_path: Path) -> None:
    text = page(sample(), tmp_path)
    for cell in sample()["evaluation"]["cells"]:
        for score in ("auc", "accuracy"):
            assert f"{cell[f'unsafe_{score}_mean']:.3f} ± {cell[f'unsafe_{score}_std']:.3f}" in text
        assert f"{cell['unsafe_auc_low']:.3f} to {cell['unsafe_auc_high']:.3f}" in text


def test_the_same_report_makes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_report(sample(), tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;]]>\udcff"


def hostile(value: Any) -> Any:
    """`value` with every free text replaced; keys that join the sections stay."""
    if isinstance(value, dict):
        joined = {"key", "method", "site", "sites", "way"}
        return {
            name: item if name in joined or (name == "against" and isinstance(item, str)) else hostile(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    text = page(hostile(sample()), tmp_path)
    assert not parsed(text).names & {"script", "img"}
    assert text.count("&lt;script&gt;alert(1)") > 20
    assert json.loads((tmp_path / "report.json").read_bytes())["title"] == HOSTILE


def test_hostile_names_of_sites_and_methods_cannot_become_markup(tmp_path: Path) -> None:
    text = json.dumps(sample(), ensure_ascii=False).replace("Hungary", "<script>").replace('"apart2"', '"<img>"')
    assert not parsed(page(json.loads(text), tmp_path)).names & {"script", "img"}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("missing", ["absent", "null"])
def test_a_missing_section_is_left_out(name: str, missing: str, tmp_path: Path) -> None:
    report = sample() | {name: None}
    if name == "headline":
        report["ledgers"] = None
    if missing == "absent":
        del report[name]
    text = page(report, tmp_path)
    parsed(text)
    for section, title in SECTIONS.items():
        assert (title in text) == (section != name)


@pytest.mark.parametrize("kept", ["headline", "ledgers", "evaluation", "environment", "title"])
def test_any_section_can_stand_alone(kept: str, tmp_path: Path) -> None:
    parsed(page({kept: sample()[kept]}, tmp_path))


def test_an_evaluation_may_lack_parts(tmp_path: Path) -> None:
    report = sample()
    del report["evaluation"]["baselines"], report["evaluation"]["paired"], report["evaluation"]["curves"]
    report["evaluation"]["cells"] = [cell for cell in report["evaluation"]["cells"] if cell["site"] != "All"]
    text = page(report, tmp_path)
    parsed(text)
    assert "AUC in each hospital" in text
    assert "AUC against ε" not in text
    assert "AUC by round" not in text


def test_a_run_without_rounds_or_clients_still_has_a_page(tmp_path: Path) -> None:
    report = sample()
    report["headline"] |= {"hospitals": [], "rounds": []}
    parsed(page(report, tmp_path))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_refused_and_nothing_is_written(bad: float, tmp_path: Path) -> None:
    report = sample()
    report["evaluation"]["cells"][3]["unsafe_auc_mean"] = bad
    with pytest.raises(NonFinite, match=r"report\.evaluation\.cells\[3\]\.unsafe_auc_mean: got"):
        write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_void_epsilon_is_said_at_the_top(tmp_path: Path) -> None:
    report = sample()
    assert "ε is void." not in page(report, tmp_path)
    report["headline"]["epsilon_void"] = True
    text = page(report, tmp_path)
    assert text.index("ε is void.") < text.index("Training together")
    assert "share of the noise, left" not in text


def test_no_privacy_is_said_at_the_top(tmp_path: Path) -> None:
    report = sample()
    plan = ("epsilon", "delta", "adversary", "min_honest", "overshoot", "bits", "sampling_rate", "noise_multiplier")
    report["headline"] |= dict.fromkeys((*plan, "clip_norm"))
    text = page(report, tmp_path)
    assert text.index("No privacy.") < text.index("Training together")


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_what_is_shown_is_never_less_than_value(value: float) -> None:
    assert float(privacy_loss(value)) >= value


@pytest.mark.parametrize("module", [markup, svg, units])
def test_doctests(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize(("width", "whole_tables"), [(1280, True), (390, False)])
def test_nothing_is_cut_off_on_a_screen(width: int, whole_tables: bool, tmp_path: Path) -> None:
    overflows = "[...d.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    measure = f"document.title = [d.scrollWidth, ...{overflows}].join()"
    frame = f'<iframe width="{width}" height="900" srcdoc="{escape(page(sample(), tmp_path))}"></iframe>'
    script = f"onload = () => {{ const d = frames[0].document.documentElement; {measure} }}"
    (tmp_path / "frame.html").write_text(
        f"<title>-</title>{frame}<script>{script}</script>", "utf-8", "xmlcharrefreplace"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'browser'}"]
    done = subprocess.run(
        ["chromium", *options, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, check=True
    )
    document, *tables = map(int, re.findall(r"<title>([\d,]+)</title>", done.stdout)[0].split(","))
    assert document <= width
    assert len(tables) >= 5
    # On a phone a table scrolls in its own frame; on a desk it is whole.
    assert not whole_tables or max(tables) == 0


def test_references_are_drawn_beside_their_own_splits_only() -> None:
    for seeds, drawn in (([0, 1, 2, 3, 4], True), ([0], False), ([1, 2, 3, 4, 5], False)):
        assert bool(Evaluation(seeds=seeds, methods=[], rounds=1).to_json()["baselines"]) == drawn


def test_a_bar_reaches_from_chance_to_the_mean(tmp_path: Path) -> None:
    text = page(sample(), tmp_path)
    assert text.count('class="bar ') == 2 * (len(METHODS) * 5 - 1)


def test_noise_in_shares_is_said_with_who_is_assumed_to_collude(tmp_path: Path) -> None:
    text = page(sample(), tmp_path)
    assert "together with 1 of the hospitals" in text
    assert "the shares of 3 honest sites are counted on, and a round had at most 1.33 times their variance" in text
    assert "3,200 secure sums of 4 hospitals, with 24 bits a coordinate" in text
    for promise in sample()["evaluation"]["against"]:
        assert promise["text"] in text
    report = sample()
    report["headline"] |= {"min_honest": None, "overshoot": None, "bits": None}
    text = page(report, tmp_path)
    assert "only clipped and noised updates left" in text
    assert "honest sites" not in text


def test_the_score_beside_the_promise_is_of_the_way_that_was_run(tmp_path: Path) -> None:
    shown = "<dd>{}</dd>"
    report = sample()
    assert shown.format("0.902") in page(report, tmp_path)
    report["headline"]["min_honest"] = None
    assert shown.format("0.886") in page(report, tmp_path)


def test_ways_to_the_same_epsilon_are_compared_in_one_table(tmp_path: Path) -> None:
    text = page(sample(), tmp_path)
    start = text.index("Difference in AUC at the same ε")
    rows = text[start : text.index("</table>", start)].replace("\xa0", " ")
    for epsilon in (8, 4, 2, 1):
        for other in ("noise by each hospital", "pooled"):
            assert f'together, ε = {epsilon}<span class="under">to {other}, ε = {epsilon}</span>' in rows
        assert rows.count(f"+{0.0123 / epsilon:.3f} ± ") == 2 * 5
    assert text.count("Difference in AUC") == 2 * 2


def test_curves_have_a_panel_for_each_epsilon_and_a_line_for_each_way(tmp_path: Path) -> None:
    text = page(sample(), tmp_path)
    drawn = text[text.index("AUC over all hospitals by round") :]
    plot = drawn[: drawn.index("</svg>")]
    assert re.findall(r'class="panel">([^<]+)<', plot) == ["ε = 8", "ε = 4", "ε = 2", "ε = 1"]
    for way in ("together", "apart", "pooled"):
        assert plot.count(f'class="thick {way}"') == 4
    assert plot.count('class="dashed together open"') == 4


def test_importing_the_report_is_cheap() -> None:
    code = "import sys, fedinfer.report; print([m for m in ('matplotlib', 'torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
