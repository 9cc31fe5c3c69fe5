"""The report card says what the plan says, and is silent where nothing is promised."""

from dataclasses import asdict

import pytest

from fedinfer.auditing.trained import audit_training
from fedinfer.card import report_card
from fedinfer.settings import RunConfig

CONFIG = RunConfig(rounds=3, epsilon=2.0)


def test_a_card_tells_each_view_and_what_an_audit_proved() -> None:
    audit = asdict(audit_training(CONFIG, canaries=100))
    card = report_card(CONFIG, run="a", rounds=3, void=False, audit=audit)
    plan = CONFIG.plan
    assert plan is not None
    assert card["epsilon"] == plan.epsilon()
    assert (card["unit"], card["relation"], card["adversary"]) == ("example", "add or remove one", "server")
    assert list(card["views"].values()) == [plan.epsilon(adversary="server"), plan.epsilon(adversary="outsider")]
    assert 0.0 <= card["audit"]["epsilon_lower"] <= card["audit"]["claimed"] == pytest.approx(plan.epsilon(), abs=1e-6)
    assert card["tuning"]["epsilon"] == 0.0
    clients = report_card(RunConfig(rounds=3, unit="client"), run="a", rounds=3, void=False, audit=None)
    assert (clients["unit"], clients["audit"]) == ("client", None)


def test_changed_settings_owe_what_they_cost() -> None:
    card = report_card(RunConfig(rounds=9, learning_rate=0.7), run="a", rounds=3, void=False, audit=None)
    assert (card["tuning"]["epsilon"], card["tuning"]["changed"]) == (None, {"learning_rate": 0.7})


@pytest.mark.parametrize(("config", "void"), [(CONFIG, True), (RunConfig(unsafe_no_privacy=True), False)])
def test_a_void_run_and_an_open_one_claim_nothing(config: RunConfig, void: bool) -> None:
    card = report_card(config, run="a", rounds=3, void=void, audit={"epsilon_lower": 0.0})
    assert (card["epsilon"], card["delta"]) == (None, None)
    assert "views" not in card
    assert card["audit"] is None or not void
