"""Attacks on secure sums over Flower: by a server that asks twice, by devices that answer for others, by a crash."""

import os
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedinfer.cli.federation import Node
from fedinfer.errors import ProtocolViolation, RoundFailed
from fedinfer.secagg import SumSpec
from fedinfer.secagg.codec import to_bytes
from fedinfer.secagg.participant import Participant
from fedinfer.secagg.round_messages import Inbox, Offer, offer_header, offer_said
from fedinfer.secagg.setup_messages import Commit, Opening
from fedinfer.settings import RunConfig
from fedinfer.sums.membership import Membership, open_membership
from fedinfer.sums.messages import (
    MASKED,
    OFFER,
    OPEN,
    REVEAL,
    SHARE,
    SIGN,
    SUM,
    SumMessage,
    error_kind,
    sum_from_content,
    sum_to_content,
)
from fedinfer.sums.sessions import FolderSessions
from fedinfer.sums.updates import content_digest
from server.rounds import RoundState, first_state, rounds
from tests.server.federation import LossyGrid, charged, hospitals, nothing_lost, on

# Of six, five must set up; one may work with the server and one may drop out.
CONFIG = RunConfig(rounds=1, min_devices=6, dropout=0.2, spare_steps=4, epsilon=4.0, timeout_s=0.1)
Tamper = Callable[[dict[int, RecordDict]], None]


class TamperingGrid(LossyGrid):
    """Some devices answer a message otherwise than the app would: `tamper` changes the answers by node (from 0)."""

    def __init__(self, nodes: list[Node], *, at: str, tamper: Tamper) -> None:
        super().__init__(nodes, lose=nothing_lost)
        self._at, self._tamper = at, tamper

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked, first = list(messages), min(self.get_node_ids())
        replies = list(super().send_and_receive(asked, timeout=timeout))
        if {message.metadata.message_type for message in asked} == {self._at}:
            contents = {reply.metadata.src_node_id - first: reply.content for reply in replies}
            self._tamper(contents)
            for reply in replies:
                reply.content = contents[reply.metadata.src_node_id - first]
        return replies


def trained(grid: LossyGrid, config: RunConfig) -> list[RoundState]:
    with on(grid):  # type: ignore[attr-defined]
        return list(rounds(grid, config, first_state(config, "a-run")))


def _says_to_be_another(contents: dict[int, RecordDict]) -> None:
    said = sum_from_content(contents[0])
    forged = replace(said.read("commit", Commit), member=3)
    contents[0] = sum_to_content(replace(said, frames={"commit": to_bytes(forged)}))


def _sends_what_another_signed(contents: dict[int, RecordDict]) -> None:
    contents[0] = contents[3]


def _opens_for_another(contents: dict[int, RecordDict]) -> None:
    if 5 in contents:
        said = sum_from_content(contents[5])
        forged = replace(said.read("opening", Opening), member=0)
        contents[5] = sum_to_content(replace(said, frames={"opening": to_bytes(forged)}))


def _sends_garbage(contents: dict[int, RecordDict]) -> None:
    contents[0] = sum_to_content(SumMessage(run="", frames=dict.fromkeys(("commit", "masked", "offer"), b"FED")))


def _sends_an_endless_error(contents: dict[int, RecordDict]) -> None:
    contents[0] = RecordDict({"error": ConfigRecord({"kind": "x\n" * 10_000})})


@pytest.mark.parametrize(
    ("at", "tamper"),
    [
        (OFFER, _says_to_be_another),
        (OFFER, _sends_what_another_signed),
        (OFFER, _sends_garbage),
        (OFFER, _sends_an_endless_error),
        (OPEN, _opens_for_another),
        (MASKED, _sends_garbage),
        (MASKED, _sends_what_another_signed),
        (SIGN, _sends_what_another_signed),
        (REVEAL, _sends_what_another_signed),
    ],
)
def test_one_bad_device_does_not_stop_a_run(tmp_path: Path, at: str, tamper: Tamper) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    found = trained(TamperingGrid(nodes, at=at, tamper=tamper), replace(config, min_devices=5))
    assert found[-1].history[0].devices >= 5


def test_a_device_with_another_policy_is_left_out(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    nodes[2]["dropout"] = 0.3
    found = trained(LossyGrid(nodes, lose=nothing_lost), replace(config, min_devices=5))
    assert found[-1].history[0].devices == 5
    assert charged(nodes[2]) == (0, 0)


def _sends_no_offer(contents: dict[int, RecordDict]) -> None:
    record = contents[0].config_records[SUM]
    record["offer"] = b"none"


def test_seeded_noise_is_noted_though_what_is_beside_it_is_bad(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    for node in nodes[1:]:
        del node["insecure-seeded-noise"]
    grid = TamperingGrid(nodes, at=MASKED, tamper=_sends_no_offer)
    (record,) = trained(grid, replace(config, min_devices=5))[-1].history
    assert (record.devices, record.void) == (6, True)


def test_offers_that_do_not_open_stop_the_sum_unpaid_and_it_is_said_whose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = Participant.offer

    def offer(self: Participant, round: int) -> Offer:
        made = honest(self, round)
        if self.member != 2:
            return made
        boxes = {other: bytes(len(box)) for other, box in made.boxes.items()}
        header = offer_header(
            session=made.session,
            round=round,
            sender=self.member,
            mask_key=made.mask_key,
            seed_digest=made.seed_digest,
        )
        return replace(made, boxes=boxes, signature=self._identity.sign(offer_said(header=header, boxes=boxes)))

    monkeypatch.setattr(Participant, "offer", offer)
    config, nodes = hospitals(tmp_path, CONFIG)
    with pytest.raises(RoundFailed, match=r"masked vectors: got 1, .* \(5 ProtocolViolation\)"):
        trained(LossyGrid(nodes, lose=nothing_lost), config)
    assert sum("offer of member 2: box" in record.getMessage() for record in caplog.records) == 5 * 2
    assert [charged(node)[0] for node in nodes] == [0, 0, 2, 0, 0, 0]


def test_what_a_device_says_of_its_error_is_a_name(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, CONFIG)
    with pytest.raises(RoundFailed) as caught:
        trained(TamperingGrid(nodes, at=OFFER, tamper=_sends_an_endless_error), config)
    assert "1 InternalError" in str(caught.value)
    assert len(str(caught.value)) < 300


class Replaying(LossyGrid):
    """A server that sends each message of one kind twice: in a row, or at once."""

    def __init__(self, nodes: list[Node], *, at: str, at_once: bool) -> None:
        super().__init__(nodes, lose=nothing_lost)
        self._at, self._at_once = at, at_once
        self.answers: list[list[str | None]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        if {message.metadata.message_type for message in asked} != {self._at}:
            return list(super().send_and_receive(asked, timeout=timeout))
        waves: list[list[Message]] = []
        ask = super().send_and_receive

        def once() -> None:
            waves.append(list(ask([_copy(message) for message in asked], timeout=timeout)))

        threads = [threading.Thread(target=once) for _ in range(2)]
        for thread in threads:
            thread.start()
            if not self._at_once:
                thread.join()
        for thread in threads:
            thread.join()
        good = []
        for pair in zip(*(sorted(wave, key=lambda m: m.metadata.src_node_id) for wave in waves), strict=True):
            self.answers.append([error_kind(reply.content) for reply in pair])
            good += [reply for reply in pair if error_kind(reply.content) is None][:1]
        return good


def _copy(message: Message) -> Message:
    metadata = message.metadata
    return Message(message.content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id)


@pytest.mark.parametrize(
    ("at", "places", "at_once"),
    [
        *((at, "memory", False) for at in (OPEN, SHARE, MASKED, SIGN, REVEAL)),
        # A ledger is of one thread: whether it or the place refuses a second masked vector at once, is chance.
        *((at, "folder", at != MASKED) for at in (OPEN, SHARE, MASKED, SIGN, REVEAL)),
    ],
)
def test_a_message_that_is_sent_twice_is_answered_once(tmp_path: Path, at: str, places: str, at_once: bool) -> None:
    config, nodes = hospitals(tmp_path, replace(CONFIG, min_devices=3, dropout=0.0, corrupt=0.1))
    for node in nodes if places == "folder" else []:
        del node["sessions"]
    grid = Replaying(nodes, at=at, at_once=at_once)
    found = trained(grid, config)
    assert found[-1].history[0].devices == 3
    assert len(grid.answers) == 3
    assert [sorted(pair, key=str) for pair in grid.answers] == [[None, "ProtocolViolation"]] * 3
    assert [charged(node) for node in nodes] == [(1, 1)] * 3


class Garbling(LossyGrid):
    """A network that delivers each message of a sum garbled first, in several ways, and then as it is."""

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__(nodes, lose=nothing_lost)
        self._random = random.Random(0)
        self.kinds: list[str | None] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        for garble in (self._flipped, self._cut, self._of_another_run):
            changed = [(_copy(message), garble(message.content)) for message in asked]
            for message, content in changed:
                message.content = content
            wave = [message for message, _ in changed if message.metadata.message_type != OFFER]
            self.kinds += [error_kind(reply.content) for reply in super().send_and_receive(wave, timeout=timeout)]
        return super().send_and_receive(asked, timeout=timeout)

    def _flipped(self, content: RecordDict) -> RecordDict:
        def flip(frame: bytes) -> bytes:
            place = self._random.randrange(len(frame))
            return frame[:place] + bytes([frame[place] ^ (1 << self._random.randrange(8))]) + frame[place + 1 :]

        return self._changed(content, flip)

    def _cut(self, content: RecordDict) -> RecordDict:
        return self._changed(content, lambda frame: frame[: self._random.randrange(len(frame))])

    def _of_another_run(self, content: RecordDict) -> RecordDict:
        records = {name: ConfigRecord(dict(r)) if name in (SUM, "task") else r for name, r in content.items()}
        for name in {SUM, "task"} & set(records):
            record = records[name]
            assert isinstance(record, ConfigRecord)
            record["run"] = "another run"
        return RecordDict(records)

    def _changed(self, content: RecordDict, change: Callable[[bytes], bytes]) -> RecordDict:
        record = content.config_records[SUM]
        frames = {k: change(value) if isinstance(value, bytes) else value for k, value in record.items()}
        return RecordDict({**content, SUM: ConfigRecord(frames)})


def test_garbled_messages_are_refused_and_change_nothing(tmp_path: Path) -> None:
    config, nodes = hospitals(tmp_path, replace(CONFIG, rounds=2, min_devices=4, dropout=0.0))
    grid = Garbling(nodes)
    found = trained(grid, config)
    assert [record.devices for record in found[-1].history] == [4, 4]
    # Five kinds of messages, of which three twice, to four devices, each garbled in three ways.
    assert len(grid.kinds) == (2 + 3 * 2) * 4 * 3
    assert set(grid.kinds) == {"WireError", "ProtocolViolation"}
    assert [charged(node) for node in nodes] == [(2, 2)] * 4


def members_in(folder: Path) -> tuple[list[Membership], list[Inbox], SumSpec]:
    """Three members on disk before the masked vector of their first round, and what they are sent then."""
    from fedinfer.secagg import Coordinator, Policy, agree
    from fedinfer.secagg.identities import PkiFile
    from fedinfer.secagg.setup_messages import Openings, Roster

    config, nodes = hospitals(folder, replace(CONFIG, min_devices=3, dropout=0.0))
    for node in nodes:
        del node["sessions"]
    members = [open_membership({k: v for k, v in node.items() if k != "data"}) for node in nodes]
    roster = Roster.of({commit.member: commit for commit in (member.offer("run") for member in members)})
    opened = [member.open("run", to_bytes(roster)) for member in members]
    openings = Openings.of({opening.member: opening for opening in opened})
    pki = PkiFile.read(Path(config.pki), pinned=config.pki_digest)
    policy = Policy(corrupt=config.corrupt, dropout=config.dropout)
    coordinator = Coordinator(agree(roster, openings, pki=pki, policy=policy, run=b"run"))
    for member in members:
        coordinator.add_offer(member.share("run", to_bytes(openings), 1))
    spec = SumSpec(length=4, bits=16)
    inboxes = coordinator.begin(1, spec=spec, model=bytes(32))
    return members, [inboxes[number] for number in sorted(inboxes)], spec


def test_a_forked_process_that_fails_puts_no_earlier_state_back(tmp_path: Path) -> None:
    (member, *_), (inbox, *_), spec = members_in(tmp_path)
    answered, tell = os.pipe()
    child = -1
    try:
        with member.participant("run") as participant:
            child = os.fork()
            if child == 0:
                # A worker of the training that fails after its parent has answered.
                os.read(answered, 1)
                raise RuntimeError("no more memory")
            participant.masked(inbox, np.zeros(4, np.uint32), spec=spec, model=bytes(32))
    except BaseException:
        if child == 0:
            os._exit(0)
        raise
    os.write(tell, b"x")
    os.waitpid(child, 0)
    with member.participant("run") as participant, pytest.raises(ProtocolViolation):
        participant.masked(inbox, np.ones(4, np.uint32), spec=spec, model=bytes(32))


def test_what_a_crash_leaves_half_written_is_removed(tmp_path: Path) -> None:
    places = FolderSessions(tmp_path)
    (tmp_path / ".0123.place.77.part").write_bytes(b"secret")
    (tmp_path / "4567.place").write_bytes(bytes(32) + b"secret of an earlier start of the machine")
    places.put("run", b"held")
    left = [path for path in tmp_path.iterdir() if b"secret" in path.read_bytes()]
    assert left == []
    assert places.take("run") == b"held"


def test_devices_that_were_told_other_things_have_other_digests() -> None:
    def of(**records: ArrayRecord | ConfigRecord | MetricRecord) -> bytes:
        return content_digest(RecordDict(dict(records)))

    zero, one = np.zeros(2), np.ones(2)
    digests = [
        of(c=ConfigRecord({"k": b"\x00"})),
        of(c=ConfigRecord({"k": "00"})),
        of(c=ConfigRecord({"k": [b"\x00"]})),
        of(c=ConfigRecord({"k": ["00"]})),
        of(c=ConfigRecord({"k": 1})),
        of(c=ConfigRecord({"k": 1.0})),
        of(c=ConfigRecord({"k": True})),
        of(c=ConfigRecord({"k": "1"})),
        of(c=MetricRecord({"k": 1})),
        of(c=ConfigRecord({"k": float("nan")})),
        of(c=ConfigRecord({"k": "NaN"})),
        of(c=ConfigRecord({"a": 1, "b": 2})),
        of(c=ConfigRecord({"b": 2, "a": 1})),
        of(),
        of(c=ConfigRecord({})),
        of(c=MetricRecord({})),
        of(c=ArrayRecord([])),
        of(c=ArrayRecord([]), d=ArrayRecord([])),
        of(c=ArrayRecord([zero, one])),
        of(c=ArrayRecord([one, zero])),
        of(c=ArrayRecord([zero]), d=ArrayRecord([one])),
        of(d=ArrayRecord([one]), c=ArrayRecord([zero])),
    ]
    assert len(set(digests)) == len(digests)
