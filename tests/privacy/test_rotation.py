"""The rotation keeps norms, spreads any vector, and is undone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import hadamard

from fedinfer.errors import ShapeMismatch
from fedinfer.privacy.rotation import padded_size, rotate, rotate_back, signs

SIZES = [1, 2, 3, 31, 32, 33, 64, 100, 1000, 1024, 1500]


def vector(size: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=size)


@given(size=st.integers(1, 3000), seed=st.integers(0, 10), text=st.text(max_size=20))
def test_it_is_undone_and_keeps_the_norm(size: int, seed: int, text: str) -> None:
    x = vector(size, seed)
    turned = rotate(x, text=text)
    assert turned.shape == (padded_size(size),)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(x), rel=1e-13)
    assert rotate_back(turned, text=text, dimension=size) == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_hadamard_transform_of_signed_coordinates(size: int) -> None:
    x, wide = vector(size), padded_size(size)
    signed = np.zeros(wide)
    signed[:size] = x
    signed *= signs(wide, text="run/1")
    matrix = hadamard(wide) / np.sqrt(wide) if wide > 1 else np.ones((1, 1))
    assert rotate(x, text="run/1") == pytest.approx(matrix @ signed, abs=1e-12)


def test_signs_are_a_function_of_the_text_and_balanced() -> None:
    first, again, other = (signs(40_000, text=text) for text in ("run/1", "run/1", "run/2"))
    assert np.array_equal(first, again)
    assert set(first.tolist()) == {-1.0, 1.0}
    for balanced in (first, other, first * other):
        assert abs(balanced.mean()) < 6.2 / np.sqrt(40_000)
    # Everybody makes the same: the first of them are part of the format.
    assert first[:16].tolist() == [-1, -1, -1, 1, -1, -1, -1, 1, -1, 1, -1, 1, 1, -1, -1, 1]


def test_a_vector_of_one_large_coordinate_or_of_equal_ones_is_spread() -> None:
    size = 4096
    for x in (np.eye(1, size)[0] * np.sqrt(size), np.ones(size)):
        assert np.abs(rotate(x, text="spread")).max() < 7.0


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch):
        rotate(np.zeros((2, 2)), text="")
    with pytest.raises(ShapeMismatch):
        rotate(np.zeros(0), text="")
    with pytest.raises(ShapeMismatch):
        rotate_back(np.zeros(8), text="", dimension=4)
