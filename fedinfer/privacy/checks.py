"""Checks of public privacy parameters."""

import sys

from fedinfer.errors import BadUsage


def check_positive(name: str, value: float) -> None:
    """Raises: BadUsage unless `value` is finite and above zero."""
    # A whole number may be larger than any float.
    if not 0.0 < value <= sys.float_info.max:
        raise BadUsage(f"{name}: got {value}, expected a finite number above 0")


def check_epsilon(epsilon: float) -> None:
    """Raises: BadUsage unless `epsilon` is finite and above zero."""
    check_positive("epsilon", epsilon)


def check_delta(delta: float) -> None:
    """Raises: BadUsage unless `delta` lies between 0 and 1."""
    if not 0.0 < delta < 1.0:
        raise BadUsage(f"delta: got {delta}, expected more than 0 and less than 1, for example 1e-5")
