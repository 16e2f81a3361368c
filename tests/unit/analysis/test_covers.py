from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_decompose.analysis.covers import Cover, find_covers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]

MASKS: Any = st.tuples(st.integers(2, 12), st.integers(2, 12)).flatmap(
    lambda shape: hnp.arrays(np.bool_, shape)
)


class Entries:
    """Price of a group: the entries it holds and so much more; gathered inputs cost ``gather`` more each."""

    def __init__(self, overhead: float, gather: float) -> None:
        self.overhead = overhead
        self.gather = gather

    def __call__(
        self, inputs: FloatArray, outputs: FloatArray, *, gathered: bool
    ) -> FloatArray:
        price = inputs * outputs + self.overhead
        return price + self.gather * inputs if gathered else price

    def of(self, cover: Cover) -> float:
        total = 0.0
        for rows, columns in zip(cover.inputs, cover.outputs, strict=True):
            sizes = np.array([rows.size], float), np.array([columns.size], float)
            total += float(self(*sizes, gathered=bool(np.ptp(rows) >= rows.size))[0])
        return total


def check(mask: BoolArray, cover: Cover) -> None:
    """What makes a cover exact."""
    outputs = np.concatenate(cover.outputs)
    assert sorted(outputs.tolist()) == list(range(mask.shape[1]))
    left = mask.copy()
    for rows, columns in zip(cover.inputs, cover.outputs, strict=True):
        assert rows.size > 0
        assert columns.size > 0
        assert (np.diff(rows) > 0).all()
        assert (np.diff(columns) > 0).all()
        left[np.ix_(rows, columns)] = False
    assert not left.any()


def banded(inputs: int, outputs: int, width: int) -> BoolArray:
    centre = np.linspace(0, inputs - 1, outputs)
    mask: BoolArray = np.abs(np.arange(inputs)[:, None] - centre) <= width / 2
    return mask


@settings(max_examples=100)
@given(
    MASKS,
    st.sampled_from([0.0, 1.0, 8.0]),
    st.sampled_from([0.0, 1.0, 1e6]),
    st.integers(1, 2),
    st.integers(2, 5),
)
def test_every_cover_holds_every_entry(
    mask: BoolArray, overhead: float, gather: float, least: int, most: int
) -> None:
    price = Entries(overhead, gather)
    for cover in find_covers(mask, price, least_groups=least, most_groups=most):
        check(mask, cover)
        assert 2 <= len(cover.inputs) <= most
        # In the form's own order of the inputs, what is a run there is scattered in the mask.
        if least == 1 and "between" not in cover.found:
            assert price.of(cover) <= mask.size + overhead


@settings(max_examples=60)
@given(
    hnp.arrays(np.bool_, st.tuples(st.integers(2, 6), st.integers(2, 6))),
    st.sampled_from([0.5, 3.0]),
)
def test_the_cuts_are_the_cheapest_of_all(mask: BoolArray, overhead: float) -> None:
    price = Entries(overhead, gather=0.5)
    outputs = mask.shape[1]
    prices = []
    for inner in itertools.chain.from_iterable(
        itertools.combinations(range(1, outputs), count) for count in range(outputs)
    ):
        total = 0.0
        for start, stop in itertools.pairwise((0, *inner, outputs)):
            rows = np.flatnonzero(mask[:, start:stop].any(axis=1))
            run = float(np.ptp(rows)) + 1 if rows.size else 1.0
            exact, width = float(max(rows.size, 1)), float(stop - start)
            total += overhead + min(run * width, exact * width + 0.5 * exact)
        prices.append((total, len(inner) + 1))
    covers = list(find_covers(mask, price, most_groups=outputs))
    own = [cover for cover in covers if "given order" in cover.found]
    cheapest = min(prices)[0]
    if own:
        assert price.of(own[0]) <= cheapest + 1e-9
    elif np.count_nonzero(mask) <= 0.97 * mask.size:
        assert any(total <= cheapest + 1e-9 for total, groups in prices if groups == 1)


def test_a_band_is_read_in_overlapping_runs() -> None:
    mask = banded(64, 32, 8)
    covers = list(find_covers(mask, Entries(20.0, 1e6), most_groups=64))
    for cover in covers:
        check(mask, cover)
    best = min(covers, key=lambda cover: cover.entries)
    assert best.found == "cut in the given order"
    assert len(best.inputs) > 4
    assert best.entries < 0.35 * mask.size
    assert all(np.ptp(rows) + 1 == rows.size for rows in best.inputs)
    assert any(np.intersect1d(a, b).size for a, b in itertools.pairwise(best.inputs))


def test_a_band_in_another_order_of_outputs_is_found(rng: np.random.Generator) -> None:
    mask = banded(64, 32, 8)
    plain = list(find_covers(mask, Entries(20.0, 1e6), most_groups=64))
    order = rng.permutation(32)
    covers = list(find_covers(mask[:, order], Entries(20.0, 1e6), most_groups=64))
    found = [cover for cover in covers if cover.found == "cut in the order of the mean input"]
    check(mask[:, order], found[0])
    assert found[0].entries == plain[0].entries


def test_dense_outputs_have_a_group_of_their_own_and_common_inputs_are_gathered() -> None:
    mask = banded(96, 96, 6)
    mask[0] = True  # an input that every output reads
    mask[:, 95] = True  # an output that reads every input
    cover = next(iter(find_covers(mask, Entries(40.0, 0.1), most_groups=64)))
    check(mask, cover)
    assert cover.outputs[-1].size <= 2
    assert cover.inputs[-1].size == 96
    inner = cover.inputs[len(cover.inputs) // 2]
    assert inner[0] == 0
    assert inner[1] > 1
    assert cover.entries < 0.4 * mask.size


def test_the_blocks_of_a_triangular_form_become_groups(rng: np.random.Generator) -> None:
    label = np.repeat(np.arange(4), 8)
    mask = label[:, None] <= label
    first, second = rng.permutation(32), rng.permutation(32)
    shuffled = mask[np.ix_(first, second)]
    covers = list(find_covers(shuffled, Entries(1.0, 0.0), most_groups=64))
    form = [
        cover
        for cover in covers
        if cover.found == "block triangular: 4 blocks, cut between them"
    ]
    assert len(form) == 2  # gathered from the given order, and in runs of the form's own
    for cover in form:
        check(shuffled, cover)
        for block, (rows, columns) in enumerate(zip(cover.inputs, cover.outputs, strict=True)):
            assert set(columns.tolist()) == set(np.flatnonzero(label[second] == block).tolist())
            assert set(rows.tolist()) == set(np.flatnonzero(label[first] <= block).tolist())


def test_dense_masks_and_single_lines_have_no_cover() -> None:
    price = Entries(0.0, 0.0)
    nearly = np.ones((20, 20), bool)
    nearly[0, :10] = False
    for mask in (
        np.ones((8, 8), bool),
        nearly,
        np.eye(1, 8, dtype=bool),
        np.eye(8, 1, dtype=bool),
    ):
        assert list(find_covers(mask, price, most_groups=8)) == []


def test_outputs_that_read_nothing_join_a_group() -> None:
    mask = np.kron(np.eye(2, dtype=bool), np.ones((8, 8), bool))
    mask[:, [3, 4, 8]] = False
    cover = next(iter(find_covers(mask, Entries(60.0, 1e6), most_groups=8)))
    check(mask, cover)
    assert len(cover.inputs) == 2


@pytest.mark.parametrize("outputs", [300, 2000])
def test_wide_masks_are_cut_at_some_positions_only(outputs: int) -> None:
    mask = banded(outputs, outputs, 16)
    mask[:, 7] = True  # at no even position
    cover = next(iter(find_covers(mask, Entries(outputs / 4, 1e6), most_groups=64)))
    check(mask, cover)
    assert [7] in [columns.tolist() for columns in cover.outputs]
    assert cover.entries < 0.2 * mask.size
