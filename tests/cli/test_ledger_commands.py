"""`fedinfer ledger`: what a data holder and an auditor type."""

import json
import shutil
from pathlib import Path

import pytest

from fedinfer.privacy.ledger import PrivacyLedger
from tests.cli.conftest import Run
from tests.privacy.charges import Light


@pytest.fixture
def path(tmp_path: Path, run: Run) -> Path:
    """A ledger made by the command, with a head and one release."""
    path = tmp_path / "a.ledger"
    made = run("ledger", "init", path, "--epsilon", 1, "--delta", 1e-6, "--head", tmp_path / "away" / "a.head")
    assert (made.code, made.err) == (0, "")
    assert "public key" in made.out
    with PrivacyLedger.open(path) as ledger:
        ledger.commit(ledger.reserve(run="metrics/2026-11", round=1, plan=Light(steps=1)))
    return path


@pytest.mark.parametrize("name", ["basic", "renyi", "gdp"])
def test_init_records_filter_key_and_head(name: str, tmp_path: Path, run: Run) -> None:
    path, key, head = tmp_path / "x.ledger", tmp_path / "keys" / "x.key", tmp_path / "x.head"
    args = ("--epsilon", 2, "--delta", 1e-6, "--filter", name, "--key", key, "--head", head, "--json")
    told = json.loads(run("ledger", "init", path, *args).out)
    assert (told["path"], told["filter"]["name"], told["head"]) == (str(path), name, str(head))
    assert key.is_file()
    assert head.is_file()
    shown = json.loads(run("ledger", "show", path, "--json").out)
    assert (shown["enrolment"], shown["public_key"]) == (told["enrolment"], told["public_key"])


def test_show_names_kind_filter_and_head(path: Path, run: Run) -> None:
    shown = run("ledger", "show", path)
    for part in ("metrics/2026-11", "Light", "1 of 1", "spent ε 0.1 of 1", "basic filter", str(path.parent / "away")):
        assert part in shown.out
    headless = path.with_name("b.ledger")
    run("ledger", "init", headless, "--epsilon", 1, "--delta", 1e-6)
    assert "an older copy in its place is not found out" in run("ledger", "show", headless).out


def test_an_export_is_verified_where_the_ledger_is_not(path: Path, run: Run) -> None:
    out = path.with_name("a.jsonl")
    told = json.loads(run("ledger", "export", path, "-o", out, "--json").out)
    assert told == {"path": str(path), "out": str(out), "entries": 4}
    public = json.loads(run("ledger", "verify", path, "--json").out)["public_key"]
    path.unlink()
    checked = json.loads(run("ledger", "verify", out, "--public-key", public, "--json").out)
    assert (checked["entries"], checked["verified"], checked["public_key"]) == (4, True, public)
    plain = run("ledger", "verify", out)
    assert "4 entries, each signed" in plain.out
    assert "compare it" in plain.err
    other = run("ledger", "verify", out, "--public-key", "00" * 32)
    assert (other.code, other.out) == (1, "")
    assert f"expected {'00' * 32}" in other.err
    assert run("ledger", "verify", out, "--head", path).code == 2
    out.write_text(out.read_text().replace('"round": 1', '"round": 2', 1))
    assert "was changed" in run("ledger", "verify", out).err


def test_a_lost_head_has_a_way_out_and_an_old_copy_has_none(path: Path, run: Run) -> None:
    head = path.parent / "away" / "a.head"
    old = path.with_name("old")
    shutil.copy2(path, old)
    head.unlink()
    for command in ("show", "verify"):
        lost = run("ledger", command, path)
        assert lost.code == 1
        assert f"`fedinfer ledger verify {path} --head FILE`" in lost.err
    assert run("ledger", "verify", path, "--head", head).code == 0
    assert run("ledger", "show", path).code == 0
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(run="b", round=1, plan=Light())
    shutil.copy2(old, path)
    for args in (("show", path), ("verify", path), ("verify", path, "--head", head)):
        refused = run("ledger", *args)
        assert refused.code == 1
        assert "rolled back" in refused.err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("init", "x", "--epsilon", "1", "--delta", "1e-6", "--filter", "zcdp"), 2, "'zcdp' is not one of"),
        (("init", "x", "--epsilon", "900", "--delta", "1e-6", "--filter", "gdp"), 2, "expected 0.001 to 500"),
        (("verify", "nowhere"), 1, "got no such file"),
        (("export", "nowhere", "-o", "x"), 1, "got no such file"),
        (("verify", __file__), 1, "neither a ledger nor an export"),
    ],
)
def test_bad_usage(args: tuple[str, ...], code: int, said: str, run: Run, tmp_path: Path) -> None:
    result = run("ledger", *(str(tmp_path / arg) if arg in ("x", "nowhere") else arg for arg in args))
    assert result.code == code
    assert said in result.err
    assert not list(tmp_path.iterdir())


def test_init_and_show_print_what_to_pin(path: Path, run: Run) -> None:
    head = path.parent / "away" / "a.head"
    public = json.loads(run("ledger", "show", path, "--json").out)["public_key"]
    assert f'ledger-public-key="{public}" ledger-head="{head}"' in run("ledger", "show", path).out
    made = run("ledger", "init", path.with_name("b"), "--epsilon", 1, "--delta", 1e-6, "--head", path.with_name("h"))
    public = json.loads(run("ledger", "show", path.with_name("b"), "--json").out)["public_key"]
    assert f'ledger-public-key="{public}" ledger-head="{path.with_name("h")}"' in made.out
    assert "pin it" in run("ledger", "init", "--help").out


def test_another_ledger_gets_no_new_head_when_the_key_is_given(path: Path, run: Run) -> None:
    public = json.loads(run("ledger", "show", path, "--json").out)["public_key"]
    other, head = path.with_name("b"), path.with_name("b.head")
    run("ledger", "init", other, "--epsilon", 900, "--delta", 1e-6)
    refused = run("ledger", "verify", other, "--head", head, "--public-key", public)
    assert (refused.code, refused.out) == (1, "")
    assert f"expected {public}" in refused.err
    assert not head.exists()
