"""What `fedinfer pki` does and prints."""

import json
from pathlib import Path

import pytest

from fedinfer.cli.pki import add_member, init_pki, new_identity, show_pki
from fedinfer.errors import BadInput, BadUsage
from fedinfer.secagg.identities import Identity, PkiFile


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
