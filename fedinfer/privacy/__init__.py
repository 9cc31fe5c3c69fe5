"""Differential privacy: plans and releases that execute and account, their ledger, their noise, clipped gradients.

The names below are loaded when they are first used: a ledger opens without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedinfer.privacy.bookkeeping import ClippedGradient, clipped_gradient
    from fedinfer.privacy.clipping import AdaptiveClip, clip_update
    from fedinfer.privacy.discrete import discrete_gaussian, discrete_laplace
    from fedinfer.privacy.distributed import DistributedPlan
    from fedinfer.privacy.evaluation import EvaluationRelease
    from fedinfer.privacy.ledger import LedgerSummary, PrivacyLedger, Reservation, RunSummary
    from fedinfer.privacy.local import LocalVector, RandomisedResponse
    from fedinfer.privacy.matrix import MatrixPlan, Participation
    from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise, os_noise
    from fedinfer.privacy.plan import PrivacyPlan
    from fedinfer.privacy.plans import plan_from_json
    from fedinfer.privacy.releases import CountRelease, HistogramRelease, ScalarRelease
    from fedinfer.privacy.samplers import Cyclic, FixedSize, Poisson
    from fedinfer.privacy.tuning import Tuned
    from fedinfer.privacy.votes import ConfidentVotes

HOMES = {
    "AdaptiveClip": "clipping",
    "ClippedGradient": "bookkeeping",
    "ConfidentVotes": "votes",
    "CountRelease": "releases",
    "Cyclic": "samplers",
    "DistributedPlan": "distributed",
    "EvaluationRelease": "evaluation",
    "FixedSize": "samplers",
    "HistogramRelease": "releases",
    "LedgerSummary": "ledger",
    "LocalVector": "local",
    "MatrixPlan": "matrix",
    "NoiseStream": "noise",
    "Participation": "matrix",
    "Poisson": "samplers",
    "PrivacyLedger": "ledger",
    "PrivacyPlan": "plan",
    "RandomisedResponse": "local",
    "Reservation": "ledger",
    "RunSummary": "ledger",
    "ScalarRelease": "releases",
    "Tuned": "tuning",
    "clip_update": "clipping",
    "clipped_gradient": "bookkeeping",
    "discrete_gaussian": "discrete",
    "discrete_laplace": "discrete",
    "insecure_seeded_noise": "noise",
    "os_noise": "noise",
    "plan_from_json": "plans",
}

__all__ = [
    "AdaptiveClip",
    "ClippedGradient",
    "ConfidentVotes",
    "CountRelease",
    "Cyclic",
    "DistributedPlan",
    "EvaluationRelease",
    "FixedSize",
    "HistogramRelease",
    "LedgerSummary",
    "LocalVector",
    "MatrixPlan",
    "NoiseStream",
    "Participation",
    "Poisson",
    "PrivacyLedger",
    "PrivacyPlan",
    "RandomisedResponse",
    "Reservation",
    "RunSummary",
    "ScalarRelease",
    "Tuned",
    "clip_update",
    "clipped_gradient",
    "discrete_gaussian",
    "discrete_laplace",
    "insecure_seeded_noise",
    "os_noise",
    "plan_from_json",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
