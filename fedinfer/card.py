"""The report card of a trained model: what is promised, to whom, against whom, and what an audit could prove."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fedinfer.privacy import DistributedPlan, PrivacyPlan
from fedinfer.settings import RunConfig

# What says where and how often a run happens, and nothing of how its settings were found.
NOT_TUNED = {"schema", "model_seed", "rounds", "epsilon", "delta", "unit", "spare_steps", "min_devices", "timeout_s"}
NOT_TUNED |= {
    "pki",
    "pki_digest",
    "corrupt",
    "dropout",
    "run",
    "checkpoint",
    "resume",
    "out",
    "evaluate",
    "histograms",
    "keep_trajectory",
    "unsafe_no_privacy",
}


def report_card(
    config: RunConfig, *, run: str, rounds: int, void: bool, audit: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The card in JSON values. `void` says that the noise was not random; then, and without a plan, there is no ε.

    `audit` is what an audit of a run by the same plan on canaries could prove; canaries cost no private row anything.
    """
    plan = config.plan
    card: dict[str, Any] = {
        "run": run,
        "rounds": rounds,
        "void": void,
        "epsilon": None,
        "delta": None,
        "plan": None if plan is None else plan.to_json(),
        "tuning": _tuning(config),
        "audit": None if audit is None or void else dict(audit),
    }
    if plan is None or void:
        return card
    return card | {
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "unit": plan.unit,
        "relation": plan.relation,
        "mechanism": plan.mechanism,
        "accountant": plan.accountant,
        "adversary": plan.adversary,
        **_views(plan),
    }


def _views(plan: PrivacyPlan | DistributedPlan) -> dict[str, Any]:
    """Against whom the ε holds, and who is trusted for it."""
    trusted = "the device, its disk and its operating system's randomness"
    if isinstance(plan, DistributedPlan):
        return {
            "views": {
                f"the server with {plan.colluders} of the devices, which sees every sum": plan.epsilon(),
                "an outsider, who sees every model": plan.epsilon(),
            },
            "trusted": f"{trusted}; the PKI file; and that {plan.min_honest} devices of each sum are honest",
        }
    return {
        "views": {
            "the server, which sees every release of each device": plan.epsilon(adversary="server"),
            "an outsider, who sees every model": plan.epsilon(adversary="outsider"),
        },
        "trusted": trusted,
    }


def _tuning(config: RunConfig) -> dict[str, Any]:
    """Which settings are not the defaults, which were found on public rows and cost nothing."""
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in NOT_TUNED and getattr(config, field.name) != field.default
    }
    if not changed:
        return {"epsilon": 0.0, "why": "every setting is a default, and defaults were chosen on public rows"}
    return {
        "epsilon": None,
        "why": "settings differ from the defaults; if private rows chose them, that cost is not in epsilon",
        "changed": changed,
    }
