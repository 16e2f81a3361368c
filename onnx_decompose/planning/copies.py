"""Equal rows and columns of one weight, computed once.

    x (..., K) --add the inputs of equal rows--> (..., D) @ (D, E) --repeat equal columns--> y (..., N)

Which units are copies is read from the annealed weight bit for bit, so the smaller product is the annealed site
exactly. What a copy costs depends on where the units lie: one run of equal columns at an end of the outputs, such as a
vocabulary's unused tail, is padding with the edge; anything else is taken unit by unit.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.shared import equal_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.planning.cost import CostModel

    IntArray = NDArray[np.intp]

__all__ = ["Copies", "find_copies"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Which computed row and column every unit of a site uses.

    Attributes:
        inputs: (K,) number of the computed row that each input is added to: rows of one input first, in order.
        outputs: (N,) number of the computed column that each output repeats, in order of the first repeat.
        picks: units are taken by ArrayFeatureExtractor, and not by Gather.
    """

    inputs: IntArray
    outputs: IntArray
    picks: bool = False

    @property
    def computed(self) -> tuple[IntArray, IntArray]:
        """Per axis, an input or output whose line of the weight is computed, in the order of the computed lines."""
        return _firsts(self.inputs), _firsts(self.outputs)

    @property
    def kept(self) -> tuple[IntArray, IntArray]:
        """:attr:`computed` with what is computed for one unit alone first, so that copies may be put behind it."""
        return _firsts(_alone_first(self.inputs)), _firsts(_alone_first(self.outputs))

    def placed(self, inputs: IntArray, outputs: IntArray) -> Copies:
        """The same copies where ``inputs`` and ``outputs`` are the units at each place of the two values."""
        return dataclasses.replace(
            self,
            inputs=_alone_first(self.inputs[inputs]),
            outputs=_by_first(self.outputs[outputs]),
        )

    @property
    def alone(self) -> IntArray:
        """The inputs that are added to no other."""
        count = np.bincount(self.inputs)
        return np.flatnonzero(count[self.inputs] == 1)

    @property
    def added(self) -> tuple[IntArray, ...]:
        """The sets of inputs that are added, in the order of the computed rows."""
        count = np.bincount(self.inputs)
        return tuple(np.flatnonzero(self.inputs == row) for row in np.flatnonzero(count > 1))

    @property
    def edges(self) -> tuple[int, int] | None:
        """How often the first and the last computed column come again; None if copies lie anywhere but at the ends."""
        last = self.outputs.max()
        before = int(np.count_nonzero(self.outputs == 0)) - 1
        after = int(np.count_nonzero(self.outputs == last)) - 1 if last else 0
        padded = np.clip(np.arange(self.outputs.size) - before, 0, last)
        return (before, after) if np.array_equal(padded, self.outputs) else None

    def seconds(self, cost: CostModel, rows: int, itemsize: int) -> float:
        """Predicted seconds of the product with its additions before and copies after, for ``rows`` rows."""
        first, second = self.computed
        total = cost.matmul(rows, first.size, second.size, itemsize)
        if first.size < self.inputs.size:
            # Each part is taken out and added up, then all are put side by side.
            total += 2 * len(self.added) * cost.kernel
            total += cost.pick(rows, self.inputs.size, itemsize)
            total += cost.copy(rows, first.size, itemsize)
        if second.size < self.outputs.size:
            copy = cost.pick if self.edges is None else cost.copy
            total += copy(rows, self.outputs.size, itemsize)
        return total

    def variants(self) -> Iterator[Copies]:
        """These copies, and those of one axis alone."""
        yield self
        first, second = self.computed
        if first.size < self.inputs.size and second.size < self.outputs.size:
            yield dataclasses.replace(self, inputs=np.arange(self.inputs.size))
            yield dataclasses.replace(self, outputs=np.arange(self.outputs.size))


def find_copies(weight: NDArray[Any]) -> Copies | None:
    """Bitwise equal rows and columns of an annealed weight, (K, N); None if no two are equal."""
    rows, columns = (equal_lines(weight, axis) for axis in (0, 1))
    if not rows and not columns:
        return None
    inputs, outputs = (
        _labels(size, classes)
        for size, classes in zip(weight.shape, (rows, columns), strict=True)
    )
    return Copies(_alone_first(inputs), _by_first(outputs))


def _labels(size: int, classes: Sequence[IntArray]) -> IntArray:
    """One label for all units of a class, and one for each other unit."""
    labels = np.arange(size)
    for members in classes:
        labels[members] = members[0]
    return labels


def _by_first(labels: IntArray) -> IntArray:
    """Labels numbered in the order in which they appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse]


def _alone_first(labels: IntArray) -> IntArray:
    """The same, with labels that come once before those that come again."""
    numbers = _by_first(labels)
    again = np.bincount(numbers)[numbers] > 1
    return np.unique(numbers + labels.size * again, return_inverse=True)[1]


def _firsts(numbers: IntArray) -> IntArray:
    return np.unique(numbers, return_index=True)[1]
