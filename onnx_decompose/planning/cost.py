"""The cost model: what an operator takes on an execution provider, from flops, bytes and kernels.

An operator is taken to last ``kernel + max(flops / flop_rate, bytes / byte_rate)`` (the roofline model, Williams et
al. 2009, plus what it takes to start it). It ranks candidates and nothing more: the finished model is always timed
against the original before it is written. The coefficients below are those of one machine each;
``onnx-decompose calibrate`` measures them on this one (:mod:`onnx_decompose.timing.calibration`).
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Units = TypeVar("Units", float, NDArray[np.float64])
"""A number of units, or an array of such numbers for as many seconds."""

__all__ = ["CPU", "CUDA", "CostModel"]


@dataclasses.dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of one execution provider; rates are per second.

    Attributes:
        kernel: seconds to start one operator.
        flop_rate: floating point operations of a matrix product.
        half_flop_rate: the same in float16 and bfloat16.
        integer_flop_rate: the same of integers of 8 bits.
        byte_rate: bytes that a matrix product reads and writes.
        block: seconds that every block of a batched product or a grouped convolution takes on top.
        batched_flop_rate: floating point operations of a batched product.
        grouped_flop_rate: floating point operations of a grouped 1x1 convolution, the rows on a spatial axis.
        copy_rate: bytes of Split, Slice, Concat and Expand, read and written in runs.
        elementwise_rate: bytes of an elementwise operator, read and written.
        gather_rate: bytes made by a Gather along the last axis, which copies element by element.
        row_gather_rate: bytes made by a Gather along the first axis, which copies rows; each row takes what an
            element takes in a Gather along the last axis, too.
        transpose_rate: bytes made by a Transpose of two axes.
        batches: numbers of rows at which candidates are compared.
        pick_ratio: how many times as fast as such a Gather ArrayFeatureExtractor is, which copies float32 and float64
            by type; 0 where the provider has none.
        waking: seconds that a long product loses until all threads work at it, and have ended; a short one loses less.
        lanes: outputs that a product computes at a time; a narrower one takes as long.
    """

    kernel: float
    flop_rate: float
    half_flop_rate: float
    integer_flop_rate: float
    byte_rate: float
    block: float
    batched_flop_rate: float
    grouped_flop_rate: float
    copy_rate: float
    elementwise_rate: float
    gather_rate: float
    row_gather_rate: float
    transpose_rate: float
    batches: tuple[int, ...] = (1, 16, 256)
    pick_ratio: float = 0.0
    waking: float = 0.0
    lanes: int = 1

    def matmul(self, rows: int, inputs: Units, outputs: Units, itemsize: int) -> Units:
        """Seconds of (rows, inputs) @ (inputs, outputs)."""
        return self.kernel + self._product(self.flop_rate, rows, (1, inputs, outputs), itemsize)

    def batched_matmul(
        self, rows: int, count: int, inputs: int, outputs: int, itemsize: int
    ) -> float:
        """Seconds of (count, rows, inputs) @ (count, inputs, outputs) in one operator."""
        shape = (count, inputs, outputs)
        product = self._product(self.batched_flop_rate, rows, shape, itemsize)
        return self.kernel + count * self.block + product

    def grouped_conv(
        self, rows: int, count: int, inputs: int, outputs: int, itemsize: int
    ) -> float:
        """Seconds of a convolution (1, count * inputs, 1, rows) -> (1, count * outputs, 1, rows), 1x1 in groups."""
        shape = (count, inputs, outputs)
        product = self._product(self.grouped_flop_rate, rows, shape, itemsize)
        return self.kernel + count * self.block + product

    def copy(self, rows: int, units: Units, itemsize: int) -> Units:
        """Seconds of an operator that moves (rows, units) in runs."""
        return self.kernel + 2 * rows * units * itemsize / self.copy_rate

    def elementwise(self, rows: int, units: Units, itemsize: int) -> Units:
        """Seconds of an elementwise operator on (rows, units)."""
        return self.kernel + 2 * rows * units * itemsize / self.elementwise_rate

    def gather(self, rows: int, units: Units, itemsize: int) -> Units:
        """Seconds of a Gather of (rows, units) along the last axis; a narrow element takes as long as one of 4."""
        return self.kernel + rows * units * max(itemsize, 4) / self.gather_rate

    def picks(self, itemsize: int) -> bool:
        """Whether :meth:`pick` can be had for elements of ``itemsize`` bytes."""
        return self.pick_ratio > 0 and itemsize >= 4

    def pick(self, rows: int, units: Units, itemsize: int) -> Units:
        """Seconds of the faster way to take (rows, units) one by one along the last axis."""
        if not self.picks(itemsize):
            return self.gather(rows, units, itemsize)
        return self.kernel + rows * units * itemsize / (self.pick_ratio * self.gather_rate)

    def row_gather(self, rows: int, units: int, itemsize: int) -> float:
        """Seconds of a Gather of (units, rows) along the first axis."""
        begun = units * itemsize / self.gather_rate
        return self.kernel + begun + rows * units * itemsize / self.row_gather_rate

    def transpose(self, rows: int, units: int, itemsize: int) -> float:
        """Seconds to turn (rows, units) into (units, rows), or back."""
        return self.kernel + rows * units * itemsize / self.transpose_rate

    def _product(
        self, flop_rate: float, rows: int, shape: tuple[int, Units, Units], itemsize: int
    ) -> Units:
        """Seconds of the arithmetic or of the traffic, whichever takes longer; ``shape`` is (blocks, K, N)."""
        count, inputs, outputs = shape
        if itemsize < 4:
            rate = self.half_flop_rate if itemsize == 2 else self.integer_flop_rate
            flop_rate *= rate / self.flop_rate
        flops = 2 * count * rows * inputs * outputs
        moved = itemsize * count * (inputs * outputs + rows * (inputs + outputs))
        return cast("Units", np.maximum(flops / flop_rate, moved / self.byte_rate))


CPU = CostModel(
    kernel=2.5e-6,
    flop_rate=1.5e11,
    half_flop_rate=1.5e11,
    integer_flop_rate=6e11,
    byte_rate=3e10,
    block=2e-7,
    batched_flop_rate=1.2e11,
    grouped_flop_rate=1.65e11,
    copy_rate=2.3e10,
    elementwise_rate=8e10,
    gather_rate=6e8,
    row_gather_rate=4.5e10,
    transpose_rate=7e9,
    pick_ratio=5.0,
    waking=3e-5,
    lanes=16,
)
"""Two cores of a server with AVX-512, onnxruntime 1.32, float32; float16 is computed in float32 there."""

CUDA = CostModel(
    kernel=6e-6,
    flop_rate=3e13,
    half_flop_rate=3e14,
    integer_flop_rate=6e14,
    byte_rate=1.5e12,
    block=1e-8,
    batched_flop_rate=3e13,
    grouped_flop_rate=1e13,
    copy_rate=1.2e12,
    elementwise_rate=1.2e12,
    gather_rate=6e11,
    row_gather_rate=1e12,
    transpose_rate=6e11,
)
"""A data-centre GPU from its data sheet, TF32 off; not measured."""
