"""Bounds keep their promise in simulations; so does choosing by them, and choosing by what was measured does not."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import pytest

from onnx_decompose.analysis.choice import (
    bounded,
    last_in_a_row,
    risk_of_turn,
    steps,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

BUDGET, RISK = 1.0, 0.05


def jackknife(samples: np.ndarray, blocks: int = 64) -> tuple[float, np.ndarray]:
    """The mean, and the mean without each block of every so many samples."""
    count = min(blocks, samples.size)
    sums = np.array([samples[start::count].sum() for start in range(count)])
    sizes = np.array([samples[start::count].size for start in range(count)])
    return float(samples.mean()), (samples.sum() - sums) / (samples.size - sizes)


class TestBounds:
    def test_of_a_mean_are_student_s(self, rng: np.random.Generator) -> None:
        samples = rng.normal(size=4000)
        found = bounded(*jackknife(samples, 4000), RISK)
        spread = samples.std() / np.sqrt(samples.size)
        assert found.value == samples.mean()
        assert found.upper - found.value == pytest.approx(1.645 * spread, rel=0.02)
        assert found.value - found.lower == pytest.approx(1.645 * spread, rel=0.02)

    @pytest.mark.parametrize("size", [24, 100])
    @pytest.mark.parametrize("name", ["normal", "exponential", "t"])
    def test_the_true_mean_is_beyond_them_about_as_often_as_the_risk_says(
        self, rng: np.random.Generator, name: str, size: int
    ) -> None:
        draws = {
            "normal": rng.normal(size=(500, size)),
            "exponential": rng.exponential(size=(500, size)) - 1,
            "t": rng.standard_t(4, size=(500, size)),
        }[name]
        missed = np.mean([bounded(*jackknife(row), RISK).upper < 0 for row in draws])
        assert missed < 0.08

    def test_skewness_is_made_up_for(self, rng: np.random.Generator) -> None:
        """Rare large drops: Student's bound is too low about twice as often as the risk says."""
        missed = {"student": 0, "bounded": 0}
        for _ in range(600):
            samples = rng.exponential(size=24) - 1
            student = samples.mean() + 1.714 * samples.std(ddof=1) / np.sqrt(24)
            missed["student"] += student < 0
            missed["bounded"] += bounded(*jackknife(samples), RISK).upper < 0
        assert missed["bounded"] < 0.9 * missed["student"]

    def test_samples_that_hold_nothing_of_it_do_not_count(
        self, rng: np.random.Generator
    ) -> None:
        """Ten of a hundred samples belong to the task: bounds are as wide as ten samples say."""
        own = rng.normal(size=10)
        without = np.full(100, own.mean())
        without[:10] = (own.sum() - own) / 9
        width = bounded(float(own.mean()), without, RISK).upper - own.mean()
        assert width > 1.645 * own.std(ddof=1) / np.sqrt(10)

    def test_nothing_is_bounded_by_one_block_or_by_what_is_missing(self) -> None:
        assert bounded(0.1, np.array([np.nan]), RISK).upper == np.inf
        assert bounded(0.1, np.array([0.1, np.nan, 0.1]), RISK).upper == np.inf
        assert bounded(np.inf, np.array([0.1, 0.2, 0.1]), RISK).upper == np.inf

    def test_where_no_sample_differs_there_is_no_width(self) -> None:
        found = bounded(0.0, np.zeros(20), RISK)
        assert found.lower == found.value == found.upper == 0


class TestChoosing:
    def test_by_bounds_keeps_the_promise_that_choosing_by_the_measured_error_breaks(
        self, rng: np.random.Generator
    ) -> None:
        """Twenty nested candidates, the stricter the larger their true error; errors go together from one to the next.

        The strictest that seems to be inside the budget is beyond it in half of the cases by what was measured.
        """
        true = np.linspace(0.3, 2.0, 20)
        broken = {"measured": 0, "bounded": 0}
        runs = 200

        def strictest(errors: Iterator[float]) -> float:
            return max(
                (t for t, _ in zip(true, takewhile(inside, errors), strict=False)), default=0
            )

        def inside(error: float) -> bool:
            return error <= BUDGET

        for _ in range(runs):
            noise = rng.normal(size=60)
            rows = true[:, None] * (1 + noise + 0.3 * rng.normal(size=(20, 60)))
            uppers = (bounded(*jackknife(row), RISK).upper for row in rows)
            broken["measured"] += strictest(iter(rows.mean(axis=1))) > BUDGET
            broken["bounded"] += strictest(uppers) > BUDGET
        assert broken["measured"] / runs > 0.3
        assert broken["bounded"] / runs < 0.07

    def test_the_held_out_samples_are_no_place_to_search(
        self, rng: np.random.Generator
    ) -> None:
        """Candidates that are all beyond the budget: one after the other until one passes, against a fixed order."""
        walked = in_a_row = 0
        runs = 2000
        for _ in range(runs):
            errors = 1.1 + 0.2 * rng.normal(size=8)
            walked += bool((errors <= BUDGET).any())
            in_a_row += last_in_a_row(range(8), (errors <= BUDGET).__getitem__) is not None
        assert walked / runs > 0.9
        assert in_a_row / runs < 0.36  # as often as a single one of them passes

    def test_the_risks_of_any_number_of_families_add_up_to_no_more(self) -> None:
        risks = [risk_of_turn(0.1, turn) for turn in range(30)]
        assert sum(risks) <= 0.1
        assert risks[0] == 0.05


class TestSteps:
    def test_the_cheapest_is_last_and_safer_ones_come_before_it(self) -> None:
        costs, used = [0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.45, 0.6, 0.2, 0.1]
        assert steps(costs, used) == [3, 1, 0]

    def test_one_that_is_safe_and_cheapest_is_shown_alone(self) -> None:
        assert steps([0.1, 0.2], [0.2, 0.1]) == [0]

    def test_without_candidates_there_is_nothing_to_show(self) -> None:
        assert steps([], []) == []

    def test_none_behind_the_first_that_fails_is_looked_at(self) -> None:
        seen: list[int] = []

        def passes(candidate: int) -> bool:
            seen.append(candidate)
            return candidate != 7

        assert last_in_a_row([3, 5, 7, 9], passes) == 5
        assert seen == [3, 5, 7]
        assert last_in_a_row([7, 9], passes) is None
