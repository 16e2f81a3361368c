from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from scipy.sparse import csgraph

from onnx_decompose.analysis.triangular import (
    FREE,
    BlockTriangularForm,
    block_triangular_form,
    dulmage_mendelsohn,
    maximum_matching,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.intp]

MASKS: Any = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(np.bool_, shape)
)


def block_labels(form: BlockTriangularForm) -> tuple[IntArray, IntArray]:
    """Block of each input and of each output."""
    labels: list[IntArray] = []
    for order, starts in ((form.rows, form.row_starts), (form.columns, form.column_starts)):
        label = np.empty(order.size, np.intp)
        label[order] = np.repeat(np.arange(form.blocks), np.diff(starts))
        labels.append(label)
    return labels[0], labels[1]


def partition(*axes: IntArray) -> set[frozenset[tuple[int, int]]]:
    """Groups of (axis, unit) that have one label."""
    groups: dict[int, set[tuple[int, int]]] = {}
    for axis, labels in enumerate(axes):
        for unit, label in enumerate(labels):
            groups.setdefault(int(label), set()).add((axis, unit))
    return set(map(frozenset, groups.values()))


def hidden(
    rng: np.random.Generator, sizes: list[tuple[int, int]], density: float
) -> tuple[BoolArray, IntArray, IntArray]:
    """A block upper triangular mask in a random order, with the block of each input and output."""
    rows, columns = (
        np.repeat(np.arange(len(sizes)), [s[axis] for s in sizes]) for axis in (0, 1)
    )
    mask = (rows[:, None] <= columns) & (rng.random((rows.size, columns.size)) < density)
    mask |= rows[:, None] == columns
    first, second = rng.permutation(rows.size), rng.permutation(columns.size)
    return mask[np.ix_(first, second)], rows[first], columns[second]


@settings(max_examples=200)
@given(MASKS)
def test_matchings_are_maximum(mask: BoolArray) -> None:
    row_of = maximum_matching(mask)
    matched = row_of != FREE
    assert np.unique(row_of[matched]).size == np.count_nonzero(matched)
    assert mask[row_of[matched], np.flatnonzero(matched)].all()
    best = csgraph.maximum_bipartite_matching(sparse.csr_array(mask), perm_type="row")
    assert np.count_nonzero(matched) == np.count_nonzero(best >= 0)


@settings(max_examples=200)
@given(MASKS)
def test_coarse_parts_have_the_shape_that_defines_them(mask: BoolArray) -> None:
    found = dulmage_mendelsohn(mask)
    for parts, size in ((found.rows, mask.shape[0]), (found.columns, mask.shape[1])):
        assert sorted(itertools.chain(*(part.tolist() for part in parts))) == list(range(size))
    # Below the diagonal there is nothing.
    for row_part, column_part in ((1, 0), (2, 0), (2, 1)):
        assert not mask[np.ix_(found.rows[row_part], found.columns[column_part])].any()
    row_of, matched = found.row_of, found.row_of != FREE
    # The horizontal part matches all its inputs, the vertical one all its outputs, and the square both.
    for part in range(3):
        columns = found.columns[part]
        inside = row_of[columns][matched[columns]]
        assert set(inside) <= set(found.rows[part])
        pairs = (found.rows[part].size, columns.size)
        assert inside.size == min(pairs)
        assert (pairs[0] > pairs[1]) - (pairs[0] < pairs[1]) in ({-1, 0}, {0}, {0, 1})[part]


@settings(max_examples=200)
@given(MASKS)
def test_the_form_is_block_upper_triangular(mask: BoolArray) -> None:
    form = block_triangular_form(mask)
    assert sorted(form.rows) == list(range(mask.shape[0]))
    assert sorted(form.columns) == list(range(mask.shape[1]))
    assert (form.row_starts[-1], form.column_starts[-1]) == mask.shape
    rows, columns = block_labels(form)
    assert not (mask & (rows[:, None] > columns)).any()
    for starts, order in ((form.row_starts, form.rows), (form.column_starts, form.columns)):
        for start, stop in itertools.pairwise(starts):
            assert (np.diff(order[start:stop]) > 0).all()


@settings(max_examples=100)
@given(MASKS, st.integers(0, 2**32 - 1))
def test_the_blocks_do_not_depend_on_the_order_of_the_units(mask: BoolArray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (rng.permutation(size) for size in mask.shape)
    rows, columns = block_labels(block_triangular_form(mask))
    shuffled = block_labels(block_triangular_form(mask[np.ix_(first, second)]))
    assert partition(rows[first], columns[second]) == partition(*shuffled)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize(
    "sizes",
    [
        [(3, 3)] * 5,
        [(1, 1)] * 20,
        [(2, 5), (4, 4), (1, 1), (6, 2)],  # more outputs first, more inputs last
        [(64, 64)] * 4,
    ],
)
def test_hidden_blocks_are_recovered(
    rng: np.random.Generator, sizes: list[tuple[int, int]], density: float
) -> None:
    mask, rows, columns = hidden(rng, sizes, density)
    form = block_triangular_form(mask)
    assert form.blocks == len(sizes)
    assert partition(*block_labels(form)) == partition(rows, columns)


def test_units_without_entries_are_blocks_of_their_own() -> None:
    mask = np.zeros((4, 3), bool)
    mask[1, 2] = True
    form = block_triangular_form(mask)
    assert form.rows.tolist() == [1, 0, 2, 3]
    assert form.columns.tolist() == [0, 1, 2]
    assert form.row_starts.tolist() == [0, 0, 1, 4]
    assert form.column_starts.tolist() == [0, 2, 3, 3]
    assert block_triangular_form(np.zeros((0, 0), bool)).blocks == 0


def test_a_triangular_matrix_has_as_many_blocks_as_units() -> None:
    form = block_triangular_form(np.tri(6, dtype=bool))
    assert form.blocks == 6
    assert form.rows.tolist() == form.columns.tolist() == [5, 4, 3, 2, 1, 0]


def test_a_large_mask_takes_seconds(rng: np.random.Generator) -> None:
    mask, rows, columns = hidden(rng, [(256, 256)] * 8, 0.05)
    start = time.perf_counter()
    form = block_triangular_form(mask)
    assert time.perf_counter() - start < 20
    assert partition(*block_labels(form)) == partition(rows, columns)
