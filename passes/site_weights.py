"""Parts of a site's weight in the form that the weight has: floats, or integers and what makes floats of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.graph.quantized import weight_position
from onnx_decompose.graph.sites import attribute_values
from onnx_decompose.model.metadata import Block
from onnx_decompose.passes.splice import Placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.quantized import Operand, Quantized
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.passes.tensor_ops import TensorOps, Value

    IntArray = NDArray[np.intp]

__all__ = ["SiteWeights"]


class SiteWeights:
    """Writes parts of weights.

    Args:
        graph: the model's main graph.
        constants: its constants.
        ops: where the new nodes go.
    """

    def __init__(self, graph: onnx.GraphProto, constants: Constants, ops: TensorOps) -> None:
        self._graph = graph
        self._makers = {name: node for node in graph.node for name in node.output}
        self._constants = constants
        self._ops = ops

    def operands(
        self,
        site: Site,
        part: NDArray[Any],
        units: tuple[IntArray, IntArray],
        suffix: str,
    ) -> tuple[dict[int, Value], Block]:
        """Store one part of a weight.

        Args:
            site: the site.
            part: the stored entries, (rows, columns) of the weight as a matrix.
            units: which rows and columns these are.
            suffix: for names.

        Returns:
            What a copy of the site's node reads, by position: the part, and the site's constants beside it that have
            units; and where the part is stored.
        """
        position = weight_position(site.op_type)
        if site.quantized is None:
            node = self._graph.node[site.node]
            flipped = bool(site.kernel or attribute_values(node).get("transB", 0))
            tensor = self._store(site, site.laid_out(part, node), suffix)
            return {position: tensor}, Block(*units, tensor.name, flipped)
        quantized = site.quantized
        laid = quantized.codes.stored(part, 2)
        tensor = self._store(site, laid, suffix)
        block = Block(*units, tensor.name, quantized.codes.rows == -1)
        sliced = {
            (operand.maker, operand.position): self._sliced(operand, units, suffix)
            for operand in quantized.operands[1:]
        }
        sliced[quantized.codes.maker, quantized.codes.position] = tensor
        read = {number: value for (maker, number), value in sliced.items() if not maker}
        if quantized.made:
            read[position] = self._made(quantized, sliced, suffix, site.node)
        return read, block

    def groups(
        self,
        site: Site,
        parts: Sequence[tuple[NDArray[Any], tuple[IntArray, IntArray]]],
        size: tuple[int, ...],
        suffix: str,
    ) -> tuple[Value, list[Block]]:
        """Store parts of a convolution's weight as its groups, each padded to ``size`` inputs and outputs.

        Args:
            site: a convolution.
            parts: entries, (rows, columns) of the weight as a matrix, and which rows and columns these are.
            size: inputs and outputs of each group.
            suffix: for names.

        Returns:
            The weight, and where each part is stored.
        """
        inputs, outputs = size
        padded = np.zeros((inputs * site.taps, len(parts), outputs), parts[0][0].dtype)
        blocks: list[Block] = []
        node = self._graph.node[site.node]
        wanted = f"{site.tensor}.{suffix}"
        for place, (part, _) in enumerate(parts):
            padded[: part.shape[0], place, : part.shape[1]] = part
        laid = site.laid_out(padded.reshape(padded.shape[0], -1), node)
        tensor = self._ops.fresh.constant(wanted, laid)
        for place, (_, (rows, columns)) in enumerate(parts):
            full = rows.size == padded.shape[0]
            blocks.append(
                Block(
                    rows,
                    columns,
                    tensor.name,
                    True,
                    stored_rows=None if full else np.arange(rows.size),
                    stored_columns=place * outputs + np.arange(columns.size),
                )
            )
        return tensor, blocks

    def _store(self, site: Site, values: NDArray[Any], suffix: str) -> gs.Constant:
        return self._ops.fresh.constant(f"{site.tensor}.{suffix}", values)

    def _sliced(self, operand: Operand, units: tuple[IntArray, IntArray], suffix: str) -> Value:
        """A constant beside the integers, for some of the units."""
        values = self._constants.array(operand.name)
        matrix = operand.matrix(values)
        places = operand.units(*units)
        part = matrix[np.ix_(*places)]
        stored: Value = gs.Variable(operand.name)
        if part.shape != matrix.shape or not np.array_equal(part, matrix):
            laid = operand.stored(part, values.ndim)
            stored = self._ops.fresh.constant(f"{operand.name}.{suffix}", laid)
        # A part lies in the rows before a constant's last axis, and along that one.
        turned = operand.rows == -1 or operand.columns == -2
        lead, last = places[::-1] if turned else places
        self._ops.note_block(operand.name, Block(lead, last, stored.name, False))
        return stored

    def _made(
        self,
        quantized: Quantized,
        sliced: dict[tuple[str, int], Value],
        suffix: str,
        place: int,
    ) -> Value:
        """The operators that make the weight of the integers, on a part; equal parts share them."""
        before = ""
        value: Value = gs.Variable.empty()
        for name in quantized.made:
            node = self._makers[name]
            inputs: list[Value] = []
            for position, operand in enumerate(node.input):
                given = value if operand == before else gs.Variable(operand)
                inputs.append(sliced.get((name, position), given))
            before = name
            value = gs.Variable(self._ops.fresh.name(f"{name}.{suffix}"))
            base = self._ops.fresh.name(f"{node.name or name}.{suffix}")
            copy = gs.Node(node.op_type, base, {}, [*inputs], [value])
            self._ops.placed.append(Placed(copy, place, node))
        return value
