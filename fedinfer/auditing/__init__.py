"""The auditor: what an adversary can prove against our training, its mutants and its peers, beside what they claim."""

from fedinfer.auditing.audits import FULL, QUICK, Finding, Size, Verdict, audit
from fedinfer.auditing.subjects import Subject, Trace, Training, Units

__all__ = [
    "FULL",
    "QUICK",
    "Finding",
    "Size",
    "Subject",
    "Trace",
    "Training",
    "Units",
    "Verdict",
    "audit",
]
