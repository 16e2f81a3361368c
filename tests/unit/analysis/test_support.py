from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from onnx_decompose.analysis.support import (
    APART,
    Activity,
    ActivityAccumulator,
    SpreadAccumulator,
    coactive_groups,
    influence,
    resting_values,
    where_it_varies,
)

GROUPS = np.repeat([0, 1, 2], [6, 4, 2])


def planted(
    rng: np.random.Generator, rows: int, *, noise: float = 0.0, shown: float = 0.8
) -> np.ndarray:
    """Activity of three groups of inputs, one group a row; ``noise`` is the chance of any other input."""
    which = rng.integers(0, 3, rows)
    own = which[:, None] == GROUPS
    active: np.ndarray = np.where(
        own, rng.random(own.shape) < shown, rng.random(own.shape) < noise
    )
    return active


def counted(active: np.ndarray) -> Activity:
    adding = ActivityAccumulator(np.zeros(active.shape[1]))
    for part in np.array_split(active.astype(float), 3):
        adding.update(part)
    return adding.result()


class TestGroups:
    @pytest.mark.parametrize("noise", [0.0, 0.1])
    def test_planted_groups_are_found(self, rng: np.random.Generator, noise: float) -> None:
        labels, count = coactive_groups(counted(planted(rng, 400, noise=noise)))
        assert count == 3
        np.testing.assert_array_equal(labels, GROUPS)

    def test_permuted_columns_carry_their_labels(self, rng: np.random.Generator) -> None:
        order = rng.permutation(GROUPS.size)
        labels, _ = coactive_groups(counted(planted(rng, 400)[:, order]))
        same = GROUPS[order][:, None] == GROUPS[order]
        np.testing.assert_array_equal(labels[:, None] == labels, same)

    def test_shuffled_activity_has_no_groups(self, rng: np.random.Generator) -> None:
        """Each input's own frequency stays, what it goes together with does not: few false edges over many draws."""
        found = 0
        for _ in range(50):
            active = rng.permuted(planted(rng, 200), axis=0)
            found += coactive_groups(counted(active), alpha=0.05)[1]
        assert found <= 8

    def test_independence_is_the_null_and_not_exclusion(self, rng: np.random.Generator) -> None:
        active = rng.random((500, 12)) < 0.5
        assert coactive_groups(counted(active))[1] == 0

    @pytest.mark.parametrize("bound", [1e-2, 1e-4, 1e-8])
    def test_pairs_are_those_whose_tail_is_within_the_bound(
        self, rng: np.random.Generator, bound: float
    ) -> None:
        common = rng.random((300, 1)) < 0.5
        often = rng.uniform(0.05, 0.95, 60)
        linked = rng.uniform(0, 0.9, 60)
        active = (rng.random((300, 60)) < often) | (common & (rng.random((300, 60)) < linked))
        activity = counted(active)
        alone, together = activity.alone, activity.together
        tail = stats.hypergeom.sf(together - 1, 300, alone[:, None], alone[None, :])
        expected = (tail <= bound) & ~np.eye(60, dtype=bool)
        assert 0 < expected.sum() < expected.size / 2
        np.testing.assert_array_equal(activity.dependent(bound), expected)

    def test_a_level_cuts_what_is_real_but_slight(self, rng: np.random.Generator) -> None:
        active = planted(rng, 3000)
        linked = rng.random(3000) < 0.35  # a common cause of all groups
        active[linked] |= rng.random((int(linked.sum()), GROUPS.size)) < 0.9
        assert coactive_groups(counted(active), level=0.0)[1] < 3
        labels, count = coactive_groups(counted(active), level=0.4)
        assert count == 3
        np.testing.assert_array_equal(labels, GROUPS)

    def test_rare_inputs_go_with_what_they_are_seen_with(
        self, rng: np.random.Generator
    ) -> None:
        active = np.column_stack([planted(rng, 400), np.zeros((400, 2), bool)])
        active[np.flatnonzero(active[:, 8])[0], 12] = True  # once, with group 1
        labels, count = coactive_groups(counted(active))
        assert count == 3
        assert labels[12] == 1
        assert labels[13] == APART

    def test_a_rare_pair_is_no_group_of_its_own(self, rng: np.random.Generator) -> None:
        """Active together, and only ever in rows of one group: too few rows to show that they belong to it."""
        active = np.column_stack([planted(rng, 400), np.zeros((400, 2), bool)])
        where = np.flatnonzero(active[:, :6].any(axis=1))[:4]
        active[where, 12:] = True
        labels, count = coactive_groups(counted(active))
        assert count == 3
        np.testing.assert_array_equal(labels, [*GROUPS, 0, 0])

    def test_a_rare_pair_that_is_seen_alone_is_a_group(self, rng: np.random.Generator) -> None:
        active = np.column_stack([planted(rng, 400), np.zeros((400, 2), bool)])
        active[:25] = False
        active[:25, 12:] = True
        labels, count = coactive_groups(counted(active))
        assert count == 4
        assert labels[12] == labels[13] == 3

    def test_phi_is_the_correlation_of_the_indicators(self, rng: np.random.Generator) -> None:
        active = planted(rng, 100, noise=0.2)
        phi = counted(active).phi
        np.testing.assert_allclose(phi, np.corrcoef(active.T), atol=1e-12)


def test_resting_values_are_the_most_frequent_ones() -> None:
    x = np.array([[0.0, 1.0, 5.0], [0.0, -1.0, 5.0], [2.0, -1.0, 5.0], [0.0, 3.0, 4.0]])
    np.testing.assert_array_equal(resting_values(x), [0.0, -1.0, 5.0])


def test_spread_is_the_variance_within_each_group(rng: np.random.Generator) -> None:
    values, which = rng.normal(3, 1, (90, 4)), rng.integers(0, 2, 90)
    share = (which[:, None] == np.arange(2)).astype(float)
    adding = SpreadAccumulator(4, 2)
    for rows in np.array_split(np.arange(90), 4):
        adding.update(values[rows], share[rows])
    for group in range(2):
        np.testing.assert_allclose(
            adding.result()[:, group], values[which == group].var(axis=0)
        )


def test_what_is_constant_has_no_spread() -> None:
    adding = SpreadAccumulator(1, 1)
    adding.update(np.full((50, 1), 0.1), np.ones((50, 1)))
    assert adding.result() == 0


def test_influence_sums_squares_over_a_group_s_outputs() -> None:
    weight, target = np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(influence(weight, target), [[1, 4], [9, 0]])


class TestWhereOutputsVary:
    def test_constants_are_apart(self) -> None:
        spread = np.array([[2.0, 0.1], [0.0, 0.0], [0.1, 3.0]])
        np.testing.assert_array_equal(where_it_varies(spread), [0, APART, 1])

    def test_groups_of_small_numbers_have_their_outputs(self) -> None:
        spread = np.array([[900.0, 0.01], [1000.0, 1e-3], [1.0, 0.1]])
        np.testing.assert_array_equal(where_it_varies(spread), [0, 0, 1])

    def test_one_of_many_outputs_is_not_lost_to_a_group_of_few(self) -> None:
        """Ten outputs share what the first group moves, two what the second moves; one of the ten varies with both."""
        spread = np.zeros((12, 2))
        spread[:10, 0], spread[10:, 1] = 2.0, 2.0
        spread[2] = 1.6, 0.7
        np.testing.assert_array_equal(where_it_varies(spread), [0] * 10 + [1] * 2)
