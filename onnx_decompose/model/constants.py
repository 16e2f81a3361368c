"""Values of a graph that are the same in every run, whatever form the exporter gave them.

A stored tensor stays one through operators that only rename, reorder or reshape its entries, or cast floats. Values
that other operators compute from constants are told apart from those that depend on an input, and are not read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_decompose.model.constant_forms import Constant, passed_on
from onnx_decompose.model.model_io import Model, read_tensor
from onnx_decompose.model.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Constant", "Constants"]

_SCALAR_FORMS = ("value_float", "value_int", "value_floats", "value_ints")
_RANDOM = {
    *("Bernoulli", "Dropout", "Multinomial"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
}
_MOST_DENSE = 2**31
"""Bytes that a sparse tensor may take when it is made dense."""

_SMALL_DENSE = 2**26
_MOST_GROWTH = 1000
"""How much larger than what is stored: a sparse tensor of over ``_SMALL_DENSE`` bytes that holds less is no weight."""


class Constants:
    """The constants of a model's main graph by value name.

    An initializer that is also a graph input can be overridden at run time, so it is not a constant.

    Attributes:
        overridable: those initializers.
        computed: values that operators compute from constants alone: the types of these operators, and of the stored
            tensors behind them, for messages. They are not read.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        graph = model.proto.graph
        inputs = {value.name for value in graph.input}
        stored = {tensor.name: tensor for tensor in graph.initializer}
        sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
        self.overridable = frozenset(inputs & (stored.keys() | sparse.keys()))
        self.computed: dict[str, tuple[str, ...]] = {}
        self._found: dict[str, Constant] = {}
        for name in stored.keys() - self.overridable:
            self._found[name] = Constant.stored(name, stored[name])
        for name in sparse.keys() - self.overridable:
            self._store_sparse(name, sparse[name])
        for node in graph.node:
            self._follow(node)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Constant:
        return self._found[name]

    @property
    def names(self) -> frozenset[str]:
        """Every value that no input can change, also those that are computed and not read."""
        return frozenset(self._found.keys() | self.computed.keys())

    def array(self, name: str) -> Array:
        """The values; a view or a memory map where the stored form allows it."""
        constant = self._found[name]
        values = read_tensor(self._model, constant.tensor)
        for step in constant.steps:
            values = step(values)
        return values

    def _follow(self, node: onnx.NodeProto) -> None:
        """Add the outputs of ``node`` if it stores a constant, or makes one of constants."""
        if not node.output:
            return
        if node.domain in {"", "ai.onnx"}:
            if node.op_type == "Constant":
                self._store(node)
                return
            source = self._found.get(next(iter(node.input), ""))
            made = None if source is None else passed_on(node, source, self._integers)
            if made is not None:
                self._found[node.output[0]] = made
                return
        self._note_computed(node)

    def _store(self, node: onnx.NodeProto) -> None:
        name = node.output[0]
        for attribute in node.attribute:
            if attribute.name == "sparse_value":
                self._store_sparse(name, attribute.sparse_tensor)
        tensor = _constant_tensor(node)
        if tensor is not None:
            self._found[name] = Constant.stored(name, tensor)

    def _store_sparse(self, name: str, sparse: onnx.SparseTensorProto) -> None:
        """Take a sparse tensor as the dense one that it stands for, unless that is huge."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(sparse.values.data_type)
        size = math.prod(sparse.dims) * dtype.itemsize
        stored = math.prod(sparse.values.dims) * dtype.itemsize
        if size > _MOST_DENSE:
            self.computed[name] = ("sparse tensor of over 2 GB",)
            return
        if size > max(_SMALL_DENSE, _MOST_GROWTH * stored):
            self.computed[name] = ("sparse tensor with next to no entries",)
            return
        dense = np.zeros(tuple(sparse.dims), dtype)
        places = read_tensor(self._model, sparse.indices)
        flat = (
            places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), dense.shape)
        )
        dense.reshape(-1)[flat] = read_tensor(self._model, sparse.values)
        self._found[name] = Constant.stored(name, numpy_helper.from_array(dense, name))

    def _note_computed(self, node: onnx.NodeProto) -> None:
        """Remember that ``node`` computes its outputs from constants alone, if it does."""
        read = [name for name in node.input if name]
        known = all(name in self._found or name in self.computed for name in read)
        if not read or not known or node.op_type in _RANDOM or _has_subgraph(node):
            return
        behind: dict[str, None] = {}
        for name in read:
            if name in self._found:
                kind = onnx.TensorProto.DataType.Name(self._found[name].data_type)
                if self._found[name].data_type not in FLOAT_TYPES:
                    behind[kind] = None
            else:
                behind.update(dict.fromkeys(self.computed[name]))
        self.computed.update(dict.fromkeys(node.output, (*behind, node.op_type)))

    def _integers(self, name: str) -> list[int] | None:
        return None if name not in self else [int(n) for n in self.array(name).reshape(-1)]


def _has_subgraph(node: onnx.NodeProto) -> bool:
    return any(a.HasField("g") or a.graphs for a in node.attribute)


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
