"""Directions of an axis by what its readers see of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from onnx_decompose.analysis.subspaces import telling_directions

if TYPE_CHECKING:
    from numpy.typing import NDArray


def covariance(rng: np.random.Generator, size: int, rank: int) -> NDArray[np.float64]:
    factors = rng.normal(size=(size, rank))
    return factors @ factors.T


def test_all_directions_leave_what_readers_see_as_it_is(rng: np.random.Generator) -> None:
    weights = [rng.normal(size=(8, 3)), rng.normal(size=(8, 2))]
    found = telling_directions([covariance(rng, 8, 8)] * 2, weights)
    x = rng.normal(size=(20, 8))
    for weight in weights:
        assert np.allclose(x @ found.encode @ found.decode @ weight, x @ weight)


def test_what_no_reader_sees_takes_no_direction(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(10, 3))
    found = telling_directions([covariance(rng, 10, 10)], [weight])
    assert found.encode.shape == (10, 3)


def test_what_does_not_vary_takes_no_direction(rng: np.random.Generator) -> None:
    own = covariance(rng, 10, 4)
    found = telling_directions([own], [rng.normal(size=(10, 10))])
    assert found.within(1e-9) == 4
    assert found.within(0.0) <= 10


def test_a_loss_is_the_share_of_the_variance_that_readers_miss(
    rng: np.random.Generator,
) -> None:
    own, weight = covariance(rng, 6, 6), rng.normal(size=(6, 4))
    found = telling_directions([own], [weight])
    assert found.lost[0] == pytest.approx(1.0)
    assert (np.diff(found.lost) <= 0).all()
    for count in range(5):
        left = np.eye(6) - found.encode[:, :count] @ found.decode[:count]
        missing = np.trace(weight.T @ left.T @ own @ left @ weight)
        assert missing / np.trace(weight.T @ own @ weight) == pytest.approx(
            found.lost[count], abs=1e-9
        )


def test_readers_count_alike_whatever_their_size(rng: np.random.Generator) -> None:
    own = covariance(rng, 6, 6)
    first, second = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    found = telling_directions([own, own], [first, second])
    scaled = telling_directions([own, own], [first, 1e3 * second])
    assert np.allclose(found.lost, scaled.lost)


def test_units_that_never_vary_need_no_direction(rng: np.random.Generator) -> None:
    found = telling_directions([np.zeros((5, 5))], [rng.normal(size=(5, 2))])
    assert found.within(1e-6) == 0
