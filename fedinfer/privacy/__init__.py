"""Differential privacy: the plan that executes and accounts, its ledger, its noise, its clipped gradients."""

from fedinfer.privacy.bookkeeping import ClippedGradient, clipped_gradient
from fedinfer.privacy.ledger import LedgerSummary, PrivacyLedger, Reservation, RunSummary
from fedinfer.privacy.noise import NoiseStream, insecure_seeded_noise, os_noise
from fedinfer.privacy.plan import PrivacyPlan

__all__ = [
    "ClippedGradient",
    "LedgerSummary",
    "NoiseStream",
    "PrivacyLedger",
    "PrivacyPlan",
    "Reservation",
    "RunSummary",
    "clipped_gradient",
    "insecure_seeded_noise",
    "os_noise",
]
