"""A model in float64: what it computes but for rounding, in any runtime that has the kernels.

Every float tensor, stored or declared, becomes float64, and every cast to a float type a cast to float64. Operators
that the standard does not define on float64 (quantization, sizes of Resize) keep their types, between casts: what
they round is part of the model.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.model.model_io import read_tensor
from onnx_decompose.model.renames import all_nodes, subgraphs
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.model.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from onnx_decompose.model.model_io import Model

__all__ = ["float_bytes", "nodes_of", "obstacle", "widened"]

_STANDARD = {"", "ai.onnx"}
_RANDOM = {
    *("Bernoulli", "Dropout", "Multinomial"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
}
_GATHER_OF_ML = ("ai.onnx.ml", "ArrayFeatureExtractor")
"""Takes columns, of float64 too; rewritten models have it."""
_NARROW, _WIDE = "tensor(float)", "tensor(double)"


def float_bytes(model: Model) -> int:
    """Bytes that the model's float initializers take in float64."""
    return sum(
        8 * int(np.prod(tensor.dims, dtype=np.int64))
        for tensor in model.proto.graph.initializer
        if tensor.data_type in FLOAT_TYPES
    )


def nodes_of(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the model, in any graph or function."""
    yield from all_nodes(proto.graph.node)
    for function in proto.functions:
        yield from all_nodes(function.node)


def obstacle(model: Model) -> str | None:
    """Why the model has no float64 form, in a few words; None if it has one."""
    proto = model.proto
    functions = {(f.domain, f.name) for f in proto.functions}
    for node in nodes_of(proto):
        known = (node.domain, node.op_type) in {*functions, _GATHER_OF_ML}
        if node.domain not in _STANDARD and not known:
            return (
                f"operator {node.op_type} of domain {node.domain} is not of the ONNX standard"
            )
        if node.op_type in _RANDOM and not _is_inference_dropout(node):
            return f"operator {node.op_type} draws random numbers"
        if any(len(body.sparse_initializer) for _, body in subgraphs(node)):
            return "it has sparse initializers"
    if len(proto.graph.sparse_initializer):
        return "it has sparse initializers"
    return None


def widened(model: Model) -> onnx.ModelProto:
    """The model in float64, without external data; for models without an :func:`obstacle`."""
    source = model.proto
    proto = onnx.ModelProto(
        ir_version=source.ir_version,
        opset_import=source.opset_import,
        graph=_Widener(model, opset_of(source)).graph(source.graph),
    )
    for function in source.functions:
        version = next((e.version for e in function.opset_import if e.domain in _STANDARD), 1)
        copy = proto.functions.add()
        copy.CopyFrom(function)
        del copy.node[:], copy.value_info[:]
        copy.node.extend(_Widener(model, version).nodes(function.node))
    return proto


@dataclasses.dataclass(slots=True)
class _Widener:
    """Widens graphs of one operator set."""

    model: Model
    opset: int
    casts: int = 0

    def graph(self, source: onnx.GraphProto) -> onnx.GraphProto:
        made = onnx.GraphProto(name=source.name)
        for kind in ("input", "output"):
            values = getattr(made, kind)
            values.extend(getattr(source, kind))
            for value in values:
                _widen_type(value.type)
        made.initializer.extend(self.tensor(tensor) for tensor in source.initializer)
        made.node.extend(self.nodes(source.node))
        return made

    def nodes(self, source: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in source:
            yield from self._bridged(self._node(node))

    def tensor(self, source: onnx.TensorProto) -> onnx.TensorProto:
        values = read_tensor(self.model, source)
        if source.data_type in FLOAT_TYPES:
            values = values.astype(np.float64)
        elif not source.external_data:
            return source
        return numpy_helper.from_array(np.ascontiguousarray(values), source.name)

    def _node(self, source: onnx.NodeProto) -> onnx.NodeProto:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                attribute.g.CopyFrom(self.graph(attribute.g))
            elif attribute.HasField("t"):
                attribute.t.CopyFrom(self.tensor(attribute.t))
            elif (
                (node.op_type, attribute.name)
                in {
                    *(("Cast", "to"), ("EyeLike", "dtype"), ("SequenceEmpty", "dtype")),
                    *(("DequantizeLinear", "output_dtype"),),
                }
                and attribute.i in FLOAT_TYPES
                and node.op_type != "DequantizeLinear"
            ):
                attribute.i = TensorProto.DOUBLE
        _widen_plain_constant(node)
        return node

    def _bridged(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The node, with casts around what the standard does not define on float64."""
        narrow_in, narrow_out = _narrow(node, self.opset)
        after = []
        for index in narrow_in:
            name = node.input[index]
            node.input[index] = self._fresh(name)
            yield _cast(name, node.input[index], TensorProto.FLOAT)
        for index in narrow_out:
            name = node.output[index]
            node.output[index] = self._fresh(name)
            after.append(_cast(node.output[index], name, TensorProto.DOUBLE))
        yield node
        yield from after

    def _fresh(self, name: str) -> str:
        self.casts += 1
        return f"{name}/in float32/{self.casts}"


def _narrow(node: onnx.NodeProto, opset: int) -> tuple[list[int], list[int]]:
    """Which inputs and outputs of a standard operator may be float32 and not float64."""
    if node.domain not in _STANDARD:
        return [], []
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return [], []
    types = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}

    def is_narrow(formals: Any, index: int) -> bool:
        formal = formals[min(index, len(formals) - 1)]
        allowed = types.get(formal.type_str, {formal.type_str})
        return _NARROW in allowed and _WIDE not in allowed

    return (
        [i for i, name in enumerate(node.input) if name and is_narrow(schema.inputs, i)],
        [i for i, name in enumerate(node.output) if name and is_narrow(schema.outputs, i)],
    )


def _widen_plain_constant(node: onnx.NodeProto) -> None:
    """Constants given as attributes that are float32 by definition, as tensors."""
    values: NDArray[Any] | None = None
    if node.op_type == "Constant" and node.attribute:
        attribute = node.attribute[0]
        if attribute.name == "value_float":
            values = np.array(attribute.f, np.float64)
        elif attribute.name == "value_floats":
            values = np.array(attribute.floats, np.float64)
    elif node.op_type == "ConstantOfShape" and not node.attribute:
        values = np.zeros(1)
    if values is not None:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(values)))


def _widen_type(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type"):
        if kind.tensor_type.elem_type in FLOAT_TYPES:
            kind.tensor_type.elem_type = TensorProto.DOUBLE
    elif kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _widen_type(kind.optional_type.elem_type)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=to)


def _is_inference_dropout(node: onnx.NodeProto) -> bool:
    """Whether a Dropout passes its input on: it has no training mode, or none is asked for."""
    return node.op_type == "Dropout" and len(node.input) < 3
