"""Hidden units of recurrent operators, for removal: in which order they can go, and what goes with them.

A unit goes if what reads it can do without: the gates of the others, through R, and all that reads the operator's
output. Each reader's loss counts as a share of its own variance, so that gates and outputs count alike.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.recurrence import unit_columns
from onnx_decompose.analysis.removal import Reader, Removal, removal_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments
    from onnx_decompose.calibrated.cells import Cell
    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.recurrent import RecurrentWeight
    from onnx_decompose.graph.state_readers import StateReaders

__all__ = ["StateAxis", "state_axes"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StateAxis:
    """The hidden units of one recurrent operator."""

    cell: Cell

    @property
    def readers(self) -> StateReaders:
        """Who reads them."""
        assert self.cell.readers is not None
        return self.cell.readers

    @property
    def size(self) -> int:
        """How many there are."""
        return self.cell.site.hidden

    @property
    def entries(self) -> int:
        """Entries of everything that has a row or a column for each unit."""
        readers = self.readers
        others = [w for other in readers.cells for w, _ in other.weights]
        read = sum(site.size for site in readers.sites)
        return read + sum(weight.size for weight in (*self.cell.weights, *others))

    def removal(self, context: CalibrationContext) -> Removal:
        """The order in which units can go, by the part to fit on."""
        return removal_order(list(self._readers(context)))

    def within(self, removal: Removal, loss: float) -> NDArray[np.intp]:
        """The units that go if ``loss`` may be lost."""
        return self.allowed(removal.within(loss))

    def allowed(self, gone: NDArray[np.intp]) -> NDArray[np.intp]:
        """Of the units ``gone`` the first: one stays at least."""
        return gone[: self.size - 1]

    def without(self, units: NDArray[np.intp], masks: dict[str, NDArray[np.bool_]]) -> None:
        """Take ``units`` out of ``masks``, by name of the weight."""
        site = self.cell.site
        w, r = self.cell.weights
        columns = unit_columns(units, site.hidden, site.gates)
        for weight in (w, r):
            _of(masks, weight.name, weight.shape)[:, columns] = False
        masks[r.name][units] = False
        for other in self.readers.cells:
            # What is fitted together is named together.
            for pair in other.weights:
                for weight in pair:
                    _of(masks, weight.name, weight.shape)
                masks[pair[0].name][units] = False
        for reader in self.readers.sites:
            _of(masks, reader.name, reader.shape)[reader.rows(units)] = False

    def _readers(self, context: CalibrationContext) -> Iterator[Reader]:
        w, r = self.cell.weights
        moments = context.states[self.cell.site.name]
        inputs = w.shape[0]
        whole = moments.through(np.vstack([w.array, r.array]))
        state = moments.xx[inputs:, inputs:]
        yield _share(state, r, whole)
        for site in self.readers.sites:
            read, weight = context.read(site), context.study.weight(site)
            power = float(read.through(weight).yy.sum())
            yield Reader(read.xx, weight / np.sqrt(max(power, 1e-300)), read.count)
        for other in self.readers.cells:
            found = context.states[other.name]
            for first, second in other.weights:
                size = first.shape[0]
                made = found.through(np.vstack([first.array, second.array]))
                yield _share(found.xx[:size, :size], first, made)


def state_axes(context: CalibrationContext) -> list[StateAxis]:
    """The hidden units of every recurrent operator that can lose some."""
    names = {cell.site.name for cell in context.cells}
    return [
        StateAxis(cell)
        for cell in context.cells
        if cell.readers is not None
        and cell.site.hidden > 1
        and {other.name for other in cell.readers.cells} <= names
    ]


def _share(covariance: NDArray[np.float64], weight: RecurrentWeight, whole: Moments) -> Reader:
    """A reader of states, its loss as a share of the variance of all that its gates add up."""
    power = max(float(whole.yy.sum()), 1e-300)
    return Reader(covariance, weight.array / np.sqrt(power), whole.count)


def _of(
    masks: dict[str, NDArray[np.bool_]], name: str, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    return masks.setdefault(name, np.ones(shape, dtype=bool))
