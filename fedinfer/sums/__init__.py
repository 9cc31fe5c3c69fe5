"""Secure sums as Flower messages, for both sides: what a device answers, and what a server asks.

`secure` and `SecureFedAvg` put them around an app that was written for plain federated averaging. The names below are
loaded when they are first used: most steps of a sum need no torch, and each is a process of its own on a SuperNode.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedinfer.sums.client import secure
    from fedinfer.sums.membership import Membership, MembershipConfig
    from fedinfer.sums.rounds import SecureSum, SecureSums, SumTask
    from fedinfer.sums.strategy import SecureFedAvg

HOMES = {
    "Membership": "membership",
    "MembershipConfig": "membership",
    "SecureFedAvg": "strategy",
    "SecureSum": "rounds",
    "SecureSums": "rounds",
    "SumTask": "rounds",
    "secure": "client",
}

__all__ = ["Membership", "MembershipConfig", "SecureFedAvg", "SecureSum", "SecureSums", "SumTask", "secure"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
