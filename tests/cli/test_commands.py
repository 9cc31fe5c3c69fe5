"""The commands on real files: train, evaluate, predict, schema, ledger."""

import json
import shutil
from pathlib import Path

import pytest

from clients.asking import describe
from fedinfer.cli.query import start_server
from fedinfer.data import read_schema
from fedinfer.data.heart import SCHEMA_PATH
from fedinfer.models import load
from fedinfer.privacy import PrivacyLedger
from tests.cli.conftest import Run, read, write


@pytest.fixture
def model(hospitals: Path, run: Run) -> Path:
    """A model trained for three rounds on the three hospitals."""
    path = hospitals.parent / "model.safetensors"
    schema = hospitals.parent / "schema.toml"
    assert run("train", hospitals, "--schema", schema, "--out", path, "--rounds", 3).code == 0
    return path


def test_train_charges_each_ledger_once_and_a_second_run_is_refused(hospitals: Path, run: Run) -> None:
    schema, out = hospitals.parent / "schema.toml", hospitals.parent / "model.safetensors"
    result = run("train", hospitals, "--schema", schema, "--out", out, "--rounds", 3, "--epsilon", 2, "--json")
    told = json.loads(result.out)
    assert result.code == 0
    assert 1.9999 <= told["epsilon"] <= 2.0
    assert told["epsilon_void"] is False
    assert [record["devices"] for record in told["rounds"]] == [3, 3, 3]
    for path in hospitals.glob("*.ledger"):
        with PrivacyLedger.open(path) as ledger:
            (charged,) = ledger.summary().runs
        assert (charged.reserved, charged.committed, charged.repeated, charged.void) == (3, 3, 0, False)
        assert charged.epsilon == told["epsilon"]
    assert len(list(hospitals.glob("*.ledger"))) == 3
    weights = out.read_bytes()
    again = run("train", hospitals, "--schema", schema, "--out", out, "--rounds", 3, "--epsilon", 2)
    assert again.code == 1
    assert "nothing was released or spent" in again.err
    assert out.read_bytes() == weights


def test_a_budget_set_by_the_data_holder_binds(hospitals: Path, run: Run) -> None:
    ledger = hospitals / "hungary.ledger"
    assert run("ledger", "init", ledger, "--epsilon", 0.5, "--delta", 1e-5).code == 0
    schema = hospitals.parent / "schema.toml"
    result = run("train", hospitals, "--schema", schema, "--out", hospitals / "m.safetensors", "--epsilon", 1)
    assert result.code == 1
    assert "0 of 0.5 spent" in result.err
    assert not (hospitals / "cleveland.ledger").exists()
    assert not (hospitals / "m.safetensors").exists()


def test_the_model_carries_its_report_card_and_no_row(model: Path) -> None:
    card = load(model).privacy
    assert 1.9999 <= card["epsilon"] <= 2.0
    assert (card["delta"], card["unit"], card["void"], card["rounds"]) == (1e-5, "example", False, 3)
    # The audited model is wider, so that rounding counts a little differently.
    assert card["audit"]["claimed"] == pytest.approx(card["epsilon"], abs=1e-2)


def test_a_report_card_is_printed_and_a_void_one_says_so(model: Path, hospitals: Path, run: Run) -> None:
    told = run("ledger", "report", model)
    assert told.code == 0
    for part in ("against the server", "add or remove one", "PLD", "every setting is a default", "ε ≥"):
        assert part in told.out
    assert json.loads(run("ledger", "report", model, "--json").out)["rounds"] == 3
    public = hospitals.parent / "public.safetensors"
    schema = hospitals.parent / "schema.toml"
    assert run("train", hospitals, "--schema", schema, "--out", public, "--rounds", 2, "--unsafe-no-privacy").code == 0
    assert "this model protects nobody" in run("ledger", "report", public).out


def test_predict_reads_standard_input_and_writes_csv(
    model: Path, hospitals: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = hospitals.parent / "answers.csv"
    assert run("predict", model, hospitals / "cleveland.csv", "-o", out).code == 0
    rows = read(out)
    assert len(rows) == 40
    assert {row["label"] for row in rows} <= {"healthy", "heart disease"}
    assert all(0.5 <= float(row["confidence"]) <= 1.0 for row in rows)
    with (hospitals / "cleveland.csv").open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        piped = run("predict", model, "-")
    assert piped.out == out.read_text(encoding="utf-8")


def test_predict_needs_no_target_and_refuses_another_table(model: Path, hospitals: Path, run: Run) -> None:
    rows = [{k: v for k, v in row.items() if k != "num"} for row in read(hospitals / "cleveland.csv")]
    write(hospitals / "cleveland.csv", rows)
    assert run("predict", model, hospitals / "cleveland.csv").code == 0
    write(hospitals / "cleveland.csv", [{"a": "1"}, {"a": "2"}])
    result = run("predict", model, hospitals / "cleveland.csv")
    assert result.code == 1
    assert "got no column 'age'" in result.err


def test_a_model_for_another_schema_is_refused(model: Path, hospitals: Path, run: Run) -> None:
    other = hospitals.parent / "other.toml"
    other.write_text(SCHEMA_PATH.read_text(encoding="utf-8").replace("high = 90", "high = 99"), encoding="utf-8")
    result = run("predict", model, hospitals / "cleveland.csv", "--schema", other)
    assert result.code == 1
    assert "got a model for the schema" in result.err


@pytest.mark.parametrize("damage", [b"", b"not a model", None])
def test_a_corrupt_model_file_is_refused(damage: bytes | None, model: Path, hospitals: Path, run: Run) -> None:
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    for command in (("predict", model, hospitals / "cleveland.csv"), ("evaluate", model, hospitals), ("serve", model)):
        result = run(*command)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(f"error: model {model}: got a file that is not safetensors")


def test_evaluate_releases_noised_counts_that_each_ledger_pays_for(model: Path, hospitals: Path, run: Run) -> None:
    schema = hospitals.parent / "schema.toml"
    hospitals = shutil.copytree(hospitals, hospitals.parent / "held-out", ignore=shutil.ignore_patterns("*.ledger*"))
    for path in hospitals.glob("*.csv"):
        ledger = path.with_suffix(".ledger")
        assert run("ledger", "init", ledger, "--epsilon", 9, "--delta", 1e-5).code == 0
    result = run("evaluate", model, hospitals, "--schema", schema, "--epsilon", 4, "--json")
    told = json.loads(result.out)
    raw = json.loads(run("evaluate", model, hospitals, "--unsafe-raw", "--json").out)["clients"]["all"]
    assert (told["devices"], told["void"], told["delta"]) == (3, False, 1e-6)
    assert 4.0 - 1e-4 <= told["epsilon"] <= 4.0
    for name, truth in (("accuracy", raw["unsafe_accuracy"]), ("examples", raw["rows"])):
        estimate = told["metrics"][name]
        assert abs(estimate["value"] - truth) < 6 * estimate["standard_error"] + 1e-3
        assert estimate["value"] != truth
    for path in hospitals.glob("*.ledger"):
        (charge,) = json.loads(run("ledger", "show", path, "--json").out)["runs"]
        assert (charge["run"], charge["reserved"], charge["committed"]) == (told["run"], 1, 1)
        assert charge["epsilon"] == told["epsilon"]
    again = run("evaluate", model, hospitals, "--schema", schema, "--epsilon", 6)
    assert (again.code, again.out) == (1, "")
    assert "nothing was released or spent" in again.err
    shown = run("evaluate", model, hospitals, "--schema", schema, "--epsilon", 0.01)
    assert "hidden by the noise" in shown.out


def test_evaluate_needs_the_schema_of_the_model(model: Path, hospitals: Path, run: Run) -> None:
    other = hospitals.parent / "other.toml"
    other.write_text(SCHEMA_PATH.read_text(encoding="utf-8").replace("high = 90", "high = 99"), encoding="utf-8")
    result = run("evaluate", model, hospitals, "--schema", other)
    assert result.code == 1
    assert "got another schema than the model's" in result.err
    wrong = run("evaluate", model, hospitals, "--epsilon", 0)
    assert wrong.code == 2
    assert "epsilon: got 0" in wrong.err


def test_evaluate_names_its_raw_metrics_unsafe(model: Path, hospitals: Path, run: Run) -> None:
    told = json.loads(run("evaluate", model, hospitals, "--unsafe-raw", "--json").out)
    assert set(told["clients"]) == {"cleveland", "hungary", "switzerland", "all"}
    assert all(set(r) == {"rows", "unsafe_auc", "unsafe_accuracy"} for r in told["clients"].values())
    assert told["clients"]["all"]["rows"] == 120


def test_a_value_outside_its_range_is_clamped_and_counted(model: Path, hospitals: Path, run: Run) -> None:
    rows = read(hospitals / "cleveland.csv")
    for row in rows:
        row["chol"] = "4000"
    write(hospitals / "cleveland.csv", rows)
    result = run("predict", model, hospitals / "cleveland.csv")
    assert result.code == 0
    assert "rows: values outside the public range were moved to its end: chol 40" in result.err
    assert "4000" not in result.err


def test_compile_writes_a_plan_that_serve_takes(model: Path, run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    result = run("compile", model, "--out", plan, "--json")
    told = json.loads(result.out)
    assert result.code == 0
    assert told["holds"] is True
    assert [layer["operation"] for layer in told["layers"]] == ["map, 1 products"]
    with start_server(plan) as url:
        assert describe(url()).circuit.digest == told["digest"]
    shown = run("compile", model, "--explain")
    assert "predicted ms" in shown.out
    assert "no plan was written" in shown.err


def test_schema_drafts_names_and_types_only(hospitals: Path, run: Run) -> None:
    draft = hospitals.parent / "draft.toml"
    assert run("schema", hospitals, "--target", "num", "--out", draft).code == 0
    text = draft.read_text(encoding="utf-8")
    assert 'column = "chol"' in text
    assert "asymptomatic" not in text
    result = run("train", hospitals, "--schema", draft, "--out", hospitals / "m")
    assert result.code == 1
    assert "expected" in result.err
    again = run("schema", hospitals, "--target", "num", "--out", draft)
    assert again.code == 1
    assert "got an existing file" in again.err


def test_schema_from_data_is_complete_and_says_that_it_is_unsafe(hospitals: Path, run: Run) -> None:
    draft = hospitals.parent / "draft.toml"
    result = run("schema", hospitals, "--target", "num", "--out", draft, "--unsafe-from-data")
    assert result.code == 0
    assert "unsafe" in result.err
    assert draft.read_text(encoding="utf-8").startswith("# UNSAFE")
    assert read_schema(draft).target.column == "num"
    out = hospitals.parent / "m.safetensors"
    assert run("train", hospitals, "--schema", draft, "--out", out, "--rounds", 2).code == 0


def test_ledger_commands(hospitals: Path, run: Run, model: Path) -> None:
    path = hospitals / "cleveland.ledger"
    told = json.loads(run("ledger", "show", path, "--json").out)
    assert told["runs"][0]["reserved"] == 3
    assert run("ledger", "show", path).code == 0
    verified = json.loads(run("ledger", "verify", path, "--json").out)
    assert verified == {
        "path": str(path),
        "entries": 8,
        "verified": True,
        "enrolment": told["enrolment"],
        "public_key": told["public_key"],
        "head": None,
    }
    again = run("ledger", "init", path, "--epsilon", 9, "--delta", 1e-5)
    assert again.code == 1
    assert "got an existing file" in again.err


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "schema",
        "train",
        "evaluate",
        "predict",
        "compile",
        "serve",
        "ask",
        "ledger",
        "ledger init",
        "ledger show",
        "ledger verify",
        "ledger export",
        "ledger report",
        "pki",
        "pki init",
        "pki identity",
        "pki add",
        "pki show",
    ],
)
def test_help_shows_an_example(command: str, run: Run) -> None:
    result = run(*command.split(), "--help")
    assert result.code == 0
    assert f"Example:  fedinfer {command}" in result.out
