"""Values of a graph that are the same in every run, whatever form the exporter gave them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_decompose.model_io import Model, read_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Constant", "Constants"]

_SCALAR_FORMS = ("value_float", "value_int", "value_floats", "value_ints")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A constant value and the stored tensor behind it.

    Attributes:
        source: what stores it: an initializer's name, or a Constant node's output.
        tensor: the stored tensor; in a Constant node it may have any name or none.
        transposed: the value is the stored matrix transposed.
    """

    source: str
    tensor: onnx.TensorProto
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        dims = tuple(self.tensor.dims)
        return dims[::-1] if self.transposed else dims


class Constants:
    """The constants of a model's main graph by value name.

    An initializer that is also a graph input can be overridden at run time, so it is not a constant.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.overridable = frozenset(
            {value.name for value in model.proto.graph.input}
            & {tensor.name for tensor in model.proto.graph.initializer}
        )
        self._found: dict[str, Constant] = {
            tensor.name: Constant(tensor.name, tensor)
            for tensor in model.proto.graph.initializer
            if tensor.name not in self.overridable
        }
        for node in model.proto.graph.node:
            self._follow(node)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Constant:
        return self._found[name]

    def array(self, name: str) -> NDArray[Any]:
        """The values; a view or a memory map where the stored form allows it."""
        constant = self._found[name]
        values = read_tensor(self._model, constant.tensor)
        return values.T if constant.transposed else values

    def _follow(self, node: onnx.NodeProto) -> None:
        """Add the outputs of ``node`` if it only stores or renames a constant."""
        if node.domain not in {"", "ai.onnx"} or not node.output:
            return
        if node.op_type == "Constant":
            tensor = _constant_tensor(node)
            if tensor is not None:
                self._found[node.output[0]] = Constant(node.output[0], tensor)
        elif node.op_type in {"Identity", "Transpose"}:
            source = self._found.get(next(iter(node.input), ""))
            if source is None:
                return
            if node.op_type == "Identity":
                self._found[node.output[0]] = source
            elif len(source.shape) == 2 and _swaps(node):
                self._found[node.output[0]] = dataclasses.replace(
                    source, transposed=not source.transposed
                )


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            stored: onnx.TensorProto = attribute.t
            return stored
        if attribute.name in _SCALAR_FORMS:
            values = onnx.helper.get_attribute_value(attribute)
            dtype = np.float32 if "float" in attribute.name else np.int64
            return numpy_helper.from_array(np.asarray(values, dtype=dtype), node.output[0])
    return None


def _swaps(node: onnx.NodeProto) -> bool:
    """Whether a Transpose of a matrix exchanges its two axes, as it does by default."""
    return all(list(a.ints) == [1, 0] for a in node.attribute if a.name == "perm")
