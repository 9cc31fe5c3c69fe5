"""A device's place in secure sums: who it is, whom it trusts, its own policy, and where each session stands.

Each method is one message of the protocol (`fedinfer/secagg`): it takes the place of the session, does the one step,
and puts it back. Only public messages go out.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fedinfer.errors import BadInput, BadUsage, ProtocolViolation
from fedinfer.secagg import Identity, Newcomer, Participant, PkiFile, Policy
from fedinfer.secagg.codec import from_bytes, to_bytes
from fedinfer.secagg.round_messages import Endorsement, Offer, Quorum, Reveal, Survivors
from fedinfer.secagg.setup_messages import MAX_RUN_BYTES, Commit, Opening, Roster
from fedinfer.secagg.suspended import Held, HeldNewcomer, openings_of, roster_of, session_of
from fedinfer.sums.sessions import FolderSessions, MemorySessions, Sessions

MAX_HELD_BYTES = 1 << 30
IN_MEMORY = ":memory:"
SIMULATED_MEMBERS = "FEDINFER_SIMULATED_MEMBERS"
NO_MEMBER = (
    "device: got no identity for secure sums, expected pki, pki-digest and identity in the node configuration; "
    "`fedinfer pki identity` makes one"
)


@dataclass(frozen=True, kw_only=True)
class MembershipConfig:
    """Where a device finds its identity and the PKI file, whose digest it pins; and its policy.

    `sessions` is the folder of its places, ":memory:" for a process that stays; beside the identity by default.
    """

    pki: Path
    pki_digest: str
    identity: Path
    sessions: str = ""
    policy: Policy

    def open(self) -> "Membership":
        """Read both files.

        Raises: BadInput if one cannot be used, or the PKI file is not the pinned one; BadUsage if it does not name
            this device.
        """
        identity, pki = Identity.load(self.identity), PkiFile.read(self.pki, pinned=self.pki_digest)
        pki.number(identity.public)
        folder = Path(self.sessions) if self.sessions else self.identity.with_name(self.identity.name + ".sessions")
        places: Sessions = MemorySessions() if self.sessions == IN_MEMORY else FolderSessions(folder)
        return Membership(identity=identity, pki=pki, policy=self.policy, sessions=places)


def membership_in(node: Mapping[str, bool | float | int | str]) -> MembershipConfig | None:
    """The part of a Flower node configuration that says who the device is; None if it says nothing of it.

    Its keys: pki, pki-digest, identity and, if not the defaults, sessions (text), corrupt and dropout (shares). A
    simulated device has no configuration of its own: it is member `partition-id` of the folder that the environment
    names (`SIMULATED_MEMBERS`).
    Raises: BadUsage if one of the first three is missing or of another type.
    """
    given = {key: node[key] for key in ("pki", "pki-digest", "identity") if key in node} or _simulated(node)
    if not given:
        return None
    if len(given) < 3 or not all(isinstance(value, str) and value for value in given.values()):
        raise BadUsage(
            f"node configuration: got {sorted(given)} or an empty one of them, expected pki, pki-digest and identity "
            "together; `fedinfer pki show` prints the digest"
        )
    policy = Policy(
        corrupt=_share(node, "corrupt", default=Policy.corrupt), dropout=_share(node, "dropout", default=Policy.dropout)
    )
    return MembershipConfig(
        pki=Path(str(given["pki"])),
        pki_digest=str(given["pki-digest"]),
        identity=Path(str(given["identity"])),
        sessions=str(node.get("sessions", "")),
        policy=policy,
    )


def simulated_file(node: Mapping[str, bool | float | int | str], suffix: str) -> Path | None:
    """A file of a device that is simulated on this machine (`fedinfer pki simulate`); None for any other device."""
    folder, number = os.environ.get(SIMULATED_MEMBERS), node.get("partition-id")
    return Path(folder) / f"device-{number}.{suffix}" if folder and number is not None else None


def _simulated(node: Mapping[str, bool | float | int | str]) -> dict[str, bool | float | int | str]:
    identity = simulated_file(node, "identity")
    if identity is None:
        return {}
    try:
        digest = identity.with_name("pki.digest").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        raise BadInput(f"{identity.parent}: got no pki.digest, expected a folder of `fedinfer pki simulate`") from None
    return {"pki": str(identity.with_name("pki.json")), "pki-digest": digest, "identity": str(identity)}


def _share(node: Mapping[str, bool | float | int | str], key: str, *, default: float) -> float:
    value = node.get(key, default)
    if type(value) not in (int, float):
        raise BadUsage(f"node configuration: got {key} of type {type(value).__name__}, expected a number below 1")
    return float(value)


def open_membership(node: Mapping[str, bool | float | int | str]) -> "Membership":
    """The member that a node configuration names, or the one already open in this process.

    Raises: BadUsage if it names none; BadInput for a file that cannot be used.
    """
    config = membership_in(node)
    if config is None:
        raise BadUsage(NO_MEMBER)
    return opened(config)


@cache
def opened(config: MembershipConfig) -> "Membership":
    """The member of `config`, the same for the whole process: its places may be in memory."""
    return config.open()


class Membership:
    """One member of one PKI file, in a session for each run.

    Guarantees: those of `Newcomer` and `Participant`, over processes that come and go.
    """

    def __init__(self, *, identity: Identity, pki: PkiFile, policy: Policy, sessions: Sessions) -> None:
        self._identity, self._pki, self._policy, self._sessions = identity, pki, policy, sessions
        self._member = pki.number(identity.public)

    def __repr__(self) -> str:
        return f"Membership(member={self._member})"

    def offer(self, run: str) -> Commit:
        """Begin a session in `run`; one that was there before is over."""
        newcomer = self._newcomer(run, held=None, roster=None)
        self._sessions.count_set_up()
        commit = newcomer.commit()
        held = Held(roster=b"", openings=b"", newcomers=(newcomer.suspend(),))
        self._sessions.put(run, to_bytes(held))
        return commit

    def open(self, run: str, roster: bytes) -> Opening:
        """This member's randomness, for the roster of this frame and no other."""
        with self._place(run) as place:
            newcomer = self._newcomer(run, held=place.newcomer(), roster=place.roster())
            opening = newcomer.open(roster_of(roster))
            place.held = replace(place.held, roster=roster)
            return opening

    def share(self, run: str, openings: bytes | None, round: int) -> Offer:
        """Enter the session of these openings and offer for `round`; without openings, offer for a later round."""
        if openings is None:
            with self.participant(run) as participant:
                return participant.offer(round)
        with self._place(run) as place:
            newcomer = self._newcomer(run, held=place.newcomer(), roster=place.roster())
            participant = newcomer.enter(openings_of(openings))
            made = participant.offer(round)
            place.held = Held(roster=place.held.roster, openings=openings, participants=(participant.suspend(),))
            return made

    def sign(self, run: str, survivors: Survivors) -> Endorsement:
        """A signature under the survivors of a round."""
        with self.participant(run) as participant:
            return participant.endorse(survivors)

    def reveal(self, run: str, quorum: Quorum) -> Reveal:
        """The shares that a quorum asks for."""
        with self.participant(run) as participant:
            return participant.reveal(quorum)

    @contextmanager
    def participant(self, run: str) -> Iterator[Participant]:
        """The participant of `run`, put back as it is afterwards, whatever happened; a crash leaves none.

        Raises: ProtocolViolation if this device is in no session of this run.
        """
        with self._place(run) as place:
            held = place.held
            if not held.participants:
                raise ProtocolViolation(f"run {run!r}: got a step of a round, expected the set-up to go on")
            session = session_of(held.roster, held.openings, pki=self._pki, policy=self._policy, run=_named(run))
            (state,) = held.participants
            participant = Participant.resume(state, session=session, member=self._member, identity=self._identity)
            # From here on the state before this step is never put back, whatever keeps the state after it from being.
            place.kept = False
            try:
                yield participant
            finally:
                place.held = replace(held, participants=(participant.suspend(),))
                place.kept = True

    def _newcomer(self, run: str, *, held: HeldNewcomer | None, roster: Roster | None) -> Newcomer:
        return Newcomer(
            identity=self._identity, pki=self._pki, policy=self._policy, run=_named(run), held=held, roster=roster
        )

    @contextmanager
    def _place(self, run: str) -> Iterator["_Place"]:
        """The place of `run`, taken and put back; a step that is refused changes nothing."""
        _named(run)
        place = _Place(run, from_bytes(Held, self._sessions.take(run), max_bytes=MAX_HELD_BYTES))
        try:
            yield place
        finally:
            if place.kept:
                self._sessions.put_back(run, to_bytes(place.held))


class _Place:
    """What is held of one run, between taking and putting back, and whether it may be put back."""

    def __init__(self, run: str, held: Held) -> None:
        self._run, self.held, self.kept = run, held, True

    def newcomer(self) -> HeldNewcomer:
        if not self.held.newcomers:
            raise ProtocolViolation(f"run {self._run!r}: got a step of the set-up out of turn, expected one of a round")
        return self.held.newcomers[0]

    def roster(self) -> Roster | None:
        return roster_of(self.held.roster) if self.held.roster else None


def _named(run: str) -> bytes:
    name = run.encode()
    if not 1 <= len(name) <= MAX_RUN_BYTES:
        raise BadUsage(f"run: got a name of {len(name)} bytes, expected 1 to {MAX_RUN_BYTES}")
    return name
