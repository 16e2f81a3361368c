"""External data: tensors whose bytes lie in files beside the model, and moving them without holding them in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import BinaryIO

__all__ = [
    "DataWriter",
    "extent",
    "external_tensors",
    "inline_bytes",
    "outside_bytes",
    "rename",
    "set_entry",
    "without_weights",
]

ALIGNMENT = 4096
"""Offsets are multiples of a memory page, so that runtimes can map tensors (ONNX, 'External Tensor Data')."""

SMALLEST = 1024
"""Bytes; smaller tensors stay in the model, where shape inference reads them."""

_CHUNK = 1 << 24


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model that is stored outside it, in any graph, attribute or function."""
    pending: list[Any] = [proto.graph, *proto.functions]
    while pending:
        graph = pending.pop()
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        for attribute in attributes:
            pending.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
        yield from filter(uses_external_data, _stored_tensors(graph))
        for attribute in attributes:
            yield from filter(uses_external_data, (attribute.t, *attribute.tensors))


def _stored_tensors(graph: Any) -> Iterator[onnx.TensorProto]:
    """The initializers of a graph, sparse ones as their two parts; functions have none."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield sparse.values
        yield sparse.indices


def extent(tensor: onnx.TensorProto) -> tuple[int, int | None]:
    """Offset and length in bytes of an external tensor; without a length the data reaches to the file's end."""
    info: Any = ExternalDataInfo(tensor)
    return int(info.offset or 0), None if info.length is None else int(info.length)


def set_entry(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Say where the bytes of ``tensor`` lie."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def rename(tensor: onnx.TensorProto, location: str) -> None:
    """Say that the file that holds an external tensor has another name."""
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def inline_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of the initializers that are stored in the model itself."""
    return sum(
        tensor.ByteSize() for tensor in proto.graph.initializer if tensor.HasField("raw_data")
    )


def outside_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of the tensors that are stored outside the model."""
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in external_tensors(proto)
    )


def without_weights(
    proto: onnx.ModelProto, kept: Collection[str] = ()
) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, onnx.TensorProto]]]:
    """A copy of ``proto`` whose large initializers have no bytes, without ever copying these.

    Args:
        proto: the model.
        kept: names of initializers that stay as they are.

    Returns:
        The copy; and for each emptied initializer its proto in the copy and the one that holds the bytes.
    """
    light = onnx.ModelProto()
    emptied: list[tuple[onnx.TensorProto, onnx.TensorProto]] = []
    _copy_fields(proto, light, "graph")
    _copy_fields(proto.graph, light.graph, "initializer")
    for tensor in proto.graph.initializer:
        if (
            tensor.name in kept
            or tensor.ByteSize() < SMALLEST
            or not tensor.HasField("raw_data")
        ):
            light.graph.initializer.append(tensor)
            continue
        copy = light.graph.initializer.add()
        _copy_fields(tensor, copy, "raw_data")
        emptied.append((copy, tensor))
    return light, emptied


class DataWriter:
    """Appends tensors to a data file, each on a page of its own.

    Args:
        stream: the new file.
        location: its name relative to the model.
    """

    def __init__(self, stream: BinaryIO, location: str) -> None:
        self._stream = stream
        self._location = location
        self._end = 0

    def append(self, tensor: onnx.TensorProto, content: memoryview) -> None:
        """Write the bytes of ``tensor``, a piece at a time, and note in it where they are."""
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._stream.write(bytes(start - self._end))
        for first in range(0, content.nbytes, _CHUNK):
            self._stream.write(content[first : first + _CHUNK])
        self._end = start + content.nbytes
        set_entry(tensor, self._location, start, content.nbytes)


def _copy_fields(source: Any, target: Any, left_out: str) -> None:
    """Copy every field that is set but one."""
    for descriptor, value in source.ListFields():
        if descriptor.name == left_out:
            continue
        if hasattr(value, "extend"):
            getattr(target, descriptor.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, descriptor.name).CopyFrom(value)
        else:
            setattr(target, descriptor.name, value)
