"""The same app, unchanged, on a real SuperLink with two SuperNodes and on Flower's simulation."""

from pathlib import Path

import numpy as np
import pytest

from clients.app import app as client_app
from fedinfer.arrays import flatten
from fedinfer.cli.federation import make_members
from fedinfer.cli.methods import write_rows
from fedinfer.data import heart_rows
from fedinfer.data.heart import SCHEMA_PATH
from fedinfer.models import load
from fedinfer.privacy import PrivacyLedger
from fedinfer.secagg.rehearsal import make_pki
from fedinfer.settings import RunConfig
from fedinfer.simulation import run_in_process
from fedinfer.sums.membership import SIMULATED_MEMBERS
from server.app import app as server_app
from tests.deployment.engines import RunFailed, run_simulation, superlink

ROOT = Path(__file__).parents[2]
ROUNDS = 2
pytestmark = [pytest.mark.deployment, pytest.mark.timeout(240)]


def node(folder: Path, hospital: str, budget: float = 2.0) -> dict[str, str]:
    """One hospital's files: its rows and its ledger."""
    data = write_rows(folder / f"{hospital}.csv", heart_rows()[hospital])
    ledger = folder / f"{hospital}.ledger"
    PrivacyLedger.create(ledger, epsilon=budget, delta=1e-5).close()
    return {"data": str(data), "schema": str(SCHEMA_PATH), "ledger": str(ledger), "insecure-seeded-noise": hospital}


def in_process(nodes: list[dict[str, str]]) -> np.ndarray:
    """The weights of the same run on the in-process grid."""
    config = RunConfig(rounds=ROUNDS, schema=str(SCHEMA_PATH)).to_flat()
    context = run_in_process(server_app, client_app, nodes=nodes, run_config=config)
    (weights,) = context.state.array_records["weights"].to_numpy_ndarrays()
    return weights


@pytest.mark.long
def test_superlink_gives_the_weights_of_the_in_process_grid(tmp_path: Path) -> None:
    deployed = [node(tmp_path / "deployed", name) for name in ("Cleveland", "VA Long Beach")]
    local = [node(tmp_path / "local", name) for name in ("Cleveland", "VA Long Beach")]
    out = tmp_path / "model.safetensors"
    checkpoint = tmp_path / "checkpoint"
    settings = {"rounds": ROUNDS, "schema": str(SCHEMA_PATH), "out": str(out), "checkpoint": str(checkpoint)}
    with superlink(deployed) as link:
        link.run(ROOT, settings, timeout_s=120)
        weights = flatten(load(out).state)
        np.testing.assert_allclose(weights, in_process(local), rtol=0, atol=1e-6)
        for config in deployed:
            with PrivacyLedger.open(Path(config["ledger"])) as ledger:
                (charged,) = ledger.summary().runs
                assert ledger.verify() == 2 + 2 * ROUNDS
            assert (charged.reserved, charged.committed, charged.void) == (ROUNDS, ROUNDS, True)
        # The budget is the data holder's: a second run finds nothing left, and the run fails.
        with pytest.raises(RunFailed, match="BudgetExceeded"):
            link.run(ROOT, settings, timeout_s=120)
    assert checkpoint.exists()


def member(nodes: list[dict[str, str]], folder: Path) -> dict[str, str]:
    """Give each node an identity and pin the PKI file; what the server must know of it."""
    pki, identities = make_pki(len(nodes))
    pki.save(folder / "pki.json")
    federation = {"pki": str(folder / "pki.json"), "pki-digest": pki.digest.hex()}
    for number, (config, identity) in enumerate(zip(nodes, identities, strict=True)):
        identity.save(folder / f"{number}.identity")
        config |= federation | {"identity": str(folder / f"{number}.identity")}
    return federation


@pytest.mark.parametrize("crash", [False, pytest.param(True, marks=pytest.mark.long)])
def test_secure_sums_on_a_superlink(tmp_path: Path, crash: bool) -> None:
    nodes = [node(tmp_path, name) for name in ("Cleveland", "Hungary", "VA Long Beach")]
    count = ROUNDS if crash else 1
    out = tmp_path / "model.safetensors"
    settings = {"rounds": count, "schema": str(SCHEMA_PATH), "out": str(out), "min-devices": 3, "spare-steps": 0}
    settings |= member(nodes, tmp_path)
    with superlink(nodes) as link:
        link.run(ROOT, settings, timeout_s=180)
        card = load(out).privacy
        if crash:
            # A device takes part no more: the same settings cannot be met, and nobody is charged for it.
            link.stop_node(2)
            with pytest.raises(RunFailed, match="expected at least 3"):
                link.run(ROOT, settings | {"timeout-s": 5.0}, timeout_s=180)
    assert card["plan"]["min_honest"] == 2
    assert card["void"]
    for config in nodes:
        # The place of the session is the device's own, and for nobody else to read.
        (place,) = Path(config["identity"] + ".sessions").glob("*.place")
        assert place.stat().st_mode & 0o077 == 0
        with PrivacyLedger.open(Path(config["ledger"])) as ledger:
            (charged,) = ledger.summary().runs
        assert (charged.reserved, charged.committed, charged.void) == (count, count, True)


def test_flowers_simulation_runs_the_same_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.safetensors"
    digest = make_members(tmp_path, 4)
    monkeypatch.setenv(SIMULATED_MEMBERS, str(tmp_path))
    settings = {"rounds": ROUNDS, "min-devices": 4, "out": str(out), "pki": str(tmp_path / "pki.json")}
    run_simulation(ROOT, num_nodes=4, run_config=settings | {"pki-digest": digest}, timeout_s=180)
    card = load(out).privacy
    assert card["rounds"] == ROUNDS
    assert card["plan"]["min_honest"] == 3
    assert 1.9999 <= card["epsilon"] <= 2.0
