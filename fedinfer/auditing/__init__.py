"""The auditor: what an adversary can prove against our training, its mutants and its peers, beside what they claim."""

from fedinfer.auditing.audits import AUDITS, audit
from fedinfer.auditing.findings import FULL, QUICK, Finding, Size, Verdict
from fedinfer.auditing.subjects import AdaptiveClients, ClientUpdates, Subject, Trace, Training, Units, ours
from fedinfer.auditing.trained import AuditBound, audit_training

__all__ = [
    "AUDITS",
    "FULL",
    "QUICK",
    "AdaptiveClients",
    "AuditBound",
    "ClientUpdates",
    "Finding",
    "Size",
    "Subject",
    "Trace",
    "Training",
    "Units",
    "Verdict",
    "audit",
    "audit_training",
    "ours",
]
