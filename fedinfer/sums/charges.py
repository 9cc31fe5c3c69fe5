"""What a secure sum is charged as, and which of these a device accepts."""

from fedinfer.errors import UnprotectedRefused
from fedinfer.privacy import DistributedPlan, EvaluationRelease
from fedinfer.privacy.histograms import FeatureHistograms
from fedinfer.secagg import Parameters

SumCharge = DistributedPlan | EvaluationRelease | FeatureHistograms


def check_charge(charge: SumCharge, parameters: Parameters) -> None:
    """Refuse noise that counts on more honest devices than this device's own policy is sure of.

    Raises: UnprotectedRefused; for a plan, too, that names more colluders than the policy holds against, or has room
        for fewer clients.
    """
    if charge.min_honest > parameters.min_honest:
        raise UnprotectedRefused(
            f"task: got noise that counts on {charge.min_honest} honest devices, expected at most "
            f"{parameters.min_honest} of {parameters.clients} by this device's own policy"
        )
    if isinstance(charge, DistributedPlan) and (
        charge.colluders > parameters.corrupt or charge.clients < parameters.clients
    ):
        raise UnprotectedRefused(
            f"task: got a plan for {charge.clients} clients and {charge.colluders} colluders, expected at least "
            f"{parameters.clients} clients and at most {parameters.corrupt} colluders"
        )
