"""State graphs of recurrent operators on arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnx_decompose.analysis.recurrence import (
    CELLS,
    GATES,
    CellType,
    UnitGraph,
    atoms_in_order,
    carried_columns,
    unit_columns,
    unit_graph,
)


def masks(
    cell: CellType, hidden: int, edges: dict[tuple[int, int], int]
) -> tuple[np.ndarray, np.ndarray]:
    """W's mask of one input per unit, and R's with the edges (source, target) at the given gate."""
    state = np.zeros((hidden, GATES[cell] * hidden), bool)
    for (source, target), gate in edges.items():
        state[source, gate * hidden + target] = True
    return np.tile(np.eye(hidden, dtype=bool), (1, GATES[cell])), state


def graph_of(
    cell: CellType, hidden: int, edges: dict[tuple[int, int], int], *, cascade: bool = True
) -> UnitGraph:
    return unit_graph(*masks(cell, hidden, edges), cell, cascade=cascade)


def order_of(graph: UnitGraph) -> list[list[int]]:
    return [atom.tolist() for atom in atoms_in_order(graph)]


@pytest.mark.parametrize("cell", CELLS)
def test_an_edge_of_any_gate_is_an_edge(cell: CellType) -> None:
    for gate in range(GATES[cell]):
        graph = graph_of(cell, 3, {(0, 2): gate})
        assert np.argwhere(graph.edges).tolist() == [[0, 2]]
        assert (graph.inputs == np.eye(3, dtype=bool)).all()
        assert graph.gates == GATES[cell]


def test_columns_gate_by_gate() -> None:
    units = np.array([1, 3])
    assert unit_columns(units, 4, 3).tolist() == [1, 3, 5, 7, 9, 11]
    assert carried_columns(units, 4, "GRU").tolist() == [1, 3, 5, 7]
    assert carried_columns(units, 4, "RNN").tolist() == [1, 3]
    assert carried_columns(units, 4, "LSTM").tolist() == unit_columns(units, 4, 4).tolist()


@pytest.mark.parametrize("cell", ["RNN", "LSTM"])
def test_a_chain_is_as_many_atoms_in_order(cell: CellType) -> None:
    graph = graph_of(cell, 4, {(2, 0): 0, (0, 3): 0, (3, 1): 0})
    assert order_of(graph) == [[2], [0], [3], [1]]
    assert graph.condensation().layers == 4


def test_a_cycle_is_one_atom() -> None:
    graph = graph_of("LSTM", 4, {(0, 1): 0, (1, 0): 3, (1, 2): 2, (3, 3): 1})
    assert order_of(graph) == [[3], [0, 1], [2]]


class TestCandidateGate:
    def test_it_binds_its_ends(self) -> None:
        graph = graph_of("GRU", 4, {(0, 1): 2, (1, 2): 0, (2, 3): 1})
        assert order_of(graph) == [[0, 1], [2], [3]]
        assert graph.condensation().sccs == 4

    def test_what_lies_between_bound_units_is_bound_too(self) -> None:
        """0 and 3 are bound; 1 and 2 read 0 and are read by 3, so no order of operators could hold them apart."""
        graph = graph_of("GRU", 5, {(0, 3): 2, (0, 1): 0, (1, 2): 0, (2, 3): 1, (3, 4): 0})
        assert order_of(graph) == [[0, 1, 2, 3], [4]]

    def test_only_the_candidate_does(self) -> None:
        for gate, count in ((0, 2), (1, 2), (2, 1)):
            assert len(order_of(graph_of("GRU", 2, {(0, 1): gate}))) == count


def test_without_cascades_every_edge_binds() -> None:
    graph = graph_of("LSTM", 5, {(0, 1): 0, (3, 2): 1}, cascade=False)
    assert order_of(graph) == [[4], [0, 1], [2, 3]]


def test_components_stand_together_the_smallest_first() -> None:
    edges = {(0, 1): 0, (1, 2): 0, (5, 4): 0}
    assert order_of(graph_of("RNN", 7, edges)) == [[3], [6], [5], [4], [0], [1], [2]]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("seed", range(20))
def test_no_finer_partition_is_exact(cell: CellType, seed: int) -> None:
    """Against brute force: units share an atom if and only if closure under both conditions forces it."""
    rng = np.random.default_rng(seed)
    hidden = int(rng.integers(2, 9))
    state = rng.random((hidden, GATES[cell] * hidden)) < 0.5 / hidden
    graph = unit_graph(np.ones((1, state.shape[1]), bool), state, cell)
    order = atoms_in_order(graph)
    assert sorted(np.concatenate(order).tolist()) == list(range(hidden))
    place = np.empty(hidden, int)
    for number, atom in enumerate(order):
        place[atom] = number
    for source, target in np.argwhere(graph.edges):
        assert place[source] <= place[target]
    for source, target in np.argwhere(graph.binding):
        assert place[source] == place[target]
    # Reachability with binding edges both ways, by squaring: together if and only if each reaches the other.
    reach = graph.edges | graph.binding.T | np.eye(hidden, dtype=bool)
    for _ in range(hidden):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    for one, other in itertools.product(range(hidden), repeat=2):
        assert (place[one] == place[other]) == (reach[one, other] and reach[other, one])
