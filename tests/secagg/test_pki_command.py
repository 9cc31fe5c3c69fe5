"""What `fedinfer pki` does and prints."""

import json
from pathlib import Path

import pytest

from fedinfer.cli.pki import add_member, init_pki, new_identity, show_pki, simulate_members
from fedinfer.errors import BadInput, BadUsage
from fedinfer.privacy import PrivacyLedger
from fedinfer.secagg.identities import Identity, PkiFile
from fedinfer.sums.membership import SIMULATED_MEMBERS, membership_in, simulated_file


def test_a_federation_is_set_up_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pki, device = tmp_path / "f.pki", tmp_path / "device.key"
    init_pki(pki, as_json=False)
    capsys.readouterr()
    new_identity(device, as_json=True)
    public = json.loads(capsys.readouterr().out)["public_key"]
    assert bytes.fromhex(public) == Identity.load(device).public
    add_member(pki, "clinic", public, as_json=True)
    digest = json.loads(capsys.readouterr().out)["digest"]
    assert PkiFile.read(pki, pinned=digest).names == ("clinic",)
    show_pki(pki, as_json=True)
    assert json.loads(capsys.readouterr().out)["members"] == [{"name": "clinic", "public_key": public}]
    show_pki(pki, as_json=False)
    shown = capsys.readouterr().out
    assert digest in shown
    assert public in shown
    assert device.read_text(encoding="utf-8").strip() not in shown


@pytest.mark.parametrize("key", ["", "xyz", "00"])
def test_keys_that_cannot_be_are_refused(tmp_path: Path, key: str) -> None:
    init_pki(tmp_path / "f.pki", as_json=True)
    with pytest.raises((BadUsage, BadInput)):
        add_member(tmp_path / "f.pki", "clinic", key, as_json=False)


def test_simulated_devices_find_their_identities_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "members"
    simulate_members(folder, count=3, epsilon=2.0, delta=1e-5, as_json=True)
    told = json.loads(capsys.readouterr().out)
    node = {"partition-id": 2, "num-partitions": 3}
    assert membership_in(node) is None
    monkeypatch.setenv(SIMULATED_MEMBERS, str(folder))
    config = membership_in(node)
    assert config is not None
    assert (str(config.pki), config.pki_digest) == (told["pki"], told["digest"])
    assert repr(config.open()) == "Membership(member=2)"
    assert simulated_file(node, "ledger") == folder / "device-2.ledger"
    with PrivacyLedger.open(folder / "device-2.ledger") as ledger:
        assert ledger.summary().budget_epsilon == 2.0
    # A device with a configuration of its own is that, and one that is no partition is none.
    assert membership_in({}) is None
    with pytest.raises(BadUsage, match="expected pki, pki-digest and identity together"):
        membership_in(node | {"pki": "other.json"})
    monkeypatch.setenv(SIMULATED_MEMBERS, str(tmp_path))
    with pytest.raises(BadInput, match="expected a folder of `fedinfer pki simulate`"):
        membership_in(node)


def test_a_folder_of_members_is_not_made_twice_nor_for_two(tmp_path: Path) -> None:
    simulate_members(tmp_path, count=3, epsilon=None, delta=1e-5, as_json=True)
    assert not (tmp_path / "device-0.ledger").exists()
    with pytest.raises(BadInput, match="got a PKI file already"):
        simulate_members(tmp_path, count=3, epsilon=None, delta=1e-5, as_json=True)
    with pytest.raises(BadUsage, match="--count: got 2"):
        simulate_members(tmp_path / "more", count=2, epsilon=None, delta=1e-5, as_json=True)
