"""The demo, fast: what it writes and what it may say."""

import json
import re
from pathlib import Path

from fedinfer.models import load
from fedinfer.privacy import PrivacyLedger
from tests.cli.conftest import Run, checkpoint_of, interrupt


def test_the_demo_shows_all_three_walks(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "demo"
    result = run("demo", "--fast", "--rounds", 8, "--epsilon", 3, "--out", out)
    assert result.code == 0, result.err
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert "an evaluation on public data" in result.out
    headline = report["headline"]
    assert 2.9999 <= headline["epsilon"] <= 3.0
    assert not [key for key in json.dumps(headline).split('"') if "auc" in key or "accuracy" in key]
    assert [ledger["releases"] for ledger in report["ledgers"]] == [8] * 4
    assert all(ledger["verified"] and ledger["unfinished"] == 0 for ledger in report["ledgers"])
    for ledger in report["ledgers"]:
        with PrivacyLedger.open(Path(ledger["path"])) as book:
            assert book.summary().spent_epsilon == headline["epsilon"]
    assert {cell["method"] for cell in report["evaluation"]["cells"]} == {
        "alone",
        "federated",
        "dp8",
        "dp4",
        "dp2",
        "dp1",
        "pooled",
    }
    assert report["encrypted_query"]["max_error"] < 1e-3
    assert report["encrypted_query"]["labels_equal"]
    assert report["local_inference"]["p50_ms"] > 0
    assert load(out / "model.safetensors").privacy["epsilon"] == headline["epsilon"]
    assert not (out / "checkpoint.safetensors").exists()
    assert "enrols the patients anew" in (out / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_in_the_evaluation_leaves_the_training_done(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "demo"
    args = ["demo", "--fast", "--rounds", 8, "--out", out]
    stopped = interrupt(args, when=(out / "model.safetensors").exists)
    assert stopped.code == 130
    assert "stopping after this step" in stopped.err
    said = f"stopped; {out / 'checkpoint.safetensors'} holds round 8 of 8: the same command goes on"
    assert said in stopped.err
    assert stopped.err.endswith("interrupted\n")
    assert "Traceback" not in stopped.err
    trained, done = checkpoint_of(out / "checkpoint.safetensors")
    assert done == 8
    assert not (out / "report.json").exists()
    finished = run(*args)
    assert finished.code == 0, finished.err
    assert re.search(f"going on from round 8 of run {trained}", finished.err)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["headline"]["resumed_from"] == 8
    assert [ledger["releases"] for ledger in report["ledgers"]] == [8] * 4
    assert [path.name for path in (out / "devices").iterdir()] == [trained]
    assert not (out / "checkpoint.safetensors").exists()
