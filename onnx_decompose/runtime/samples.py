"""Real inputs from the user: read, checked against the model, cut into batches.

``INPUTS.npz`` holds one array per model input, or a directory holds several such files (their
rows are joined in the order of the file names) or one ``.npy`` per input. The first axis counts
samples where the model's input has a dynamic first axis. An input with a fixed first axis of
size d holds k * d rows for k samples, or d rows that go with every sample. An array with one
axis more than its input holds one whole input per sample.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.errors import DataError
from onnx_decompose.model.tensors import BFLOAT16, TensorSpec, is_float

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.runtime.feeds import Feeds

__all__ = ["Samples", "load_inputs", "samples_from_arrays", "split_indices"]

logger = logging.getLogger(__name__)

_SMALL = 2**28
_MOST_GROWTH = 100
"""A file that unpacks to over ``_SMALL`` bytes may grow this much: more is a mistake, or an attack on memory."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Checked inputs, and what came with them (labels, masks).

    Attributes:
        source: the file or directory, for messages.
        count: number of samples: the smallest parts that can be run alone.
        batchable: whether samples can be joined into batches; not so where the model fixes its
            batch size.
        rows: model inputs whose first axis is cut into ``count`` equal parts.
        stacked: of those, the ones where that axis is not an axis of the input.
        whole: model inputs that go with every batch as they are.
        extras: arrays that are not model inputs, cut like ``rows``.
        extras_whole: the same, not cut (a scalar, or where there is one sample only).
        at_a_time: samples that are run together at most, whoever asks for more.
    """

    source: str
    count: int
    batchable: bool
    rows: Mapping[str, NDArray[Any]]
    stacked: frozenset[str] = frozenset()
    whole: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    extras_whole: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    at_a_time: int | None = None

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[tuple[Feeds, Feeds]]:
        """Yield (model inputs, extras) for ``size`` samples at a time; the last may be smaller.

        A model with a fixed batch size gets one sample at a time whatever ``size`` is.
        """
        step = min(size, self.at_a_time or size) if self.batchable else 1
        for start in range(0, self.count, step):
            part = slice(start, min(start + step, self.count))
            feeds = {name: self._part(array, part) for name, array in self.rows.items()}
            # With an ellipsis, a scalar stays an array.
            feeds.update({name: feeds[name][0, ...] for name in self.stacked})
            extras = {name: self._part(array, part) for name, array in self.extras.items()}
            yield {**feeds, **self.whole}, {**extras, **self.extras_whole}

    def take(self, indices: NDArray[np.intp]) -> Samples:
        """The samples at ``indices``, in that order."""
        return dataclasses.replace(
            self,
            count=len(indices),
            rows={name: self._select(array, indices) for name, array in self.rows.items()},
            extras={name: self._select(array, indices) for name, array in self.extras.items()},
        )

    def split(self, rng: np.random.Generator, share: float) -> tuple[Samples, Samples]:
        """Two disjoint random parts, the first with about ``share`` of the samples.

        Both keep the order of the file and hold at least one sample.

        Raises:
            DataError: there is only one sample.
        """
        if self.count < 2:
            raise DataError(f"{self.source}: holds one sample; at least 2 are needed to split")
        first, second = split_indices(np.arange(self.count), rng, share)
        return self.take(first), self.take(second)

    def _part(self, array: NDArray[Any], part: slice) -> NDArray[Any]:
        width = array.shape[0] // self.count
        return array[part.start * width : part.stop * width]

    def _select(self, array: NDArray[Any], indices: NDArray[np.intp]) -> NDArray[Any]:
        width = array.shape[0] // self.count
        parts = array.reshape(self.count, width, *array.shape[1:])[indices]
        return parts.reshape(len(indices) * width, *array.shape[1:])


def split_indices(
    indices: NDArray[np.intp], rng: np.random.Generator, share: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Two disjoint random parts of two indices or more, each in ascending order, the first with about ``share``."""
    first = min(max(round(share * indices.size), 1), indices.size - 1)
    order = rng.permutation(indices.size)
    return np.sort(indices[order[:first]]), np.sort(indices[order[first:]])


def load_inputs(path: Path, specs: Sequence[TensorSpec]) -> Samples:
    """Read calibration or validation inputs.

    Args:
        path: an ``.npz`` file, or a directory of ``.npz`` or ``.npy`` files.
        specs: the model's inputs.

    Raises:
        DataError: the files cannot be read or do not fit the model.
    """
    return samples_from_arrays(_read(Path(path)), specs, source=str(path))


def samples_from_arrays(
    arrays: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec], *, source: str = "inputs"
) -> Samples:
    """Check arrays against the model's inputs; arrays of other names become extras.

    float64 is narrowed to the model's float type and integers change size where every value
    fits; the log says so.

    Raises:
        DataError: an array is missing, of the wrong type or shape, holds NaN or Inf, or the
            numbers of samples differ.
    """
    names = {spec.name for spec in specs}
    rows: Feeds = {}
    whole: Feeds = {}
    stacked: set[str] = set()
    counts: dict[str, int] = {}  # inputs that dictate the number of samples
    for spec in specs:
        if spec.name not in arrays:
            raise DataError(
                f"{source}: no array for the model's input {spec.name!r}; "
                f"it holds {', '.join(map(repr, arrays)) or 'nothing'}"
            )
        where = f"{source}: array {spec.name!r}"
        array = _cast(arrays[spec.name], spec, where)
        is_stack, count = _layout(array, spec, where)
        if count == 1:
            whole[spec.name] = array[0] if is_stack else array
            continue
        rows[spec.name] = array
        if is_stack:
            stacked.add(spec.name)
        if count is not None:
            counts[spec.name] = count
    count = _sample_count(rows, counts, source)
    if count > 1 and not counts:
        _refuse_shared_batch(specs, rows, source)
    extras = {name: array for name, array in arrays.items() if name not in names}
    cut = {name: array for name, array in extras.items() if rows and array.ndim}
    # Rows per sample: 1, or the batch size that the model fixes.
    widths = {1, *(rows[name].shape[0] // count for name in counts)}
    _check_lengths({**rows, **cut}, {count * width for width in widths}, source)
    return Samples(
        source=source,
        count=count,
        batchable=bool(rows) and not counts,
        rows=rows,
        stacked=frozenset(stacked),
        whole=whole,
        extras=cut,
        extras_whole={name: array for name, array in extras.items() if name not in cut},
    )


def _layout(array: NDArray[Any], spec: TensorSpec, where: str) -> tuple[bool, int | None]:
    """How the array holds samples: whether stacked, and their number (None: one per row)."""
    if array.ndim and array.shape[0] == 0:
        raise DataError(f"{where} is empty; give at least one sample")
    if spec.shape is None:
        return False, None if array.ndim else 1
    rank = len(spec.shape)
    is_stack = array.ndim == rank + 1
    inner = array.shape[1:] if is_stack else array.shape
    if len(inner) != rank or any(
        isinstance(dim, int) and size != dim and (axis > 0 or is_stack)
        for axis, (size, dim) in enumerate(zip(inner, spec.shape, strict=True))
    ):
        raise DataError(f"{where} has shape {array.shape}; the model wants {spec}")
    if is_stack:
        return True, array.shape[0]
    if not rank:
        return False, 1
    first = spec.shape[0]
    if not isinstance(first, int):
        return False, None
    if not first or array.shape[0] % first:
        raise DataError(
            f"{where} has {array.shape[0]} rows; the model wants a multiple of {first}"
        )
    return False, array.shape[0] // first


def _sample_count(rows: Feeds, counts: Mapping[str, int], source: str) -> int:
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise DataError(f"{source}: the inputs hold different numbers of samples ({told})")
    if counts:
        return next(iter(counts.values()))
    return max((array.shape[0] for array in rows.values()), default=1)


def _refuse_shared_batch(specs: Sequence[TensorSpec], rows: Feeds, source: str) -> None:
    """An input that goes with every batch as it is cannot itself hold the batch axis."""
    batch = {spec.axis_symbol(0) for spec in specs if spec.name in rows and spec.shape}
    for spec in specs:
        axes = range(len(spec.shape or ()))
        if spec.name not in rows and batch & {spec.axis_symbol(axis) for axis in axes} - {None}:
            raise DataError(
                f"{source}: array {spec.name!r} has the batch on an inner axis ({spec}); "
                "give one whole input per sample, stacked on a new first axis"
            )


def _check_lengths(arrays: Feeds, accepted: set[int], source: str) -> None:
    for name, array in arrays.items():
        if array.shape[0] not in accepted:
            wanted = " or ".join(map(str, sorted(accepted)))
            raise DataError(
                f"{source}: array {name!r} has {array.shape[0]} rows, not {wanted} like the "
                "others; give one row per sample in every array"
            )


def _cast(array: NDArray[Any], spec: TensorSpec, where: str) -> NDArray[Any]:
    """The array in the model's dtype, refused where values would be lost or are not finite."""
    result = array
    if array.dtype != spec.dtype:
        result = _converted(array, spec.dtype, where)
        logger.info("%s: converted from %s to %s", where, array.dtype, spec.dtype)
    if is_float(spec.dtype):
        bad = int(np.count_nonzero(~np.isfinite(result)))
        if bad:
            raise DataError(
                f"{where} holds {bad} NaN or infinite values in {spec.dtype}; "
                "remove those samples or replace the values"
            )
    return result


def _converted(array: NDArray[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    source = array.dtype
    if dtype == BFLOAT16 and source == np.dtype("V2"):
        return array.view(BFLOAT16)  # how numpy's files give bfloat16 back
    integers = source.kind in "iu" and dtype.kind in "iu"
    if integers and array.size:
        info = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            raise DataError(
                f"{where} holds {low if low < info.min else high}, "
                f"which does not fit the model's {dtype}"
            )
    strings = source.kind == "U" and dtype.kind == "O"
    if (
        integers
        or strings
        or (is_float(source) and is_float(dtype))
        or (source.kind in "biu" and np.can_cast(source, dtype, "safe"))
    ):
        with np.errstate(over="ignore"):
            return array.astype(dtype)
    raise DataError(f"{where} is {source}; the model wants {dtype}, convert it first")


def _read(path: Path) -> Feeds:
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory; give an .npz file or a directory")
    return _read_npz(path)


def _read_directory(path: Path) -> Feeds:
    bundles = sorted(path.glob("*.npz"))
    singles = sorted(path.glob("*.npy"))
    if bool(bundles) == bool(singles):
        found = "both .npz and .npy files" if bundles else "no .npz or .npy file"
        raise DataError(f"{path}: holds {found}; give .npz files, or one .npy per input")
    if singles:
        return {file.stem: _read_npy(file) for file in singles}
    chunks = [_read_npz(file) for file in bundles]
    for file, chunk in zip(bundles, chunks, strict=True):
        if chunk.keys() != chunks[0].keys():
            raise DataError(
                f"{file}: holds the arrays {sorted(chunk)}, but {bundles[0].name} holds "
                f"{sorted(chunks[0])}; give the same arrays in every file"
            )
    return {name: _joined([chunk[name] for chunk in chunks], name, path) for name in chunks[0]}


def _joined(parts: list[NDArray[Any]], name: str, path: Path) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    try:
        return np.stack(parts) if parts[0].ndim == 0 else np.concatenate(parts)
    except ValueError as error:
        shapes = ", ".join(str(shape) for shape in sorted({part.shape for part in parts}))
        raise DataError(
            f"{path}: array {name!r} has shapes that cannot be joined ({shapes}); "
            "pad them to one size"
        ) from error


def _read_npz(file: Path) -> Feeds:
    content = _loaded(file)
    if isinstance(content, np.ndarray):
        raise DataError(
            f"{file}: is a single array; save it with numpy.savez(file, input_name=array)"
        )
    return content


def _read_npy(file: Path) -> NDArray[Any]:
    content = _loaded(file)
    if not isinstance(content, np.ndarray):
        raise DataError(f"{file}: holds several arrays; name it .npz")
    return content


def _loaded(file: Path) -> NDArray[Any] | Feeds:
    try:
        with file.open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content
            _check_growth(file, content.zip)
            return {name: np.asarray(content[name]) for name in content.files}
    except DataError:
        raise
    except Exception as error:  # numpy lets whatever zipfile, zlib and tokenize raise through
        raise _unreadable(file, error) from error


def _check_growth(file: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that is small and unpacks to more than memory may hold."""
    unpacked = sum(member.file_size for member in archive.infolist())
    stored = file.stat().st_size
    if unpacked > max(_SMALL, _MOST_GROWTH * stored):
        raise DataError(
            f"{file}: unpacks to {unpacked / stored:.0f} times its size; save it with numpy.savez, uncompressed"
        )


def _unreadable(file: Path, error: Exception) -> DataError:
    if "Object arrays" in str(error):
        return DataError(f"{file}: holds an array of Python objects; save plain numeric arrays")
    return DataError(f"{file}: is not a readable numpy file; save it with numpy.savez")
