"""Every kind of bad input ends in one clear line, a non-zero code, and nothing written or spent."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedinfer.privacy import PrivacyLedger
from tests.cli.conftest import Run, read, write

Rows = list[dict[str, str]]


def in_row(column: str, value: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        rows = read(path)
        rows[6][column] = value
        write(path, rows)

    return spoil


def only(keep: Callable[[Rows], Rows]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        rows = read(path)
        kept = keep(rows)
        if kept:
            write(path, kept)
        else:
            path.write_text(",".join(rows[0]) + "\n", encoding="utf-8")

    return spoil


def without(column: str) -> Callable[[Path], None]:
    return only(lambda rows: [{k: v for k, v in row.items() if k != column} for row in rows])


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing column": (without("chol"), "got no column 'chol', expected age"),
    "missing target": (without("num"), "got no column 'num'"),
    "unknown category": (in_row("cp", "Secretvalue"), "line 8, column 'cp': got an unknown category, expected one of"),
    "outside the range": (
        in_row("ca", "7"),
        "line 8, column 'ca': got a value outside the public range, expected 0 to 3",
    ),
    "NaN": (in_row("age", "nan"), "line 8, column 'age': got NaN or infinity, expected a number from 20 to 90"),
    "text in a number": (in_row("age", "Secretvalue"), "line 8, column 'age': got text, expected a number"),
    "nothing in a number": (in_row("age", ""), "line 8, column 'age': got nothing, expected a number"),
    "unknown label": (in_row("num", "9"), "line 8, target 'num': got another value, expected one of 0, 1, 2, 3, 4"),
    "empty": (only(lambda rows: []), "got 0 rows, expected at least 2"),
    "one row": (only(lambda rows: rows[:1]), "got 1 rows, expected at least 2"),
    "one class": (only(lambda rows: [r for r in rows if r["num"] == "0"]), "got rows of one class only, expected both"),
    "binary": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\x00"), "got a file that is not UTF-8 text"),
    "no header": (lambda path: path.write_text(""), "got an empty file, expected CSV with a header line"),
    "ragged": (lambda path: path.write_text(path.read_text() + "1,2,3\n"), "got 3 cells, expected 16"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_hospital_stops_training_before_anything_is_spent(kind: str, hospitals: Path, run: Run) -> None:
    spoil, expected = SPOILT[kind]
    PrivacyLedger.create(hospitals / "cleveland.ledger", epsilon=3.0, delta=1e-5).close()
    spoil(hospitals / "hungary.csv")
    before = sorted(path.name for path in hospitals.iterdir())
    model = hospitals.parent / "model.safetensors"
    result = run("train", hospitals, "--schema", hospitals.parent / "schema.toml", "--out", model, "--rounds", 2)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert "hungary.csv" in result.err
    assert expected in result.err
    assert "Secretvalue" not in result.err
    assert result.out == ""
    assert sorted(path.name for path in hospitals.iterdir()) == before
    assert not list(hospitals.parent.glob("*model*"))
    with PrivacyLedger.open(hospitals / "cleveland.ledger") as ledger:
        assert ledger.summary().spent_epsilon == 0.0


BAD_USAGE = {
    "epsilon 0": (("--epsilon", "0"), "epsilon: got 0.0, expected"),
    "epsilon below 0": (("--epsilon", "-1"), "epsilon: got -1.0, expected"),
    "epsilon nan": (("--epsilon", "nan"), "epsilon: got nan, expected"),
    "delta 1": (("--delta", "1"), "delta: got 1.0, expected more than 0 and less than 1"),
    "delta 0": (("--delta", "0"), "delta: got 0.0, expected more than 0 and less than 1"),
    "rounds": (("--rounds", "-3"), "rounds: got -3, expected at least 1"),
    "family": (("--model", "forest"), "model family: got 'forest', expected one of logistic, mlp"),
}


@pytest.mark.parametrize("kind", BAD_USAGE)
def test_bad_usage_exits_with_2_and_writes_nothing(kind: str, hospitals: Path, run: Run) -> None:
    options, expected = BAD_USAGE[kind]
    model = hospitals.parent / "model.safetensors"
    result = run("train", hospitals, "--schema", hospitals.parent / "schema.toml", "--out", model, *options)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert not list(hospitals.glob("*.ledger"))
    assert not list(hospitals.parent.glob("*model*"))


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (("train",), 2, "data: got neither DIR and --data, expected one of them"),
        (
            ("train", "nowhere", "--schema", "nowhere.toml"),
            1,
            "nowhere.toml: got no readable file, expected schema.toml",
        ),
        (("train", "--data", "mnist"), 2, "--data: got 'mnist', expected 'heart-disease'"),
        (("predict", "nowhere.safetensors", "x.csv"), 1, "got no such file, expected a model"),
        (("serve", "nowhere.safetensors"), 1, "got no such file, expected a model"),
        (("ask", "http://127.0.0.1:9", "x.csv"), 1, "no answer"),
        (("ask", "gopher://x", "x.csv"), 2, "expected http://HOST:PORT"),
        (("ledger", "show", "nowhere.ledger"), 1, "got no such file; the data holder makes one"),
        (("ledger", "init", "new.ledger", "--epsilon", "0", "--delta", "1e-5"), 2, "epsilon: got 0.0"),
        (("schema", "nowhere", "--target", "num"), 1, "got no such folder"),
        (("demo", "--rounds", "-1"), 2, "rounds: got -1"),
        (("demo", "--epsilon", "0"), 2, "epsilon: got 0.0"),
        (("demo", "--epsilon", "0.0001", "--out", "e0"), 2, "epsilon: got 0.0001, too small for 42 steps"),
        (
            ("train", "--data", "heart-disease", "--epsilon", "0.0001", "--out", "e0/m"),
            2,
            "epsilon: got 0.0001, too small for 42 steps",
        ),
    ],
)
def test_a_command_that_cannot_be_is_one_line(
    args: tuple[str, ...], code: int, expected: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.code == code
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [("nonsense",), ("train", "--rounds", "many"), ("ledger", "init", "x.ledger")])
def test_an_unknown_word_exits_with_2(args: tuple[str, ...], run: Run) -> None:
    result = run(*args)
    assert result.code == 2
    assert "Error: " in result.err
    assert "Traceback" not in result.err


def test_a_place_that_cannot_be_written_is_one_line_and_nothing_is_spent(hospitals: Path, run: Run) -> None:
    blocked = hospitals.parent / "file"
    blocked.write_text("in the way")
    schema = hospitals.parent / "schema.toml"
    result = run("train", hospitals, "--schema", schema, "--out", blocked / "model.safetensors", "--rounds", 2)
    assert result.code == 1
    assert "error: " in result.err
    assert "Traceback" not in result.err
    assert not list(hospitals.glob("*.ledger"))
    result = run("ledger", "init", blocked / "a.ledger", "--epsilon", 1, "--delta", 1e-5)
    assert (result.code, result.err.count("\n")) == (1, 1)
