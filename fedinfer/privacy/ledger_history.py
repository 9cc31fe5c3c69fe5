"""What the entries of a ledger say, read from the first to the last: each must be allowed after those before it.

A ledger decides by this alone, never by a query of the table: an entry that was changed, removed, put in or does not
obey the rules stops it before a row is used. The same reading checks an export, with no database at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedinfer.errors import FedinferError, LedgerError
from fedinfer.privacy.filters import BasicFilter, Filter, Spent, filter_from_json
from fedinfer.privacy.heads import Mark
from fedinfer.privacy.ledger_store import Entry
from fedinfer.privacy.signing import check_signature


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """A ledger's first entry: its random id, its budget and its filter."""

    id: str
    epsilon: float
    delta: float
    filter: Filter


@dataclass(frozen=True, kw_only=True)
class Charged:
    """A plan as it was charged to a run."""

    kind: str
    digest: str
    steps: int
    cost: Mapping[str, float]
    plan: Mapping[str, Any]

    @property
    def neighbours(self) -> tuple[str, str] | None:
        """The unit and the relation that the plan's ε is for, if it says so."""
        unit, relation = self.plan.get("unit"), self.plan.get("relation")
        # What stands after a comma narrows a relation down; within the wider one the numbers add up.
        return None if unit is None or relation is None else (str(unit), str(relation).split(",")[0])


@dataclass
class Run:
    """The releases of one run."""

    charge: Charged
    reserved: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    committed: set[tuple[int, int]] = field(default_factory=set)
    void: bool = False


class History:
    """The state after the entries read so far. `name` is what errors call the ledger."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.hash = ""
        self.runs: dict[str, Run] = {}
        self.spent = Spent()
        self.public_key: str | None = None
        self.key_path: Path | None = None
        self.head_path: Path | None = None
        self._enrolment: Enrolment | None = None
        self._neighbours: tuple[str, str] | None = None

    @property
    def enrolment(self) -> Enrolment:
        if self._enrolment is None:
            raise LedgerError(f"ledger {self.name}: got no enrolment, expected one as its first entry")
        return self._enrolment

    @property
    def mark(self) -> Mark:
        return Mark(enrolment=self.enrolment.id, number=self.number, hash=self.hash)

    def add(self, entry: Entry, *, signature: bool) -> None:
        """Read the next entry; with `signature`, check that too. An entry that is refused changes nothing.

        The last signature vouches for all before it, because it is of a hash of them.
        Raises: LedgerError at an entry that does not follow from those before it.
        """
        if entry.number != self.number + 1 or entry.hash != entry.expected_hash(self.hash):
            raise LedgerError(f"ledger {self.name}: entry {self.number + 1} was changed, removed or put in later")
        try:
            self._read(entry, check=signature)
        except (KeyError, TypeError, ValueError):
            raise LedgerError(
                f"ledger {self.name}: entry {entry.number}: got a {entry.kind!r} without its fields"
            ) from None
        except FedinferError as error:
            raise LedgerError(f"ledger {self.name}: entry {entry.number}: {error}") from None
        self.number, self.hash = entry.number, entry.hash

    def check_key(self, expected: str | None) -> None:
        """Raises: LedgerError if the ledger has no public key, or another than `expected` (hex, from elsewhere)."""
        if self.public_key is None:
            raise LedgerError(f"ledger {self.name}: got no public key, expected one in its enrolment or migration")
        if expected is not None and expected.lower() != self.public_key:
            raise LedgerError(
                f"ledger {self.name}: got the public key {self.public_key}, expected {expected.lower()}; if that is "
                "right, another ledger was put in this one's place"
            )

    def check_neighbours(self, charge: Charged) -> None:
        """Raises: LedgerError if its ε is for other neighbours than those charged before: they do not add up."""
        if None not in (charge.neighbours, self._neighbours) and charge.neighbours != self._neighbours:
            raise LedgerError(
                f"plan: got one for {charge.neighbours}, expected {self._neighbours} as charged before; the ε of "
                "different neighbours do not add up, and nothing was released or spent"
            )

    def _read(self, entry: Entry, *, check: bool) -> None:
        body = entry.fields()
        if (entry.kind == "enrol") != (self._enrolment is None):
            raise LedgerError(f"got {entry.kind!r}, expected an enrolment first and once")
        if entry.kind == "migrate" and self.public_key is not None:
            raise LedgerError("got a second public key")
        public = body["public_key"] if entry.kind in ("enrol", "migrate") and "public_key" in body else self.public_key
        # Entries of format 1 have no signature; the hash in the entry that made it format 2 covers them.
        if check and (public is not None or entry.signature):
            check_signature(str(public), entry.hash, entry.signature)
        match entry.kind:
            case "enrol":
                self._enrol(body)
            case "migrate":
                self.public_key = str(public)
            case "head":
                self.head_path = Path(body["head"])
            case "charge":
                self._charge(entry.run, body)
            case "reserve":
                self._reserve(entry, void=bool(body["void"]))
            case "commit":
                self._commit(entry)
            case _:
                raise LedgerError(f"got an entry of kind {entry.kind!r}, which this version does not know")

    def _enrol(self, body: Mapping[str, Any]) -> None:
        epsilon, delta = float(body["epsilon"]), float(body["delta"])
        rule: Filter = BasicFilter(epsilon=epsilon, delta=delta)
        if "public_key" in body:
            rule = filter_from_json(body["filter"], epsilon=epsilon, delta=delta)
            self.public_key = str(body["public_key"])
            self.key_path = None if body["key"] is None else Path(body["key"])
            self.head_path = None if body["head"] is None else Path(body["head"])
        self._enrolment = Enrolment(id=str(body["enrolment"]), epsilon=epsilon, delta=delta, filter=rule)

    def _charge(self, run: str, body: Mapping[str, Any]) -> None:
        if run in self.runs:
            raise LedgerError(f"run {run!r} is charged already")
        charge = charge_from_json(body)
        spent = self.spent.plus(charge.cost)
        # Format 1 checked its own sums, with a slack that this one does not have.
        if self.public_key is not None:
            self.check_neighbours(charge)
            self.enrolment.filter.check(self.spent, charge.cost)
        self.runs[run], self.spent = Run(charge=charge), spent
        self._neighbours = self._neighbours or charge.neighbours

    def _reserve(self, entry: Entry, *, void: bool) -> None:
        run = self.runs[entry.run]
        made = run.attempts.get(entry.round, 0)
        if run.reserved >= run.charge.steps or entry.attempt != made + 1:
            raise LedgerError("got a release beyond its plan, or out of turn")
        run.reserved += 1
        run.attempts[entry.round] = entry.attempt
        run.void = run.void or void

    def _commit(self, entry: Entry) -> None:
        run = self.runs[entry.run]
        place = (entry.round, entry.attempt)
        if not 1 <= entry.attempt <= run.attempts.get(entry.round, 0) or place in run.committed:
            raise LedgerError("got a commit of a release that was never reserved, or is committed already")
        run.committed.add(place)


def charge_to_json(charge: Charged) -> dict[str, Any]:
    """The body of a charge; the cost stands among the other fields, as in format 1."""
    said = {"kind": charge.kind, "digest": charge.digest, "steps": charge.steps, "plan": charge.plan}
    return {**said, **charge.cost}


def charge_from_json(body: Mapping[str, Any]) -> Charged:
    """Read `charge_to_json` back, or a charge of format 1."""
    return Charged(
        kind=str(body.get("kind", "PrivacyPlan")),
        digest=str(body["digest"]),
        steps=int(body["steps"]),
        cost={name: float(body[name]) for name in ("epsilon", "delta", "rdp", "mu") if name in body},
        plan=dict(body["plan"]),
    )
