"""The demo, fast: what it writes and what it may say."""

import json
import re
from pathlib import Path

import pytest

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
    table = report["evaluation"]
    private = {f"{way}{epsilon}" for way in ("together", "apart", "pooled") for epsilon in (2, 1)}
    assert {cell["method"] for cell in table["cells"]} == {"alone", "together", "pooled"} | private
    # Four splits, two ε: every sum had all four hospitals in it, where three are counted on.
    sums = table["secure_sums"]
    assert (sums["count"], sums["members"], sums["min_honest"], sums["colluders"]) == (4 * 2 * 8, 4, 3, 1)
    assert sums["overshoot"] == headline["overshoot"] == pytest.approx(4 / 3)
    said = " ".join(result.out.split())
    assert "with 1 of the 4 hospitals: the noise of 3 is counted on, and a sum had at most 1.33 times" in said
    assert max(map(len, result.out.splitlines()[:-1])) <= 100
    assert report["encrypted_query"]["max_error"] < 1e-3
    assert report["encrypted_query"]["labels_equal"]
    assert report["local_inference"]["p50_ms"] > 0
    assert load(out / "model.safetensors").privacy["epsilon"] == headline["epsilon"]
    assert not (out / "checkpoint.safetensors").exists()
    assert "enrols the patients anew" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.long
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
