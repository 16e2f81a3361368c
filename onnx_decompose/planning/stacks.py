"""Stacks: branches of about one size side by side in one operator, each padded to the largest.

Three layouts. ``columns``: the units of all blocks are the channels of one value, and a site is a 1x1 convolution in
groups. ``rows``: the blocks are an axis of their own, and a site is a batched matrix product. ``channels``: the units
were channels before, and a site stays the convolution that it is, in groups.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.planning.cost import CostModel

    IntArray = NDArray[np.intp]

__all__ = ["CHANNELS", "Border", "Grouping", "Stack", "StackLayout", "StackWork", "groupings"]

StackLayout = Literal["channels", "columns", "rows"]

CHANNELS = 16
"""Channels per group are padded to a multiple: onnxruntime has kernels in blocks of 16 (8 without AVX-512) channels."""

_PADDED_WORK = (1.0, 1.25, 2.0, np.inf)
"""Multiply-adds with padding over those without, above which a branch begins a stack of its own: what is tried."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """Blocks of one size.

    Attributes:
        count: how many.
        sizes: per axis, units of each, padding included.
    """

    count: int
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Grouping:
    """How the branches of a region are stacked.

    Attributes:
        layout: of the values inside.
        stacks: the first takes as many of the branches as it counts, the next one the branches after those.
    """

    layout: StackLayout
    stacks: tuple[Stack, ...]

    def width(self, axis: int) -> int:
        """Units of an axis, padding included."""
        return sum(stack.count * stack.sizes[axis] for stack in self.stacks)

    def blocks(self, source: int, target: int) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of every block of a weight between two axes, padding included."""
        return tuple(
            (stack.sizes[source], stack.sizes[target])
            for stack in self.stacks
            for _ in range(stack.count)
        )

    def entries(self, source: int, target: int) -> int:
        """Entries that a weight between two axes stores, padding included."""
        return sum(inputs * outputs for inputs, outputs in self.blocks(source, target))


@dataclasses.dataclass(frozen=True, slots=True)
class Border:
    """A value that comes in or goes out.

    Attributes:
        axis: its units.
        in_place: whether the blocks' units stand in it one block after the other, and no others, without padding.
    """

    axis: int
    in_place: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StackWork:
    """What a region does, for its predicted cost.

    Attributes:
        products: axes that each site leads from and to.
        elementwise: axis of each elementwise node that stays one.
        fused: axis of each elementwise node that a convolution does on the way: bias and activation.
        itemsize: bytes per element.
    """

    products: tuple[tuple[int, int], ...]
    elementwise: tuple[int, ...]
    fused: tuple[int, ...]
    itemsize: int

    def seconds(
        self, grouping: Grouping, borders: Sequence[Border], cost: CostModel, rows: int
    ) -> float:
        """Predicted seconds of all of it on ``rows`` rows."""
        if grouping.layout == "columns":
            product, elementwise, cross = cost.grouped_conv, self.elementwise, _cross_columns
        else:
            product, cross = cost.batched_matmul, _cross_rows
            elementwise = (*self.elementwise, *self.fused)
        total = 0.0
        for stack in grouping.stacks:
            for source, target in self.products:
                inputs, outputs = stack.sizes[source], stack.sizes[target]
                total += product(rows, stack.count, inputs, outputs, self.itemsize)
            for axis in elementwise:
                total += cost.elementwise(rows, stack.count * stack.sizes[axis], self.itemsize)
        for border in borders:
            width = grouping.width(border.axis)
            total += cross(border, width, len(grouping.stacks), cost, (rows, self.itemsize))
        return total


def _cross_columns(
    border: Border, width: int, stacks: int, cost: CostModel, form: tuple[int, int]
) -> float:
    """Seconds to turn rows into channels, or back."""
    rows, itemsize = form
    # The runtime's own blocked layout is entered and left at the convolutions.
    total = cost.copy(rows, width, itemsize) + cost.kernel
    if not border.in_place:
        total += cost.transpose(rows, width, itemsize) + cost.row_gather(rows, width, itemsize)
    return total + (cost.copy(rows, width, itemsize) if stacks > 1 else 0.0)


def _cross_rows(
    border: Border, width: int, stacks: int, cost: CostModel, form: tuple[int, int]
) -> float:
    """Seconds to cut rows into blocks, or to put them together again."""
    rows, itemsize = form
    total = stacks * 2 * cost.kernel + cost.copy(rows, width, itemsize)
    if not border.in_place:
        total += cost.gather(rows, width, itemsize)
    return total + (cost.copy(rows, width, itemsize) if stacks > 1 else 0.0)


def groupings(
    sizes: IntArray, products: Sequence[tuple[int, int]], layout: StackLayout
) -> Iterator[tuple[IntArray, Grouping]]:
    """Ways to stack branches, from no padding but a layout's own to a single stack.

    Args:
        sizes: (branches, axes) units.
        products: axes that each site leads from and to.
        layout: of the stacked values.

    Yields:
        The branches in the order of the stacks, and the stacks.
    """
    multiple = CHANNELS if layout == "columns" else 1
    padded = -(-sizes // multiple) * multiple
    order = np.argsort(-_work(padded, products), kind="stable")
    seen: set[Grouping] = set()
    equal = bool((padded == padded[0]).all())
    for limit in _PADDED_WORK[:1] if equal else _PADDED_WORK:
        grouping = Grouping(layout, tuple(_stacks(padded[order], products, limit)))
        if grouping not in seen:
            seen.add(grouping)
            yield order, grouping


def _work(sizes: IntArray, products: Sequence[tuple[int, int]]) -> IntArray:
    """Multiply-adds per row of each of the branches."""
    sources, targets = np.array(products, dtype=np.intp).T
    work: IntArray = (sizes[..., sources] * sizes[..., targets]).sum(axis=-1)
    return work


def _stacks(
    sizes: IntArray, products: Sequence[tuple[int, int]], limit: float
) -> Iterator[Stack]:
    """Consecutive branches of ``sizes`` together, as long as padding adds no more work than ``limit`` allows."""
    start = 0
    for stop in range(1, len(sizes) + 1):
        if stop < len(sizes):
            together = sizes[start : stop + 1]
            largest = together.max(axis=0)
            with_padding = len(together) * _work(largest, products)
            if with_padding <= limit * _work(together, products).sum():
                continue
        yield Stack(stop - start, tuple(int(size) for size in sizes[start:stop].max(axis=0)))
        start = stop
