from __future__ import annotations

import itertools
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_decompose.analysis.structure import (
    ISOLATED,
    Edge,
    bipartite_components,
    condense,
    live_units,
    state_components,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]


def masks(rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]) -> Any:
    return st.tuples(rows, columns).flatmap(lambda shape: hnp.arrays(np.bool_, shape))


@st.composite
def state_graphs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Edge, ...]]:
    """Up to four axes, up to five sites between any two of them: residual and parallel sites too."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    ends = st.tuples(*[st.integers(0, len(sizes) - 1)] * 2)
    edges = [
        Edge(source, target, draw(hnp.arrays(np.bool_, (sizes[source], sizes[target]))))
        for source, target in draw(st.lists(ends, min_size=1, max_size=5))
    ]
    return tuple(sizes), tuple(edges)


def arcs(sizes: Sequence[int], edges: Sequence[Edge]) -> list[tuple[int, int]]:
    """Every edge between two nodes, numbered over all axes."""
    offsets = [0, *itertools.accumulate(sizes)]
    return [
        (offsets[edge.source] + int(i), offsets[edge.target] + int(j))
        for edge in edges
        for i, j in np.argwhere(edge.mask)
    ]


def reachable(start: set[int], pairs: list[tuple[int, int]]) -> set[int]:
    seen = set(start)
    while True:
        more = {head for tail, head in pairs if tail in seen} - seen
        if not more:
            return seen
        seen |= more


def expected_components(nodes: int, pairs: list[tuple[int, int]]) -> list[int]:
    """Component numbers by first node, one search at a time."""
    both = pairs + [(head, tail) for tail, head in pairs]
    touched = {node for pair in pairs for node in pair}
    labels = [ISOLATED] * nodes
    number = 0
    for node in range(nodes):
        if node in touched and labels[node] == ISOLATED:
            for other in reachable({node}, both):
                labels[other] = number
            number += 1
    return labels


@given(state_graphs())
def test_components_are_those_of_the_union_graph(
    graph: tuple[tuple[int, ...], tuple[Edge, ...]],
) -> None:
    sizes, edges = graph
    found = state_components(sizes, edges)
    labels = expected_components(sum(sizes), arcs(sizes, edges))
    assert [axis.size for axis in found.labels] == list(sizes)
    assert np.concatenate(found.labels).tolist() == labels
    assert found.count == max(labels) + 1
    assert found.isolated == labels.count(ISOLATED)
    assert found.sizes.tolist() == [labels.count(n) for n in range(found.count)]


def test_units_are_ascending_per_axis() -> None:
    mask = np.zeros((3, 4), bool)
    mask[2, [3, 1]] = True
    mask[0, 2] = True
    found = bipartite_components(mask)
    assert found.count == 2
    assert [units.tolist() for units in found.units(0)] == [[0], [2]]
    assert [units.tolist() for units in found.units(1)] == [[2], [1, 3]]
    assert found.isolated == 2  # input 1 and output 0


def test_components_join_across_blocks_of_rows() -> None:
    # The mask is read 1024 rows at a time: rows 0 and 3000 meet in column 1 only.
    mask = np.zeros((3001, 2), bool)
    mask[0, [0, 1]] = mask[3000, 1] = True
    found = bipartite_components(mask)
    assert found.count == 1
    assert found.isolated == 2999


def test_no_edge_is_no_component() -> None:
    found = bipartite_components(np.zeros((2, 3), bool))
    assert (found.count, found.isolated, found.sizes.size) == (0, 5, 0)


def test_a_residual_site_makes_one_axis_both_ends() -> None:
    # x + f(x): the two sites lead from axis 0 to 1 and back.
    first, second = np.zeros((2, 2), bool), np.zeros((2, 2), bool)
    first[0, 0] = second[0, 1] = True
    found = state_components((2, 2), [Edge(0, 1, first), Edge(1, 0, second)])
    assert [axis.tolist() for axis in found.labels] == [[0, 0], [0, ISOLATED]]


@given(state_graphs(), st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)))
def test_liveness_is_reachability(
    graph: tuple[tuple[int, ...], tuple[Edge, ...]], entries: set[int], exits: set[int]
) -> None:
    sizes, edges = graph
    varies, needed = live_units(sizes, edges, entries, exits)
    axis_of = [axis for axis, size in enumerate(sizes) for _ in range(size)]
    pairs = arcs(sizes, edges)
    from_entries = reachable({n for n, axis in enumerate(axis_of) if axis in entries}, pairs)
    to_exits = reachable(
        {n for n, axis in enumerate(axis_of) if axis in exits}, [(b, a) for a, b in pairs]
    )
    assert set(np.flatnonzero(np.concatenate(varies))) == from_entries
    assert set(np.flatnonzero(np.concatenate(needed))) == to_exits


def test_unneeded_units_die_in_cascade() -> None:
    # 0 -> a -> b, and nothing reads b: neither a nor b is needed.
    chain = [Edge(0, 1, np.eye(2, dtype=bool)), Edge(1, 2, np.eye(2, dtype=bool))]
    out = np.array([[True], [False]])
    _, needed = live_units((2, 2, 2, 1), [*chain, Edge(2, 3, out)], {0}, {3})
    assert [axis.tolist() for axis in needed] == [[True, False]] * 3 + [[True]]


@given(st.integers(1, 7).flatmap(lambda n: hnp.arrays(np.bool_, (n, n))))
def test_condensation_is_mutual_reachability(mask: BoolArray) -> None:
    nodes = mask.shape[0]
    pairs = [(int(i), int(j)) for i, j in np.argwhere(mask)]
    reach = [reachable({n}, pairs) for n in range(nodes)]
    found = condense(mask)
    for a, b in itertools.product(range(nodes), repeat=2):
        assert (found.labels[a] == found.labels[b]) == (a in reach[b] and b in reach[a])
    firsts = [int(np.flatnonzero(found.labels == n)[0]) for n in range(found.sccs)]
    assert firsts == sorted(firsts)
    # The layer of a component is the longest path of components that ends in it.
    for component in range(found.sccs):
        feeders = {
            int(found.labels[a])
            for a, b in pairs
            if found.labels[b] == component and found.labels[a] != component
        }
        longest = max((int(found.layer[f]) + 1 for f in feeders), default=0)
        assert found.layer[component] == longest
    assert found.layers == int(found.layer.max()) + 1


def test_condensation_of_a_chain_and_a_cycle() -> None:
    chain = np.eye(4, k=1, dtype=bool)
    assert (condense(chain).sccs, condense(chain).layers) == (4, 4)
    cycle = chain.copy()
    cycle[3, 0] = True
    assert (condense(cycle).sccs, condense(cycle).layers) == (1, 1)


@pytest.mark.parametrize("density", [0.001, 0.5, 1.0])
def test_a_large_mask_is_never_held_as_a_list_of_edges(
    density: float, rng: np.random.Generator
) -> None:
    mask = rng.random((2048, 2048), dtype=np.float32) < density
    tracemalloc.start()
    found = bipartite_components(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.count >= 1
    assert peak < 5 * mask.nbytes  # 4 M edges as index pairs would take 16 times the mask
