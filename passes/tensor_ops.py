"""Operators on the unit axis of values, in whatever form a model's operator set has, and where constants go."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.model.metadata import Block
from onnx_decompose.passes.splice import Placed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.model.shapes import Dim
    from onnx_decompose.passes.splice import Fresh

    Value: TypeAlias = gs.Variable | gs.Constant

__all__ = ["TensorOps"]


class TensorOps:
    """Operators on the unit axis, in the form that the model's operator set has."""

    def __init__(self, opset: int, shapes: Mapping[str, tuple[Dim, ...]], fresh: Fresh) -> None:
        self.unit_axis = -1
        self.opset = opset
        self.shapes = shapes
        self.ranks = {name: len(shape) for name, shape in shapes.items()}
        self.fresh = fresh
        self.placed: list[Placed] = []
        self.constants: dict[str, list[Block]] = {}
        self.unit_axes: dict[str, int] = {}
        self._noted: set[tuple[str, str, int | None, bytes, bytes]] = set()

    def along(self, unit_axis: int) -> TensorOps:
        """The same operators, nodes and notes, on another axis, counted from the last."""
        other = copy.copy(self)
        other.unit_axis = unit_axis
        return other

    def axis(self, value: str) -> int:
        """The unit axis of ``value`` as an attribute; negative axes came with operator set 11."""
        return self.unit_axis if self.opset >= 11 else self.ranks[value] + self.unit_axis

    def add(
        self,
        op: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        place: int,
        attrs: dict[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> None:
        """Add a helper node before whatever is placed next."""
        name = self.fresh.name(f"{outputs[0].name}.{op}")
        node = gs.Node(op, name, attrs or {}, list(inputs), list(outputs))
        if domain:
            node.domain = domain
        self.placed.append(Placed(node, place, None))

    def note(
        self,
        constant: str,
        units: NDArray[np.intp],
        stored: str,
        *,
        rows: int = 1,
        transposed: bool = False,
        axis: int = -1,
        **places: Any,
    ) -> None:
        """Write down where ``units`` of a per-unit constant lie now; ``places`` as of :class:`Block`.

        An emitter notes every per-unit constant that its nodes read: a folded bias that is not noted cannot be proved.

        Args:
            constant: its name.
            units: some of its units.
            stored: the tensor that holds them.
            rows: entries that each unit has: the product of the other axes.
            transposed: the units are the first of the tensor's axes that are not 1.
            axis: of the constant that has the units, counted from the last.
            places: fields of the block.
        """
        block = Block(np.arange(rows), units, stored, transposed, **places)
        self.note_block(constant, block, axis)

    def note_block(self, constant: str, block: Block, axis: int = -1) -> None:
        """Write down where a part of a constant lies now, rows taken of all other axes; see :meth:`note`."""
        units = block.rows.tobytes(), block.columns.tobytes()
        key = (constant, block.initializer, block.part, *units)
        if key in self._noted:
            return
        self._noted.add(key)
        self.unit_axes[constant] = axis
        self.constants.setdefault(constant, []).append(block)

    def split(
        self,
        value: Value,
        sizes: Sequence[int],
        outputs: Sequence[Value],
        place: int,
        *,
        axis: int | None = None,
    ) -> None:
        """Cut ``value`` into consecutive runs of ``sizes``; along its unit axis unless told otherwise."""
        axis = self.axis(value.name) if axis is None else axis
        if self.opset >= 13:
            lengths = self.fresh.constant(f"{value.name}.sizes", np.asarray(sizes, np.int64))
            self.add("Split", [value, lengths], outputs, place, {"axis": axis})
        else:
            self.add("Split", [value], outputs, place, {"axis": axis, "split": list(sizes)})

    def slice(
        self,
        value: Value,
        start: int,
        stop: int,
        output: Value,
        place: int,
        like: str | None = None,
    ) -> None:
        """Units ``start`` to ``stop`` of ``value``; ``like`` is a value of the same rank where it is a new one."""
        axis = self.axis(like or value.name)
        if self.opset < 10:
            attrs = {"starts": [start], "ends": [stop], "axes": [axis]}
            self.add("Slice", [value], [output], place, attrs)
            return
        bounds = [
            self.fresh.constant(f"{output.name}.{what}", np.asarray([number], np.int64))
            for what, number in (("start", start), ("stop", stop), ("axis", axis))
        ]
        self.add("Slice", [value, *bounds], [output], place)

    def gather(
        self, value: Value, units: NDArray[np.intp], output: Value, like: str, place: int
    ) -> None:
        """The given units of ``value``; ``like`` is a value of the same rank."""
        indices = self.fresh.constant(f"{output.name}.units", units.astype(np.int64))
        self.add("Gather", [value, indices], [output], place, {"axis": self.axis(like)})

    def pick(
        self, value: Value, units: NDArray[np.intp], output: Value, like: str, place: int
    ) -> None:
        """The same by an operator that copies by type instead of byte by byte, where the rank is known not to be 1.

        onnxruntime has it for float32 and float64 on the CPU.
        """
        # Of a vector it makes a matrix, and it knows the last axis alone.
        if self.ranks.get(like, 1) < 2 or self.unit_axis != -1:
            self.gather(value, units, output, like, place)
            return
        indices = self.fresh.constant(f"{output.name}.units", units.astype(np.int64))
        self.add(
            "ArrayFeatureExtractor", [value, indices], [output], place, domain="ai.onnx.ml"
        )

    def can_pad(self, like: str) -> bool:
        """Whether :meth:`pad` can be written: axes can be named since operator set 18, before that all are padded."""
        return self.opset >= 18 or like in self.ranks

    def pad(
        self, value: Value, around: tuple[int, int], output: Value, like: str, place: int
    ) -> None:
        """``value`` with its first and last unit repeated so often before and after it."""
        attrs = {"mode": "edge"}
        if self.opset >= 18:
            pads, axes = np.asarray(around, np.int64), np.asarray([-1], np.int64)
            inputs = [
                self.fresh.constant(f"{output.name}.pads", pads),
                gs.Variable.empty(),
                self.fresh.constant(f"{output.name}.axes", axes),
            ]
            self.add("Pad", [value, *inputs], [output], place, attrs)
            return
        others = [0] * (self.ranks[like] - 1)
        widths = [*others, around[0], *others, around[1]]
        if self.opset < 11:
            self.add("Pad", [value], [output], place, {**attrs, "pads": widths})
            return
        pads = self.fresh.constant(f"{output.name}.pads", np.asarray(widths, np.int64))
        self.add("Pad", [value, pads], [output], place, attrs)

    def total(self, value: Value, output: Value, like: str, place: int) -> None:
        """The sum over the units of ``value``, as one unit."""
        axis = self.axis(like)
        if self.opset >= 13:
            axes = self.fresh.constant(f"{output.name}.axes", np.asarray([axis], np.int64))
            self.add("ReduceSum", [value, axes], [output], place, {"keepdims": 1})
        else:
            self.add("ReduceSum", [value], [output], place, {"axes": [axis], "keepdims": 1})

    def concat(self, values: Sequence[Value], output: Value, like: str, place: int) -> None:
        """``values`` side by side; ``like`` is a value of the same rank."""
        self.add("Concat", values, [output], place, {"axis": self.axis(like)})
