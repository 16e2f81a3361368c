"""The order in which units go, and what it is predicted to cost."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.analysis.removal import Product, Reader, Removal, at_price, removal_order


def _left(covariance: np.ndarray, weight: np.ndarray, kept: np.ndarray) -> float:
    """Variance of the outputs that a refit on ``kept`` misses, by least squares."""
    gram = covariance[np.ix_(kept, kept)]
    cross = covariance[kept] @ weight
    explained = np.einsum("ij,ij->", cross, np.linalg.solve(gram, cross))
    return float(np.einsum("ij,ij->", weight, covariance @ weight) - explained)


def _random(rng: np.random.Generator, units: int, outputs: int) -> Reader:
    samples = rng.normal(size=(4 * units, units)) @ rng.normal(size=(units, units))
    return Reader(np.cov(samples.T, bias=True), rng.normal(size=(units, outputs)))


def test_the_loss_is_that_of_a_refit() -> None:
    rng = np.random.default_rng(0)
    reader = _random(rng, 20, 7)
    removal = removal_order([reader])
    power = np.einsum("ij,ij->", reader.weight, reader.covariance @ reader.weight)
    for count in (1, 3, len(removal.order)):
        kept = np.setdiff1d(np.arange(20), removal.order[:count])
        assert removal.lost[count - 1] == pytest.approx(
            _left(reader.covariance, reader.weight, kept) / power, rel=1e-3, abs=1e-6
        )
    assert (np.diff(removal.lost) >= 0).all()


def test_each_step_takes_the_unit_of_least_loss_then() -> None:
    rng = np.random.default_rng(1)
    readers = [_random(rng, 12, 3), _random(rng, 12, 5)]
    removal = removal_order(readers)
    kept = np.arange(12)
    for unit in removal.order[:5]:
        losses = {
            other: sum(_left(r.covariance, r.weight, kept[kept != other]) for r in readers)
            for other in kept
        }
        assert losses[unit] == pytest.approx(min(losses.values()), rel=1e-3)
        kept = kept[kept != unit]


def test_of_two_units_that_say_the_same_one_goes_for_nothing() -> None:
    rng = np.random.default_rng(2)
    samples = rng.normal(size=(400, 6))
    samples[:, 5] = 2 * samples[:, 1]
    reader = Reader(np.cov(samples.T, bias=True), rng.normal(size=(6, 4)))
    removal = removal_order([reader])
    assert set(removal.within(1e-4).tolist()) < {1, 5}
    assert removal.within(1e-4).size == 1


def test_constant_units_and_unread_ones_go_first() -> None:
    rng = np.random.default_rng(3)
    samples = rng.normal(size=(300, 5))
    samples[:, 3] = 4.0
    weight = rng.normal(size=(5, 2))
    weight[0] = 0
    reader = Reader(np.cov(samples.T, bias=True), weight)
    assert {0, 3} <= set(removal_order([reader]).order[:2].tolist())


def test_nothing_goes_beyond_the_asked_loss() -> None:
    reader = _random(np.random.default_rng(4), 30, 4)
    removal = removal_order([reader], most=0.05)
    assert removal.lost[-1] <= 0.05
    assert removal.within(0.01).size < removal.order.size < 30
    assert removal.within(0.0).size == 0


def test_small_losses_are_told_where_there_are_enough_rows() -> None:
    """A unit that the others say but for 1e-4 of it: a loss of about 1e-9, far under what few rows can tell."""
    rng = np.random.default_rng(5)
    samples = rng.normal(size=(4000, 8))
    samples[:, 6] = samples[:, 0] - samples[:, 1] + 1e-4 * samples[:, 6]
    covariance, weight = np.cov(samples.T, bias=True), rng.normal(size=(8, 3))
    power = np.einsum("ij,ij->", weight, covariance @ weight)
    told = {}
    for rows in (4000.0, 10.0):
        removal = removal_order([Reader(covariance, weight, rows)])
        kept = np.setdiff1d(np.arange(8), removal.order[:1])
        told[rows] = removal.lost[0] / (_left(covariance, weight, kept) / power)
    assert told[4000.0] == pytest.approx(1.0, rel=0.05)
    assert told[10.0] > 10


@pytest.mark.parametrize("decay", [25.0, 40.0])
def test_the_loss_is_that_of_a_refit_where_units_nearly_repeat_each_other(decay: float) -> None:
    """Variances from 1 to e^-40: rounding in the inverse covariance is larger than many of its entries."""
    rng = np.random.default_rng(3)
    size = 200
    axes = np.linalg.qr(rng.normal(size=(size, size)))[0]
    covariance = (axes * np.exp(-np.arange(size) / size * decay)) @ axes.T
    reader = Reader(covariance, rng.normal(size=(size, 20)))
    removal = removal_order([reader])
    power = np.einsum("ij,ij->", reader.weight, covariance @ reader.weight)
    assert np.isfinite(removal.lost).all()
    assert removal.order.size < size
    for count in (size // 2, 3 * size // 4, removal.order.size):
        kept = np.setdiff1d(np.arange(size), removal.order[:count])
        assert removal.lost[count - 1] == pytest.approx(
            _left(covariance, reader.weight, kept) / power, rel=1e-2, abs=1e-8
        )


def _patches(rng: np.random.Generator, units: int, taps: int, outputs: int) -> Reader:
    rows = units * taps
    samples = rng.normal(size=(4 * rows, rows)) @ rng.normal(size=(rows, rows))
    weight = rng.normal(size=(rows, outputs))
    return Reader(np.cov(samples.T, bias=True), weight, taps=taps)


def _rows(units: np.ndarray, taps: int) -> np.ndarray:
    return (units[:, None] * taps + np.arange(taps)).ravel()


def test_rows_of_a_unit_go_together() -> None:
    """Readers with another number of taps each, as of a 3x3 and a 1x1 convolution that read the same channels."""
    rng = np.random.default_rng(6)
    readers = [_patches(rng, 10, 9, 4), _patches(rng, 10, 1, 30), _patches(rng, 10, 4, 6)]
    removal = removal_order(readers)
    power = sum(np.einsum("ij,ij->", r.weight, r.covariance @ r.weight) for r in readers)
    kept = np.arange(10)
    for unit, lost in zip(removal.order, removal.lost, strict=True):
        losses = {
            other: sum(
                _left(r.covariance, r.weight, _rows(kept[kept != other], r.taps))
                for r in readers
            )
            for other in kept
        }
        assert losses[unit] == pytest.approx(min(losses.values()), rel=1e-6)
        assert lost == pytest.approx(losses[unit] / power, rel=1e-5)
        kept = kept[kept != unit]
    assert removal.order.size > 4


def test_blocks_of_units_are_brought_up_to_date() -> None:
    rng = np.random.default_rng(7)
    reader = _patches(rng, 90, 3, 5)
    repeated = rng.permutation(90)[:80]
    others = rng.integers(0, 10, 80)
    basis = np.setdiff1d(np.arange(90), repeated)
    source, target = _rows(basis[others], 3), _rows(repeated, 3)
    turn = np.eye(270)
    turn[target] = turn[source]
    covariance = turn @ reader.covariance @ turn.T
    removal = removal_order([Reader(covariance, reader.weight, taps=3)])
    assert removal.within(1e-6).size == 80


def test_a_channel_that_the_others_say_goes_for_nothing() -> None:
    """Each tap of it is another channel's, and what it adds in all is large."""
    rng = np.random.default_rng(8)
    samples = rng.normal(size=(4000, 6, 3))
    samples[:, 4] = samples[:, 2] - 2 * samples[:, 0]
    covariance = np.cov(samples.reshape(4000, 18).T, bias=True)
    removal = removal_order([Reader(covariance, rng.normal(size=(18, 4)), taps=3)])
    assert removal.within(1e-7).size == 1
    assert removal.order[0] in {0, 2, 4}


class TestAtPrice:
    """Three sets in a chain: 10 inputs, 20, 40 and 20 units, 5 outputs."""

    SIZES = (20, 40, 20)
    PRODUCTS = (
        Product(None, 0, 10),
        Product(0, 1, 1),
        Product(1, 2, 1),
        Product(2, None, 5),
    )

    @pytest.fixture
    def removals(self) -> list[Removal]:
        rng = np.random.default_rng(3)
        return [
            Removal(rng.permutation(size), np.cumsum(np.sort(10 ** rng.uniform(-6, 0, size))))
            for size in self.SIZES
        ]

    def objective(self, removals: list[Removal], counts: list[int], price: float) -> float:
        first, second, third = (size - n for size, n in zip(self.SIZES, counts, strict=True))
        left = 10 * first + first * second + second * third + 5 * third
        lost = sum(r.lost[n - 1] for r, n in zip(removals, counts, strict=True) if n)
        return float(lost + price * left / (200 + 800 + 800 + 100))

    @pytest.mark.parametrize("price", [1e-3, 1e-2, 1e-1])
    def test_no_other_number_of_one_set_is_worth_more(
        self, price: float, removals: list[Removal]
    ) -> None:
        gone = at_price(removals, self.SIZES, self.PRODUCTS, price)
        counts = [units.size for units in gone]
        assert all(count > 0 for count in counts)
        least = self.objective(removals, counts, price)
        for number, size in enumerate(self.SIZES):
            for other in range(size + 1):
                changed = [*counts[:number], other, *counts[number + 1 :]]
                assert self.objective(removals, changed, price) >= least * (1 - 1e-12)

    def test_the_first_of_each_order_go(self, removals: list[Removal]) -> None:
        for removal, units in zip(
            removals, at_price(removals, self.SIZES, self.PRODUCTS, 1e-2), strict=True
        ):
            np.testing.assert_array_equal(units, removal.order[: units.size])

    def test_more_go_at_a_higher_price(self, removals: list[Removal]) -> None:
        counts = [
            sum(u.size for u in at_price(removals, self.SIZES, self.PRODUCTS, 10.0**k))
            for k in range(-9, 5)
        ]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, sum(self.SIZES))

    def test_of_two_alike_the_one_with_more_weights_loses_more(self) -> None:
        removal = Removal(np.arange(30), np.cumsum(10.0 ** np.linspace(-6, 0, 30)))
        products = (Product(None, 0, 100), Product(None, 1, 10))
        wide, narrow = at_price([removal, removal], (30, 30), products, 1e-2)
        assert wide.size > narrow.size > 0

    def test_a_state_that_makes_itself_saves_more_of_itself(self) -> None:
        """32 units with 4 gates each: the first that go save 4 * 63 entries of R each, and 4 * 8 of W."""
        lost = np.cumsum(np.geomspace(1e-6, 1, 32))
        removal = Removal(np.arange(32), lost)
        products = (Product(0, 0, 4), Product(None, 0, 32))
        (units,) = at_price([removal], (32,), products, 0.05)
        left = 32 - np.arange(33)
        work = (4 * left**2 + 32 * left) / (4 * 32**2 + 32 * 32)
        assert units.size == np.argmin(np.concatenate([[0], lost]) + 0.05 * work)


def test_of_units_that_no_output_needs_all_go_for_nothing() -> None:
    rng = np.random.default_rng(4)
    covariance = _random(rng, 70, 1).covariance
    for taps in (1, 2):
        removal = removal_order([Reader(covariance, np.zeros((70, 0)), taps=taps)])
        assert sorted(removal.order.tolist()) == list(range(70 // taps))
        assert not removal.lost.any()
