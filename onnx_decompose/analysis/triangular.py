"""Dulmage-Mendelsohn decomposition and block triangular form of a rectangular mask.

A mask of shape (K, N) is the biadjacency matrix of a bipartite graph, inputs against outputs. A maximum matching
splits it in one way only, whichever matching was found (Dulmage and Mendelsohn 1958):

              outputs   horizontal   square   vertical
    inputs
    horizontal              x           x         x         more outputs than inputs
    square                              x         x         a perfect matching
    vertical                                      x         more inputs than outputs

The horizontal and the vertical part fall into connected components, the square part into the strongly connected
components of its matched digraph (Pothen and Fan, "Computing the block triangular form of a sparse matrix", 1990).
An output then reads inputs of its own block and of earlier ones only.

The matching is made here: ``scipy.sparse.csgraph.maximum_bipartite_matching`` takes minutes on a mask of 8192 by
8192 with a few million entries.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.structure import ISOLATED, bipartite_components, condense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.intp]

__all__ = [
    "FREE",
    "BlockTriangularForm",
    "DulmageMendelsohn",
    "block_triangular_form",
    "dulmage_mendelsohn",
    "maximum_matching",
]

FREE = -1
"""Partner of a node that the matching leaves out."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DulmageMendelsohn:
    """The coarse decomposition; each part ascending.

    Attributes:
        rows: inputs of the horizontal, the square and the vertical part.
        columns: outputs of the same three parts.
        row_of: (N,) matched input of each output, or ``FREE``.
    """

    rows: tuple[IntArray, IntArray, IntArray]
    columns: tuple[IntArray, IntArray, IntArray]
    row_of: IntArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BlockTriangularForm:
    """Orders in which a mask is block upper triangular.

    ``mask[np.ix_(rows, columns)]`` has nothing under its diagonal blocks: block ``b`` holds rows ``row_starts[b]`` to
    ``row_starts[b + 1]`` and columns alike. A block may have no rows (outputs that read nothing) or no columns.

    Attributes:
        rows: (K,) order of the inputs.
        columns: (N,) order of the outputs.
        row_starts: (blocks + 1,) positions in ``rows``.
        column_starts: (blocks + 1,) positions in ``columns``.
    """

    rows: IntArray
    columns: IntArray
    row_starts: IntArray
    column_starts: IntArray

    @property
    def blocks(self) -> int:
        """Diagonal blocks."""
        return self.row_starts.size - 1


def maximum_matching(mask: BoolArray) -> IntArray:
    """A maximum matching of a bipartite graph, ``mask`` of shape (K, N).

    Greedy first, nodes of small degree before others; then augmenting paths by breadth-first search from all free
    outputs at once, one path per search tree (Azad, Buluc and Pothen 2017).

    Returns:
        (N,) the input matched to each output, or ``FREE``.
    """
    reads = np.ascontiguousarray(mask.T)
    column_of = np.full(mask.shape[0], FREE, dtype=np.intp)
    row_of = np.full(mask.shape[1], FREE, dtype=np.intp)
    by_degree = np.argsort(np.count_nonzero(mask, axis=1), kind="stable")
    free = np.ones(mask.shape[0], dtype=bool)
    for column in np.argsort(np.count_nonzero(reads, axis=1), kind="stable"):
        candidates = (reads[column] & free)[by_degree]
        position = candidates.argmax()
        if candidates[position]:
            row = by_degree[position]
            row_of[column], column_of[row], free[row] = row, column, False
    while True:
        found = _search(reads, row_of, column_of)
        ends = found.end[found.end != FREE]
        if ends.size == 0:
            return row_of
        for end in ends:
            _augment(int(end), found.parent, row_of, column_of)


def dulmage_mendelsohn(mask: BoolArray) -> DulmageMendelsohn:
    """The coarse decomposition of ``mask``, (K, N); it does not depend on the matching."""
    row_of = maximum_matching(mask)
    column_of = np.full(mask.shape[0], FREE, dtype=np.intp)
    column_of[row_of[row_of != FREE]] = np.flatnonzero(row_of != FREE)
    over = _search(np.ascontiguousarray(mask.T), row_of, column_of)
    under = _search(np.ascontiguousarray(mask), column_of, row_of)
    return DulmageMendelsohn(
        rows=_three_parts(over.parent != FREE, under.root != FREE),
        columns=_three_parts(over.root != FREE, under.parent != FREE),
        row_of=row_of,
    )


def block_triangular_form(mask: BoolArray) -> BlockTriangularForm:
    """The finest block upper triangular form of ``mask``, (K, N).

    Blocks come part by part; those of the square part in topological order, those with equal rank by their smallest
    output.
    """
    coarse = dulmage_mendelsohn(mask)
    blocks = _connected(mask, coarse.rows[0], coarse.columns[0])
    square = coarse.columns[1]
    matched = coarse.row_of[square]
    dag = condense(mask[np.ix_(matched, square)])
    members = _groups(dag.labels, dag.sccs)
    for scc in np.lexsort((np.arange(dag.sccs), dag.layer)):
        blocks.append((np.sort(matched[members[scc]]), square[members[scc]]))
    blocks += _connected(mask, coarse.rows[2], coarse.columns[2])
    rows, columns = zip(*blocks, strict=True) if blocks else ((), ())
    return BlockTriangularForm(_joined(rows), _joined(columns), _starts(rows), _starts(columns))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Search trees of alternating paths from all free columns at once.

    Attributes:
        root: (N,) the free column in whose tree a column is, or ``FREE``.
        parent: (K,) the column from which a row was reached, or ``FREE``.
        end: (N,) a free row in the tree of a root, or ``FREE``.
    """

    root: IntArray
    parent: IntArray
    end: IntArray


def _search(reads: BoolArray, row_of: IntArray, column_of: IntArray) -> _Search:
    """Breadth-first search along any edge to a row and along the matched one back; ``reads`` is (N, K).

    A tree that has an end is not grown further. Where the matching is maximum no tree has one, and everything that
    alternating paths reach is found.
    """
    columns, rows = reads.shape
    frontier = np.flatnonzero(row_of == FREE)
    root, end = np.full(columns, FREE, np.intp), np.full(columns, FREE, np.intp)
    parent = np.full(rows, FREE, np.intp)
    root[frontier] = frontier
    while frontier.size:
        unseen = np.flatnonzero(parent == FREE)
        edges = reads[np.ix_(frontier, unseen)]
        first = edges.argmax(axis=0)
        hit = edges[first, np.arange(unseen.size)]
        reached = unseen[hit]
        parent[reached] = frontier[first[hit]]
        tree = root[parent[reached]]
        free = column_of[reached] == FREE
        end[tree[free]] = reached[free]
        onward = ~free & (end[tree] == FREE)
        frontier = column_of[reached[onward]]
        root[frontier] = tree[onward]
    return _Search(root, parent, end)


def _augment(end: int, parent: IntArray, row_of: IntArray, column_of: IntArray) -> None:
    """Match every other edge of the path from ``end`` to its root, which makes one pair more."""
    row = end
    while row != FREE:
        column = int(parent[row])
        following = int(row_of[column])
        row_of[column], column_of[row] = row, column
        row = following


def _three_parts(
    horizontal: BoolArray, vertical: BoolArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Unit numbers of the horizontal, the square and the vertical part."""
    square = ~(horizontal | vertical)
    return np.flatnonzero(horizontal), np.flatnonzero(square), np.flatnonzero(vertical)


def _connected(
    mask: BoolArray, rows: IntArray, columns: IntArray
) -> list[tuple[IntArray, IntArray]]:
    """Rows and columns of each connected component of a part; what has no edge is one block more."""
    if rows.size == 0 or columns.size == 0:
        return [(rows, columns)] if rows.size or columns.size else []
    found = bipartite_components(mask[np.ix_(rows, columns)])
    per_axis = [_groups(labels, found.count) for labels in found.labels]
    blocks = [(rows[r], columns[c]) for r, c in zip(*per_axis, strict=True)]
    alone = tuple(
        units[labels == ISOLATED]
        for units, labels in zip((rows, columns), found.labels, strict=True)
    )
    if alone[0].size or alone[1].size:
        blocks.append((alone[0], alone[1]))
    return blocks


def _groups(labels: IntArray, count: int) -> list[IntArray]:
    """Ascending positions of the labels 0 to ``count`` - 1."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(count + 1)))[1:-1]


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.empty(0, np.intp)


def _starts(parts: Sequence[IntArray]) -> IntArray:
    return np.cumsum([0, *(part.size for part in parts)], dtype=np.intp)
