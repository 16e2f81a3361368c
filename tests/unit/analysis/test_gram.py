from __future__ import annotations

import numpy as np

from onnx_decompose.analysis.gram import MomentAccumulator


def test_batches_add_up_to_the_moments_of_all_rows(rng: np.random.Generator) -> None:
    x = rng.normal(3.0, 2.0, (60, 5))
    y = x @ rng.normal(size=(5, 4)) + rng.normal(size=(60, 4)) - 7.0
    adding = MomentAccumulator()
    for start in (0, 7, 40):
        stop = {0: 7, 7: 40, 40: 60}[start]
        adding.update(x[start:stop].reshape(1, -1, 5), y[start:stop].reshape(1, -1, 4))
    found = adding.result()
    assert found.count == 60
    np.testing.assert_allclose(found.mean_x, x.mean(axis=0))
    np.testing.assert_allclose(found.mean_y, y.mean(axis=0))
    np.testing.assert_allclose(found.xx, np.cov(x.T, bias=True))
    centred = (x - x.mean(axis=0)).T @ (y - y.mean(axis=0)) / 60
    np.testing.assert_allclose(found.xy, centred, atol=1e-12)
    np.testing.assert_allclose(found.spread, x.std(axis=0))
    np.testing.assert_allclose(found.yy, y.var(axis=0))


def test_a_weight_counts_rows_as_often(rng: np.random.Generator) -> None:
    x, y = rng.normal(5, 1, (20, 3)), rng.normal(-5, 1, (20, 2))
    times = rng.integers(0, 4, 20)
    weighted, repeated = MomentAccumulator(), MomentAccumulator()
    weighted.update(x, y, times.astype(float))
    repeated.update(np.repeat(x, times, axis=0), np.repeat(y, times, axis=0))
    first, second = weighted.result(), repeated.result()
    for name in ("count", "mean_x", "mean_y", "xx", "xy", "yy"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-12)


def test_moments_through_a_weight(rng: np.random.Generator) -> None:
    x, weight = rng.normal(2, 1, (30, 4)), rng.normal(size=(4, 3))
    alone, both = MomentAccumulator(), MomentAccumulator()
    alone.update(x)
    both.update(x, x @ weight)
    found, expected = alone.result().through(weight), both.result()
    for name in ("mean_y", "xx", "xy", "yy"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-12)


def test_a_large_mean_costs_no_digits(rng: np.random.Generator) -> None:
    """Sums are taken from the first batch's mean on: 1e6 squared would leave 4 digits of a spread of 1."""
    x = 1e6 + rng.normal(size=(4000, 3))
    adding = MomentAccumulator()
    for batch in np.array_split(x, 8):
        adding.update(batch)
    np.testing.assert_allclose(adding.result().xx, np.cov(x.T, bias=True), rtol=1e-9, atol=1e-9)


def test_float32_batches_are_multiplied_in_float64(rng: np.random.Generator) -> None:
    """The smallest eigenvalue is 1e-10 of the largest: float32 products would bury it."""
    x = (rng.normal(size=(500, 6)) * np.logspace(0, -5, 6)).astype(np.float32)
    adding = MomentAccumulator()
    adding.update(x)
    exact = np.cov(x.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(adding.result().xx), np.linalg.eigvalsh(exact), rtol=1e-6
    )


def test_inputs_are_left_alone(rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 3))
    kept = x.copy()
    MomentAccumulator().update(x, x)
    np.testing.assert_array_equal(x, kept)
