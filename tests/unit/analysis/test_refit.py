from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.analysis.gram import MomentAccumulator
from onnx_decompose.analysis.refit import RIDGES, degrees_of_freedom, refit_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments

    Array = NDArray[Any]


def moments(x: Array, y: Array) -> Moments:
    adding = MomentAccumulator()
    adding.update(x, y)
    return adding.result()


def two_views(rng: np.random.Generator, rows: int) -> Array:
    """Six inputs; the last three are the first three, mixed."""
    base = rng.normal(1.0, 1.0, (rows, 3))
    return np.hstack([base, base @ np.array([[1.0, 2, 0], [0, 1, 1], [1, 0, 3]])])


@pytest.fixture
def weight(rng: np.random.Generator) -> Array:
    return rng.normal(size=(6, 4))


MASK = np.arange(6)[:, None] < np.array([3, 3, 6, 0])


class TestRidge:
    def test_what_is_kept_takes_over_what_it_can_express(
        self, rng: np.random.Generator, weight: Array
    ) -> None:
        fit, held = two_views(rng, 200), two_views(rng, 50)
        found = refit_weight(
            weight, MASK, moments(fit, fit @ weight), moments(held, held @ weight)
        )
        assert (found.weight[~MASK] == 0).all()
        new = two_views(rng, 100)
        np.testing.assert_allclose(
            (new @ found.weight + found.added)[:, :3], (new @ weight)[:, :3], atol=1e-6
        )
        assert found.relative_error < 1e-6

    def test_an_output_without_inputs_is_its_mean(
        self, rng: np.random.Generator, weight: Array
    ) -> None:
        fit, held = two_views(rng, 200), two_views(rng, 50)
        found = refit_weight(
            weight, MASK, moments(fit, fit @ weight), moments(held, held @ weight)
        )
        assert found.added[3] == pytest.approx((fit @ weight[:, 3]).mean())
        assert np.isnan(found.error[3])

    def test_inputs_that_were_changed_before_are_made_up_for(
        self, rng: np.random.Generator, weight: Array
    ) -> None:
        mixing = rng.normal(size=(6, 6))
        z, held = rng.normal(size=(300, 6)), rng.normal(size=(80, 6))
        found = refit_weight(
            weight,
            np.ones_like(weight, dtype=bool),
            moments(z @ mixing, z @ weight),
            moments(held @ mixing, held @ weight),
        )
        np.testing.assert_allclose(found.weight, np.linalg.solve(mixing, weight), atol=1e-5)

    def test_directions_without_data_keep_what_they_were(
        self, rng: np.random.Generator, weight: Array
    ) -> None:
        """Two inputs that are constant in the data: nothing can be said of their weights."""
        fit, held = rng.normal(size=(200, 6)), rng.normal(size=(50, 6))
        fit[:, 4:] = held[:, 4:] = 2.0
        mask = np.ones_like(weight, dtype=bool)
        mask[0] = False
        found = refit_weight(
            weight, mask, moments(fit, fit @ weight), moments(held, held @ weight)
        )
        np.testing.assert_allclose(found.weight[4:], weight[4:], atol=1e-9)

    def test_held_out_rows_choose_the_strength(self, rng: np.random.Generator) -> None:
        """As many inputs as rows, and outputs of noise: least squares would fit the noise."""
        start = np.zeros((40, 40))
        x, held = rng.normal(size=(45, 40)), rng.normal(size=(4000, 40))
        noise, noise_held = rng.normal(size=(45, 40)), rng.normal(size=(4000, 40))
        found = refit_weight(
            start,
            np.ones_like(start, dtype=bool),
            moments(x, noise),
            moments(held, noise_held),
        )
        assert found.ridges[0] >= 1
        assert found.relative_error <= 1.01

    def test_the_ridge_is_the_best_of_all_that_are_solved_one_by_one(
        self, rng: np.random.Generator
    ) -> None:
        start = rng.normal(size=(12, 5))
        mixing = rng.normal(size=(12, 12))
        x, held = rng.normal(size=(20, 12)) @ mixing, rng.normal(size=(300, 12)) @ mixing
        wanted = np.ones((12, 5)) + start
        y, y_held = (rows @ wanted + 3 * rng.normal(size=(len(rows), 5)) for rows in (x, held))
        fit, other = moments(x, y), moments(held, y_held)
        found = refit_weight(start, np.ones_like(start, dtype=bool), fit, other)
        mean = np.diagonal(fit.xx).mean()
        solved = {np.inf: start}
        for ridge in RIDGES[1:]:
            damped = fit.xx + ridge * mean * np.eye(12)
            solved[ridge] = start + np.linalg.solve(damped, fit.xy - fit.xx @ start)
        errors = {
            ridge: np.var(y_held - held @ found, axis=0) / np.var(y_held, axis=0)
            for ridge, found in solved.items()
        }
        best = min(errors, key=lambda ridge: errors[ridge].sum())
        assert found.ridges == (best,)
        assert 1e-6 < best < 1e2
        np.testing.assert_allclose(found.weight, solved[best], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(found.error, errors[best], rtol=1e-8)

    @pytest.mark.parametrize("compensation", ["mean", "none"])
    def test_weaker_compensations(
        self, rng: np.random.Generator, weight: Array, compensation: Any
    ) -> None:
        fit, held = two_views(rng, 200), two_views(rng, 50)
        found = refit_weight(
            weight, MASK, moments(fit, fit @ weight), moments(held, held @ weight), compensation
        )
        np.testing.assert_array_equal(found.weight, np.where(MASK, weight, 0))
        lost = fit.mean(axis=0) @ np.where(MASK, 0, weight)
        np.testing.assert_allclose(
            found.added, lost if compensation == "mean" else 0, atol=1e-9
        )
        assert found.relative_error > 0.1


def test_degrees_of_freedom_count_the_directions_that_vary() -> None:
    assert degrees_of_freedom(np.diag([1.0, 2.0, 0.0, 1e-9]), 1e-3) == pytest.approx(
        2, abs=0.01
    )
    assert degrees_of_freedom(np.zeros((3, 3)), 1e-3) == 0


def test_what_is_right_from_the_start_is_not_touched(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, truth = rng.normal(size=(200, 6)), rng.normal(size=(6, 3))
    accumulator = MomentAccumulator()
    accumulator.update(x, x @ truth)
    moments = accumulator.result()

    def never(_: object) -> None:
        raise AssertionError("nothing is to be solved")

    monkeypatch.setattr("scipy.linalg.eigh", never)
    found = refit_weight(truth, np.ones(truth.shape, dtype=bool), moments, moments)
    np.testing.assert_array_equal(found.weight, truth)
    assert found.relative_error < 1e-6
