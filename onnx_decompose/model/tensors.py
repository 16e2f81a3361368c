"""What a model's inputs and outputs look like: name, dtype, shape with symbolic dimensions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx

from onnx_decompose.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BFLOAT16",
    "FLOAT_TYPES",
    "TensorSpec",
    "graph_inputs",
    "graph_outputs",
    "is_float",
    "largest_number",
    "smallest_normal",
    "tensor_dtype",
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

FLOAT_TYPES = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    }
)
"""ONNX element types of float weights: 16 bits or more."""

# Names as in the ONNX standard's DataType, in lower case.
_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "string": np.dtype(object),
    "bfloat16": BFLOAT16,
    **{name: np.dtype(name) for name in ("float16", "bool", "complex64", "complex128")},
    **{
        f"{kind}{bits}": np.dtype(f"{kind}{bits}")
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}


def tensor_dtype(type_name: str) -> np.dtype[Any] | None:
    """Numpy's dtype for an ONNX element type such as ``float``, or None where there is none."""
    return _DTYPES.get(type_name)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is a real floating-point type, bfloat16 included."""
    return bool(np.issubdtype(dtype, np.floating)) or dtype == BFLOAT16


def largest_number(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a floating-point type, bfloat16 included."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def smallest_normal(dtype: np.dtype[Any]) -> float:
    """The smallest positive number that a floating-point type, bfloat16 included, holds with all of its digits."""
    return float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: the tensor's name in the graph.
        dtype: numpy's dtype (``ml_dtypes.bfloat16`` for bfloat16, ``object`` for strings).
        shape: per axis its fixed size, its symbolic name, or None for an unnamed dynamic axis;
            None instead of a tuple where the model does not even state the rank.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def axis_symbol(self, axis: int) -> str | None:
        """The name under which a dynamic axis gets its size; None for a fixed axis.

        An unnamed dynamic axis is called ``<tensor>.<axis>``; equal symbols share one size.
        """
        if self.shape is None:
            return None
        dim = self.shape[axis]
        if isinstance(dim, int):
            return None
        return dim or f"{self.name}.{axis}"

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name}: {self.dtype}[...]"
        return f"{self.name}: {self.dtype}[{', '.join(str(d or '?') for d in self.shape)}]"


def graph_inputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The inputs a caller must give, in graph order; initializers that are also inputs are not.

    Raises:
        ModelError: an input is not a tensor, or of a type numpy cannot hold.
    """
    given = {tensor.name for tensor in model.graph.initializer}
    given.update(tensor.values.name for tensor in model.graph.sparse_initializer)
    return _specs(value for value in model.graph.input if value.name not in given)


def graph_outputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The graph's outputs, in order.

    Raises:
        ModelError: an output is not a tensor, or of a type numpy cannot hold.
    """
    return _specs(model.graph.output)


def _specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "untyped"
        raise ModelError(
            f"{value.name}: its type is {kind}; only tensors can be run and compared"
        )
    tensor = value.type.tensor_type
    type_name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    dtype = tensor_dtype(type_name)
    if dtype is None:
        raise ModelError(f"{value.name}: element type {type_name} cannot be run and compared")
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(_dim(dim) for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype, shape)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    # Negative sizes are an old spelling of "dynamic", which onnxruntime accepts too.
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return dim.dim_param or None
