"""`fedinfer ledger report`: the report card that a model carries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedinfer.cli.console import out, show_json
from fedinfer.errors import ModelFileError
from fedinfer.models import load


def report_model(path: Path, *, as_json: bool) -> None:
    """Print the card."""
    card = load(path).privacy
    if "views" not in card and "plan" not in card:
        raise ModelFileError(f"model {path}: got no report card in it, expected one; `fedinfer train` writes it")
    if as_json:
        show_json(dict(card))
    else:
        lines = _lines(card)
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            out.print(f"{name:{width}}  {text}", markup=False)
        if card["epsilon"] is None:
            out.print("this model protects nobody")


def _lines(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    rounds = ("run", f"{card['run']}, {card['rounds']} rounds")
    if card["epsilon"] is None:
        why = "noise was seeded, and whoever knows the seed takes it off" if card["void"] else "trained without a plan"
        return [rounds, ("ε", f"void: {why}")]
    plan, tuning = card["plan"], card["tuning"]
    changed = "".join(f"; {name} = {value}" for name, value in tuning.get("changed", {}).items())
    sampler = ", ".join(f"{name} {value}" for name, value in plan["sampler"].items())
    cost = "0" if tuning["epsilon"] == 0.0 else "unknown"
    return [
        rounds,
        ("ε, δ", f"{card['epsilon']:.4f} at δ = {card['delta']:g}, against the {card['adversary']}"),
        *((f"  {who}", f"ε = {epsilon:.4f}") for who, epsilon in card["views"].items()),
        ("protects", f"one {card['unit']}: {card['relation']}"),
        ("mechanism", f"{card['mechanism']}, noise multiplier {plan['noise_multiplier']:.4f}"),
        ("clip norm, divisor", f"{plan['clip_norm']:g}, {plan['divisor']:g} (public constants)"),
        ("sampler", f"{sampler}; at most {plan['steps']} steps"),
        ("accountant", card["accountant"]),
        ("trusted", card["trusted"]),
        (
            "tuning",
            f"ε {cost}: {tuning['why']}" + changed,
        ),
        ("audit", _audit(card["audit"])),
    ]


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "none was run"
    return (
        f"ε ≥ {audit['epsilon_lower']:.2f} at {audit['confidence']:.0%} confidence, where {audit['claimed']:.4f} is "
        f"claimed ({audit['canaries']} canaries)"
    )
