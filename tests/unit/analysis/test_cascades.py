from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_decompose.analysis.cascades import (
    Cascade,
    States,
    condense_states,
    find_cascades,
)
from onnx_decompose.analysis.structure import Edge, condense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]


class Entries:
    """Price of a run: the entries that it holds, so much more, and so much for each unit read of other runs."""

    def __init__(self, states: States, overhead: float = 1.0, exchange: float = 0.0) -> None:
        self.states, self.overhead, self.exchange = states, overhead, exchange

    def __call__(
        self,
        owned: Sequence[FloatArray],
        read: Sequence[FloatArray],
        apart: Sequence[BoolArray],
    ) -> FloatArray:
        total = np.full(owned[0].shape, self.overhead)
        for edge in self.states.edges:
            total += read[edge.source] * owned[edge.target]
        for axis, others in enumerate(apart):
            total += self.exchange * read[axis] * others
        return total


def check(states: States, cascade: Cascade) -> None:
    """What makes a cascade exact, and possible to write."""
    for axis, size in enumerate(states.sizes):
        owned = [run[axis] for run in cascade.owned]
        read = [run[axis] for run in cascade.read]
        assert all(units.size > 0 for units in (*owned, *read))
        side_by_side = np.concatenate(owned)
        if axis in states.made:
            assert np.unique(side_by_side).size == side_by_side.size
        if axis in states.exits:
            assert side_by_side.size == size
        place = np.full(size, -1)
        place[side_by_side] = np.arange(side_by_side.size)
        mixed = any(not np.array_equal(a, b) for a, b in zip(owned, read, strict=True))
        for units, same in zip(read, owned, strict=True):
            assert axis in states.made or np.array_equal(units, same)
            assert not mixed or (np.diff(place[units]) == 1).all()
            assert mixed or (np.diff(units) > 0).all()
    for edge in states.edges:
        needed = edge.mask.copy()
        if edge.target not in states.exits:  # what nothing reads is not made
            read_by = [e.mask.any(axis=1) for e in states.edges if e.source == edge.target]
            needed &= np.any(read_by, axis=0) if read_by else False
        for own, inputs in zip(cascade.owned, cascade.read, strict=True):
            needed[np.ix_(inputs[edge.source], own[edge.target])] = False
        assert not needed.any()


def chain(labels: Sequence[IntArray]) -> States:
    """One site after another, block b of each axis read by the blocks b, b + 1, ... of the next."""
    edges = [
        Edge(axis, axis + 1, labels[axis][:, None] <= labels[axis + 1])
        for axis in range(len(labels) - 1)
    ]
    return States([axis.size for axis in labels], edges, {0}, {len(labels) - 1})


def partition(labels: IntArray, units: Sequence[IntArray]) -> list[set[int]]:
    return [set(labels[part].tolist()) for part in units]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_nested_inputs_of_a_rectangular_chain(count: int, rng: np.random.Generator) -> None:
    """Inputs and outputs are permuted each in its own way, and there are more hidden units than either."""
    labels = [rng.permutation(np.arange(size) % count) for size in (30, 60, 45)]
    states = chain(labels)
    found = list(find_cascades(states, Entries(states), most_runs=8))
    for cascade in found:
        check(states, cascade)
    nested = next(c for c in found if c.found == "cut in the order of the inputs' readers")
    for axis in (1, 2):
        assert partition(labels[axis], [run[axis] for run in nested.owned]) == [
            {b} for b in range(count)
        ]
        source = [run[axis - 1] for run in nested.read]
        assert partition(labels[axis - 1], source) == [set(range(b + 1)) for b in range(count)]


class TestCondensation:
    def test_of_a_square_site_with_permuted_units(self, rng: np.random.Generator) -> None:
        labels = rng.permutation(np.repeat(np.arange(3), 8))
        mask = (labels[:, None] <= labels) & ~np.eye(24, dtype=bool)
        states = States([24, 24], [Edge(0, 1, mask)], {0}, {1})
        found = condense_states(states)
        assert found is not None
        assert found.condensation.sccs == condense(mask).sccs == 3
        assert found.condensation.layers == 3
        for axis in found.labels:
            pairs = np.unique(np.stack([axis, labels]), axis=1)
            assert pairs.shape[1] == 3
        order = [int(labels[found.labels[0] == scc][0]) for scc in found.order]
        assert order == [0, 1, 2]

    def test_exit_and_entry_of_one_size_are_tied(self, rng: np.random.Generator) -> None:
        state = rng.permutation(np.arange(12) % 3)
        hidden = rng.permutation(np.arange(20) % 3)
        found = condense_states(chain([state, hidden, state]))
        assert found is not None
        assert found.condensation.sccs == 3

    def test_nothing_leads_back(self) -> None:
        ones = np.ones((3, 4), bool)
        assert condense_states(States([3, 4], [Edge(0, 1, ones)], {0}, {1})) is None

    def test_a_dense_region_is_seen_at_once(self) -> None:
        ones = np.ones((6, 6), bool)
        edges = [Edge(0, 1, ones), Edge(1, 0, ones)]
        assert condense_states(States([6, 6], edges, {0}, {0})) is None

    def test_what_no_edge_joins_stays_apart_in_the_order(self) -> None:
        """Two cascades of two, side by side: layers would take one of each in turn."""
        group = np.repeat(np.arange(4), 2)
        below = np.zeros((4, 4), bool)
        below[[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 2, 3]] = True
        mask = below[np.ix_(group, group)]
        found = condense_states(States([8], [Edge(0, 0, mask)], {0}, {0}))
        assert found is not None
        assert found.condensation.layers == 2
        assert [int(group[found.labels[0] == scc][0]) for scc in found.order] == [0, 2, 1, 3]


def test_an_exchange_that_is_dear_leaves_one_run(rng: np.random.Generator) -> None:
    state = rng.permutation(np.arange(12) % 3)
    mask = state[:, None] <= state
    states = States([12, 12], [Edge(0, 1, mask), Edge(1, 0, mask)], {0}, {0})
    assert list(find_cascades(states, Entries(states), most_runs=8))
    dear = Entries(states, exchange=100.0)
    assert not list(find_cascades(states, dear, most_runs=8))
    forced = list(find_cascades(states, dear, least_runs=2, most_runs=8))
    assert forced
    for cascade in forced:
        check(states, cascade)
        assert len(cascade.owned) == 2


@pytest.mark.parametrize(
    ("entries", "exits"),
    [({0}, {0, 1}), (set(), {1})],
    ids=["an input is read outside", "a source that nothing makes"],
)
def test_regions_that_are_no_cascade(entries: set[int], exits: set[int]) -> None:
    mask = np.tri(8, dtype=bool).T
    states = States([8, 8], [Edge(0, 1, mask)], entries, exits)
    assert not list(find_cascades(states, Entries(states), most_runs=8))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    density=st.sampled_from([0.1, 0.3, 0.6]),
    back=st.booleans(),
    least=st.sampled_from([1, 2]),
)
def test_every_cascade_is_exact(
    seed: int, sizes: list[int], density: float, back: bool, least: int
) -> None:
    rng = np.random.default_rng(seed)
    ends = [(axis, axis + 1) for axis in range(len(sizes) - 1)]
    ends += [(len(sizes) - 1, 0)] if back else []
    edges = [Edge(a, b, rng.random((sizes[a], sizes[b])) < density) for a, b in ends]
    exits = {0} if back else {len(sizes) - 1}
    if rng.random() < 0.3:
        exits.add(1)
    states = States(sizes, edges, {0}, exits)
    price = Entries(states, overhead=0.1)
    for cascade in find_cascades(states, price, least_runs=least, most_runs=4):
        check(states, cascade)
        assert 2 <= len(cascade.owned) <= 4
