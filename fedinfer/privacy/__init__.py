"""Differential privacy: the plan that executes and accounts, its ledger, its noise, its clipped gradients.

The names below are loaded when they are first used: a ledger opens without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedinfer.privacy.bookkeeping import ClippedGradient, clipped_gradient
    from fedinfer.privacy.ledger import LedgerSummary, PrivacyLedger, Reservation, RunSummary
    from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise, os_noise
    from fedinfer.privacy.plan import PrivacyPlan
    from fedinfer.privacy.samplers import Cyclic, FixedSize, Poisson

HOMES = {
    "ClippedGradient": "bookkeeping",
    "Cyclic": "samplers",
    "FixedSize": "samplers",
    "LedgerSummary": "ledger",
    "NoiseStream": "noise",
    "Poisson": "samplers",
    "PrivacyLedger": "ledger",
    "PrivacyPlan": "plan",
    "Reservation": "ledger",
    "RunSummary": "ledger",
    "clipped_gradient": "bookkeeping",
    "insecure_seeded_noise": "noise",
    "os_noise": "noise",
}

__all__ = [
    "ClippedGradient",
    "Cyclic",
    "FixedSize",
    "LedgerSummary",
    "NoiseStream",
    "Poisson",
    "PrivacyLedger",
    "PrivacyPlan",
    "Reservation",
    "RunSummary",
    "clipped_gradient",
    "insecure_seeded_noise",
    "os_noise",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
