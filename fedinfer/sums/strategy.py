"""A Flower Strategy for apps that were written for plain federated averaging: the server sees only noised sums."""

import json
import logging
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedinfer.errors import BadUsage
from fedinfer.privacy import DistributedPlan, Poisson
from fedinfer.rules import FedSgd, RuleState, ServerRule
from fedinfer.secagg import PkiFile, Policy, SumSpec
from fedinfer.sums.client import ARRAYS, PLAN
from fedinfer.sums.messages import MASKED
from fedinfer.sums.rounds import SecureSum, SecureSums, SumTask
from fedinfer.sums.updates import arrays_of, content_digest, floats_in, with_floats

log = logging.getLogger("fedinfer.server")
CONFIG = "config"


class SecureFedAvg(Strategy):
    """Federated averaging by secure sums with distributed noise; the devices run `fedinfer.sums.secure(app)`.

    Unit: a whole client. Adversary: the server with the PKI file's corrupt members. Clients weigh equally: the sum of
    their clipped updates is divided by the constant `min_devices`, and `rule` moves the weights by it (federated
    averaging unless said; any of `fedinfer.rules`, to which the mean update is a step down).

    rounds: how many rounds `epsilon` and `delta` pay for; `spare` more if sums have to be tried again.
    min_devices: that must set up; how many may drop out and be corrupt say `dropout` and `corrupt`, which devices
        bring along too (`fedinfer.secagg.Policy`).

    Guarantees: those of `DistributedPlan`, at each device by its own ledger. No metric of a client is asked for:
    measure with `evaluate_fn`.
    Raises: BadUsage or BadInput for settings or a PKI file that cannot be; in a round RoundFailed.
    """

    def __init__(
        self,
        *,
        epsilon: float,
        delta: float,
        rounds: int,
        clip_norm: float,
        min_devices: int,
        pki: str | Path,
        pki_digest: str,
        rule: ServerRule | None = None,
        spare: int = 2,
        bits: int = 24,
        corrupt: float = Policy.corrupt,
        dropout: float = Policy.dropout,
        timeout_s: float = 3600.0,
    ) -> None:
        self._pki, self._policy = PkiFile.read(Path(pki), pinned=pki_digest), Policy(corrupt=corrupt, dropout=dropout)
        self._parameters = self._policy.parameters(clients=min_devices, members=len(self._pki))
        self._epsilon, self._delta, self._steps, self._spare = epsilon, delta, rounds + spare, spare
        self._clip_norm, self._min_devices, self._bits, self._timeout_s = clip_norm, min_devices, bits, timeout_s
        self._rule: ServerRule = FedSgd(learning_rate=1.0) if rule is None else rule
        self._run = f"strategy-{secrets.token_hex(8)}"
        self._state: RuleState | None = None
        self._sums: SecureSums | None = None
        self._found: tuple[ArrayRecord, SecureSum] | None = None
        self.plan: DistributedPlan | None = None

    def summary(self) -> None:
        """Log what is promised."""
        log.info(
            "secure sums: ε = %g at δ = %g for each whole client, against the server with %d of %d members; the noise "
            "of %d honest devices is counted on",
            self._epsilon,
            self._delta,
            self._parameters.corrupt,
            len(self._pki),
            self._parameters.min_honest,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Run one secure sum; nothing is left for Flower to send."""
        plan, sums = self._plan_for(arrays), self._sums_on(grid)
        config["server-round"] = server_round
        said = ConfigRecord({"plan": json.dumps(plan.to_json()), "round": server_round})
        content = RecordDict({ARRAYS: arrays, CONFIG: config, PLAN: said})
        task = SumTask(
            action=MASKED,
            content=content,
            spec=SumSpec(length=plan.padded, bits=plan.bits),
            model=content_digest(content),
            group=str(server_round),
            tries=2 if self._spare else 1,
        )
        self._found = arrays, sums.total(task)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Move the weights by the sum of this round."""
        if self._found is None or self.plan is None:
            raise BadUsage("aggregate_train: got no secure sum, expected configure_train before it")
        (sent, found), self._found = self._found, None
        self.plan.check_total(found.total, survivors=found.survivors)
        mean = self.plan.decode(found.total, rotation=f"round {server_round}")
        before = arrays_of(sent)
        weights = floats_in(before).astype(np.float32)
        state = self._rule.init(weights) if self._state is None else self._state
        moved, self._state = self._rule.step(weights, -mean, state)
        metrics = MetricRecord(
            {"clients": found.survivors, "waves": found.waves, "overshoot": self.plan.overshoot(found.survivors)}
        )
        if found.void:
            log.warning("round %d: a device's noise was seeded; ε is void", server_round)
        return with_floats(before, moved), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No client is asked: its answer would be about its data alone."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked for."""
        return None

    def _plan_for(self, arrays: ArrayRecord) -> DistributedPlan:
        if self.plan is None:
            self.plan = DistributedPlan.calibrate(
                epsilon=self._epsilon,
                delta=self._delta,
                steps=self._steps,
                unit="client",
                clip_norm=self._clip_norm,
                sampler=Poisson(rate=1.0),
                divisor=float(self._min_devices),
                dimension=len(floats_in(arrays_of(arrays))),
                clients=len(self._pki),
                min_honest=self._parameters.min_honest,
                colluders=self._parameters.corrupt,
                bits=self._bits,
            )
        return self.plan

    def _sums_on(self, grid: Grid) -> SecureSums:
        if self._sums is None:
            self._sums = SecureSums(
                grid,
                run=self._run,
                pki=self._pki,
                policy=self._policy,
                min_devices=self._min_devices,
                min_honest=self._parameters.min_honest,
                timeout_s=self._timeout_s,
            )
        return self._sums
