"""Made-up inputs to run a model on: random and extreme values, every dynamic axis resized."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from onnx_decompose.errors import DataError, OptionError
from onnx_decompose.model.tensors import TensorSpec, is_float

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

__all__ = [
    "Feeds",
    "batch_dims",
    "batch_sizes",
    "check_axes",
    "dim_symbols",
    "entries_per_sample",
    "index_limits",
    "other_dims",
    "poisoned_feeds",
    "random_feeds",
    "resized",
    "size_settings",
    "special_feeds",
]

Feeds = dict[str, "NDArray[Any]"]
"""One array per model input."""

_DEFAULT_LIMITS = (0, 2)
_FOLLOWED = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_SAME_SHAPE = ("Cast", "DequantizeLinear", "Identity")


def random_feeds(
    specs: Sequence[TensorSpec],
    *,
    rng: np.random.Generator,
    dims: Mapping[str, int],
    scale: float = 1.0,
    limits: Mapping[str, tuple[int, int]] | None = None,
) -> Feeds:
    """Draw every input: floats from N(0, scale^2), integers uniformly, booleans fairly.

    Args:
        specs: the model's inputs.
        rng: source of randomness.
        dims: size of every dynamic axis by its symbol (see :func:`dim_symbols`).
        scale: standard deviation of the floats.
        limits: per integer input its range, upper end excluded; [0, 2) by default, which nearly
            every index, mask or flag accepts.

    Raises:
        DataError: an input cannot be made up (strings, unknown rank or axis size).
    """
    limits = limits or {}
    return {
        spec.name: _draw(
            spec, _shape(spec, dims), rng, scale, limits.get(spec.name, _DEFAULT_LIMITS)
        )
        for spec in specs
    }


def special_feeds(
    specs: Sequence[TensorSpec],
    *,
    rng: np.random.Generator,
    dims: Mapping[str, int],
    limits: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Feeds]:
    """Inputs at the extremes of the float range: ``zeros``, ``large``, ``tiny``, ``denormal`` and ``negative``.

    Large and tiny values are chosen per dtype such that products of a few of them neither
    overflow nor vanish in it: 1e3 and 1e-5 in float32, 16 and 8e-3 in float16. Denormal ones are under the smallest
    normal number, negative ones of size 1. Integers are drawn as in :func:`random_feeds`, and are at their lowest
    value in ``zeros``.
    """
    made: dict[str, Feeds] = {
        kind: {} for kind in ("zeros", "large", "tiny", "denormal", "negative")
    }
    for spec in specs:
        low, high = (limits or {}).get(spec.name, _DEFAULT_LIMITS)
        scales = {"zeros": 0.0, "large": 1.0, "tiny": 1.0, "denormal": 1.0, "negative": 1.0}
        if is_float(spec.dtype):
            finfo = ml_dtypes.finfo(spec.dtype)  # type: ignore[no-untyped-call]
            scales["large"] = min(1e3, float(finfo.max) ** 0.25)
            scales["tiny"] = max(1e-5, float(finfo.tiny) ** 0.5)
            scales["denormal"] = float(finfo.tiny) / 16
        for label, scale in scales.items():
            bounds = (low, low + 1) if label == "zeros" else (low, high)
            made[label][spec.name] = _draw(spec, _shape(spec, dims), rng, scale, bounds)
            if label == "zeros" and spec.dtype == np.bool_:
                made[label][spec.name][...] = False
            if label == "negative" and is_float(spec.dtype):
                made[label][spec.name] = -np.abs(made[label][spec.name])
    return made


def poisoned_feeds(
    specs: Sequence[TensorSpec],
    *,
    rng: np.random.Generator,
    dims: Mapping[str, int],
    limits: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Feeds]:
    """Random inputs, the first entry of every float input ``NaN`` or ``infinity``; none without float inputs."""
    made: dict[str, Feeds] = {}
    for kind, value in (("NaN", np.nan), ("infinity", np.inf)):
        feeds = random_feeds(specs, rng=rng, dims=dims, limits=limits)
        floats = [array for array in feeds.values() if is_float(array.dtype) and array.size]
        for array in floats:
            array[(0,) * array.ndim] = value
        if floats:
            made[kind] = feeds
    return made


def dim_symbols(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Every dynamic axis by its symbol, in order; axes of equal symbol share a size."""
    return tuple(dict.fromkeys(symbol for symbol, _ in _dynamic_axes(specs)))


def batch_dims(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """The symbols of the batch dimension; several where the model leaves it unnamed.

    Per input: the axis whose symbol contains ``batch``, else its dynamic first axis. Symbols
    that only ever name first axes go before those that name other axes too, as a sequence
    length usually does.
    """
    inner = {symbol for symbol, axis in _dynamic_axes(specs) if axis > 0}
    leading = [symbol for symbol, axis in _dynamic_axes(specs) if axis == 0]
    first = {symbol for symbol in leading if symbol not in inner} or set(leading)
    found: dict[str, None] = {}
    for spec in specs:
        own = _dynamic_axes([spec])
        named = [symbol for symbol, _ in own if "batch" in symbol.lower()]
        unnamed = [symbol for symbol, axis in own if axis == 0 and symbol in first]
        found.update(dict.fromkeys(named[:1] or unnamed))
    return tuple(found)


def other_dims(specs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, int]:
    """The size that every dynamic axis but the batch has in ``feeds``, by its symbol."""
    batch = batch_dims(specs)
    return {
        symbol: feeds[spec.name].shape[axis]
        for spec in specs
        for symbol, axis in _dynamic_axes([spec])
        if symbol not in batch
    }


def check_axes(specs: Sequence[TensorSpec], names: Iterable[str]) -> None:
    """Refuse names that are not those of dynamic axes but the batch.

    Raises:
        OptionError: naming those that there are.
    """
    batch = batch_dims(specs)
    known = [symbol for symbol in dim_symbols(specs) if symbol not in batch]
    for name in names:
        if name not in known:
            told = ", ".join(map(repr, known)) or "none"
            raise OptionError(
                f"axis {name!r} cannot be given a size: the model's dynamic axes but the batch are {told}"
            )


def resized(specs: Sequence[TensorSpec], feeds: Feeds, sizes: Mapping[str, int]) -> Feeds:
    """``feeds`` with dynamic axes of other sizes, by their symbols: cut at the end, or begun again from the start."""
    result = dict(feeds)
    for spec in specs:
        for symbol, axis in _dynamic_axes([spec]):
            if symbol in sizes:
                places = np.arange(sizes[symbol]) % result[spec.name].shape[axis]
                result[spec.name] = result[spec.name].take(places, axis=axis)
    return result


def batch_sizes(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    sizes: Sequence[int],
    *,
    other: int,
    most_entries: int,
) -> tuple[int, ...]:
    """``sizes`` of the batch, cut so that no input or output holds more than ``most_entries``, but never under 2.

    Args:
        inputs: the model's.
        outputs: the same.
        sizes: asked for, ascending.
        other: size of every other dynamic axis.
        most_entries: of one of them.
    """
    dims = dict.fromkeys(dim_symbols(inputs), other)
    most = max(2, most_entries // entries_per_sample(inputs, outputs, dims))
    return tuple(dict.fromkeys(min(size, most) for size in sizes))


def entries_per_sample(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], dims: Mapping[str, int]
) -> int:
    """Entries of the largest input or output for one sample, as far as the model states their shapes.

    Args:
        inputs: the model's.
        outputs: the same.
        dims: sizes of dynamic axes but the batch, by symbol; others count once.
    """
    batches = batch_dims(inputs)
    others = {symbol: size for symbol, size in dims.items() if symbol not in batches}
    largest = 1
    for spec in (*inputs, *outputs):
        symbols = [spec.axis_symbol(axis) for axis in range(len(spec.shape or ()))]
        if any(symbol in batches for symbol in symbols):
            one = math.prod(
                dim if isinstance(dim, int) else others.get(symbol or "", 1)
                for dim, symbol in zip(spec.shape or (), symbols, strict=True)
            )
            largest = max(largest, one)
    return largest


def size_settings(
    specs: Sequence[TensorSpec],
    *,
    batch: Sequence[int] = (1, 5),
    other: Sequence[int] = (32, 64),
    given: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, int]]:
    """Sizes to try: as few settings as put every dynamic axis at each of its sizes.

    Two other axes never move in step (height 32 goes with width 64), so that mixing them up
    cannot pass unnoticed.

    Args:
        specs: the model's inputs.
        batch: sizes of the batch dimension.
        other: sizes of every other dynamic axis.
        given: sizes by symbol, where the model accepts only certain ones.

    Returns:
        One mapping symbol -> size per setting; ``[{}]`` for a model without dynamic axes.
    """
    batches = batch_dims(specs)
    sizes: dict[str, tuple[int, ...]] = {}
    turn = 0
    for symbol in dim_symbols(specs):
        if given and symbol in given:
            sizes[symbol] = tuple(given[symbol])
        elif symbol in batches:
            sizes[symbol] = tuple(batch)
        else:
            shift = turn % len(other)
            sizes[symbol] = (*other[shift:], *other[:shift])
            turn += 1
    count = max((len(choices) for choices in sizes.values()), default=1)
    return [
        {symbol: choices[i % len(choices)] for symbol, choices in sizes.items()}
        for i in range(count)
    ]


def index_limits(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Valid ranges of the integer inputs that look up rows of constant tables (Gather).

    Shape-preserving operators and casts between input and lookup are followed, as are those between a stored table
    and its lookup (a table in integers is dequantized), also where an input is only read inside a body of If, Loop or
    Scan. An input that looks up several tables gets the smallest. Random token ids then cover the whole vocabulary.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in stored]
    limits: dict[str, tuple[int, int]] = {}
    _follow(
        model.graph,
        {name: tuple(tensor.dims) for name, tensor in stored.items()},
        {name: name for name in names},
        limits,
    )
    return limits


def _follow(
    graph: onnx.GraphProto,
    tables: dict[str, tuple[int, ...]],
    origin: dict[str, str],
    limits: dict[str, tuple[int, int]],
) -> None:
    """Collect the ranges of a graph's lookups.

    Args:
        graph: a graph, or a body inside it.
        tables: shapes of the stored values that are in sight.
        origin: the input that each value in sight is, as it is.
        limits: what is found.
    """
    tables.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    for node in graph.node:
        source = node.input[0] if node.input else ""
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            tables[node.output[0]] = tuple(attributes["value"].t.dims)
        if node.op_type in _FOLLOWED and source in origin:
            origin[node.output[0]] = origin[source]
        if node.op_type in _SAME_SHAPE and source in tables:
            tables[node.output[0]] = tables[source]
        if node.op_type == "Gather" and node.input[1] in origin and tables.get(source):
            axis = attributes["axis"].i if "axis" in attributes else 0
            name, size = origin[node.input[1]], tables[source][axis]
            limits[name] = (0, min(limits.get(name, (0, size))[1], size))
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _follow(body, dict(tables), dict(origin), limits)


def _dynamic_axes(specs: Sequence[TensorSpec]) -> list[tuple[str, int]]:
    return [
        (symbol, axis)
        for spec in specs
        for axis in range(len(spec.shape or ()))
        if (symbol := spec.axis_symbol(axis)) is not None
    ]


def _shape(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    if spec.shape is None:
        raise DataError(f"input {spec.name!r} has no known rank; give real inputs instead")
    shape = []
    for axis, dim in enumerate(spec.shape):
        symbol = spec.axis_symbol(axis)
        if symbol is not None and symbol not in dims:
            raise DataError(f"input {spec.name!r}: no size is given for its axis {symbol!r}")
        shape.append(dim if isinstance(dim, int) else dims[str(symbol)])
    return tuple(shape)


def _draw(
    spec: TensorSpec,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    scale: float,
    bounds: tuple[int, int],
) -> NDArray[Any]:
    if is_float(spec.dtype):
        return np.asarray(rng.standard_normal(shape) * scale).astype(spec.dtype)
    if spec.dtype == np.bool_:
        return np.asarray(rng.random(shape) < 0.5)
    if spec.dtype.kind in "iu":
        return np.asarray(rng.integers(*bounds, size=shape)).astype(spec.dtype)
    raise DataError(
        f"input {spec.name!r}: values of type {spec.dtype} cannot be made up; give real inputs"
    )
