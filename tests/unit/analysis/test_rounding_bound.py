"""The bound holds for every order of additions, and says what it should on numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_decompose.analysis.rounding_bound import (
    Bounded,
    activated,
    added,
    gamma,
    multiplied,
    product,
)

U = 2.0**-24


def exact(values: Any) -> Bounded:
    wide = np.asarray(values, np.float64)
    return Bounded(wide, np.zeros_like(wide))


def test_gamma() -> None:
    assert gamma(10, 1e-3) == pytest.approx(0.01 / 0.99)
    assert gamma(10, 0.1) == np.inf


def test_a_product_by_hand() -> None:
    found = product(exact([[1.0, -2.0]]), exact([[3.0], [4.0]]), U)
    assert found.value.tolist() == [[-5.0]]
    assert found.error[0, 0] == pytest.approx(gamma(2, U) * 11)


def test_errors_that_come_in_are_carried() -> None:
    x = Bounded(np.array([[1.0, -2.0]]), np.array([[0.5, 0.25]]))
    assert product(x, exact([[3.0], [4.0]]), 0.0).error.tolist() == [[2.5]]
    assert added(x, x, 0.0, -1.0).error.tolist() == [[1.0, 0.5]]
    assert multiplied(x, exact([[2.0, 2.0]]), 0.0).error.tolist() == [[1.0, 0.5]]
    assert activated("Sigmoid", x, x.value, 0.0).error.tolist() == [[0.125, 0.0625]]


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_additions_exceeds_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 200), (200, 4)))
    hidden = product(exact(x), exact(w), U)
    bias = rng.normal(size=4).astype(np.float32)
    bounded = multiplied(added(hidden, exact(bias), U), exact(bias), U)
    for _ in range(20):
        order = rng.permutation(200)
        total = np.zeros((3, 4), np.float32)
        for k in order:
            total += x[:, k, None] * w[k]
        computed = (total + bias) * bias
        assert (np.abs(computed - bounded.value) <= bounded.error).all()
