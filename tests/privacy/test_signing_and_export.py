"""Keys, signatures, and exports that are checked with nothing but the file."""

import json
import os
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedinfer.errors import LedgerError
from fedinfer.privacy.ledger import PrivacyLedger
from fedinfer.privacy.ledger_export import check_export, export_lines
from fedinfer.privacy.signing import CONTEXT, SigningKey, check_signature
from tests.privacy.charges import Light
from tests.privacy.test_ledger_migration import old_ledger

PLAN = Light(steps=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger"
    with PrivacyLedger.create(path, epsilon=1.0, delta=1e-6) as ledger:
        ledger.commit(ledger.reserve(run="a", round=1, plan=PLAN))
        ledger.reserve(run="a", round=2, plan=PLAN)
    return path


def test_a_signature_is_of_its_hash_and_its_key() -> None:
    key, other = SigningKey.generate(), SigningKey.generate()
    digest = bytes(32).hex()
    signature = key.sign(digest)
    check_signature(key.public, digest, signature)
    changed = f"{int(signature, 16) ^ 1:0128x}"
    for public, signed, given in (
        (other.public, digest, signature),
        (key.public, bytes([1] * 32).hex(), signature),
        (key.public, digest, changed),
        (key.public, digest, ""),
        (key.public, digest, "no hex"),
        ("00", digest, signature),
    ):
        with pytest.raises(LedgerError, match="signature that is not of the ledger's key"):
            check_signature(public, signed, given)
    assert CONTEXT.startswith(b"fedinfer")


def test_the_signature_is_that_of_rfc_8032() -> None:
    # RFC 8032, section 7.1, TEST 2: of one byte. Ours is the same function, of the context and the hash.
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
    assert key.public == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert (
        Ed25519PrivateKey.from_private_bytes(secret).sign(b"\x72").hex().startswith("92a009a9f0d4cab8720e820b5f642540")
    )
    assert key.sign("aa") == Ed25519PrivateKey.from_private_bytes(secret).sign(CONTEXT + b"\xaa").hex()


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "key"
    before = os.umask(0)
    try:
        key = SigningKey.open_or_make(place)
    finally:
        os.umask(before)
    assert place.stat().st_mode & 0o777 == 0o600
    assert SigningKey.open(place).public == SigningKey.open_or_make(place).public == key.public
    assert [file.name for file in place.parent.iterdir()] == ["key"]
    place.chmod(0o640)
    with pytest.raises(LedgerError, match="got mode 0640, expected 0600"):
        SigningKey.open(place)


def test_a_key_shows_and_copies_nothing_secret() -> None:
    key = SigningKey.generate()
    assert repr(key) == f"SigningKey(public={key.public!r})"
    with pytest.raises(TypeError, match="is not copied"):
        pickle.dumps(key)


@pytest.mark.parametrize("content", [b"", b"text", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_is_no_key_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(LedgerError, match="not an Ed25519 key"):
        SigningKey.open(tmp_path / "key")


def test_without_its_key_a_ledger_is_shown_and_verified_but_pays_for_nothing(path: Path) -> None:
    key = Path(f"{path}.key")
    hidden = key.rename(path.parent / "hidden")
    with PrivacyLedger.open(path) as ledger:
        entries = ledger.verify()
        assert ledger.summary().runs[0].reserved == 2
        with pytest.raises(LedgerError, match=r"cannot be read .* nothing can be released"):
            ledger.reserve(run="a", round=3, plan=PLAN)
    SigningKey.open_or_make(key)
    with PrivacyLedger.open(path) as ledger:
        with pytest.raises(LedgerError, match="got the key of another ledger"):
            ledger.reserve(run="a", round=3, plan=PLAN)
        assert ledger.verify() == entries
    hidden.replace(key)
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(run="a", round=3, plan=PLAN)


def test_a_key_elsewhere_is_found_again_and_may_serve_several_ledgers(tmp_path: Path) -> None:
    key = tmp_path / "keys" / "holder.key"
    for name in ("one", "two"):
        PrivacyLedger.create(tmp_path / name, epsilon=1.0, delta=1e-6, key=key).close()
        with PrivacyLedger.open(tmp_path / name) as ledger:
            ledger.reserve(run="a", round=1, plan=PLAN)
            assert ledger.verify(public_key=SigningKey.open(key).public.upper()) == 3
    assert not list(tmp_path.glob("*.key"))


def test_another_public_key_than_expected_is_refused(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger, pytest.raises(LedgerError, match=r"got the public key .*, expected 00ff"):
        ledger.verify(public_key="00FF")


def exported(path: Path) -> Path:
    with PrivacyLedger.open(path) as ledger:
        lines = export_lines(str(path), ledger.entries())
    out = path.with_suffix(".jsonl")
    out.write_text(lines, encoding="utf-8")
    return out


def test_an_export_is_checked_with_nothing_but_itself(path: Path) -> None:
    out = exported(path)
    with PrivacyLedger.open(path) as ledger:
        public, spent = ledger.summary().public_key, ledger.summary().spent_epsilon
    for leftover in (path, Path(f"{path}.key")):
        leftover.unlink()
    history = check_export(out, public_key=public)
    assert (history.number, float(history.spent.epsilon)) == (5, spent)
    header = json.loads(out.read_text().splitlines()[0])
    assert (header["entries"], header["public_key"]) == (5, public)
    assert "PRIVATE" not in out.read_text()


def test_a_migrated_ledger_is_exported_too(tmp_path: Path) -> None:
    old_ledger(tmp_path / "ledger")
    assert check_export(exported(tmp_path / "ledger"), public_key=None).number == 11


@pytest.mark.parametrize("line", range(1, 6))
@pytest.mark.parametrize("how", ["edit", "drop", "double", "swap", "unsign"])
def test_an_export_that_was_changed_is_refused(how: str, line: int, path: Path) -> None:
    out = exported(path)
    lines = out.read_text().splitlines()
    if how == "edit":
        lines[line] = lines[line].replace('"attempt": ', '"attempt": 1')
    elif how == "drop":
        del lines[line]
    elif how == "double":
        lines.insert(line, lines[line])
    elif how == "swap":
        lines[line], lines[line - 1] = lines[line - 1], lines[line]
    else:
        lines[line] = json.dumps({**json.loads(lines[line]), "signature": ""})
    out.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(LedgerError):
        check_export(out, public_key=None)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "text", '{"fedinfer_ledger_export": 9}'])
def test_a_file_that_is_no_export_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(content)
    with pytest.raises(LedgerError, match="neither a ledger nor an export"):
        check_export(tmp_path / "x", public_key=None)
