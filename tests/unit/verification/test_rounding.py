"""What is allowed between outputs that differ by rounding, in numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from onnx_decompose.verification.claims import Tolerance
from onnx_decompose.verification.rounding import (
    CONVICTING,
    DRAWS,
    ERROR_FACTOR,
    FLOOR,
    Compared,
    compare,
    first_miss,
)

EPS = 2.0**-23


def compared(**changes: Any) -> Compared:
    values: dict[str, Any] = {
        "output": "y",
        "label": "here",
        "kind": "random",
        "dtype": np.dtype(np.float32),
        "size": 1.0,
        "deviation": 0.0,
        "annealed": None,
        "rewritten": None,
        "moves": lambda: 0.0,
    }
    return Compared(**{**values, **changes})


def passes(*every: Compared, tolerance: Tolerance | None = None) -> bool:
    return first_miss(every, tolerance) is None


class TestCompare:
    def test_against_the_exact_output(self) -> None:
        exact = np.array([[1.0, -4.0]])
        annealed = np.array([[1.0, -4.5]], np.float32)
        rewritten = np.array([[1.25, -4.0]], np.float32)
        assert compare(annealed, rewritten, exact) == (4.0, 0.5, 0.5, 0.25)

    def test_without_it(self) -> None:
        annealed, rewritten = np.array([2.0], np.float32), np.array([3.0], np.float32)
        assert compare(annealed, rewritten, None) == (2.0, 1.0, None, None)

    def test_float64_is_its_own_reference(self) -> None:
        value = np.array([2.0])
        assert compare(value, value, value) == (2.0, 0.0, None, None)

    @pytest.mark.parametrize(
        "other",
        [
            np.array([[1.0]], np.float32),
            np.array([1.0], np.float64),
            np.array([np.nan], np.float32),
        ],
    )
    def test_what_cannot_be_compared(self, other: Any) -> None:
        assert compare(np.array([np.inf], np.float32), other, None)[1] == np.inf

    def test_integers_are_equal_or_not(self) -> None:
        assert compare(np.array([1]), np.array([1]), None)[1] == 0
        assert compare(np.array([1]), np.array([2]), None)[1] == np.inf


class TestWithAReference:
    def test_as_far_as_the_annealed_model_itself(self) -> None:
        allowed = ERROR_FACTOR * 1e-5 + FLOOR * EPS
        assert passes(compared(annealed=1e-5, rewritten=0.99 * allowed))
        assert not passes(compared(annealed=1e-5, rewritten=1.01 * allowed))

    def test_much_less_than_the_type_s_tolerance_fails(self) -> None:
        assert not passes(compared(annealed=1e-7, rewritten=1e-5, deviation=1e-5))
        assert passes(compared(deviation=1e-5))

    def test_an_error_that_is_small_by_luck_is_that_of_its_kind(self) -> None:
        lucky = compared(label="there", annealed=0.0, rewritten=3e-5)
        assert not passes(lucky)
        assert passes(lucky, compared(annealed=1e-5, rewritten=1e-5))
        assert not passes(lucky, compared(kind="large", annealed=1e-5, rewritten=1e-5))

    def test_a_suspicion_needs_most_pairs_beside(self) -> None:
        """Fails at 28 of 32 and not at 27: a chance of 9.7e-6 where every second pair is the worse one by luck."""
        suspected = compared(annealed=1e-7, rewritten=2e-6)
        assert not passes(suspected)
        for worse, luck in ((CONVICTING - 1, True), (CONVICTING, False)):
            pairs = [(1e-7, 2e-6)] * worse + [(3e-7, 4e-7)] * (DRAWS - worse)
            for order in (pairs, pairs[::-1]):
                assert passes(dataclasses.replace(suspected, beside=order.copy)) is luck
        assert binom.sf(CONVICTING - 1, DRAWS, 0.5) < 1e-5

    def test_the_test_has_no_scale(self) -> None:
        for scale in (1e-3, 1.0, 1e3):
            suspected = compared(
                size=scale, annealed=1e-7 * scale, rewritten=2e-6 * scale, deviation=scale
            )
            for factor, luck in ((1.9, True), (2.1, False)):
                pairs = [(1e-6 * scale, factor * 1e-6 * scale)] * DRAWS
                assert passes(dataclasses.replace(suspected, beside=pairs.copy)) is luck

    def test_twice_the_rounding_is_alarming_in_few_of_a_hundred_thousand(self) -> None:
        """Half normal errors, the rewritten model's twice as large: the most that counts as rounding."""
        rng = np.random.default_rng(0)
        errors = np.abs(rng.standard_normal((2000, DRAWS, 2))) * [1e-7, 2e-7]
        suspected = compared(annealed=1e-7, rewritten=2e-6)
        assert all(
            passes(dataclasses.replace(suspected, beside=pairs.tolist().copy))
            for pairs in errors
        )

    def test_a_constant_fault_as_large_as_the_luck_fails(self) -> None:
        """Rounding of the same size with 2e-6 on top, which is what the suspicion saw."""
        rng = np.random.default_rng(0)
        suspected = compared(annealed=1e-7, rewritten=2e-6)
        for _ in range(100):
            rounding = rng.standard_normal((DRAWS, 2)) * 3e-7
            pairs = np.abs(rounding + np.array([0, 2e-6])).tolist()
            assert not passes(dataclasses.replace(suspected, beside=pairs.copy))

    def test_what_cannot_be_measured_acquits_nobody(self) -> None:
        suspected = compared(annealed=1e-6, rewritten=1e-4)
        infinite = float("inf")
        for pair in ((infinite, infinite), (0.3, 0.3), (1e-7, infinite), (1e-7, float("nan"))):
            assert not passes(dataclasses.replace(suspected, beside=([pair] * DRAWS).copy))
        few = [(1e-6, 1e-6)] * (DRAWS - CONVICTING)
        assert not passes(dataclasses.replace(suspected, beside=few.copy))

    def test_beside_is_not_asked_for_in_vain(self) -> None:
        def ask() -> list[tuple[float, float]]:
            raise AssertionError("asked")

        assert passes(compared(annealed=1e-6, rewritten=4e-6, beside=ask))
        assert not passes(compared(deviation=float("inf"), beside=ask))
        assert not passes(compared(deviation=1e-3, beside=ask), tolerance=Tolerance(1e-4))

    def test_what_cancels_has_the_rounding_of_its_terms(self) -> None:
        usual = compared(size=100.0, annealed=0.0, rewritten=0.0)
        nothing = compared(kind="zeros", size=0.0, annealed=0.0, rewritten=50 * EPS)
        assert not passes(nothing)
        assert passes(nothing, usual)
        assert not passes(
            compared(kind="zeros", size=0.01, annealed=0.0, rewritten=1e-5), usual
        )

    def test_a_reference_that_is_not_the_model_is_not_believed(self) -> None:
        far = compared(annealed=0.5, rewritten=0.5, deviation=1e-3)
        assert not passes(far)
        assert passes(compared(annealed=0.5, rewritten=0.5, deviation=1e-6))

    def test_other_draws_without_it_go_by_the_pool(self) -> None:
        known = compared(annealed=1e-5, rewritten=1e-5)
        assert passes(known, compared(deviation=4.9e-5))
        assert not passes(known, compared(deviation=6e-5))


class TestWithout:
    def test_the_type_s_tolerance(self) -> None:
        assert passes(compared(deviation=0.9e-4))
        assert not passes(compared(deviation=1.1e-4))

    def test_or_what_the_last_bits_of_the_inputs_make(self) -> None:
        assert passes(compared(deviation=3.9e-3, moves=lambda: 1e-3))
        assert not passes(compared(deviation=4.1e-3, moves=lambda: 1e-3))


def test_a_user_s_tolerance_is_all_that_counts() -> None:
    one = compared(annealed=1.0, rewritten=1.0, deviation=1e-3, size=2.0)
    assert passes(one, tolerance=Tolerance(5e-4))
    assert not passes(one, tolerance=Tolerance(4e-4))
    assert passes(one, tolerance=Tolerance(0.0, 1e-3))
