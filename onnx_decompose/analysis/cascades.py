"""Cascades: a whole region cut into runs of units, each of which reads its own units and some of other runs.

All units of a region are put in one order and cut into runs. A run owns its units on every axis; a site's part for a
run has those units as outputs, and as inputs whatever they read: units of the same run, and of others. Every value
is complete before a site reads it, so that any order and any cut is exact. What is cheap depends on the order:

- The strongly connected components of the state graph, in topological order (Jin, arXiv 2601.15871, section 4). A run
  then reads its own units and those of its ancestors: the block triangular form of the whole region. A region
  whose entry and exit have as many units is closed for that by an edge from each exit unit to the entry unit of the
  same number, which is what repeating it would do.
- The place of what a unit reads, on the average: bands, through any number of sites.
- The number of units that read an entry, and the last such entry that a unit depends on: nested sets of inputs.

Where to cut is a dynamic program over the predicted price of a run (``analysis.cuts``).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from onnx_decompose.analysis.cuts import cheapest_cuts, hulls, unions
from onnx_decompose.analysis.structure import Condensation, Edge, condense_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = [
    "Cascade",
    "RunPrice",
    "StateCondensation",
    "States",
    "condense_states",
    "find_cascades",
]

_MOST_SEGMENTS = 64
"""Runs of units that the dynamic program keeps together at the finest."""

_ROWS_AT_A_TIME = 1024

_ROUNDS = 3
"""Times that all sites are followed in search of a region where every unit leads to every other one."""

_WORTH = 0.97
"""Share of the entries above which a cascade is not looked for: it would save less than it costs."""


class RunPrice(Protocol):
    """What one run takes, in any unit."""

    def __call__(
        self,
        owned: Sequence[FloatArray],
        read: Sequence[FloatArray],
        apart: Sequence[BoolArray],
    ) -> FloatArray:
        """Price by numbers of units, elementwise.

        Args:
            owned: per axis, units that the run makes.
            read: per axis, units that its sites read.
            apart: per axis, whether it reads others than it makes.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class States:
    """The units of a region and how they depend on each other.

    Attributes:
        sizes: units of each axis.
        edges: the sites, in the order in which they run.
        entries: axes whose units come from outside.
        exits: axes whose units are all made, also those that read nothing.
    """

    sizes: Sequence[int]
    edges: Sequence[Edge]
    entries: set[int]
    exits: set[int]

    @property
    def made(self) -> set[int]:
        """Axes that some site writes."""
        return {edge.target for edge in self.edges}

    @property
    def entry_count(self) -> int:
        """Entries of all sites together."""
        return sum(edge.mask.size for edge in self.edges)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cascade:
    """Runs of a region's units.

    Attributes:
        found: what was found, for a reader.
        owned: per run and axis, the units that the run makes, in order, at least one. The runs of an axis that some
            site writes are disjoint; of an axis that comes in they are what is read.
        read: per run and axis, the units that its sites read, in order: ``owned``, or other units that follow each
            other when those of all runs are put side by side.
    """

    found: str
    owned: tuple[tuple[IntArray, ...], ...]
    read: tuple[tuple[IntArray, ...], ...]

    def entries(self, edges: Sequence[Edge]) -> int:
        """Entries that the runs' parts of the sites ``edges`` hold."""
        return sum(
            read[edge.source].size * owned[edge.target].size
            for owned, read in zip(self.owned, self.read, strict=True)
            for edge in edges
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StateCondensation:
    """Strongly connected components of the units of several axes.

    Attributes:
        condensation: of all units, numbered axis by axis.
        labels: the same labels per axis.
        order: the components in topological order; what no edge joins stays apart.
    """

    condensation: Condensation
    labels: tuple[IntArray, ...]
    order: IntArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """Where each unit stands: per axis, a number by which all units of all axes are sorted."""

    found: str
    rank: tuple[FloatArray, ...]


def find_cascades(
    states: States, price: RunPrice, *, least_runs: int = 1, most_runs: int
) -> Iterator[Cascade]:
    """The cheapest cascade of each order, where it has two runs or more.

    Args:
        states: the region.
        price: of one run; a cascade's price is the sum over its runs.
        least_runs: runs that are asked for, 2 for a cascade that costs more than one run too.
        most_runs: runs that are allowed.
    """
    supported = sum(int(np.count_nonzero(edge.mask)) for edge in states.edges)
    if supported > _WORTH * states.entry_count:
        return
    known = states.made | states.entries
    if states.exits - states.made or any(edge.source not in known for edge in states.edges):
        return  # an axis of units that no site makes
    kept = _kept(states)
    if not all(kept[axis].any() for axis in states.made):
        return  # every run makes a unit of each axis
    for order in _orders(states):
        cascade = _Cut(states, order, kept).cheapest(price, (least_runs, most_runs))
        if cascade is not None:
            yield cascade


def condense_states(states: States) -> StateCondensation | None:
    """The strongly connected components of a region's units; None where no unit can lead back to itself, or all do.

    Each exit axis that is not an entry axis too is tied to one of the same size, unit by unit, if there is one.
    """
    axis_sizes, tied = states.sizes, [*states.edges, *_ties(states)]
    if not _is_cyclic(len(axis_sizes), tied) or _is_one(axis_sizes, tied):
        return None
    offsets = np.cumsum([0, *axis_sizes])
    nodes = int(offsets[-1])
    blocks = [sparse.coo_array(edge.mask) for edge in tied]
    tails = [
        b.row.astype(np.int32) + np.int32(offsets[e.source])
        for b, e in zip(blocks, tied, strict=True)
    ]
    heads = [
        b.col.astype(np.int32) + np.int32(offsets[e.target])
        for b, e in zip(blocks, tied, strict=True)
    ]
    rows, columns = np.concatenate(tails), np.concatenate(heads)
    graph = sparse.csr_array((np.ones(rows.size, np.int8), (rows, columns)), (nodes, nodes))
    found = condense_graph(graph)
    labels = tuple(found.labels[a:b] for a, b in itertools.pairwise(offsets))
    parts = csgraph.connected_components(graph, directed=False)[1]
    first = np.unique(found.labels, return_index=True)[1]
    order = np.lexsort((first, found.layer, parts[first]))
    return StateCondensation(found, labels, order)


def _ties(states: States) -> Iterator[Edge]:
    """Edges from each unit of an exit to the unit of the same number of an entry."""
    read = {edge.source for edge in states.edges} & states.entries
    for leaving in sorted(states.exits - read):
        size = states.sizes[leaving]
        for coming in sorted(read):
            if states.sizes[coming] == size:
                yield Edge(leaving, coming, np.eye(size, dtype=bool))
                break


def _is_cyclic(axes: int, edges: Sequence[Edge]) -> bool:
    """Whether some axis can be reached from itself."""
    pairs = np.array([(edge.source, edge.target) for edge in edges])
    graph = sparse.coo_array((np.ones(len(pairs)), pairs.T), (axes, axes)).tocsr()
    return csgraph.connected_components(graph, connection="strong")[0] < axes or any(
        edge.source == edge.target for edge in edges
    )


def _is_one(axis_sizes: Sequence[int], edges: Sequence[Edge]) -> bool:
    """Whether one unit reaches all that has any edge in a few steps, and is reached by it.

    So it is in a dense region, whose edges would take long to look at one by one. A sparse one may need more steps, and
    False then.
    """
    touched = [np.zeros(size, bool) for size in axis_sizes]
    for edge in edges:
        touched[edge.source] |= edge.mask.any(axis=1)
        touched[edge.target] |= edge.mask.any(axis=0)
    start = edges[0].source
    some = int(edges[0].mask.any(axis=1).argmax())
    for forward in (True, False):
        known = [np.zeros(size, bool) for size in axis_sizes]
        known[start][some] = True
        for _ in range(_ROUNDS):
            for edge in edges if forward else reversed(edges):
                tail, head = (edge.source, edge.target)[:: 1 if forward else -1]
                mask = edge.mask if forward else edge.mask.T
                known[head] |= mask.any(axis=0, where=known[tail][:, None])
        if any((units & ~found).any() for units, found in zip(touched, known, strict=True)):
            return False
    return True


def _kept(states: States) -> tuple[BoolArray, ...]:
    """Per axis, the units that are made: those that are read or go out."""
    kept = [np.full(size, axis in states.exits) for axis, size in enumerate(states.sizes)]
    for edge in states.edges:
        kept[edge.source] |= edge.mask.any(axis=1)
    return tuple(kept)


def _orders(states: States) -> Iterator[_Order]:
    found = condense_states(states)
    if found is not None and found.condensation.sccs > 1:
        rank = np.argsort(found.order).astype(np.float64)
        count = int(np.count_nonzero(np.bincount(found.condensation.labels) > 1))
        text = (
            f"{count} strongly connected component{'' if count == 1 else 's'} of more than one unit, "
            f"{found.condensation.layers} layers"
        )
        yield _Order(text, tuple(rank[labels] for labels in found.labels))
    given, by_mean = _by_place(states)
    yield _Order("cut in the given order", given)
    yield _Order("cut in the order of the mean input", by_mean)
    nested = _by_readers(states)
    if nested is not None:
        yield _Order("cut in the order of the inputs' readers", nested)


def _by_place(states: States) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    """Entries by their own number, and each other unit by the mean of what it reads; between 0 and 1.

    Returns:
        One order where exits have their own numbers too, and one where they do not.
    """
    own = [(np.arange(size) + 0.5) / size for size in states.sizes]
    place = list(own)
    known = set(states.entries)
    for edge in states.edges:
        if edge.target in known:
            continue
        known.add(edge.target)
        count = np.count_nonzero(edge.mask, axis=0)
        mean = _matmul(place[edge.source], edge.mask) / np.maximum(count, 1)
        place[edge.target] = np.where(count > 0, mean, own[edge.target])
    given = tuple(
        own[axis] if axis in states.exits else place[axis] for axis in range(len(own))
    )
    return given, tuple(place)


def _matmul(values: FloatArray, mask: BoolArray) -> FloatArray:
    """(K,) @ (K, N), without a float copy of the whole mask."""
    total = np.zeros(mask.shape[1])
    for start in range(0, values.size, _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        total += values[rows] @ mask[rows]
    return total


def _by_readers(states: States) -> tuple[FloatArray, ...] | None:
    """Entries with many readers first, and each other unit after all entries that it depends on."""
    if states.made & states.entries:
        return None  # units that come in are written too: see the strongly connected components
    rank: list[FloatArray] = [np.zeros(size) for size in states.sizes]
    for axis in states.entries:
        for edge in states.edges:
            if edge.source == axis:
                rank[axis] -= np.count_nonzero(edge.mask, axis=1)
    low = min(float(r.min()) for r in rank)
    for axis in states.made:
        rank[axis] = np.full(states.sizes[axis], low)
    for edge in states.edges:
        latest = np.argsort(-rank[edge.source], kind="stable")
        reads = edge.mask[latest]
        first = reads.argmax(axis=0)
        late = np.where(reads.any(axis=0), rank[edge.source][latest[first]], low)
        rank[edge.target] = np.maximum(rank[edge.target], late)
    return tuple(rank)


class _Cut:
    """An order of all units in segments, and what each of them makes and reads.

    Args:
        states: the region.
        order: where each unit stands.
        kept: per axis, the units that are made at all.
    """

    def __init__(self, states: States, order: _Order, kept: Sequence[BoolArray]) -> None:
        self._states, self._found, self._made = states, order.found, states.made
        self._sizes, self._edges = states.sizes, states.edges
        counted = [order.rank[axis][kept[axis]] for axis in sorted(self._made)]
        starts = _segment_starts(np.concatenate(counted))
        self._segments = starts.size
        # Units of each axis in order, and where each segment's begin among them.
        self._units: list[IntArray] = []
        self._bounds: list[IntArray] = []
        for axis, rank in enumerate(order.rank):
            units = np.flatnonzero(kept[axis])
            units = units[np.argsort(rank[units], kind="stable")]
            bounds = np.searchsorted(rank[units], starts)
            bounds[0] = 0
            self._units.append(units)
            self._bounds.append(np.append(bounds, units.size))
        self._reads = {axis: self._read_by_segment(axis) for axis in self._sources}

    @property
    def _sources(self) -> set[int]:
        return {edge.source for edge in self._edges}

    def _read_by_segment(self, axis: int) -> BoolArray:
        """(segments, units) which units of an axis, in order, the sites that make a segment read."""
        reads = np.zeros((self._segments, self._sizes[axis]), bool)
        for edge in self._edges:
            if edge.source != axis:
                continue
            columns, bounds = self._units[edge.target], self._bounds[edge.target]
            for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
                reads[number] |= edge.mask[:, columns[start:stop]].any(axis=1)
        return reads[:, self._units[axis]]

    def cheapest(self, price: RunPrice, runs: tuple[int, int]) -> Cascade | None:
        """The cascade with the least price; None if it is a single run, or must hold nearly every entry."""
        if self._least_entries() > _WORTH * self._states.entry_count:
            return None
        owned, read, apart = self._numbers()
        with np.errstate(invalid="ignore"):
            cost = price(owned, read, apart)
        for axis in self._made:
            cost[owned[axis] < 1] = np.inf
        bounds = cheapest_cuts(cost, *runs)
        if len(bounds) < 3:
            return None
        made = [self._run(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]
        owned_units, read_units = zip(*self._tidied(made), strict=True)
        cascade = Cascade(self._found, owned_units, read_units)
        worth = cascade.entries(self._edges) <= _WORTH * self._states.entry_count
        return cascade if worth else None

    def _least_entries(self) -> int:
        """Entries of the sites, were every segment a run and read nothing but what it needs."""
        return sum(
            int(
                np.count_nonzero(self._reads[edge.source], axis=1)
                @ np.diff(self._bounds[edge.target])
            )
            for edge in self._edges
        )

    def _numbers(self) -> tuple[list[FloatArray], list[FloatArray], list[BoolArray]]:
        """What segments i to j own and read, as :class:`RunPrice` takes it; j >= i."""
        owned: list[FloatArray] = []
        read: list[FloatArray] = []
        apart: list[BoolArray] = []
        for axis, bounds in enumerate(self._bounds):
            own = (bounds[None, 1:] - bounds[:-1, None]).astype(np.float64)
            width, others = own, np.zeros(own.shape, bool)
            if axis in self._reads and axis in self._made:
                low, high = hulls(self._reads[axis])
                others = (high >= low) & (
                    (low < bounds[:-1, None]) | (high >= bounds[None, 1:])
                )
                width = np.where(others, high - low + 1, own)
            elif axis in self._reads:
                width = unions(self._reads[axis])
                own, others = width, width < self._sizes[axis]
            owned.append(own)
            read.append(width)
            apart.append(others)
        return owned, read, apart

    def _run(self, start: int, stop: int) -> tuple[list[IntArray], list[IntArray]]:
        """Units that segments ``start`` to ``stop`` own and read, per axis."""
        owned: list[IntArray] = []
        read: list[IntArray] = []
        for axis, (units, bounds) in enumerate(zip(self._units, self._bounds, strict=True)):
            own = units[bounds[start] : bounds[stop]]
            needed = own
            if axis in self._reads:
                wanted = np.flatnonzero(self._reads[axis][start:stop].any(axis=0))
                if axis not in self._made:
                    # A product has one input at least, if only to multiply it by zero.
                    own = needed = units[wanted] if wanted.size else np.zeros(1, np.intp)
                elif wanted.size and (wanted[0] < bounds[start] or wanted[-1] >= bounds[stop]):
                    needed = units[wanted[0] : wanted[-1] + 1]
            owned.append(own)
            read.append(needed)
        return owned, read

    def _tidied(
        self, runs: Sequence[tuple[list[IntArray], list[IntArray]]]
    ) -> list[tuple[tuple[IntArray, ...], tuple[IntArray, ...]]]:
        """The runs, with ascending units on every axis where each reads what it owns."""
        mixed = [
            any(not np.array_equal(owned[axis], read[axis]) for owned, read in runs)
            for axis in range(len(self._sizes))
        ]
        return [
            (
                tuple(u if mix else np.sort(u) for u, mix in zip(owned, mixed, strict=True)),
                tuple(u if mix else np.sort(u) for u, mix in zip(read, mixed, strict=True)),
            )
            for owned, read in runs
        ]


def _segment_starts(ranks: FloatArray) -> FloatArray:
    """First rank of each segment: ranks of one value stay together, and few units make no segment of their own."""
    values, counts = np.unique(ranks, return_counts=True)
    least = ranks.size / _MOST_SEGMENTS
    starts = [values[0]]
    size = 0
    for value, count in zip(values, counts, strict=True):
        if size >= least or (size and count >= least):
            starts.append(value)
            size = 0
        size += int(count)
    return np.array(starts)
