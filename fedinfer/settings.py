"""The settings of a training run, parsed once at the edge from Flower's flat run configuration."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from fedinfer.arrays import flatten
from fedinfer.combiners import Combiner, combiner_named
from fedinfer.data import Schema, heart_schema, read_schema
from fedinfer.errors import BadUsage
from fedinfer.models import ModelSpec, build
from fedinfer.privacy import DistributedPlan, Poisson, PrivacyPlan
from fedinfer.privacy.checks import check_delta, check_epsilon, check_positive
from fedinfer.privacy.evaluation import EvaluationRelease
from fedinfer.privacy.histograms import FeatureHistograms
from fedinfer.rules import ServerRule, rule_named
from fedinfer.secagg import Parameters, PkiFile, Policy

BUNDLED_SCHEMA = "heart-disease"
# A logistic loss above it counts as this much: six times that of a coin.
LOSS_BOUND = 4.0
Flat = Mapping[str, bool | float | int | str]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Every field is public, and so is each default: none was chosen on private rows.

    `unit` is what is protected: an "example", sampled on its device at `sampling_rate`, or a whole "client", which
    takes part in every round, adds the noise for itself and needs many others beside it. `examples_per_client` is
    the public constant that a device's noised sum is divided by (times the sampling rate); it need not be right.
    With a PKI file (`pki`, whose digest is `pki_digest`) devices add up in secure sums: each adds a share of the
    noise, the plan is for all of them together, and `min_devices` is how many must set up. `corrupt` and `dropout` are
    the shares of `fedinfer.secagg.Policy`, which devices bring along too, and `bits` the size of a coordinate.

    `spare_steps` are releases that the plan pays for beyond `rounds`, so that a round interrupted by a crash can be
    repeated. `combine` makes one update of a round's many; how many of them may be anything at all, `wrong_devices`, is
    an assumption of robust rules. Where `evaluate` names a model file, nothing is trained: each device answers once
    with noised counts, whose ε and δ are `epsilon` and `delta`; where `histograms` is a number of bins, with
    histograms of every feature, by a secure sum. `experiments/choose_settings.py` is where the defaults
    come from.
    """

    schema: str = BUNDLED_SCHEMA
    model: str = "logistic"
    hidden: int = 16
    model_seed: int = 0
    rounds: int = 40
    epsilon: float = 2.0
    delta: float = 1e-5
    unit: str = "example"
    unsafe_no_privacy: bool = False
    sampling_rate: float = 0.5
    clip_norm: float = 1.0
    examples_per_client: int = 200
    spare_steps: int = 2
    rule: str = "fedsgd"
    learning_rate: float = 0.5
    momentum: float = 0.8
    combine: str = "mean"
    wrong_devices: int = 0
    min_devices: int = 2
    pki: str = ""
    pki_digest: str = ""
    corrupt: float = 0.1
    dropout: float = 0.1
    bits: int = 24
    timeout_s: float = 600.0
    run: str = ""
    checkpoint: str = ""
    resume: bool = False
    out: str = ""
    evaluate: str = ""
    histograms: int = 0
    keep_trajectory: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BadUsage(f"rounds: got {self.rounds}, expected at least 1")
        if self.spare_steps < 0:
            raise BadUsage(f"spare steps: got {self.spare_steps}, expected at least 0")
        if self.examples_per_client < 1:
            raise BadUsage(f"examples per client: got {self.examples_per_client}, expected at least 1")
        if self.min_devices < 1:
            raise BadUsage(f"devices: got a minimum of {self.min_devices}, expected at least 1")
        if not 0.0 <= self.momentum < 1.0:
            raise BadUsage(f"momentum: got {self.momentum}, expected 0 to below 1")
        check_positive("learning rate", self.learning_rate)
        check_positive("timeout", self.timeout_s)
        if self.unit not in ("example", "client"):
            raise BadUsage(f"unit: got {self.unit!r}, expected 'example' or 'client'")
        if not self.unsafe_no_privacy:
            check_epsilon(self.epsilon)
            check_delta(self.delta)
        if bool(self.pki) != bool(self.pki_digest):
            raise BadUsage(
                "pki: got a file or a digest alone, expected both; `fedinfer pki show FILE` prints the digest"
            )
        if self.pki and self.unsafe_no_privacy:
            raise BadUsage("pki: got one for a run without privacy, expected a plan; a sum alone protects nobody")
        if self.pki and self.combine != "mean":
            raise BadUsage(
                f"combine: got {self.combine} with a PKI file, expected mean; a secure sum hides single updates"
            )
        if self.resume and not self.checkpoint:
            raise BadUsage("resume: got no checkpoint to resume from, expected checkpoint = FILE")
        self.server_rule()
        combiner_named(self.combine, wrong_devices=self.wrong_devices)
        ModelSpec(family=self.model, inputs=1, hidden=self.hidden)

    @classmethod
    def from_flat(cls, flat: Flat) -> Self:
        """Read Flower's run configuration: the names of the fields, with hyphens; integers may stand for floats.

        Raises: BadUsage for an unknown name, a wrong type or a value that cannot be.
        """
        kinds = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in flat.items():
            name = key.replace("-", "_")
            if name not in kinds:
                raise BadUsage(f"run configuration: got unknown key {key!r}, expected {', '.join(sorted(kinds))}")
            kind = kinds[name]
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise BadUsage(f"{key}: got {type(value).__name__}, expected {kind.__name__}")
            values[name] = value
        return cls(**values)

    def to_flat(self) -> dict[str, bool | float | int | str]:
        """The run configuration that `from_flat` reads back."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}

    def digest(self) -> str:
        """SHA-256 of all that decides the weights: a checkpoint continues only the run that it came from."""
        free = {
            "min_devices",
            "timeout_s",
            "run",
            "checkpoint",
            "resume",
            "out",
            "evaluate",
            "histograms",
            "keep_trajectory",
            "schema",
            "pki",
            "pki_digest",
        }
        values = {name: value for name, value in asdict(self).items() if name not in free}
        values["schema_digest"] = self.public_schema.digest()
        if self.federation is not None and self.plan is not None:
            # Another federation may go on with it, if the same plan holds there.
            values["plan"] = self.plan.digest()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @cached_property
    def public_schema(self) -> Schema:
        """The schema of the run: the bundled one by name, or a file."""
        return heart_schema() if self.schema == BUNDLED_SCHEMA else read_schema(Path(self.schema))

    @cached_property
    def spec(self) -> ModelSpec:
        """The public shape of the model."""
        return ModelSpec(family=self.model, inputs=self.public_schema.width, hidden=self.hidden)

    @cached_property
    def federation(self) -> PkiFile | None:
        """Who may take part in secure sums; None if there are none.

        Raises: BadInput for a file that is not the pinned one.
        """
        return PkiFile.read(Path(self.pki), pinned=self.pki_digest) if self.pki else None

    @property
    def policy(self) -> Policy:
        """What the server expects that devices insist on."""
        return Policy(corrupt=self.corrupt, dropout=self.dropout)

    @cached_property
    def _parameters(self) -> Parameters | None:
        """What holds of a sum of the fewest devices that set up."""
        if self.federation is None:
            return None
        return self.policy.parameters(clients=self.min_devices, members=len(self.federation))

    @property
    def min_honest(self) -> int:
        """How many honest devices' noise counts; 1 where each adds all of its own."""
        return 1 if self._parameters is None else self._parameters.min_honest

    @cached_property
    def plan(self) -> PrivacyPlan | DistributedPlan | None:
        """The plan that every device runs and charges whole, or None without privacy."""
        if self.unsafe_no_privacy:
            return None
        whole = self.unit == "client"
        if self._parameters is not None and self.federation is not None:
            each = 1.0 if whole else self.sampling_rate * self.examples_per_client
            return DistributedPlan.calibrate(
                epsilon=self.epsilon,
                delta=self.delta,
                steps=self.rounds + self.spare_steps,
                unit="client" if whole else "example",
                sampler=Poisson(rate=1.0 if whole else self.sampling_rate),
                clip_norm=self.clip_norm,
                divisor=each * self.min_devices,
                dimension=len(flatten(build(self.spec).state_dict())),
                clients=len(self.federation),
                min_honest=self._parameters.min_honest,
                colluders=self._parameters.corrupt,
                bits=self.bits,
            )
        return PrivacyPlan.calibrate(
            epsilon=self.epsilon,
            delta=self.delta,
            steps=self.rounds + self.spare_steps,
            unit="client" if whole else "example",
            sampler=Poisson(rate=1.0 if whole else self.sampling_rate),
            clip_norm=self.clip_norm,
            divisor=1.0 if whole else self.sampling_rate * self.examples_per_client,
        )

    @cached_property
    def evaluation(self) -> EvaluationRelease:
        """What each device releases of its rows to measure a model."""
        return EvaluationRelease.calibrate(
            epsilon=self.epsilon,
            delta=self.delta,
            loss_bound=LOSS_BOUND,
            min_honest=self.min_honest,
        )

    @cached_property
    def feature_histograms(self) -> FeatureHistograms:
        """What devices add up to show where their rows lie."""
        return FeatureHistograms.calibrate(
            epsilon=self.epsilon,
            delta=self.delta,
            features=self.public_schema.width,
            bins=self.histograms,
            min_honest=self.min_honest,
        )

    def combiner(self) -> Combiner:
        """The rule that makes one update of a round's many.

        Raises: BadUsage if a round may go on with fewer devices than it needs.
        """
        combiner = combiner_named(self.combine, wrong_devices=self.wrong_devices)
        if self.min_devices < combiner.least:
            raise BadUsage(
                f"combine: got at least {self.min_devices} devices a round, expected {combiner.least} or more for "
                f"{self.combine} with {self.wrong_devices} wrong; take more devices, or another rule"
            )
        return combiner

    def server_rule(self) -> ServerRule:
        """The rule that turns a round's mean into new weights."""
        return rule_named(self.rule, learning_rate=self.learning_rate, momentum=self.momentum)
