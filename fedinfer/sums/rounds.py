"""Secure sums over Flower: a set-up of three waves, and then three waves a sum, whatever is summed.

    masked   the task with each member's inbox → masked vectors, and the offers for the next sum
    sign     who is in the sum → signatures of the survivors
    reveal   a quorum of signatures → the shares that take the masks off

The server is trusted with nothing here (`fedinfer/secagg`); it only has to get the messages to everybody. Members that
missed a sum are asked, in the first wave of the next, for an offer, so that they are back one sum later. When too few
are left, or a sum fails, everybody sets up anew.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedinfer.errors import BadUsage, ProtocolViolation, RoundFailed, WireError
from fedinfer.secagg import Coordinator, PkiFile, Policy, SumSpec, Words, agree
from fedinfer.secagg.codec import Message as SumFrame
from fedinfer.secagg.codec import to_bytes
from fedinfer.secagg.round_messages import Endorsement, Masked, Offer, Reveal
from fedinfer.secagg.session import check_commit, check_opening
from fedinfer.secagg.setup_messages import Commit, Opening, Openings, Roster
from fedinfer.sums.messages import (
    OFFER,
    OPEN,
    REVEAL,
    SHARE,
    SIGN,
    SUM,
    SumMessage,
    sum_from_content,
    sum_to_content,
    sum_to_record,
    void_in,
)
from fedinfer.sums.waves import Wave, size_of

log = logging.getLogger("fedinfer.server")
# Set-ups in a row in which somebody keeps silent.
TRIES = 3
M = TypeVar("M", bound=SumFrame)


@dataclass(frozen=True, kw_only=True)
class SumTask:
    """What is summed: the message to members, the vectors it asks for, and the digest that all of them must share.

    `tries` is how often it may be asked for, where what devices charge it to has room for more than once.
    """

    action: str
    content: RecordDict
    spec: SumSpec
    model: bytes
    group: str
    tries: int = 1

    @property
    def what(self) -> str:
        """The sum in words."""
        return f"sum {self.group}"


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """The sum of the survivors' vectors, and what it took; `members` were in the session."""

    total: Words = field(repr=False)
    survivors: int
    members: int
    void: bool
    bytes_up: int
    bytes_down: int
    waves: int


@dataclass(kw_only=True)
class _Session:
    """One set-up: the coordinator, and which node is which member."""

    coordinator: Coordinator
    nodes: Mapping[int, int]
    round: int = 1
    offered: set[int] = field(default_factory=set)


class SecureSums:
    """The secure sums of one run, over as many sessions as it takes."""

    def __init__(
        self,
        grid: Grid,
        *,
        run: str,
        pki: PkiFile,
        policy: Policy,
        min_devices: int,
        min_honest: int,
        timeout_s: float,
    ) -> None:
        self._grid, self._run, self._pki, self._policy = grid, run, pki, policy
        self._min_devices, self._min_honest, self._timeout_s = min_devices, min_honest, timeout_s
        self._session: _Session | None = None
        self._waves: list[Wave] = []
        self._bytes_down = 0

    def total(self, task: SumTask) -> SecureSum:
        """The sum over all members who answer in time.

        A sum that fails is tried again after a new set-up, if the task says so; devices charge each try.
        Raises: RoundFailed if too few devices set up or answer.
        """
        self._waves, self._bytes_down = [], 0
        for left in reversed(range(task.tries)):
            session = self._ready()
            try:
                return self._sum(session, task)
            except RoundFailed as error:
                self._session = None
                if not left:
                    raise
                log.warning("%s: %s; setting up anew", task.what, error)
        raise AssertionError("unreachable")

    def _ready(self) -> _Session:
        """The session, set up anew if too few of its members are there for the next sum."""
        session = self._session
        if session is None or len(session.offered) < session.coordinator.session.parameters.min_survivors:
            session = self._session = self._set_up()
        return session

    def _set_up(self) -> _Session:
        nodes, silent, run = sorted(self._grid.get_node_ids()), "", self._run.encode()
        for _ in range(TRIES):
            # --- everybody's commit
            wave = self._wave({node: (OFFER, self._said({})) for node in nodes}, "set-up 1")
            commits: dict[int, Commit] = {}
            node_of: dict[int, int] = {}
            there: set[int] = set()
            for node, commit in self._read(wave, "commit", Commit):
                with _refusing(node):
                    check_commit(commit, pki=self._pki, policy=self._policy, run=run)
                    there.add(node)
                    if commit.member in commits:
                        raise ProtocolViolation(f"commit of member {commit.member}: got it from two nodes")
                    commits[commit.member], node_of[commit.member] = commit, node
            self._check_enough("commits", len(commits), wave.reasons())
            for member in sorted(commits)[self._safe_size(len(commits)) :]:
                del commits[member], node_of[member]
            roster = Roster.of(commits)
            # --- everybody's randomness
            said = self._said({"roster": to_bytes(roster)})
            wave = self._wave(dict.fromkeys(node_of.values(), (OPEN, said)), "set-up 2")
            openings: dict[int, Opening] = {}
            member_of = {node: member for member, node in node_of.items()}
            for node, opening in self._read(wave, "opening", Opening):
                with _refusing(node):
                    check_opening(opening, commit=commits[member_of[node]], roster=roster, pki=self._pki, run=run)
                    openings[opening.member] = opening
            if set(openings) == set(commits):
                return self._enter(roster, Openings.of(openings), node_of)
            silent = wave.reasons() or "or send what is no opening"
            # Two nodes may have said to be one member: whoever did not open for it is left out, and the other is heard.
            nodes = sorted(there - {node_of[member] for member in commits if member not in openings})
            log.warning("set-up: %d of %d members opened; beginning again with them", len(openings), len(commits))
        raise RoundFailed(f"set-up: got members who keep silent in {TRIES} tries ({silent}), expected all to open")

    def _enter(self, roster: Roster, openings: Openings, node_of: Mapping[int, int]) -> _Session:
        agreed = agree(roster, openings, pki=self._pki, policy=self._policy, run=self._run.encode())
        session = _Session(coordinator=Coordinator(agreed), nodes=node_of)
        said = self._said({"openings": to_bytes(openings)}, round=session.round)
        wave = self._wave(dict.fromkeys(node_of.values(), (SHARE, said)), "set-up 3")
        for node, offer in self._read(wave, "offer", Offer):
            with _refusing(node):
                self._offered(session, offer)
        return session

    def _sum(self, session: _Session, task: SumTask) -> SecureSum:
        coordinator, nodes = session.coordinator, session.nodes
        round, session.round = session.round, session.round + 1
        inboxes = coordinator.begin(round, spec=task.spec, model=task.model)
        session.offered = set()
        # --- masked
        again = self._said({}, round=round + 1)
        messages = {
            node: (task.action, self._task_for(task, to_bytes(inboxes[member])))
            if member in inboxes
            else (SHARE, again)
            for member, node in nodes.items()
        }
        wave, void = self._wave(messages, task.group), False
        for node, content in wave:
            with _refusing(node):
                void |= self._masked(session, node, content)
        # --- sign
        with _saying_why(wave):
            lists = {nodes[member]: to_bytes(shown) for member, shown in coordinator.survivors().items()}
        asked = {node: (SIGN, self._said({"survivors": frame})) for node, frame in lists.items()}
        wave = self._wave(asked, f"{task.what}, signing")
        for node, endorsement in self._read(wave, "endorsement", Endorsement):
            with _refusing(node):
                coordinator.add_endorsement(endorsement)
        # --- reveal
        with _saying_why(wave):
            said = self._said({"quorum": to_bytes(coordinator.quorum())})
        wave = self._wave(dict.fromkeys(lists, (REVEAL, said)), f"{task.what}, revealing")
        for node, reveal in self._read(wave, "reveal", Reveal):
            with _refusing(node):
                coordinator.add_reveal(reveal)
        with _saying_why(wave):
            total = coordinator.total()
        return SecureSum(
            total=total,
            survivors=len(lists),
            members=len(nodes),
            void=void,
            bytes_up=sum(wave.bytes_up for wave in self._waves),
            bytes_down=self._bytes_down,
            waves=len(self._waves),
        )

    def _masked(self, session: _Session, node: int, content: RecordDict) -> bool:
        """Fold in what a member sent, a masked vector or only an offer; whether its noise was void."""
        said = sum_from_content(content)
        if "masked" not in said.frames:
            self._offered(session, said.read("offer", Offer))
            return False
        session.coordinator.add_masked(said.read("masked", Masked))
        # The vector is in the sum, whatever the offer is.
        with _refusing(node):
            self._offered(session, said.read("offer", Offer))
        return void_in(content)

    def _offered(self, session: _Session, offer: Offer) -> None:
        session.coordinator.add_offer(offer)
        if offer.round == session.round:
            session.offered.add(offer.member)

    def _task_for(self, task: SumTask, inbox: bytes) -> RecordDict:
        said = SumMessage(run=self._run, frames={"inbox": inbox})
        return RecordDict({**task.content, SUM: sum_to_record(said)})

    def _said(self, frames: Mapping[str, bytes], *, round: int = 0) -> RecordDict:
        return sum_to_content(SumMessage(run=self._run, round=round, frames=frames))

    def _wave(self, messages: Mapping[int, tuple[str, RecordDict]], group: str) -> Wave:
        sent = [Message(content, node, action, group_id=group) for node, (action, content) in messages.items()]
        self._bytes_down += sum(size_of(content) for _, content in messages.values())
        wave = Wave(self._grid, sent, timeout_s=self._timeout_s, name=group)
        self._waves.append(wave)
        return wave

    def _read(self, wave: Wave, name: str, kind: type[M]) -> Iterator[tuple[int, M]]:
        """The messages of one name in the answers, without those that are none."""
        for node, content in wave:
            with _refusing(node):
                yield node, sum_from_content(content).read(name, kind)

    def _safe_size(self, clients: int) -> int:
        """The most of `clients` members with which as many honest ones are in a sum as noise counts on.

        More members are not always more honest ones: their shares of dropouts and corrupt members come in whole ones.
        Raises: RoundFailed if there is no such number from `min_devices` on.
        """
        why = ""
        for size in range(clients, self._min_devices - 1, -1):
            try:
                found = self._policy.parameters(clients=size, members=len(self._pki))
            except BadUsage as error:
                why = str(error)
                continue
            if found.min_honest >= self._min_honest:
                return size
            why = f"{found.min_honest} honest members are sure, expected {self._min_honest}"
        raise RoundFailed(f"set-up: got {clients} members, of whom no sum is safe ({why})")

    def _check_enough(self, what: str, got: int, reasons: str) -> None:
        if got < self._min_devices:
            raise RoundFailed(
                f"set-up: got {got} {what}, expected at least {self._min_devices} ({reasons or 'no failure'}); the "
                "devices' own logs say why"
            )


@contextmanager
def _refusing(node: int) -> Iterator[None]:
    """One bad message is dropped, and not the sum."""
    try:
        yield
    except (ProtocolViolation, WireError) as error:
        log.warning("node %d: %s", node, error)


@contextmanager
def _saying_why(wave: Wave) -> Iterator[None]:
    """A round that fails after a wave says what came back of it."""
    try:
        yield
    except RoundFailed as error:
        raise RoundFailed(f"{error} ({wave.reasons() or 'no failure'}); the devices' own logs say why") from None
