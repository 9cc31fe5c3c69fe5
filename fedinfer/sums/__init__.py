"""Secure sums as Flower messages, for both sides: what a device answers, and what a server asks.

`secure` and `SecureFedAvg` put them around an app that was written for plain federated averaging.
"""

from fedinfer.sums.client import secure
from fedinfer.sums.membership import Membership, MembershipConfig
from fedinfer.sums.rounds import SecureSum, SecureSums, SumTask
from fedinfer.sums.strategy import SecureFedAvg

__all__ = ["Membership", "MembershipConfig", "SecureFedAvg", "SecureSum", "SecureSums", "SumTask", "secure"]
