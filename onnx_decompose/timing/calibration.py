"""Measuring the cost model's coefficients on this machine: small models, and a least-squares fit to their times.

A probe is an operator at some size. It is timed as a model of one copy and as one of several, each copy with
constants of its own; the difference over the number of further copies is the time of one operator, without what a run
takes in any case. The coefficients are then those that reproduce all times best, in logarithms: being wrong by
a factor counts the same for a short operator and for a long one.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from scipy import optimize

from onnx_decompose.planning.cost import CPU, CUDA, CostModel
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BenchSettings, bench_candidates
from onnx_decompose.timing.cost_cache import COEFFICIENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.runtime.feeds import Feeds

__all__ = ["Sample", "calibrate", "fit", "measure"]

logger = logging.getLogger(__name__)

_COPIES = 5
_ROWS = {Provider.CPU: (1, 16, 256), Provider.CUDA: (1, 64, 2048)}
_SETTINGS = BenchSettings(seconds=0.04, max_seconds=0.2, precision=0.1, warmup=2)
_TOWARDS_START = 0.01
"""Weight of staying at the built-in coefficient: decides only where no time depends on one."""

_SCAN = np.log(10.0) * np.linspace(-4, 4, 33)
"""Logarithms of the factors by which a coefficient may be off from the built-in one."""

_OPSET = 17


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A measured operator.

    Attributes:
        operator: method of the cost model that predicts it.
        arguments: what that method is given.
        seconds: measured time.
    """

    operator: str
    arguments: tuple[int, ...]
    seconds: float

    def predicted(self, cost: CostModel) -> float:
        """Seconds by ``cost``."""
        return float(getattr(cost, self.operator)(*self.arguments))


def calibrate(provider: Provider, *, rng: np.random.Generator) -> CostModel:
    """Measure and fit the coefficients of ``provider``; takes about half a minute.

    Raises:
        ModelError: onnxruntime does not run a probe.
    """
    samples = measure(provider, rng=rng)
    cost = fit(samples, CUDA if provider is Provider.CUDA else CPU)
    if provider is Provider.CPU:  # computed in float32 there, the weights converted once
        cost = dataclasses.replace(cost, half_flop_rate=cost.flop_rate)
    for sample in samples:
        ratio = sample.predicted(cost) / sample.seconds
        logger.debug("%s: predicted / measured %.2f", sample, ratio)
    return cost


def measure(provider: Provider, *, rng: np.random.Generator) -> list[Sample]:
    """Time every probe; times that drown in noise are left out."""
    samples: list[Sample] = []
    for probe in _probes(provider):
        logger.info("calibrating: %s %s", probe.operator, probe.sizes)
        feeds = {rows: probe.feeds(rows, rng) for rows in _ROWS[provider]}
        timing = bench_candidates(
            probe.model(1, rng),
            {"several": probe.model(_COPIES, rng)},
            feeds_by_batch=feeds,
            provider=provider,
            rng=rng,
            settings=_SETTINGS,
        )["several"]
        for entry in timing.batches:
            seconds = (entry.rewritten_ms - entry.original_ms) / (_COPIES - 1) / 1e3
            if seconds > 0:
                arguments = (entry.batch, *probe.sizes, probe.itemsize)
                samples.append(Sample(probe.operator, arguments, seconds))
    return samples


def fit(samples: Sequence[Sample], start: CostModel) -> CostModel:
    """The coefficients that reproduce ``samples`` best (least squares of log ratios, outliers damped).

    Args:
        samples: measured operators.
        start: where to begin, and the value of a coefficient that no sample depends on.
    """
    origin = np.log([getattr(start, name) for name in COEFFICIENTS])
    measured = np.log([sample.seconds for sample in samples])

    def with_logs(logs: NDArray[np.float64]) -> CostModel:
        values = dict(zip(COEFFICIENTS, np.exp(logs).tolist(), strict=True))
        return dataclasses.replace(start, **values)

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        cost = with_logs(logs)
        ratios = np.log([sample.predicted(cost) for sample in samples]) - measured
        return np.concatenate([ratios, _TOWARDS_START * (logs - origin)])

    begin = _scanned(lambda logs: float(np.abs(residuals(logs)).sum()), origin)
    found = optimize.least_squares(residuals, begin, loss="soft_l1", f_scale=0.3)
    return with_logs(found.x)


def _scanned(
    loss: Callable[[NDArray[np.float64]], float], origin: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A good place to begin: each coefficient in turn at the best of many values, twice.

    Of flops and bytes only the slower counts, so where one is far too fast the loss does not change with it.
    """
    best = origin.copy()
    for _ in range(2):
        for number in range(best.size):
            tried = np.tile(best, (_SCAN.size, 1))
            tried[:, number] = origin[number] + _SCAN
            best = tried[int(np.argmin([loss(logs) for logs in tried]))]
    return best


@dataclasses.dataclass(frozen=True, slots=True)
class _Probe:
    """An operator at some size, at several numbers of rows.

    Attributes:
        operator: method of the cost model.
        sizes: that method's arguments between the rows and the item size.
        shape: of the input; ``rows`` stands for the dynamic axis.
        node: makes the operator's node from its input, its output and its constants' names.
        constants: makes the constants of one copy.
        chained: each copy reads what the one before made, as convolutions in a row do, which onnxruntime runs in a
            layout of its own; else each has an input of its own.
        dtype: of the input.
    """

    operator: str
    sizes: tuple[int, ...]
    shape: tuple[int | str, ...]
    node: Callable[[str, str, Sequence[str]], onnx.NodeProto]
    constants: Callable[[np.random.Generator, np.dtype[Any]], Sequence[NDArray[Any]]]
    chained: bool = False
    dtype: np.dtype[Any] = np.dtype(np.float32)  # noqa: RUF009 (immutable)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize

    def feeds(self, rows: int, rng: np.random.Generator) -> Feeds:
        """An input for every copy that a model may have."""
        shape = [rows if size == "rows" else int(size) for size in self.shape]
        if np.issubdtype(self.dtype, np.integer):
            values = [rng.integers(0, 127, shape, self.dtype) for _ in range(_COPIES)]
        else:
            values = [rng.standard_normal(shape).astype(self.dtype) for _ in range(_COPIES)]
        return {f"x{n}": array for n, array in enumerate(values)}

    def _unknown(self, output: str) -> list[str]:
        """A shape of the input's rank, which every operator here keeps."""
        return [f"{output}.{axis}" for axis in range(len(self.shape))]

    def model(self, copies: int, rng: np.random.Generator) -> bytes:
        """The operator so many times."""
        element = helper.np_dtype_to_tensor_dtype(self.dtype)
        nodes: list[onnx.NodeProto] = []
        tensors: list[onnx.TensorProto] = []
        for copy in range(copies):
            names: list[str] = []
            for position, array in enumerate(self.constants(rng, self.dtype)):
                names.append(f"c{copy}.{position}")
                tensors.append(numpy_helper.from_array(array, names[-1]))
            source = f"y{copy - 1}" if self.chained and copy else f"x{copy}"
            nodes.append(self.node(source, f"y{copy}", names))
        results = nodes[-1:] if self.chained else nodes
        # Products of integers are summed up in 32 bits.
        is_integer = np.issubdtype(self.dtype, np.integer)
        made = onnx.TensorProto.INT32 if is_integer else element
        graph = helper.make_graph(
            nodes,
            "probe",
            [
                helper.make_tensor_value_info(f"x{n}", element, list(self.shape))
                for n in range(_COPIES)
            ],
            [
                helper.make_tensor_value_info(name, made, self._unknown(name))
                for node in results
                for name in node.output
            ],
            tensors,
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        return bytes(
            helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        )


def _probes(provider: Provider) -> Iterator[_Probe]:
    single, half = np.dtype(np.float32), np.dtype(np.float16)
    large = 2048 if provider is Provider.CUDA else 1024
    for dtype in (single, half) if provider is Provider.CUDA else (single,):
        for inputs, outputs in ((64, 64), (256, 256), (large, large), (large, 4 * large)):
            yield _matmul(inputs, outputs, dtype)
    if provider is Provider.CPU:
        for inputs, outputs in ((256, 256), (large, large), (large, 4 * large)):
            yield _integer_matmul(inputs, outputs)
    for count, size in ((4, 64), (8, 128), (32, 32), (4, large // 2)):
        yield _batched(count, size)
        yield _grouped(count, size)
    for units in (256, 1024, 4096):
        yield _moving("gather", units, ("rows", units), "Gather", _permutation(units), axis=-1)
        yield _moving(
            "row_gather", units, (units, "rows"), "Gather", _permutation(units), axis=0
        )
        yield _moving("transpose", units, ("rows", units), "Transpose", _nothing, perm=[1, 0])
        yield _moving("elementwise", units, ("rows", units), "Relu", _nothing)
        yield _split(units, 8)


def _matmul(inputs: int, outputs: int, dtype: np.dtype[Any]) -> _Probe:
    return _Probe(
        "matmul",
        (inputs, outputs),
        ("rows", inputs),
        lambda x, y, names: helper.make_node("MatMul", [x, *names], [y]),
        _weight(inputs, outputs),
        dtype=dtype,
    )


def _integer_matmul(inputs: int, outputs: int) -> _Probe:
    return _Probe(
        "matmul",
        (inputs, outputs),
        ("rows", inputs),
        lambda x, y, names: helper.make_node("MatMulInteger", [x, *names], [y]),
        lambda rng, _dtype: [rng.integers(-127, 128, (inputs, outputs), np.int8)],
        dtype=np.dtype(np.uint8),
    )


def _batched(count: int, size: int) -> _Probe:
    return _Probe(
        "batched_matmul",
        (count, size, size),
        (count, "rows", size),
        lambda x, y, names: helper.make_node("MatMul", [x, *names], [y]),
        _weight(count, size, size),
    )


def _grouped(count: int, size: int) -> _Probe:
    return _Probe(
        "grouped_conv",
        (count, size, size),
        (1, count * size, 1, "rows"),
        lambda x, y, names: helper.make_node("Conv", [x, *names], [y], group=count),
        lambda rng, dtype: [
            (rng.standard_normal((count * size, size, 1, 1)) / np.sqrt(size)).astype(dtype)
        ],
        chained=True,
    )


def _moving(
    operator: str,
    units: int,
    shape: tuple[int | str, ...],
    op_type: str,
    constants: Callable[[np.random.Generator, np.dtype[Any]], Sequence[NDArray[Any]]],
    **attributes: Any,
) -> _Probe:
    return _Probe(
        operator,
        (units,),
        shape,
        lambda x, y, names: helper.make_node(op_type, [x, *names], [y], **attributes),
        constants,
    )


def _split(units: int, parts: int) -> _Probe:
    return _Probe(
        "copy",
        (units,),
        ("rows", units),
        lambda x, y, names: helper.make_node(
            "Split", [x, *names], [f"{y}.{part}" for part in range(parts)], axis=-1
        ),
        lambda _rng, _dtype: [np.full(parts, units // parts, np.int64)],
    )


def _weight(
    *shape: int,
) -> Callable[[np.random.Generator, np.dtype[Any]], Sequence[NDArray[Any]]]:
    return lambda rng, dtype: [rng.standard_normal(shape, np.float32).astype(dtype)]


def _permutation(
    units: int,
) -> Callable[[np.random.Generator, np.dtype[Any]], Sequence[NDArray[Any]]]:
    return lambda rng, _dtype: [rng.permutation(units).astype(np.int64)]


def _nothing(_rng: np.random.Generator, _dtype: np.dtype[Any]) -> Sequence[NDArray[Any]]:
    return []
