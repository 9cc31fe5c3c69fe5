"""The section of what a deployment may see: the promise, the rounds, the bytes and the ledgers."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from fedinfer.report.markup import Node, el, facts, section, table
from fedinfer.report.units import milliseconds, privacy_loss, seconds, significant, size


def training_section(
    headline: Mapping[str, Any] | None, ledgers: Sequence[Mapping[str, Any]] | None, ledger_note: str | None
) -> Element | None:
    """The headline run and the ledgers with what there is to say of them, any of which may be missing."""
    if not headline and not ledgers:
        return None
    parts: list[Node] = []
    if headline:
        parts += _training(headline)
    if ledgers:
        parts += _ledgers(ledgers, ledger_note)
    return section("training", "Training together", *parts)


def _training(headline: Mapping[str, Any]) -> list[Node]:
    rounds = headline["rounds"]
    resumed = headline.get("resumed_from")
    sites = [
        (site["name"], f"{site['releases']:,}", size(site["bytes_up"]), size(site["bytes_down"]))
        for site in headline["hospitals"]
    ]
    steps = [
        (
            str(step["round"]),
            str(step["devices"]),
            significant(step["update_norm"]),
            milliseconds(step["seconds"] * 1e3),
        )
        for step in rounds
    ]
    return [
        el(
            "p",
            {},
            "This part holds only what a deployment may see: how often each site released something, how much it "
            "sent, and what that cost. No accuracy stands here, because measuring it on private rows would cost ε of "
            "its own.",
        ),
        facts(
            [*_promise(headline), *_pace(rounds, headline["seconds"]), ("Resumed from round", resumed and str(resumed))]
        ),
        table("What each site sent and received", ("Site", "Releases", "Sent", "Received"), sites),
        el(
            "details",
            {},
            el("summary", {}, f"All {len(rounds)} rounds"),
            table("The rounds as the server saw them", ("Round", "Devices", "Norm of the update", "Time"), steps),
        ),
    ]


def _promise(headline: Mapping[str, Any]) -> list[tuple[str, Node]]:
    if headline["epsilon"] is None:
        return [("Privacy", el("span", {"class": "bad"}, "none"))]
    epsilon = privacy_loss(headline["epsilon"])
    return [
        ("ε", el("span", {"class": "bad"}, f"void ({epsilon} by the plan)") if headline["epsilon_void"] else epsilon),
        ("δ", significant(headline["delta"])),
        ("Protects", f"one {headline['unit']}: {headline['relation']}"),
        ("Against", str(headline["adversary"])),
        ("Noise", _shares(headline)),
        ("Sampling rate", significant(headline["sampling_rate"])),
        ("Noise multiplier", significant(headline["noise_multiplier"], 4)),
        ("Clip norm", significant(headline["clip_norm"])),
    ]


def _shares(headline: Mapping[str, Any]) -> str | None:
    """How the noise of a secure sum is shared, and how much more there was than is counted on."""
    if headline.get("min_honest") is None:
        return None
    return (
        f"a share from each site, summed with the updates by secure sums of {headline['bits']} bits a coordinate; the "
        f"shares of {headline['min_honest']} honest sites are counted on, and a round had at most "
        f"{significant(headline['overshoot'])} times their variance"
    )


def _pace(rounds: Sequence[Mapping[str, Any]], total_s: float) -> list[tuple[str, Node]]:
    if not rounds:
        return []
    median = statistics.median(step["seconds"] for step in rounds)
    return [("Time", f"{seconds(total_s)}; a round takes {milliseconds(median * 1e3)} (median)")]


def _ledgers(ledgers: Sequence[Mapping[str, Any]], ledger_note: str | None) -> list[Node]:
    return [
        el("h3", {}, "Privacy ledgers"),
        el(
            "p",
            {},
            "Each site keeps its own account of ε on its own disk and refuses a release that it cannot pay for. "
            "An unfinished release stays spent.",
        ),
        el("p", {}, ledger_note) if ledger_note else None,
        table(
            "Spent of the budget, by site",
            ("Site", "ε", "δ", "Releases", "Unfinished", "Entries"),
            [_ledger(ledger) for ledger in ledgers],
        ),
        el(
            "details",
            {},
            el("summary", {}, "Where the ledgers are"),
            facts((ledger["device"], el("code", {}, str(ledger["path"]))) for ledger in ledgers),
        ),
    ]


def _ledger(ledger: Mapping[str, Any]) -> list[Node]:
    epsilon = f"{privacy_loss(ledger['spent_epsilon'])} of {ledger['budget_epsilon']:g}"
    verified = "✓ verified" if ledger["verified"] else el("span", {"class": "bad"}, "✗ not verified")
    return [
        ledger["device"],
        el("span", {"class": "bad"}, f"{epsilon} (void)") if ledger["void"] else epsilon,
        f"{significant(ledger['spent_delta'])} of {significant(ledger['budget_delta'])}",
        f"{ledger['releases']:,} of {ledger['plan_releases']:,}",
        f"{ledger['unfinished']:,}",
        verified,
    ]
