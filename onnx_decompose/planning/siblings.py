"""Products that read the same value: whether one wider product, cut afterwards, is faster than all of them.

onnxruntime runs one after the other. Each is started, shared out among the threads and waited for, and each reads the
value anew; a narrow one computes more columns than it has. A wider one does all that once, and what cuts its result is
a copy: with many rows and wide outputs that costs more than is saved.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.planning.region_cost import WORTH, relative_cost

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.planning.cost import CostModel

__all__ = ["Siblings", "apart_seconds", "joined_cost", "joined_seconds", "pays"]


@dataclasses.dataclass(frozen=True, slots=True)
class Siblings:
    """Products of one value, with or without a bias each.

    Attributes:
        inputs: units of the value.
        widths: outputs of each product, in order.
        itemsize: bytes of an entry.
        positions: rows of the value for each sample, or in all.
        has_batch: whether it has as many rows for each sample.
    """

    inputs: int
    widths: tuple[int, ...]
    itemsize: int
    positions: int = 1
    has_batch: bool = True

    def rows(self, batch: int) -> int:
        """Rows of the value."""
        return self.positions * (batch if self.has_batch else 1)


def apart_seconds(siblings: Siblings, rows: int, cost: CostModel) -> float:
    """Seconds of the products one after another."""
    return sum(_product(siblings, width, rows, cost) for width in siblings.widths)


def joined_seconds(siblings: Siblings, rows: int, cost: CostModel) -> float:
    """Seconds of one product for all outputs, and of cutting them."""
    width = sum(siblings.widths)
    return _product(siblings, width, rows, cost) + cost.copy(rows, width, siblings.itemsize)


def joined_cost(siblings: Siblings, cost: CostModel) -> float:
    """Predicted time of one wider product over that of all of them: geometric mean over the cost model's batches.

    These are samples here.
    """

    def over_batches(joined: bool) -> NDArray[np.float64]:
        seconds = joined_seconds if joined else apart_seconds
        return np.array([seconds(siblings, siblings.rows(n), cost) for n in cost.batches])

    return relative_cost(over_batches(True), over_batches(False))


def pays(siblings: Siblings, cost: CostModel) -> bool:
    """Whether to join them."""
    return len(siblings.widths) > 1 and joined_cost(siblings, cost) < WORTH


def _product(siblings: Siblings, width: int, rows: int, cost: CostModel) -> float:
    """Seconds of one product; a bias is added on the way."""
    computed = -(-width // cost.lanes) * cost.lanes
    seconds = cost.matmul(rows, siblings.inputs, computed, siblings.itemsize)
    if not cost.waking:
        return seconds
    work = seconds - cost.kernel
    # What is done before the other threads are there is not lost: of two times the shorter one, smoothly.
    return seconds + work * cost.waking / (work + cost.waking)
