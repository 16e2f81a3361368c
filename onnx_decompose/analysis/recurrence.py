"""State graphs of recurrent operators: which hidden units can be computed apart from which others.

The nodes are the hidden units; the state of unit i is (h_i, c_i). Unit i depends on unit j if any gate of i reads
h_j: the channel edge j -> i. Everything else in the three operators of the ONNX standard stays within a unit
(gates, activations, peepholes, clipping, the cell state), so this digraph is exact:

    RNN   h_i = f(W_i x + R_i h + b_i)
    LSTM  every gate is f(W_gi x + R_gi h + p_gi c_i + b_gi); c_i and h_i are made of unit i's gates alone
    GRU   z_i, r_i as the gates of an LSTM; the candidate is g(W_i x + R_i (r . h) + b_i) or, with
          ``linear_before_reset``, g(W_i x + r_i (R_i h + b'_i) + b_i)

In the first form of the GRU's candidate, unit i also depends on r_j, the reset gate of its source. That gate is a
function of x and of the h that unit j itself reads: of edges into j. No set of units that is closed under the edges
lacks anything, but r_j is not an output of the operator that computes unit j.

Cascade. Where the units of an earlier operator are read by a later one, their previous outputs are inputs to it:
R_i h_j(t-1) is one more column of W_i x. That holds for every gate that adds R h to W x: all of an RNN's and an
LSTM's, the update and reset gates of a GRU. Its candidate needs r_j (in the first form), or multiplies the sum over h
by r_i (in the second): such an edge *binds* its two ends to one operator. So the *atoms*, the smallest sets of units
that can have an operator of their own, are the strongly connected components of the digraph in which binding edges
go both ways (closed under both conditions and acyclic between them, so no finer partition is exact).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from onnx_decompose.analysis.structure import (
    ISOLATED,
    Condensation,
    Edge,
    condense,
    state_components,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.intp]

__all__ = [
    "CELLS",
    "GATES",
    "CellType",
    "UnitGraph",
    "atoms_in_order",
    "carried_columns",
    "parts_in_order",
    "unit_columns",
    "unit_edges",
    "unit_graph",
]

CellType = Literal["RNN", "GRU", "LSTM"]
CELLS: tuple[CellType, ...] = get_args(CellType)

GATES: Mapping[CellType, int] = {"RNN": 1, "GRU": 3, "LSTM": 4}
"""Rows of W and R per hidden unit; row ``gate * H + i`` is of unit i."""

_CANDIDATE = 2
"""The GRU's gates are update, reset and candidate, in this order."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class UnitGraph:
    """One direction of a recurrent operator.

    Attributes:
        inputs: (I, H) True where any gate of a unit reads an input.
        edges: (H, H) True where any gate of unit j reads unit i.
        binding: (H, H) the edges whose two ends need one operator.
        gates: rows of the weights per unit.
    """

    inputs: BoolArray
    edges: BoolArray
    binding: BoolArray
    gates: int

    @property
    def hidden(self) -> int:
        """H, the number of hidden units."""
        return int(self.edges.shape[0])

    def condensation(self) -> Condensation:
        """Strongly connected components of the units, and their layers."""
        return condense(self.edges)

    def atoms(self) -> Condensation:
        """The smallest sets of units that can have an operator of their own, and their layers."""
        return condense(self.edges | self.binding.T)


def unit_graph(
    input_mask: BoolArray, state_mask: BoolArray, cell: CellType, *, cascade: bool = True
) -> UnitGraph:
    """The state graph of one direction.

    Args:
        input_mask: (I, gates * H) supported entries of W, transposed.
        state_mask: (H, gates * H) supported entries of R, transposed.
        cell: the operator.
        cascade: whether an operator may read what another one made a step before; if not, every edge binds.
    """
    gates = GATES[cell]
    edges = unit_edges(state_mask, gates)
    if not cascade:
        binding = edges
    elif cell == "GRU":
        binding = _by_gate(state_mask, gates)[:, _CANDIDATE]
    else:
        binding = np.zeros_like(edges)
    return UnitGraph(unit_edges(input_mask, gates), edges, binding, gates)


def unit_edges(mask: BoolArray, gates: int) -> BoolArray:
    """(K, H) the edges that ``mask``, (K, gates * H), has an entry of: those of any gate."""
    return np.asarray(_by_gate(mask, gates).any(axis=1))


def unit_columns(units: IntArray, hidden: int, gates: int) -> IntArray:
    """Columns of W or R, (K, gates * H), that belong to ``units``, gate by gate."""
    return np.concatenate([units + gate * hidden for gate in range(gates)])


def carried_columns(units: IntArray, hidden: int, cell: CellType) -> IntArray:
    """The columns of ``units`` whose entries may read another operator's units: those that do not bind."""
    columns = unit_columns(units, hidden, GATES[cell])
    return columns if cell != "GRU" else columns[columns < _CANDIDATE * hidden]


def atoms_in_order(graph: UnitGraph, gone: IntArray | None = None) -> list[IntArray]:
    """The units of every atom, in an order in which none reads a later one.

    What is connected stands together, smaller components first; within a component by layers. So every run of this
    order can be one operator, and runs of it contain whole components as well as parts of one cascade.

    Args:
        graph: one direction.
        gone: units without an edge that are left out.
    """
    atoms = graph.atoms()
    component = state_components([graph.hidden], [Edge(0, 0, graph.edges)])
    labels = component.labels[0]
    size = np.concatenate([component.sizes, [0]])  # the last one is that of ISOLATED units
    assert ISOLATED == -1
    first = np.unique(atoms.labels, return_index=True)[1]
    of_atom = labels[first]
    order = np.lexsort((first, atoms.layer, of_atom, size[of_atom]))
    found = [np.flatnonzero(atoms.labels == atom) for atom in order]
    return found if gone is None else [a for a in found if not np.isin(a, gone).any()]


def parts_in_order(graph: UnitGraph, gone: IntArray | None = None) -> list[int]:
    """Where sets of atoms that no edge joins to others begin in :func:`atoms_in_order`, and its length."""
    component = state_components([graph.hidden], [Edge(0, 0, graph.edges)]).labels[0]
    labels = [int(component[atom[0]]) for atom in atoms_in_order(graph, gone)]
    starts = [
        number
        for number, label in enumerate(labels)
        if number == 0 or label != labels[number - 1]
    ]
    return [*starts, len(labels)]


def _by_gate(mask: BoolArray, gates: int) -> BoolArray:
    """(K, gates * H) as (K, gates, H)."""
    return mask.reshape(mask.shape[0], gates, -1)
