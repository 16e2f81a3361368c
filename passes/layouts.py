"""Where the units of a stack lie, and how values get there and back.

With G blocks of c units each, C = G * c, and a model's values of K units:

    Columns   [B, K] -> [1, C, 1, B]    [B, T, K] -> [1, C, B, T]    a site is a 1x1 Conv in G groups
    Rows      [B, K] -> [G, B, c]       [B, T, K] -> [G, B, T, c]    a site is a batched MatMul

Axes before the units are taken together where there are more of them, and at most one of their sizes is unknown.
No Shape is computed at run time: shapes are as static as the model's.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.model.metadata import Block

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.graph.unit_layouts import StackForm
    from onnx_decompose.passes.tensor_ops import TensorOps, Value
    from onnx_decompose.planning.stacks import StackLayout

    IntArray = NDArray[np.intp]

__all__ = ["LAYOUTS", "Columns", "Layout", "Rows", "Spread"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """How the units of one axis are spread over stacks.

    Attributes:
        whole: units of the axis in the model.
        counts: blocks of each stack.
        sizes: units of each of a stack's blocks, padding included.
        units: which unit stands at each place, stack by stack and block by block; padding repeats one of its block.
    """

    whole: int
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    units: IntArray

    @property
    def widths(self) -> list[int]:
        """Units of each stack."""
        return [count * size for count, size in zip(self.counts, self.sizes, strict=True)]

    def parts(self, units: IntArray) -> list[IntArray]:
        """An array like ``units`` by stack, (G, c) each."""
        runs = np.split(units, np.cumsum(self.widths)[:-1])
        shapes = zip(runs, self.counts, self.sizes, strict=True)
        return [run.reshape(count, size) for run, count, size in shapes]


class Layout(abc.ABC):
    """Moves values between the model's layout and that of stacks.

    Args:
        form: of the region's values.
        ops: where the nodes go.
    """

    op: str
    """Operator of a site."""

    most_axes: int
    """Axes of a value whose first ones are not taken together."""

    def __init__(self, form: StackForm, ops: TensorOps) -> None:
        self._lead = list(form.flat) if form.flat and form.rank > self.most_axes else None
        self._rank = 2 if self._lead else form.rank
        self._ops = ops

    @abc.abstractmethod
    def enter(
        self, value: Value, spread: Spread, index: IntArray | None, place: int
    ) -> list[Value]:
        """A value of the model in each stack.

        Args:
            value: made outside.
            spread: of its units.
            index: position in ``value`` of each unit of ``spread``; None where they are all in turn.
            place: of the new nodes.
        """

    @abc.abstractmethod
    def leave(
        self,
        parts: Sequence[Value],
        spread: Spread,
        index: IntArray | None,
        output: Value,
        place: int,
    ) -> None:
        """Make the model's value ``output`` from its parts in the stacks.

        Args:
            parts: of each stack.
            spread: of the units.
            index: which unit of ``spread`` stands at each position of ``output``; None where they are all in turn.
            output: read outside.
            place: of the new nodes.
        """

    @abc.abstractmethod
    def broadcast(self, value: Value, units: int, place: int) -> Value:
        """A value as it is, for every stack: its last axis has size 1, or holds all ``units`` in turn."""

    @abc.abstractmethod
    def constant(self, values: NDArray[Any], count: int) -> NDArray[Any]:
        """The constant (..., C) of a stack of ``count`` blocks; or (..., 1)."""

    @abc.abstractmethod
    def weight(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """Blocks (G, k, n) as the operator of a site reads them."""

    @abc.abstractmethod
    def attributes(self, count: int) -> Mapping[str, Any]:
        """Of the operator of a site with ``count`` blocks."""

    @abc.abstractmethod
    def block(
        self, tensor: str, number: int, size: tuple[int, int], units: tuple[IntArray, IntArray]
    ) -> Block:
        """Where ``weight`` holds block ``number`` of ``size`` (k, n), the first of which are ``units``."""

    @abc.abstractmethod
    def row(self, number: int, size: int, units: int) -> Mapping[str, Any]:
        """Where ``constant`` holds the first ``units`` of block ``number`` of ``size``, as fields of a ``Block``."""

    def _aligned(self, values: NDArray[Any]) -> NDArray[Any]:
        """A constant with as many axes as the values that it meets have on their way in."""
        missing = self._rank - values.ndim
        shape = values.shape[-1:] if self._lead else values.shape
        return values.reshape(*(1,) * (1 if self._lead else missing), *shape)

    def _flat(self, value: Value, units: int, place: int) -> Value:
        if self._lead is None:
            return value
        return self._reshape(value, [-1, units], self._new(value, "flat"), place)

    def _new(self, value: Value, what: str) -> Value:
        return gs.Variable(self._ops.fresh.name(f"{value.name}.{what}"))

    def _transpose(
        self, value: Value, order: Sequence[int], place: int, output: Value | None = None
    ) -> Value:
        output = output or self._new(value, "turned")
        self._ops.add("Transpose", [value], [output], place, {"perm": list(order)})
        return output

    def _take(
        self, value: Value, index: IntArray, axis: int, place: int, output: Value
    ) -> Value:
        tensor = self._ops.fresh.constant(f"{output.name}.order", index.astype(np.int64))
        self._ops.add("Gather", [value, tensor], [output], place, {"axis": axis})
        return output

    def _reshape(self, value: Value, shape: Sequence[Any], output: Value, place: int) -> Value:
        """0 keeps a size, and -1 is what is left."""
        tensor = self._ops.fresh.constant(f"{output.name}.shape", np.asarray(shape, np.int64))
        self._ops.add("Reshape", [value, tensor], [output], place)
        return output

    def _axes(
        self,
        op: str,
        value: Value,
        axes: Sequence[int],
        place: int,
        output: Value | None = None,
    ) -> Value:
        """Squeeze or Unsqueeze; its axes became an input in operator set 13."""
        output = output or self._new(value, f"{op.lower()}d")
        if self._ops.opset >= 13:
            tensor = self._ops.fresh.constant(f"{output.name}.axes", np.asarray(axes, np.int64))
            self._ops.add(op, [value, tensor], [output], place)
        else:
            self._ops.add(op, [value], [output], place, {"axes": list(axes)})
        return output


class Columns(Layout):
    """Units as channels and rows on the spatial axes: onnxruntime's fastest kernels for blocks on a CPU.

    The rows must not be the convolution's batch: that would run one product per row.
    """

    op = "Conv"
    most_axes = 3

    def enter(
        self, value: Value, spread: Spread, index: IntArray | None, place: int
    ) -> list[Value]:
        """See :meth:`Layout.enter`. A Gather along the first axis copies whole rows."""
        if index is None:
            whole = self.broadcast(value, spread.whole, place)
        else:
            last = self._rank - 1
            flat = self._flat(value, spread.whole, place)
            turned = self._transpose(flat, [last, *range(last)], place)
            shape = (1, -1, 1) if self._rank == 2 else (1, -1)
            whole = self._new(value, "units")
            self._take(turned, index.reshape(shape), 0, place, whole)
        if len(spread.counts) == 1:
            return [whole]
        parts = [self._new(value, f"stack{number}") for number in range(len(spread.counts))]
        self._ops.split(whole, spread.widths, parts, place, axis=1)
        return parts

    def leave(
        self,
        parts: Sequence[Value],
        spread: Spread,
        index: IntArray | None,
        output: Value,
        place: int,
    ) -> None:
        """See :meth:`Layout.leave`."""
        whole = parts[0]
        if len(parts) > 1:
            whole = self._new(output, "joined")
            self._ops.add("Concat", parts, [whole], place, {"axis": 1})
        rows = self._new(output, "rows") if self._lead else output
        if index is None:
            # onnxruntime folds such a Transpose, and the one of ``broadcast``, into the convolution's reordering.
            turned = self._transpose(whole, [0, 2, 3, 1], place)
            self._axes("Squeeze", turned, [0, 1] if self._rank == 2 else [0], place, rows)
        else:
            taken = self._take(whole, index, 1, place, self._new(output, "taken"))
            taken = self._axes("Squeeze", taken, [0, 2] if self._rank == 2 else [0], place)
            self._transpose(taken, [*range(1, self._rank), 0], place, rows)
        if self._lead:
            units = sum(spread.widths) if index is None else index.size
            self._reshape(rows, [*self._lead, units], output, place)

    def broadcast(self, value: Value, units: int, place: int) -> Value:
        """See :meth:`Layout.broadcast`."""
        flat = self._flat(value, units, place)
        wide = self._axes("Unsqueeze", flat, [0, 1] if self._rank == 2 else [0], place)
        return self._transpose(wide, [0, 3, 1, 2], place)

    def constant(self, values: NDArray[Any], count: int) -> NDArray[Any]:
        """See :meth:`Layout.constant`."""
        del count
        channels = np.moveaxis(self._aligned(values), -1, 0)[None]
        return channels[:, :, None] if self._rank == 2 else channels

    def weight(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """(G * n, k, 1, 1)."""
        turned = blocks.transpose(0, 2, 1)
        return turned.reshape(-1, turned.shape[2], 1, 1)

    def attributes(self, count: int) -> Mapping[str, Any]:
        """See :meth:`Layout.attributes`."""
        return {"group": count, "kernel_shape": [1, 1]}

    def block(
        self, tensor: str, number: int, size: tuple[int, int], units: tuple[IntArray, IntArray]
    ) -> Block:
        """See :meth:`Layout.block`."""
        rows, columns = units
        first = number * size[1]
        stored = np.arange(first, first + columns.size)
        return Block(rows, columns, tensor, True, None, _places(rows.size, size[0]), stored)

    def row(self, number: int, size: int, units: int) -> Mapping[str, Any]:
        """See :meth:`Layout.row`; so does a Conv's bias."""
        return {"stored_columns": number * size + np.arange(units)}


class Rows(Layout):
    """Blocks as an axis of their own, in front: batched products, on any provider and in any type."""

    op = "MatMul"
    most_axes = 2

    def enter(
        self, value: Value, spread: Spread, index: IntArray | None, place: int
    ) -> list[Value]:
        """See :meth:`Layout.enter`."""
        flat, last = self._flat(value, spread.whole, place), self._rank - 1
        cut: list[Value] = [
            self._new(value, f"stack{number}.units") for number in range(len(spread.counts))
        ]
        if index is not None:
            for part, units in zip(cut, spread.parts(index), strict=True):
                self._take(flat, units, last, place, part)
        else:
            runs = [flat]
            if len(cut) > 1:
                runs = [self._new(part, "run") for part in cut]
                self._ops.split(flat, spread.widths, runs, place, axis=last)
            for run, part, count, size in zip(
                runs, cut, spread.counts, spread.sizes, strict=True
            ):
                self._reshape(run, [*[0] * last, count, size], part, place)
        order = [last, *range(last), last + 1]
        return [self._transpose(part, order, place) for part in cut]

    def leave(
        self,
        parts: Sequence[Value],
        spread: Spread,
        index: IntArray | None,
        output: Value,
        place: int,
    ) -> None:
        """See :meth:`Layout.leave`."""
        last = self._rank - 1
        lead = self._lead or [0] * last
        joined = output if index is None else self._new(output, "joined")
        runs = [joined]
        if len(parts) > 1:
            runs = [self._new(part, "run") for part in parts]
        for part, run, width in zip(parts, runs, spread.widths, strict=True):
            turned = self._transpose(part, [*range(1, last + 1), 0, last + 1], place)
            self._reshape(turned, [*lead, width], run, place)
        axis = len(lead)
        if len(parts) > 1:
            self._ops.add("Concat", runs, [joined], place, {"axis": axis})
        if index is not None:
            self._take(joined, index, axis, place, output)

    def broadcast(self, value: Value, units: int, place: int) -> Value:
        """See :meth:`Layout.broadcast`."""
        return self._axes("Unsqueeze", self._flat(value, units, place), [0], place)

    def constant(self, values: NDArray[Any], count: int) -> NDArray[Any]:
        """See :meth:`Layout.constant`."""
        aligned = self._aligned(values)
        if aligned.shape[-1] == 1:
            return aligned[None]
        return np.moveaxis(aligned.reshape(*aligned.shape[:-1], count, -1), -2, 0)

    def weight(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """(G, 1, ..., k, n), with as many axes as the values."""
        count, rows, columns = blocks.shape
        return blocks.reshape(count, *(1,) * (self._rank - 2), rows, columns)

    def attributes(self, count: int) -> Mapping[str, Any]:
        """See :meth:`Layout.attributes`."""
        del count
        return {}

    def block(
        self, tensor: str, number: int, size: tuple[int, int], units: tuple[IntArray, IntArray]
    ) -> Block:
        """See :meth:`Layout.block`."""
        places = [_places(part.size, whole) for part, whole in zip(units, size, strict=True)]
        return Block(*units, tensor, False, number, *places)

    def row(self, number: int, size: int, units: int) -> Mapping[str, Any]:
        """See :meth:`Layout.row`."""
        return {"part": number, "stored_columns": _places(units, size)}


def _places(units: int, size: int) -> IntArray | None:
    """Where a matrix padded to ``size`` holds its units; None where it is full."""
    return None if units == size else np.arange(units, dtype=np.intp)


LAYOUTS: Mapping[StackLayout, type[Layout]] = {"columns": Columns, "rows": Rows}
"""How each layout is written."""
