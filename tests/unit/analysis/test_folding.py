from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.analysis.folding import Units, anything, fold_rows, read_by, settle


def units(varies: list[bool], value: list[float]) -> Units:
    return Units(np.array(varies), np.array(value))


class TestSettle:
    def test_what_varies_has_no_value(self) -> None:
        found = settle(np.array([1.0, 2.0]), np.array([True, False]), np.inf)
        np.testing.assert_array_equal(found.varies, [True, False])
        np.testing.assert_array_equal(found.value, [0.0, 2.0])

    def test_a_unit_must_be_the_same_at_every_position(self) -> None:
        values = np.array([[[1.0, 2.0], [1.0, 3.0]]])
        found = settle(values, np.zeros(2, bool), np.inf)
        np.testing.assert_array_equal(found.varies, [False, True])

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0])
    def test_no_number_of_the_type(self, value: float) -> None:
        found = settle(np.array([value, -65504.0]), np.zeros(2, bool), 65504.0)
        np.testing.assert_array_equal(found.varies, [True, False])

    def test_a_scalar_is_one_unit(self) -> None:
        assert settle(np.array(3.0), np.zeros(1, bool), np.inf).value.tolist() == [3.0]


class TestReadBy:
    GATE = units([True, False, False], [0, 0, 2])

    def test_a_sum_varies_with_any_operand(self) -> None:
        other = units([False, False, True], [1, 1, 0])
        found = read_by([self.GATE, other], 3, product=False)
        np.testing.assert_array_equal(found, [True, False, True])

    def test_zero_times_anything_is_zero(self) -> None:
        found = read_by([self.GATE, anything(3)], 3, product=True)
        np.testing.assert_array_equal(found, [True, False, True])
        assert read_by([self.GATE, anything(3)], 3, product=False).all()

    def test_one_unit_is_read_by_all(self) -> None:
        assert read_by([units([False] * 2, [1, 2]), anything(1)], 2, product=False).all()
        assert not read_by([anything(2), units([False], [0])], 2, product=True).any()


class TestFoldRows:
    def test_by_hand(self) -> None:
        weight = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
        mask = np.array([[True, True], [True, False], [False, True]])
        found, total = fold_rows(units([True, False, False], [0, 10, 0.5]), weight, mask)
        np.testing.assert_array_equal(found, [[True, True], [False, False], [False, False]])
        # Unsupported entries of a constant row count: a constant costs nothing.
        np.testing.assert_array_equal(total, [32.5, 43.0])
        assert total.dtype == np.float64

    def test_nothing_constant_costs_nothing(self) -> None:
        mask = np.ones((2, 3), bool)
        found, total = fold_rows(anything(2), np.ones((2, 3), np.float32), mask)
        assert found is mask
        assert not total.any()

    def test_many_rows(self, rng: np.random.Generator) -> None:
        weight, value = rng.standard_normal((3000, 2)), rng.standard_normal(3000)
        constant = Units(np.zeros(3000, bool), value)
        found, total = fold_rows(constant, weight, np.ones(weight.shape, bool))
        assert not found.any()
        np.testing.assert_allclose(total, value @ weight, rtol=1e-12)
