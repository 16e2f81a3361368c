"""Constants that a graph puts together from others: gates in the standard's order, directions side by side.

Exporters store a recurrent module's weights as the framework has them, and let Slice, Concat and Unsqueeze bring the
gates into the order of the ONNX standard. Nothing but the places of entries changes. Initial states that a user does
not give are zeros, expanded to the batch size at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.reference

from onnx_decompose.model.shapes import opset_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.model_io import Model

__all__ = ["Rearranged"]

_MOVES = {
    *("Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
_SPREADS = _MOVES - {"Concat"} | {"Expand", "Tile"}
"""Operators that make nothing but entries of their first operand."""


class Rearranged:
    """The constants of a model's main graph, and what operators that only move entries make of them."""

    def __init__(self, model: Model, constants: Constants) -> None:
        self._constants = constants
        self._opset = opset_of(model.proto)
        self._makers = {
            name: node
            for node in model.proto.graph.node
            if node.domain in {"", "ai.onnx"}
            for name in node.output
        }
        self._arrays: dict[str, NDArray[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return self.source(name) is not None

    def source(self, name: str) -> str | None:
        """The stored tensor behind a value, the first where there are several; None if it is not constant."""
        if name in self._constants:
            return self._constants[name].source
        maker = self._makers.get(name)
        if maker is None or maker.op_type not in _MOVES:
            return None
        sources = [self.source(operand) for operand in maker.input if operand]
        return sources[0] if sources and None not in sources else None

    def array(self, name: str) -> NDArray[Any]:
        """The values."""
        if name in self._constants:
            return self._constants.array(name)
        if name not in self._arrays:
            self._run(self._makers[name])
        return self._arrays[name]

    def is_zero(self, name: str) -> bool:
        """Whether a value is known to be zero everywhere, whatever its shape at run time."""
        if name in self._constants:
            return not self._constants.array(name).any()
        maker = self._makers.get(name)
        if maker is None:
            return False
        if maker.op_type == "ConstantOfShape":
            return not any(onnx.numpy_helper.to_array(a.t).any() for a in maker.attribute)
        return maker.op_type in _SPREADS and self.is_zero(maker.input[0])

    def _run(self, node: onnx.NodeProto) -> None:
        """Compute the outputs of ``node`` as the standard says."""
        operands = {operand: self.array(operand) for operand in node.input if operand}
        graph = onnx.helper.make_graph(
            [node],
            "rearranged",
            [onnx.ValueInfoProto(name=operand) for operand in operands],
            [onnx.ValueInfoProto(name=output) for output in node.output if output],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", self._opset)]
        )
        made: Any = onnx.reference.ReferenceEvaluator(model).run(
            None, {operand: np.ascontiguousarray(array) for operand, array in operands.items()}
        )
        self._arrays.update(zip(filter(None, node.output), made, strict=True))
