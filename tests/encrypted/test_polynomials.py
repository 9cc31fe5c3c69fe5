"""Polynomials for activations: minimax is minimax, least squares is nearest where the values are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer.encrypted.polynomials import ACTIVATIONS, GRID, MARGIN, least_squares, minimax
from fedinfer.errors import BadUsage

VALUES = np.linspace(-3.0, 3.0, 50)


def errors(name: str, coefficients: np.ndarray, points: np.ndarray) -> np.ndarray:
    return ACTIVATIONS[name](points) - np.polynomial.polynomial.polyval(points, coefficients)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("degree", [1, 2, 3, 6, 9])
def test_minimax_errors_alternate_as_often_as_chebyshev_says(name: str, degree: int) -> None:
    """Chebyshev's theorem: a fit with degree + 2 extrema of one size and alternating signs is the best there is."""
    half = 3.0 * (1 + 2 * MARGIN)
    points = half * np.cos(np.linspace(np.pi, 0.0, GRID))
    error = errors(name, minimax(ACTIVATIONS[name], VALUES, degree), points)
    signs = np.sign(error[np.abs(error) > 0.999 * np.abs(error).max()])
    assert 1 + int((np.diff(signs) != 0).sum()) >= degree + 2


def test_known_minimax_error_of_the_absolute_value() -> None:
    """Bernstein: the best quadratic to |x| on [-1, 1] is x^2 + 1/8, with error 1/8."""
    inside = np.array([-1.0, 1.0]) / (1 + 2 * MARGIN)
    found = minimax(np.abs, inside, 2)
    np.testing.assert_allclose(found, [0.125, 0.0, 1.0], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(ACTIVATIONS)), st.integers(2, 8), st.floats(0.1, 5.0), st.floats(-3.0, 3.0))
def test_least_squares_is_nearer_than_minimax_on_the_values(
    name: str, degree: int, width: float, middle: float
) -> None:
    values = np.random.default_rng(0).normal(middle, width, 500)
    near = np.mean(errors(name, least_squares(ACTIVATIONS[name], values, degree), values) ** 2)
    other = np.mean(errors(name, minimax(ACTIVATIONS[name], values, degree), values) ** 2)
    assert near <= other * 1.05 + 1e-12


@pytest.mark.parametrize("fit", [minimax, least_squares])
def test_what_cannot_be_fitted_is_refused(fit: object) -> None:
    with pytest.raises(BadUsage, match="got 32, expected 1 to 31"):
        fit(np.tanh, VALUES, 32)  # type: ignore[operator]
    with pytest.raises(BadUsage, match="expected finite"):
        fit(np.tanh, np.array([0.0, np.inf]), 3)  # type: ignore[operator]
