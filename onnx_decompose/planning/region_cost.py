"""Predicted seconds of a region as branches, as stacks, or with equal rows and columns computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.planning.borders import gathered_order, is_run, layout_of
from onnx_decompose.planning.stacks import Border, StackWork
from onnx_decompose.planning.state_graph import everything, is_cascade

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.planning.copies import Copies
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.stacks import Grouping
    from onnx_decompose.planning.state_graph import Branch, StateGraph

    FloatArray = NDArray[np.float64]

__all__ = ["WORTH", "predicted_seconds", "relative_cost", "shared_seconds"]

WORTH = 0.97
"""Predicted cost, relative to dense, above which a rewrite is not tried."""


def relative_cost(seconds: FloatArray, dense: FloatArray) -> float:
    """Geometric mean over the batches: each counts the same."""
    return float(np.exp(np.mean(np.log(seconds / dense))))


def predicted_seconds(
    graph: StateGraph,
    branches: tuple[Branch, ...],
    cost: CostModel,
    grouping: Grouping | None = None,
) -> FloatArray:
    """Predicted seconds at each of the cost model's batches."""
    if graph.has_channels:
        return np.array(
            [_channel_seconds(graph, branches, grouping, cost, rows) for rows in cost.batches]
        )
    if grouping is None:
        return np.array([_seconds(graph, branches, cost, rows) for rows in cost.batches])
    work = StackWork(
        tuple((edge.source, edge.target) for edge in graph.edges),
        graph.elementwise,
        graph.fused,
        graph.itemsize,
    )
    borders = [
        Border(axis, _in_place(graph, branches, grouping, axis))
        for axis in (*graph.entries, *graph.exits)
    ]
    return np.array([work.seconds(grouping, borders, cost, rows) for rows in cost.batches])


def shared_seconds(graph: StateGraph, copies: Copies, cost: CostModel) -> NDArray[np.float64]:
    """Predicted seconds at each batch; whatever is not the site stays as wide as it was."""
    (edge,) = graph.edges
    whole = predicted_seconds(graph, (everything(graph),), cost)
    inputs, outputs = edge.mask.shape
    site = [cost.matmul(rows, inputs, outputs, graph.itemsize) for rows in cost.batches]
    shared = [copies.seconds(cost, rows, graph.itemsize) for rows in cost.batches]
    return whole + np.subtract(shared, site, dtype=np.float64)


def _in_place(
    graph: StateGraph, branches: tuple[Branch, ...], grouping: Grouping, axis: int
) -> bool:
    """Whether the branches' units of a border axis stand outside as they do in the stacks."""
    size = graph.axis_sizes[axis]
    units = np.concatenate([branch.units[axis] for branch in branches])
    if units.size != size or grouping.width(axis) != size:
        return False
    return axis in graph.free or np.array_equal(units, np.arange(size))


def _seconds(
    graph: StateGraph, branches: tuple[Branch, ...], cost: CostModel, rows: int
) -> float:
    total = 0.0
    for branch in branches:
        sizes = [units.size for units in branch.units]
        for edge in graph.edges:
            inputs = branch.inputs(edge.source).size
            total += cost.matmul(rows, inputs, sizes[edge.target], graph.itemsize)
        for axis in graph.elementwise:
            total += cost.elementwise(rows, sizes[axis], graph.itemsize)
    for axis in graph.inner:
        total += _exchange_seconds(graph, branches, axis, cost, rows)
    for axis in graph.entries:
        total += _cut_seconds(graph, branches, axis, cost, rows)
    for axis in graph.exits:
        total += _join_seconds(graph, branches, axis, cost, rows)
    return total


def _channel_seconds(
    graph: StateGraph,
    branches: tuple[Branch, ...],
    grouping: Grouping | None,
    cost: CostModel,
    samples: int,
) -> float:
    """Seconds of convolutions: each channel is a run of positions, and is copied as one wherever it lies."""
    if grouping is None:
        strands = [(1, [units.size for units in branch.units]) for branch in branches]
    else:
        strands = [(stack.count, list(stack.sizes)) for stack in grouping.stacks]
    rows = [samples * positions for positions in graph.positions]
    total = 0.0
    for count, sizes in strands:
        for edge, taps in zip(graph.edges, graph.taps, strict=True):
            inputs, outputs = taps * sizes[edge.source], sizes[edge.target]
            total += (
                cost.matmul(rows[edge.target], inputs, outputs, graph.itemsize)
                if count == 1
                else cost.grouped_conv(
                    rows[edge.target], count, inputs, outputs, graph.itemsize
                )
            )
        for axis in graph.elementwise:
            total += cost.elementwise(rows[axis], count * sizes[axis], graph.itemsize)
    for axis in (*graph.entries, *graph.exits):
        parts = [branch.units[axis] for branch in branches]
        widths = sum(count * sizes[axis] for count, sizes in strands)
        in_order = widths == graph.axis_sizes[axis] and (
            axis in graph.free
            or np.array_equal(np.concatenate(parts), np.arange(graph.axis_sizes[axis]))
        )
        if not in_order:
            total += cost.copy(rows[axis], widths, graph.itemsize)
        if len(strands) > 1:
            total += cost.copy(rows[axis], widths, graph.itemsize)
    return total


def _exchange_seconds(
    graph: StateGraph, branches: tuple[Branch, ...], axis: int, cost: CostModel, rows: int
) -> float:
    """Seconds to put a value together inside the region, and to cut what branches read of each other."""
    if not is_cascade(branches, axis):
        return 0.0
    size = sum(branch.units[axis].size for branch in branches)
    return cost.copy(rows, size, graph.itemsize) + _taken_seconds(
        graph, branches, axis, cost, rows
    )


def _taken_seconds(
    graph: StateGraph, branches: tuple[Branch, ...], axis: int, cost: CostModel, rows: int
) -> float:
    """Seconds to cut what branches read of each other out of the whole value."""
    size = sum(branch.units[axis].size for branch in branches)
    return sum(
        cost.copy(rows, branch.read[axis].size, graph.itemsize)
        for branch in branches
        if branch.reads_others(axis) and branch.read[axis].size < size
    )


def _cut_seconds(
    graph: StateGraph, branches: tuple[Branch, ...], axis: int, cost: CostModel, rows: int
) -> float:
    """Seconds to cut one value into branches."""
    size = graph.axis_sizes[axis]
    if is_cascade(branches, axis):
        turns = np.concatenate([branch.units[axis] for branch in branches])
        total = cost.copy(rows, size, graph.itemsize)
        if axis not in graph.free and not np.array_equal(turns, np.arange(size)):
            total += cost.pick(rows, size, graph.itemsize)
        return total + _taken_seconds(graph, branches, axis, cost, rows)
    parts = [branch.units[axis] for branch in branches]
    read = sum(part.size for part in parts)
    if axis in graph.free:  # renumbered, so that every branch's units are a run
        whole_axis = read == size and np.unique(np.concatenate(parts)).size == size
        if whole_axis:
            return 0.0 if len(parts) == 1 else cost.copy(rows, size, graph.itemsize)
        return sum(cost.copy(rows, part.size, graph.itemsize) for part in parts)
    if layout_of(parts, size) == "whole":
        return 0.0 if len(parts) == 1 else cost.copy(rows, size, graph.itemsize)
    order = gathered_order(parts)
    total = 0.0 if order is None else cost.pick(rows, order.size, graph.itemsize)
    whole = size if order is None else order.size
    for units in parts:
        if units.size == whole:
            continue
        runs = order is not None or is_run(units)
        total += (cost.copy if runs else cost.pick)(rows, units.size, graph.itemsize)
    return total


def _join_seconds(
    graph: StateGraph, branches: tuple[Branch, ...], axis: int, cost: CostModel, rows: int
) -> float:
    """Seconds to put one value together from the branches."""
    size = graph.axis_sizes[axis]
    parts = [branch.units[axis] for branch in branches]
    if axis in graph.free:
        layout = "whole"
    elif is_cascade(branches, axis):
        in_place = np.array_equal(np.concatenate(parts), np.arange(size))
        layout = "whole" if in_place else "scattered"
    else:
        layout = layout_of(parts, size)
    if layout == "whole" and len(branches) == 1:
        return 0.0
    total = cost.copy(rows, size, graph.itemsize)
    return total if layout == "whole" else total + cost.pick(rows, size, graph.itemsize)
