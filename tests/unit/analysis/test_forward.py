from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.analysis.forward import Need, draft_units
from onnx_decompose.analysis.support import APART


def lost(need: Need, kept: np.ndarray) -> float:
    """The share of the outputs' variance that least squares on ``kept`` leaves."""
    power = np.trace(need.weight.T @ need.covariance @ need.weight)
    if not kept.size:
        return 1.0
    wanted = need.covariance[kept] @ need.weight
    solved = np.linalg.lstsq(need.covariance[np.ix_(kept, kept)], wanted, rcond=None)[0]
    return 1 - float(np.einsum("ij,ij->", wanted, solved)) / float(power)


def needs(rng: np.random.Generator, units: int = 30, rows: int = 400) -> Need:
    values = rng.normal(size=(rows, units)) @ rng.normal(size=(units, units))
    return Need(np.cov(values.T, bias=True), rng.normal(size=(units, 3)))


class TestOneGroup:
    def test_what_it_says_it_lacks_is_what_least_squares_leaves(
        self, rng: np.random.Generator
    ) -> None:
        need = needs(rng)
        draft = draft_units([[need]], 1e-4)
        for count in (1, 5, draft.order.size):
            left = lost(need, draft.order[:count])
            assert draft.lacking[count - 1] == pytest.approx(left, abs=1e-9)
        assert draft.lacking[-1] <= 1e-4 < draft.lacking[-2]

    def test_the_first_is_the_best_single_one(self, rng: np.random.Generator) -> None:
        need = needs(rng)
        alone = [lost(need, np.array([unit])) for unit in range(30)]
        assert draft_units([[need]], 0.9).order[0] == np.argmin(alone)

    def test_of_units_that_say_the_same_one_is_enough(self, rng: np.random.Generator) -> None:
        values = np.repeat(rng.normal(size=(300, 4)), 5, axis=1)
        need = Need(np.cov(values.T, bias=True), rng.normal(size=(20, 2)))
        draft = draft_units([[need]], 1e-6)
        assert sorted(draft.order // 5) == [0, 1, 2, 3]

    def test_a_looser_loss_keeps_a_part(self, rng: np.random.Generator) -> None:
        draft = draft_units([[needs(rng)]], 1e-5)
        kept = [set(np.flatnonzero(draft.within(loss) == 0)) for loss in (0.3, 0.03, 0.003)]
        assert kept[0] < kept[1] < kept[2]

    def test_several_readers_count_together(self, rng: np.random.Generator) -> None:
        first, second = needs(rng), needs(rng)
        small = Need(first.covariance, 1e-6 * first.weight)
        alone = draft_units([[second]], 0.01).order
        np.testing.assert_array_equal(draft_units([[small, second]], 0.01).order, alone)


class TestSeveralGroups:
    def test_each_gets_the_units_that_work_for_it(self, rng: np.random.Generator) -> None:
        """Two halves of the units, of which each group's rows move one; the second group's outputs are tiny."""
        halves = np.arange(20) < 10
        found = draft_units(
            [
                [Need(np.diag(np.where(half, 1.0, 1e-6)), scale * rng.normal(size=(20, 2)))]
                for half, scale in ((halves, 1.0), (~halves, 1e-3))
            ],
            1e-4,
        ).within(1e-4)
        assert set(np.flatnonzero(found == 0)) == set(range(10))
        assert set(np.flatnonzero(found == 1)) == set(range(10, 20))

    def test_a_unit_goes_to_one_group_only_and_both_get_near(
        self, rng: np.random.Generator
    ) -> None:
        both = [needs(rng, units=40), needs(rng, units=40)]
        draft = draft_units([[need] for need in both], 0.3)
        assert np.unique(draft.order).size == draft.order.size
        labels = draft.within(0.3)
        for group, need in enumerate(both):
            assert lost(need, np.flatnonzero(labels == group)) <= 0.3

    def test_who_lacks_most_chooses(self, rng: np.random.Generator) -> None:
        draft = draft_units([[needs(rng)], [needs(rng)]], 0.4)
        assert draft.lacking[-1] <= 0.4
        assert (np.diff(draft.lacking) <= 1e-12).all()

    def test_a_pool_that_is_too_small_is_dealt_out(self, rng: np.random.Generator) -> None:
        draft = draft_units([[needs(rng, 8)], [needs(rng, 8)]], 1e-9)
        assert draft.order.size == 8
        assert set(draft.within(1e-9)) == {0, 1}

    def test_a_group_that_needs_nothing_gets_nothing(self, rng: np.random.Generator) -> None:
        need = needs(rng)
        nothing = Need(need.covariance, np.zeros((30, 0)))
        labels = draft_units([[nothing], [need]], 0.1).within(0.1)
        assert set(labels) == {APART, 1}

    def test_no_makeshift_is_taken_from_the_group_whose_unit_it_is(self) -> None:
        """The first group reads units 0 and 1, the second unit 2, which is nearly their sum."""
        covariance = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 2.01]])
        both = [[Need(covariance, np.array([[1.0], [1.0], [0.0]]))]]
        both.append([Need(covariance, np.array([[0.0], [0.0], [1.0]]))])
        belongs = np.array([[0.99, 0.01], [0.99, 0.01], [0.01, 0.99]])
        np.testing.assert_array_equal(draft_units(both, 1e-6, belongs).within(1e-6), [0, 0, 1])
        assert draft_units(both, 1e-6).within(1e-6)[2] == 0
