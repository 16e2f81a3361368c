"""Structure of a supported mask: components, liveness, condensation, layers.

A mask of shape (K, N) is the biadjacency matrix of one site: entry (i, j) is the edge from input i to output j.
Several sites share a *state graph* whose nodes are the units of the axes between them; its components are the
independent substructures (Jin, arXiv 2601.15871, section 4; here generalized from one square graph to any region).

scipy.sparse.csgraph does the graph work. Its labels come in no promised order, so they are renumbered here:
component 0 holds the smallest node, component 1 the smallest node outside component 0, and so on.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.intp]

__all__ = [
    "ISOLATED",
    "Components",
    "Condensation",
    "Edge",
    "bipartite_components",
    "condense",
    "condense_graph",
    "live_units",
    "state_components",
]

ISOLATED = -1
"""Label of a node without any edge."""

_ROWS_AT_A_TIME = 1024


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """One site of a state graph: its supported mask from one axis to another.

    Attributes:
        source: index of the axis that the site reads.
        target: index of the axis that the site writes.
        mask: (K, N) bool, K and N the sizes of the two axes.
    """

    source: int
    target: int
    mask: BoolArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Components:
    """Connected components with at least one edge, and what is outside them.

    Attributes:
        labels: per axis, an int array of its size: component number, or ``ISOLATED``.
        count: components with at least one edge.
    """

    labels: tuple[IntArray, ...]
    count: int

    @property
    def isolated(self) -> int:
        """Nodes without any edge, over all axes."""
        return sum(int(np.count_nonzero(axis == ISOLATED)) for axis in self.labels)

    @property
    def sizes(self) -> IntArray:
        """(count,) nodes of each component, over all axes."""
        total = np.zeros(self.count, dtype=np.intp)
        for axis in self.labels:
            total += np.bincount(axis[axis != ISOLATED], minlength=self.count)
        return total

    def units(self, component: int) -> tuple[IntArray, ...]:
        """Per axis, the ascending unit numbers that belong to ``component``."""
        return tuple(np.flatnonzero(axis == component) for axis in self.labels)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Condensation:
    """Strongly connected components of a square site and their DAG's layers.

    Attributes:
        sccs: number of strongly connected components (a node alone counts as one).
        labels: (K,) component of each node, numbered by smallest node.
        layer: (sccs,) topological generation of each component: 0 for those that nothing feeds.
    """

    sccs: int
    labels: IntArray
    layer: IntArray

    @property
    def layers(self) -> int:
        """Number of topological generations."""
        return int(self.layer.max()) + 1 if self.layer.size else 0


def bipartite_components(mask: BoolArray) -> Components:
    """Components of one rectangular site, ``mask`` of shape (K, N); axis 0 is inputs, axis 1 outputs."""
    return state_components(mask.shape, [Edge(0, 1, mask)])


def state_components(axis_sizes: Sequence[int], edges: Sequence[Edge]) -> Components:
    """Components of the union graph over all sites of a region.

    Args:
        axis_sizes: units of each axis.
        edges: the sites; an axis may be written and read by many of them.
    """
    offsets = np.concatenate([[0], np.cumsum(axis_sizes)]).astype(np.intp)
    nodes = int(offsets[-1])
    labels: NDArray[np.integer[Any]] = np.arange(nodes, dtype=np.int32)
    rows = columns = np.empty(0, dtype=np.intp)
    # Exact without ever holding a dense mask as an edge list: only edges that still join two components are
    # looked at, one per row and one per column at a time, until none is left.
    for edge in edges:
        for start in range(0, edge.mask.shape[0], _ROWS_AT_A_TIME):
            block = edge.mask[start : start + _ROWS_AT_A_TIME]
            first_row, first_column = offsets[edge.source] + start, offsets[edge.target]
            while True:
                inputs = labels[first_row : first_row + block.shape[0], None]
                outputs = labels[first_column : first_column + block.shape[1]]
                r, c = _one_per_line(block & (inputs != outputs))
                if r.size == 0:
                    break
                rows = np.concatenate([rows, r + first_row])
                columns = np.concatenate([columns, c + first_column])
                graph = sparse.coo_array(
                    (np.ones(rows.size, np.int8), (rows, columns)), (nodes, nodes)
                )
                labels = csgraph.connected_components(graph.tocsr(), directed=False)[1]
    # A node with an edge to another was alone at first, so one of them has been taken; edges to itself join nothing.
    touched = np.zeros(nodes, dtype=bool)
    touched[rows] = touched[columns] = True
    for edge in edges:
        if edge.source == edge.target:
            touched[offsets[edge.source] + np.flatnonzero(edge.mask.diagonal())] = True
    numbers = _by_first_node(np.where(touched, labels, ISOLATED))
    per_axis = tuple(numbers[a:b] for a, b in itertools.pairwise(offsets))
    return Components(per_axis, count=int(numbers.max(initial=ISOLATED)) + 1)


def live_units(
    axis_sizes: Sequence[int], edges: Sequence[Edge], entry_axes: set[int], exit_axes: set[int]
) -> tuple[tuple[BoolArray, ...], tuple[BoolArray, ...]]:
    """Cascade through a region: which units vary, and which are needed.

    A unit varies if some entry reaches it along supported edges; it is needed if it reaches some exit. A unit that
    is not needed can be dropped exactly. One that does not vary is a constant (its bias through its activations).

    Args:
        axis_sizes: units of each axis.
        edges: the sites.
        entry_axes: axes whose units come from outside the region.
        exit_axes: axes whose units are read outside the region.

    Returns:
        ``varies`` and ``needed``: per axis, bool arrays of its size.
    """
    varies = [np.full(size, axis in entry_axes) for axis, size in enumerate(axis_sizes)]
    needed = [np.full(size, axis in exit_axes) for axis, size in enumerate(axis_sizes)]
    changed = True
    while changed:
        changed = False
        for edge in edges:
            changed |= _spread(varies[edge.source], edge.mask, varies[edge.target])
        for edge in reversed(edges):
            changed |= _spread(needed[edge.target], edge.mask.T, needed[edge.source])
    return tuple(varies), tuple(needed)


def condense(mask: BoolArray) -> Condensation:
    """Strongly connected components and topological layers of a square site, ``mask`` of shape (K, K)."""
    return condense_graph(sparse.csr_array(mask))


def condense_graph(graph: Any) -> Condensation:
    """The same of a ``scipy.sparse.csr_array`` of edges, (K, K)."""
    _, labels = csgraph.connected_components(graph, directed=True, connection="strong")
    labels = _by_first_node(labels)
    count = int(labels.max(initial=-1)) + 1
    rows, columns = graph.nonzero()
    tails, heads = labels[rows], labels[columns]
    across = tails != heads
    dag = sparse.csr_array(
        (np.ones(np.count_nonzero(across), dtype=np.int8), (tails[across], heads[across])),
        shape=(count, count),
    )
    dag.sum_duplicates()
    return Condensation(count, labels, _generations(dag))


def _generations(dag: Any) -> IntArray:
    """Length of the longest path that ends in each node of a DAG (Kahn's algorithm, a generation at a time)."""
    waiting = np.bincount(dag.indices, minlength=dag.shape[0])
    generation = np.zeros(dag.shape[0], dtype=np.intp)
    front = np.flatnonzero(waiting == 0)
    step = 0
    while front.size:
        generation[front] = step
        heads = dag[front].indices
        waiting -= np.bincount(heads, minlength=waiting.size)
        candidates = np.unique(heads)
        front = candidates[waiting[candidates] == 0]
        step += 1
    return generation


def _spread(known: BoolArray, mask: BoolArray, target: BoolArray) -> bool:
    """Mark in ``target`` what ``known`` reaches through ``mask``; True if that marked anything new."""
    reached = mask.any(axis=0, where=known[:, None]) & ~target
    target |= reached
    return bool(reached.any())


def _by_first_node(labels: NDArray[np.integer[Any]]) -> IntArray:
    """Renumber ``labels`` in order of first appearance; ``ISOLATED`` stays."""
    kept = labels != ISOLATED
    values, first, inverse = np.unique(labels[kept], return_index=True, return_inverse=True)
    rank = np.empty(values.size, dtype=np.intp)
    rank[np.argsort(first)] = np.arange(values.size)
    renumbered = np.full(labels.shape, ISOLATED, dtype=np.intp)
    renumbered[kept] = rank[inverse]
    return renumbered


def _one_per_line(mask: BoolArray) -> tuple[IntArray, IntArray]:
    """One entry of every nonempty row and one of every nonempty column of ``mask``."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return (
        np.concatenate([rows, mask[:, columns].argmax(axis=0)]),
        np.concatenate([mask[rows].argmax(axis=1), columns]),
    )
