"""The device: the only place that touches rows. It enforces its own ledger and takes no policy from a server."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Self

from torch import nn

from fedinfer.counting import HistogramTask, histogram_summand
from fedinfer.data import Schema, Table, encode, heart_rows, heart_schema, read_schema, read_table
from fedinfer.errors import BadInput, BadUsage, SchemaError, UnprotectedRefused
from fedinfer.evaluating import EvaluationReply, EvaluationTask, evaluation_summand, private_evaluation
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import (
    Cyclic,
    DistributedPlan,
    NoiseStream,
    Poisson,
    PrivacyLedger,
    PrivacyPlan,
    insecure_seeded_noise,
    os_noise,
)
from fedinfer.privacy.heads import HeadFile
from fedinfer.secagg import Words
from fedinfer.secagg.round_messages import Inbox, Masked, Offer
from fedinfer.sums.charges import check_charge
from fedinfer.sums.membership import NO_MEMBER, Membership, MembershipConfig, membership_in, opened
from fedinfer.training import StepReply, StepTask, private_step, step_summand, unsafe_step

log = logging.getLogger("fedinfer.device")
# What a device takes part in by a secure sum.
SumTask = StepTask | EvaluationTask | HistogramTask
BUNDLED = "heart-disease"
# A scratch ledger keeps the books of an evaluation on public rows; it is no limit.
SCRATCH_EPSILON, SCRATCH_DELTA = 1e9, 0.999


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where a device finds its rows, its public schema and its ledger.

    `data` is a CSV file, or None for a hospital of the bundled public table (`partition`). `public_data` says that
    the rows protect nobody: only then may the ledger be left out, and only then does the device train without a
    plan. `insecure_seeded_noise` makes runs repeatable and ε void.

    `ledger_head` (the path of its head file) and `ledger_public_key` (32 bytes in hex) pin the ledger; `fedinfer
    ledger init` prints them. Without them the ledger file says itself which key and head it has, and another ledger
    put in its place is believed.

    `membership` is who the device is in secure sums; without it, it takes part in none.
    """

    data: Path | None
    partition: int = 0
    schema: str = BUNDLED
    ledger: Path | None = None
    ledger_head: Path | None = None
    ledger_public_key: str | None = None
    public_data: bool = False
    membership: MembershipConfig | None = None
    insecure_seeded_noise: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.ledger is None and not self.public_data:
            raise BadUsage(
                'device: got no ledger, expected ledger="PATH" in the node configuration; '
                "make one with `fedinfer ledger init PATH --epsilon E --delta D`"
            )
        if self.ledger is None and (self.ledger_head is not None or self.ledger_public_key is not None):
            raise BadUsage("device: got ledger-head or ledger-public-key without a ledger, expected the ledger too")
        if self.ledger_public_key is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.ledger_public_key):
            raise BadUsage(
                f"device: got a ledger-public-key of {len(self.ledger_public_key)} characters, expected 64 of hex; "
                "`fedinfer ledger init` prints it"
            )

    @classmethod
    def from_node(cls, node: Mapping[str, bool | float | int | str]) -> Self:
        """Read a Flower node configuration.

        Its keys: data, schema, ledger, ledger-head, ledger-public-key, insecure-seeded-noise (text), public-data (yes
        or no), partition-id and num-partitions (whole numbers); for secure sums pki, pki-digest, identity, sessions
        (text), corrupt and dropout (shares, by default those of `fedinfer.secagg.Policy`).
        Raises: BadUsage for an unknown key or a value of another type, and for a pin that is empty.
        """
        kinds: dict[str, type] = {"data": str, "schema": str, "ledger": str, "public-data": bool}
        kinds |= {"ledger-head": str, "ledger-public-key": str}
        kinds |= {"pki": str, "pki-digest": str, "identity": str, "sessions": str, "corrupt": float, "dropout": float}
        kinds |= {"insecure-seeded-noise": str, "partition-id": int, "num-partitions": int}
        for key, value in node.items():
            if key not in kinds:
                raise BadUsage(f"node configuration: got {key}, expected {', '.join(sorted(kinds))}")
            # A whole number may stand for a share.
            if type(value) is not kinds[key] and (kinds[key], type(value)) != (float, int):
                raise BadUsage(
                    f"node configuration: got {key} of type {type(value).__name__}, expected {kinds[key].__name__}"
                )
        data, ledger = str(node.get("data", "")), str(node.get("ledger", ""))
        pins = {key: str(node[key]) for key in ("ledger-head", "ledger-public-key") if key in node}
        for key, value in pins.items():
            # A variable that was not set must not unpin the ledger.
            if not value:
                raise BadUsage(f'node configuration: got {key}="", expected a value; leave the key out to pin nothing')
        return cls(
            data=Path(data) if data else None,
            partition=int(node.get("partition-id", 0)),
            schema=str(node.get("schema", BUNDLED)),
            ledger=Path(ledger) if ledger else None,
            ledger_head=Path(pins["ledger-head"]) if "ledger-head" in pins else None,
            ledger_public_key=pins.get("ledger-public-key"),
            public_data=bool(node.get("public-data", False)) or not data,
            membership=membership_in(node),
            insecure_seeded_noise=str(node.get("insecure-seeded-noise", "")),
        )


@dataclass(frozen=True, kw_only=True)
class MaskedReply:
    """What leaves the device for a secure sum: a masked vector, the offer for the next round, and if it was void."""

    masked: Masked
    offer: Offer
    void: bool


class Device:
    """One data holder's rows and ledger, and what may be asked of them."""

    def __init__(
        self,
        *,
        table: Table,
        schema: Schema,
        ledger: PrivacyLedger,
        public_data: bool = False,
        membership: Membership | None = None,
        insecure_seed: str = "",
    ) -> None:
        self._table = table
        self._schema_digest = schema.digest()
        self._width = schema.width
        self._ledger = ledger
        self._public_data = public_data
        self._membership = membership
        self._insecure_seed = insecure_seed
        self._nets: dict[ModelSpec, nn.Module] = {}

    @classmethod
    def open(cls, config: DeviceConfig) -> Self:
        """Read the schema, the ledger and the rows.

        Raises: SchemaError or LedgerError for a file that cannot be used; nothing is spent.
        """
        schema = heart_schema() if config.schema == BUNDLED else read_schema(Path(config.schema))
        if config.ledger is None:
            ledger = PrivacyLedger.scratch(epsilon=SCRATCH_EPSILON, delta=SCRATCH_DELTA)
        else:
            head = None if config.ledger_head is None else HeadFile(config.ledger_head.absolute())
            ledger = PrivacyLedger.open(config.ledger, head=head, public_key=config.ledger_public_key)
        return cls(
            table=_read(config, schema),
            schema=schema,
            ledger=ledger,
            public_data=config.public_data,
            membership=opened(config.membership) if config.membership is not None else None,
            insecure_seed=config.insecure_seeded_noise,
        )

    def step(self, task: StepTask) -> StepReply:
        """Answer one round: reserve in the ledger, then use the rows, then commit.

        Guarantees: without `public_data` nothing leaves but a release of the task's plan, charged to the ledger on
        disk before a row is used for it.
        Raises: BudgetExceeded, UnprotectedRefused or SchemaError before any row is used, and with nothing spent.
        """
        self._check(task)
        if task.plan is None:
            if not self._public_data:
                raise UnprotectedRefused(
                    "task: got no privacy plan, expected one; a device answers without only for public data"
                )
            return unsafe_step(task, self._net(task.spec), self._table)
        if isinstance(task.plan, DistributedPlan):
            raise UnprotectedRefused("task: got the plan of a secure sum, expected one whose noise is enough alone")
        _check_plan(task.plan)
        stream = self._stream(str(task.round))
        reservation = self._ledger.reserve(run=task.run, round=task.round, plan=task.plan, void=stream.void)
        reply = private_step(task, self._net(task.spec), self._table, stream)
        self._ledger.commit(reservation)
        return reply

    def evaluate(self, task: EvaluationTask) -> EvaluationReply:
        """Measure a model on the device's rows: reserve in the ledger, then use the rows, then commit.

        Guarantees: nothing leaves but a release of noised counts, charged to the ledger before a row is used for it.
        Raises: BudgetExceeded or SchemaError before any row is used.
        """
        self._check(task)
        if task.release.min_honest > 1:
            raise UnprotectedRefused("task: got the release of a secure sum, expected one whose noise is enough alone")
        stream = self._stream(task.run)
        reservation = self._ledger.reserve(run=task.run, round=1, plan=task.release, void=stream.void)
        reply = private_evaluation(task, self._net(task.spec), self._table, stream)
        self._ledger.commit(reservation)
        return reply

    @property
    def membership(self) -> Membership:
        """Who the device is in secure sums.

        Raises: BadUsage if it is in none.
        """
        if self._membership is None:
            raise BadUsage(NO_MEMBER)
        return self._membership

    def masked(self, task: SumTask, inbox: Inbox) -> MaskedReply:
        """Answer one round of a secure sum: check it, reserve in the ledger, use the rows, mask, commit.

        What is charged is the sum's plan or release. It stays charged if the round comes to nothing.

        Guarantees: what leaves the device is, to the server and to at most `Parameters.corrupt` others, random but
        for a sum with the noise of at least `min_honest` devices, which is what is charged (`fedinfer.secagg`).
        Raises: ProtocolViolation, BudgetExceeded, UnprotectedRefused or SchemaError before any row is used, and with
            nothing spent.
        """
        self._check(task)
        charge = task.plan if isinstance(task, StepTask) else task.release
        if isinstance(charge, PrivacyPlan) or charge is None:
            raise UnprotectedRefused("task: got a plan for one device alone or none, expected that of a secure sum")
        spec, model = task.sum_spec, task.digest()
        with self.membership.participant(task.run) as participant:
            check_charge(charge, participant.session.parameters)
            participant.check(inbox, spec=spec, model=model)
            round = task.round if isinstance(task, StepTask) else 1
            stream = self._stream(str(round))
            reservation = self._ledger.reserve(run=task.run, round=round, plan=charge, void=stream.void)
            masked = participant.masked(inbox, self._summand(task, stream), spec=spec, model=model)
            self._ledger.commit(reservation)
            offer = participant.offer(inbox.round + 1)
        return MaskedReply(masked=masked, offer=offer, void=stream.void)

    def _summand(self, task: SumTask, stream: NoiseStream) -> Words:
        if isinstance(task, HistogramTask):
            return histogram_summand(task, self._table, stream)
        net = self._net(task.spec)
        if isinstance(task, StepTask):
            return step_summand(task, net, self._table, stream)
        return evaluation_summand(task, net, self._table, stream)

    def _check(self, task: SumTask) -> None:
        width = task.release.features if isinstance(task, HistogramTask) else task.spec.inputs
        if task.schema_digest != self._schema_digest or width != self._width:
            raise SchemaError(
                "task: got another schema than this device's, expected the same schema.toml on both sides"
            )

    def _stream(self, purpose: str) -> NoiseStream:
        return insecure_seeded_noise(f"{self._insecure_seed}/{purpose}") if self._insecure_seed else os_noise()

    def _net(self, spec: ModelSpec) -> nn.Module:
        if spec not in self._nets:
            self._nets[spec] = build(spec)
        return self._nets[spec]


def _check_plan(plan: PrivacyPlan) -> None:
    """Refuse a plan whose ε does not hold here, whatever the server says it is.

    The server decides whom it asks and when, so that nothing of that may count; how many rows there are is private;
    and each release is seen alone.
    """
    if plan.unit == "client":
        fits = plan.adversary == "server" and not isinstance(plan.sampler, Cyclic)
    else:
        fits = isinstance(plan.sampler, Poisson)
    if not fits or plan.min_honest != 1:
        raise UnprotectedRefused(
            f"task: got a plan for one {plan.unit}, {type(plan.sampler).__name__}, against the {plan.adversary}, with "
            f"{plan.min_honest} honest devices; expected examples sampled by Poisson, or clients against the server, "
            "and noise that is enough alone"
        )


def _read(config: DeviceConfig, schema: Schema) -> Table:
    if config.data is not None:
        return read_table(config.data, schema)
    hospitals = list(heart_rows().values())
    if not 0 <= config.partition < len(hospitals):
        raise BadInput(f"partition: got {config.partition}, expected 0 to {len(hospitals) - 1} of the bundled table")
    return encode(hospitals[config.partition], schema, with_target=True)


def open_device(config: DeviceConfig) -> Device:
    """Open a device, or take the one already open in this process if its files are the same."""
    paths = (config.data, None if config.schema == BUNDLED else Path(config.schema))
    stamps = [path.stat().st_mtime_ns for path in paths if path is not None and path.exists()]
    # A ledger changes with every release; another file in its place is another ledger.
    stamps += [config.ledger.stat().st_ino] if config.ledger is not None and config.ledger.exists() else []
    return _open(config, tuple(stamps))


@lru_cache(maxsize=1024)
def _open(config: DeviceConfig, stamps: tuple[int, ...]) -> Device:
    return Device.open(config)
