"""Inputs that hardly matter, added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from onnx_decompose.analysis.gram import MomentAccumulator
from onnx_decompose.analysis.pooling import least_telling, pooled
from onnx_decompose.analysis.refit import refit_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray


def lost(
    weight: NDArray[np.float64], variance: NDArray[np.float64], labels: NDArray[np.intp]
) -> float:
    """The cost by its definition, each group with its own weighted mean."""
    total = 0.0
    for label in np.unique(labels):
        rows, sizes = weight[labels == label], variance[labels == label]
        mean = sizes @ rows / sizes.sum()
        total += float(sizes @ np.square(rows - mean).sum(axis=1))
    return total


def test_the_least_telling_come_first() -> None:
    weight = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
    order, share = least_telling(weight, np.array([1.0, 1.0, 0.0, 2.0]))
    assert order.tolist() == [2, 0, 1, 3]
    assert share == pytest.approx([0, 1 / 9, 5 / 9, 1])


def test_a_pool_has_the_mean_by_variance(rng: np.random.Generator) -> None:
    weight, variance = rng.normal(size=(6, 3)), np.array([1.0, 2, 3, 4, 5, 6])
    pools = pooled(weight, variance, np.array([1, 4]), 1)
    assert pools.labels.tolist() == [0, 1, 2, 3, 1, 4]
    assert pools.rows == 5
    assert np.allclose(pools.mean(weight)[1], (2 * weight[1] + 5 * weight[4]) / 7)
    assert np.allclose(pools.mean(weight)[2], weight[2])


def test_inputs_that_never_vary_share_a_plain_mean(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(4, 2))
    pools = pooled(weight, np.array([0.0, 1, 0, 1]), np.array([0, 2]), 1)
    assert np.allclose(pools.mean(weight)[0], weight[[0, 2]].mean(axis=0))


def test_several_pools_take_rows_that_are_alike(rng: np.random.Generator) -> None:
    kinds = rng.integers(3, size=60)
    weight = rng.normal(size=(3, 40))[kinds] + 0.01 * rng.normal(size=(60, 40))
    variance = rng.uniform(0.5, 1.5, size=60)
    pools = pooled(weight, variance, np.arange(60), 3)
    assert pools.rows == 3
    assert lost(weight, variance, pools.labels) == pytest.approx(
        lost(weight, variance, kinds), rel=1e-9
    )


def test_moments_of_sums_are_those_of_the_sums(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 2))
    labels = np.array([0, 1, 0, 2, 1, 0])
    sums = np.stack([x[:, labels == k].sum(axis=1) for k in range(3)], axis=1)
    before, wanted = MomentAccumulator(), MomentAccumulator()
    before.update(x, y)
    wanted.update(sums, y)
    found, expected = before.result().added_up(labels), wanted.result()
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        assert np.allclose(getattr(found, name), getattr(expected, name)), name


def test_a_refit_of_pooled_inputs_is_one_of_their_sum(rng: np.random.Generator) -> None:
    x = rng.normal(size=(400, 5))
    labels = np.array([0, 0, 1, 1, 2])
    truth = rng.normal(size=(3, 2))
    accumulator = MomentAccumulator()
    accumulator.update(x, x @ truth[labels])
    moments = accumulator.result().added_up(labels)
    start = truth + 0.1 * rng.normal(size=truth.shape)
    found = refit_weight(start, np.ones(start.shape, dtype=bool), moments, moments)
    assert np.allclose(found.weight, truth, atol=1e-6)
