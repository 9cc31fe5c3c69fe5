"""Either kind of plan from its JSON fields: noise that is enough alone, or a share of the noise of a secure sum."""

from collections.abc import Mapping
from typing import Any

from fedinfer.privacy.distributed import DistributedPlan
from fedinfer.privacy.plan import PrivacyPlan


def plan_from_json(values: Mapping[str, Any]) -> PrivacyPlan | DistributedPlan:
    """Read `to_json` of a plan back; only that of a secure sum has bits.

    Raises: BadUsage for a missing or unknown field, or one that cannot be.
    """
    return DistributedPlan.from_json(values) if "bits" in values else PrivacyPlan.from_json(values)
