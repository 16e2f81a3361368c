"""A first cost model: what a region takes on an execution provider, from flops, bytes and kernels.

One matrix product of (B, K) by (K, N) is taken to last ``kernel + max(flops / flop_rate, bytes / byte_rate)``
(the roofline model, Williams et al. 2009, plus a launch cost). It ranks candidates; the finished model is always
timed against the original before it is written.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Units = TypeVar("Units", float, NDArray[np.float64])
"""A number of units, or an array of such numbers for as many seconds."""

__all__ = ["CPU", "CUDA", "CostModel"]


@dataclasses.dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of one execution provider.

    Attributes:
        kernel: seconds to start one operator.
        flop_rate: floating point operations per second of a matrix product.
        byte_rate: bytes per second that a matrix product reads and writes.
        copy_rate: bytes per second of Split, Slice, Concat and elementwise operators.
        gather_rate: bytes per second of Gather along the last axis, which copies element by element.
        batches: numbers of rows at which candidates are compared.
        pick_rate: bytes per second of ArrayFeatureExtractor, a Gather along the last axis for float32 and float64
            that copies by type; 0 where the provider has none.
    """

    kernel: float
    flop_rate: float
    byte_rate: float
    copy_rate: float
    gather_rate: float
    batches: tuple[int, ...] = (1, 16, 256)
    pick_rate: float = 0.0

    def matmul(self, rows: int, inputs: Units, outputs: Units, itemsize: int) -> Units:
        """Seconds of (rows, inputs) @ (inputs, outputs)."""
        flops = 2 * rows * inputs * outputs
        moved = itemsize * (inputs * outputs + rows * (inputs + outputs))
        longer: Units = np.maximum(flops / self.flop_rate, moved / self.byte_rate)
        return self.kernel + longer

    def copy(self, rows: int, units: Units, itemsize: int) -> Units:
        """Seconds of an operator that moves (rows, units) in runs."""
        return self.kernel + 2 * rows * units * itemsize / self.copy_rate

    def gather(self, rows: int, units: Units, itemsize: int) -> Units:
        """Seconds of a Gather of (rows, units) along the last axis."""
        return self.kernel + rows * units * itemsize / self.gather_rate

    def picks(self, itemsize: int) -> bool:
        """Whether :meth:`pick` can be had for elements of ``itemsize`` bytes."""
        return self.pick_rate > 0 and itemsize >= 4

    def pick(self, rows: int, units: int, itemsize: int) -> float:
        """Seconds of the faster way to take (rows, units) one by one along the last axis."""
        if not self.picks(itemsize):
            return self.gather(rows, units, itemsize)
        return self.kernel + rows * units * itemsize / self.pick_rate


CPU = CostModel(
    kernel=3e-6,
    flop_rate=8e10,
    byte_rate=1.5e10,
    copy_rate=8e9,
    gather_rate=2e9,
    pick_rate=4e9,
)
CUDA = CostModel(
    kernel=6e-6, flop_rate=3e13, byte_rate=1.5e12, copy_rate=1.2e12, gather_rate=6e11
)
