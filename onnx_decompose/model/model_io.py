"""Reading and writing ONNX models: checked once here, at the border, so that everything inside may assume.

External data stays in its files: a tensor is read when it is asked for, and copied beside the output at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import logging
import math
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnx_decompose.errors import ModelError, OutputError
from onnx_decompose.model.external_data import (
    DataWriter,
    extent,
    external_tensors,
    rename,
    without_weights,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # asked for None before it is used

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

__all__ = [
    "Model",
    "check_output",
    "copy_model",
    "external_bytes",
    "external_files",
    "load_model",
    "model_files",
    "read_tensor",
    "remove_folder",
    "remove_temporaries",
    "save_model",
    "writing",
]


_MOST_NODES = 1_000_000
"""Nodes that a model's functions may stand for: onnx's shape inference goes through all of them."""

_PACKED = {"UINT4": 2, "INT4": 2, "FLOAT4E2M1": 2, "UINT2": 4, "INT2": 4}
"""How many numbers of a type share a byte."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model that passed the border checks.

    Attributes:
        proto: the model; external tensors are not loaded into it.
        path: the file it came from; None for a model made in memory.
        shown: what messages call it; its path by default.
    """

    proto: onnx.ModelProto
    path: Path | None = None
    shown: str = ""

    @property
    def folder(self) -> Path | None:
        """The folder that external data locations are relative to."""
        return None if self.path is None else self.path.parent

    @property
    def label(self) -> str:
        """How messages call the model."""
        return self.shown or ("model" if self.path is None else str(self.path))


def load_model(source: str | Path | onnx.ModelProto) -> Model:
    """Load and check a model.

    Raises:
        ModelError: the file is missing, empty, truncated or not an ONNX model, or its external data is not there.
    """
    if isinstance(source, onnx.ModelProto):
        model = Model(source)
    else:
        path = Path(source)
        model = Model(_parse(path), path)
    _check_graph(model)
    for tensor in external_tensors(model.proto):
        _external_path(model, tensor)
    return model


def read_tensor(model: Model, tensor: onnx.TensorProto) -> NDArray[Any]:
    """The values of ``tensor``; its shape is ``tensor.dims``.

    Raises:
        ModelError: the stored bytes do not fit the declared shape and type.
    """
    try:
        if uses_external_data(tensor):
            return _read_external(model, tensor)
        return numpy_helper.to_array(tensor)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{model.label}: tensor '{tensor.name}' is broken ({_one_line(error)}); export the model again"
        ) from error


def external_bytes(model: Model, tensor: onnx.TensorProto) -> NDArray[np.uint8]:
    """The stored bytes of an external tensor, memory-mapped."""
    path = _external_path(model, tensor)
    offset, length = extent(tensor)
    length = path.stat().st_size - offset if length is None else length
    if not length:
        return np.empty(0, np.uint8)
    try:
        mapped: NDArray[np.uint8] = np.memmap(str(path), np.uint8, "r", offset, (length,))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check who may") from error
    return mapped


def check_output(path: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work is done, an output that cannot be written or would overwrite an input.

    Raises:
        OutputError: naming the path.
    """
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError(
                f"{path}: is the input, which is never modified; choose another output path"
            )
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the path of a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(
            f"{path}: its folder is missing or cannot be written; choose another path"
        )


def model_files(model: Model) -> set[Path]:
    """The files that ``model`` came from: its own and its external data."""
    return external_files(model) | ({model.path} if model.path is not None else set())


def save_model(
    proto: onnx.ModelProto, path: Path, *, data_from: Model, kept: Iterable[Path] = ()
) -> None:
    """Write ``proto``, and the external data that it still refers to, beside it: whole or not at all.

    Data files of which every tensor is still in use are copied under their names, and used in place where ``path`` is
    in their folder. Of other files only the tensors in use go along, into ``<path>.data``; so do the new weights of a
    model that keeps its weights outside.

    Args:
        proto: the model to write.
        path: where to.
        data_from: the model whose external files ``proto`` refers to.
        kept: files that stay, besides those of ``data_from``, even if what was at ``path`` alone refers to them.
    """
    with _alone_in(path.parent), _all_or_none() as made:
        superseded = _own_data(path) - _resolved([*external_files(data_from), *kept])
        written = proto
        if next(external_tensors(data_from.proto), None) is not None:
            written, new = without_weights(
                proto, {t.name for t in data_from.proto.graph.initializer}
            )
            locations = _locations(written)
            taken = {
                location
                for location in locations
                if _goes_whole(location, written, path, data_from)
            }
            made.extend(_copy_external(taken, path, data_from))
            moved = [
                t
                for t in external_tensors(written)
                if ExternalDataInfo(t).location not in taken
            ]
            if new or moved:
                made.extend(_write_data(new, moved, path, data_from))
        with writing(path) as temporary:
            temporary.write_bytes(written.SerializeToString())
        _remove(superseded, written, path)


def _goes_whole(location: str, proto: onnx.ModelProto, path: Path, data_from: Model) -> bool:
    """Whether a data file is taken along as it is: used in place, or copied because all of it is still in use."""
    assert data_from.folder is not None
    source, target = data_from.folder / location, path.parent / location
    if target.exists() and target.samefile(source):
        return True
    used, whole = (
        sum(
            external_bytes(data_from, tensor).nbytes
            for tensor in external_tensors(model)
            if ExternalDataInfo(tensor).location == location
        )
        for model in (proto, data_from.proto)
    )
    return used == whole and _is_free(target, source)


def _is_free(target: Path, source: Path) -> bool:
    """Whether ``source`` may be copied to ``target``: nothing else is there."""
    return not target.exists() or target.samefile(source) or filecmp.cmp(target, source, False)


def _write_data(
    new: Sequence[tuple[onnx.TensorProto, onnx.TensorProto]],
    moved: Sequence[onnx.TensorProto],
    path: Path,
    data_from: Model,
) -> list[Path]:
    """Stream tensors into a data file of the new model's own.

    What is there already stays as it is, since a model may refer to it: the one of an earlier run does, until this
    one is whole.

    Returns:
        The file; none where one with that content is there.
    """
    with _temporary_beside(path) as temporary:
        with temporary.open("wb") as stream:
            data = DataWriter(stream, path.name)
            for tensor in moved:
                data.append(tensor, external_bytes(data_from, tensor).data)
            for tensor, source in new:
                data.append(tensor, memoryview(source.raw_data))
        number = 0
        target = path.with_name(f"{path.name}.data")
        while target.exists() and not filecmp.cmp(temporary, target, False):
            number += 1
            target = path.with_name(f"{path.name}.{number}.data")
        for tensor in (*moved, *(tensor for tensor, _ in new)):
            rename(tensor, target.name)
        if target.exists():
            return []
        _put(temporary, target)
        return [target]


def _own_data(path: Path) -> set[Path]:
    """The data files that :func:`save_model` made for the model that is at ``path``."""
    try:
        proto = onnx.ModelProto.FromString(path.read_bytes())
        locations = _locations(proto)
    except (OSError, DecodeError, ValueError, TypeError):
        return set()
    pattern = re.compile(re.escape(path.name) + r"(\.[1-9]\d*)?\.data")
    return _resolved(path.parent / found for found in locations if pattern.fullmatch(found))


def _remove(superseded: set[Path], proto: onnx.ModelProto, path: Path) -> None:
    """Remove the data of the model that was at ``path`` before ``proto``, which no longer has a reader."""
    in_use = _resolved(path.parent / location for location in _locations(proto))
    for file in superseded - in_use:
        with contextlib.suppress(OSError):  # the new model is whole without that
            file.unlink()


def _resolved(paths: Iterable[Path]) -> set[Path]:
    return {path.resolve() for path in paths}


@contextlib.contextmanager
def _all_or_none() -> Iterator[list[Path]]:
    """Collects files that were made; they go again where the block ends with an error."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time put a model and its data into a folder, where the system has locks for that."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # not every file system locks folders
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def copy_model(model: Model, path: Path) -> None:
    """Write the bytes of the file that ``model`` came from, and its external data, to ``path``."""
    assert model.path is not None
    with _alone_in(path.parent), _all_or_none() as made:
        superseded = _own_data(path) - _resolved(external_files(model))
        made.extend(_copy_external(_locations(model.proto), path, model))
        with writing(path) as temporary:
            shutil.copyfile(model.path, temporary)
        _remove(superseded, model.proto, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without an error.

    Raises:
        OutputError: the folder is missing or cannot be written.
    """
    with _temporary_beside(path) as temporary:
        yield temporary
        _put(temporary, path)


def remove_temporaries() -> None:
    """What an interruption of the clearing up itself may have left."""
    while _temporaries:
        temporary = _temporaries.pop()
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Clear a temporary folder up; what an interruption leaves of it, ``remove_temporaries`` takes."""
    _temporaries.add(folder)
    shutil.rmtree(folder, ignore_errors=True)
    _temporaries.discard(folder)


_temporaries: set[Path] = set()


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of ``path``, gone at the end unless it was put in its place.

    Raises:
        OutputError: as ``writing``.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    _temporaries.add(temporary)  # before it is there: an interruption may come at any moment
    try:
        try:
            temporary.open("xb").close()
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            _temporaries.discard(temporary)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another path"
        ) from error


def _put(temporary: Path, path: Path) -> None:
    """Move a file that is whole to its place."""
    with temporary.open("rb+") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def external_files(model: Model) -> set[Path]:
    """The external data files that ``model`` refers to."""
    return {_external_path(model, tensor) for tensor in external_tensors(model.proto)}


def _parse(path: Path) -> onnx.ModelProto:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); give an ONNX file"
        ) from error
    if not content:
        raise ModelError(f"{path}: the file is empty; export the model again")
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(
            f"{path}: not an ONNX model, or a truncated one; export or copy it again"
        ) from error
    return proto


def _check_graph(model: Model) -> None:
    proto = model.proto
    if not proto.HasField("graph") or not proto.graph.output:
        raise ModelError(
            f"{model.label}: holds no graph with outputs; not an ONNX model, or a truncated one"
        )
    if not proto.opset_import:
        raise ModelError(
            f"{model.label}: declares no operator set; truncated, or not exported completely"
        )
    seen: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in seen:
            raise ModelError(
                f"{model.label}: two initializers are called '{tensor.name}'; export it again"
            )
        seen.add(tensor.name)
        _check_size(model, tensor)
    _check_order(model, seen)
    _check_attributes(model, proto.graph)
    _check_calls(model)


def _check_calls(model: Model) -> None:
    """Functions that call each other twice, again and again, are a small file and more nodes than anybody can read."""
    functions = {(f.domain, f.name, f.overload): f for f in model.proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    waiting = {key: _nodes_in(function.node) for key, function in functions.items()}
    found = True
    while found:  # those that call only what is counted come next; what stays calls itself
        found = False
        for key, nodes in list(waiting.items()):
            called = [(node.domain, node.op_type, node.overload) for node in nodes]
            if not any(other in waiting for other in called):
                sizes[key] = sum(sizes.get(other, 1) for other in called)
                del waiting[key]
                found = True
    nodes = _nodes_in(model.proto.graph.node)
    count = sum(sizes.get((node.domain, node.op_type, node.overload), 1) for node in nodes)
    if count > max(_MOST_NODES, 2 * len(nodes)):
        raise ModelError(
            f"{model.label}: its functions call each other so often that they stand for {count:.2g} nodes; inline "
            "those that matter, and export the model again"
        )


def _nodes_in(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes and those of the graphs in them."""
    found = list(nodes)
    for node in found:  # grows as it goes
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found.extend(inner.node)
    return found


def _check_attributes(model: Model, graph: onnx.GraphProto) -> None:
    """Only a function's nodes may refer to attributes of a call (ONNX IR specification, 'Attributes')."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                raise ModelError(
                    f"{model.label}: node '{node.name or node.op_type}' takes '{attribute.name}' from a call, and is "
                    "in no function; export the model again"
                )
            for inner in (attribute.g, *attribute.graphs):
                _check_attributes(model, inner)


def _check_order(model: Model, initializers: set[str]) -> None:
    """Every value is made once, before it is read (ONNX IR specification, 'Graphs')."""
    graph = model.proto.graph
    known = initializers | {value.name for value in graph.input} | {""}
    known |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        twice = [name for name in node.output if name and name in known]
        if twice:
            raise ModelError(
                f"{model.label}: node '{node.name or node.op_type}' makes '{twice[0]}', which is there already; "
                "export the model again"
            )
        missing = [name for name in node.input if name not in known]
        if missing:
            raise ModelError(
                f"{model.label}: node '{node.name or node.op_type}' reads '{missing[0]}', which nothing before it "
                "makes; export the model again"
            )
        known.update(node.output)
    missing = [value.name for value in graph.output if value.name not in known]
    if missing:
        raise ModelError(
            f"{model.label}: nothing makes the output '{missing[0]}'; export the model again"
        )


def _check_size(model: Model, tensor: onnx.TensorProto) -> None:
    """Declared and stored bytes must agree before anything is allocated from the declared shape."""
    if any(size < 0 for size in tensor.dims):
        raise ModelError(
            f"{model.label}: tensor '{tensor.name}' declares shape {list(tensor.dims)}; export the model again"
        )
    if tensor.data_type == onnx.TensorProto.STRING or not tensor.HasField("raw_data"):
        return
    if uses_external_data(tensor):  # what is stored here as well does not count
        return
    if _declared_bytes(model, tensor) != len(tensor.raw_data):
        raise ModelError(
            f"{model.label}: tensor '{tensor.name}' declares shape {list(tensor.dims)} but holds "
            f"{len(tensor.raw_data)} bytes; export the model again"
        )


def _declared_bytes(model: Model, tensor: onnx.TensorProto) -> int:
    """What the values of the declared shape and type take."""
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError as error:
        raise ModelError(
            f"{model.label}: tensor '{tensor.name}' has the unknown type {tensor.data_type}; "
            "a newer onnx package may know it"
        ) from error
    in_a_byte = _PACKED.get(onnx.TensorProto.DataType.Name(tensor.data_type), 1)
    found: int = -(-math.prod(tensor.dims) * itemsize // in_a_byte)
    return found


def _external_path(model: Model, tensor: onnx.TensorProto) -> Path:
    """The data file of an external tensor: inside the model's folder, and long enough."""
    where = f"{model.label}: tensor '{tensor.name}'"
    if model.folder is None:
        raise ModelError(
            f"{where} is stored outside a model that has no file; load its external data first"
        )
    try:
        info = ExternalDataInfo(tensor)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{where} has a broken external data entry ({_one_line(error)})"
        ) from error
    folder = model.folder.resolve()
    if not isinstance(info.location, str):  # protobuf gives what is not UTF-8 as bytes
        raise ModelError(f"{where} points to a file whose name is not UTF-8; export it again")
    if "\0" in info.location:  # no file system has such names, and Python refuses to ask
        raise ModelError(
            f"{where} points to a file whose name holds a zero byte; export it again"
        )
    path = (folder / info.location).resolve()
    if not path.is_relative_to(folder) or not info.location:
        raise ModelError(
            f"{where} points to '{info.location}', outside the model's folder; move the data beside it"
        )
    if not path.is_file():
        raise ModelError(
            f"{where} is stored in '{info.location}', which is missing; put it beside the model"
        )
    offset, length = extent(tensor)
    declared = _declared_bytes(model, tensor)
    end = offset + (declared if length is None else length)
    if offset < 0 or (length or 0) < 0 or path.stat().st_size < end:
        raise ModelError(
            f"{where} ends at byte {end} of '{info.location}', past its end; copy the file again"
        )
    if length is not None and length != declared:
        raise ModelError(
            f"{where} declares shape {list(tensor.dims)} but is stored in {length} bytes of '{info.location}'; "
            "export the model again"
        )
    return path


def _read_external(model: Model, tensor: onnx.TensorProto) -> NDArray[Any]:
    """Memory-map an external tensor: only the pages that are looked at are read."""
    path = _external_path(model, tensor)
    offset, length = extent(tensor)
    dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if length is not None and length != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{length} bytes for shape {shape} of {dtype}")
    if 0 in shape:
        return np.empty(shape, dtype)
    mapped: NDArray[Any] = np.memmap(str(path), dtype, "r", offset, shape)
    return mapped


def _locations(proto: onnx.ModelProto) -> set[str]:
    """The data files that ``proto`` refers to, relative to its folder."""
    return {ExternalDataInfo(tensor).location for tensor in external_tensors(proto)}


def _copy_external(locations: set[str], path: Path, data_from: Model) -> list[Path]:
    """Copy external data files beside ``path``, each whole or not at all; the new ones are returned."""
    made: list[Path] = []
    for location in sorted(locations):
        assert data_from.folder is not None
        source, target = data_from.folder / location, path.parent / location
        if target.exists() and _is_free(target, source):
            continue
        if target.exists():
            raise OutputError(
                f"{target}: holds other data already, perhaps of another model; write to another folder"
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{target.parent}: cannot be made ({error.strerror})") from error
        with writing(target) as temporary:
            shutil.copyfile(source, temporary)
        made.append(target)
    return made


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
