"""Who a device is in secure sums: what its node configuration says, and what is wrong with it."""

from pathlib import Path

import pytest

from clients.sdk import DeviceConfig
from fedinfer.cli.federation import Node, enlist
from fedinfer.errors import BadInput, BadUsage, FedinferError
from fedinfer.secagg import Policy
from fedinfer.secagg.rehearsal import make_pki
from fedinfer.settings import RunConfig
from fedinfer.sums.membership import NO_MEMBER, membership_in, open_membership


@pytest.fixture
def node(tmp_path: Path) -> Node:
    _, (first, *_) = enlist(RunConfig(min_devices=3), [{}, {}, {}], tmp_path)
    return first


def test_a_whole_number_may_stand_for_a_share(node: Node) -> None:
    config = membership_in({**node, "dropout": 0})
    assert config is not None
    assert config.policy == Policy(dropout=0.0)
    device = DeviceConfig.from_node({"public-data": True, **node, "dropout": 0})
    assert device.membership == config


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"corrupt": "0.1"}, BadUsage, "got corrupt of type str, expected a number"),
        ({"dropout": True}, BadUsage, "got dropout of type bool, expected a number"),
        ({"corrupt": 1.5}, BadUsage, "corrupt: got 1.5, expected 0 or more and less than 1"),
        ({"pki-digest": ""}, BadUsage, "an empty one of them, expected pki, pki-digest and identity"),
        ({"pki-digest": 7}, BadUsage, "expected pki, pki-digest and identity"),
        ({"pki-digest": "00" * 32}, BadInput, "PKI file .*: got digest .*, expected 0000"),
        ({"pki": "nowhere.json"}, BadInput, "PKI file nowhere.json: got no file"),
        ({"identity": "nowhere"}, BadInput, "identity nowhere: got no such file"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(
    node: Node, wrong: Node, kind: type[FedinferError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        open_membership({**node, **wrong})


def test_an_identity_that_is_not_in_the_pki_file_is_said_so(node: Node, tmp_path: Path) -> None:
    _, (stranger,) = make_pki(1)
    stranger.save(tmp_path / "stranger")
    with pytest.raises(BadUsage, match="identity: got a key that the PKI file does not name"):
        open_membership({**node, "identity": str(tmp_path / "stranger")})


def test_a_device_without_an_identity_is_in_no_sum() -> None:
    assert membership_in({"data": "rows.csv"}) is None
    with pytest.raises(BadUsage) as caught:
        open_membership({"data": "rows.csv"})
    assert str(caught.value) == NO_MEMBER


def test_a_member_in_memory_is_the_same_however_many_there_are(node: Node) -> None:
    first = open_membership(node)
    for number in range(1100):
        open_membership({**node, "dropout": number / 10_000})
    assert open_membership(node) is first


def test_the_name_of_a_run_is_bounded_before_it_is_told_to_anyone(node: Node) -> None:
    member = open_membership(node)
    for step in (lambda run: member.offer(run), lambda run: member.open(run, b"")):
        with pytest.raises(BadUsage, match="run: got a name of 100000 bytes") as caught:
            step("x" * 100_000)
        assert len(str(caught.value)) < 200
