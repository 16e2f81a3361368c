"""Covers of a mask: groups of outputs, each with the inputs that it reads.

The groups' outputs are disjoint and are all outputs; their inputs may overlap. Every supported entry (i, j) has input i
in the group that makes output j, so a cover is exact whatever its groups are. The finest covers follow an order of
the outputs: the given one, by the mean input that an output reads (banded masks), or that of the block triangular
form. Consecutive outputs become one group; where to cut is a dynamic program over the predicted price of a group.

A group reads its inputs as one run from the first to the last, cheap to cut out, or as exactly those that it needs,
gathered: what is cheaper. Dense outputs end up in a group of their own, and inputs that all outputs read are gathered
by every group (bordered masks).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Protocol

import numpy as np

from onnx_decompose.analysis.cuts import cheapest_cuts, spans, unions
from onnx_decompose.analysis.triangular import block_triangular_form

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Cover", "Price", "find_covers"]

_MOST_SEGMENTS = 256
"""Runs of outputs that the dynamic program keeps together at the finest."""

_WORTH = 0.97
"""Share of the entries above which a cover is not looked for: it would save less than it costs."""


class Price(Protocol):
    """What one group takes, in any unit."""

    def __call__(
        self, inputs: FloatArray, outputs: FloatArray, *, gathered: bool
    ) -> FloatArray:
        """Price by numbers of inputs and outputs, elementwise; ``gathered``: the inputs are no run."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cover:
    """Groups of outputs and what they read.

    Attributes:
        found: what was found, and in which order the outputs were cut, for a reader.
        inputs: per group, ascending input numbers, at least one.
        outputs: per group, ascending output numbers, at least one; together every output once.
    """

    found: str
    inputs: tuple[IntArray, ...]
    outputs: tuple[IntArray, ...]

    @property
    def entries(self) -> int:
        """Entries that the groups hold."""
        return sum(i.size * o.size for i, o in zip(self.inputs, self.outputs, strict=True))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """An order to cut outputs in.

    Attributes:
        found: see :class:`Cover`.
        columns: (N,) the outputs.
        rows: (K,) the order of the inputs in which a group reads a run; None for their own order.
        cuts: positions in ``columns`` where a group may begin or end, from 0 to N.
    """

    found: str
    columns: IntArray
    rows: IntArray | None
    cuts: IntArray


def find_covers(
    mask: BoolArray, price: Price, *, least_groups: int = 1, most_groups: int
) -> Iterator[Cover]:
    """The cheapest cover of each order of the outputs, where it has two groups or more.

    Args:
        mask: (K, N) supported entries.
        price: of one group; a cover's price is the sum over its groups.
        least_groups: groups that are asked for, 2 for a cover that costs more than one group too.
        most_groups: groups that are allowed.
    """
    if min(mask.shape) < 2 or np.count_nonzero(mask) > _WORTH * mask.size:
        return
    for order in _orders(mask):
        cover = _cheapest(mask, order, price, (least_groups, most_groups))
        if cover is not None:
            yield cover


def _orders(mask: BoolArray) -> Iterator[_Order]:
    form = block_triangular_form(mask)
    blocks = f"block triangular: {form.blocks} blocks, " if form.blocks > 1 else ""
    own = np.arange(mask.shape[1])
    yield _Order(f"{blocks}cut in the given order", own, None, _cuts(mask))
    by_mean = np.argsort(_mean_inputs(mask), kind="stable")
    if not np.array_equal(by_mean, own):
        cuts = _cuts(mask[:, by_mean])
        yield _Order(f"{blocks}cut in the order of the mean input", by_mean, None, cuts)
    if form.blocks > 1:
        found = f"{blocks}cut between them"
        cuts = _thinned(np.unique(form.column_starts))
        yield _Order(found, form.columns, None, cuts)
        yield _Order(found, form.columns, form.rows, cuts)


def _mean_inputs(mask: BoolArray) -> FloatArray:
    """(N,) mean number of the inputs that each output reads; 0 where it reads none."""
    total = np.zeros(mask.shape[1])
    for start in range(0, mask.shape[0], 1024):
        block = mask[start : start + 1024]
        total += np.arange(start, start + block.shape[0], dtype=np.float64) @ block
    mean: FloatArray = total / np.maximum(np.count_nonzero(mask, axis=0), 1)
    return mean


def _cuts(mask: BoolArray) -> IntArray:
    """Evenly spaced positions, and those where neighbouring outputs read inputs that differ most."""
    outputs = mask.shape[1]
    if outputs <= _MOST_SEGMENTS:
        return np.arange(outputs + 1)
    change = np.count_nonzero(mask[:, 1:] != mask[:, :-1], axis=0)
    steps = np.argsort(-change, kind="stable")[: _MOST_SEGMENTS // 2] + 1
    even = np.linspace(0, outputs, _MOST_SEGMENTS // 2 + 1).astype(np.intp)
    return np.unique(np.concatenate([even, steps]))


def _thinned(cuts: IntArray) -> IntArray:
    """At most so many of ``cuts`` that the dynamic program stays small."""
    if cuts.size <= _MOST_SEGMENTS + 1:
        return cuts
    return cuts[np.linspace(0, cuts.size - 1, _MOST_SEGMENTS + 1).astype(np.intp)]


def _cheapest(
    mask: BoolArray, order: _Order, price: Price, groups: tuple[int, int]
) -> Cover | None:
    """The cover of an order with the least price; None if it is a single group, or must hold nearly every entry."""
    reads = _segments(mask, order)
    outputs = np.diff(order.cuts)
    if np.count_nonzero(reads, axis=1) @ outputs > _WORTH * mask.size:
        return None  # no group reads less than the segments in it: a random mask ends here
    runs, needed = spans(reads), unions(reads)
    made = np.cumsum([0, *outputs])
    widths = np.maximum(made[None, 1:] - made[:-1, None], 1).astype(np.float64)
    cost = price(runs, widths, gathered=False)
    gather = np.zeros(cost.shape, bool)
    if order.rows is None:
        exact = price(needed, widths, gathered=True)
        gather = exact < cost
        cost = np.where(gather, exact, cost)
    bounds = cheapest_cuts(cost, *groups)
    if len(bounds) < 3:
        return None
    rows = np.arange(mask.shape[0]) if order.rows is None else order.rows
    inputs: list[IntArray] = []
    for start, stop in itertools.pairwise(bounds):
        read = np.flatnonzero(reads[start:stop].any(axis=0))
        if read.size == 0:
            read = np.zeros(1, np.intp)
        if not gather[start, stop - 1]:
            read = np.arange(read[0], read[-1] + 1)
        inputs.append(np.sort(rows[read]))
    parts = np.split(order.columns, order.cuts[bounds[1:-1]])
    return Cover(order.found, tuple(inputs), tuple(np.sort(part) for part in parts))


def _segments(mask: BoolArray, order: _Order) -> BoolArray:
    """(segments, K) which inputs, in the order's own, the outputs between two cuts read."""
    reads = np.stack(
        [
            mask[:, order.columns[start:stop]].any(axis=1)
            for start, stop in itertools.pairwise(order.cuts)
        ]
    )
    return reads if order.rows is None else reads[:, order.rows]
