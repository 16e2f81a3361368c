"""Proposals from hidden units that the rest can stand in for: those go, the sites that read them are refitted.

The units of convolutions are channels: with one of them go all of its taps.

One level for all sets of hidden units: the share of the variance that their readers may lose, as the covariance
predicts it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.removal import Reader, Removal, removal_order
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.state_axes import StateAxis, state_axes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

__all__ = ["LANES", "HiddenAxis", "hidden_axes", "readers_of", "removed_units", "without_units"]

LEVELS = tuple(10.0 ** (k / 4) for k in range(-56, 0))
"""Shares of the variance: the root is about the relative error that a layer makes, from 1e-7 on."""


LANES = 8
"""Channels of a convolution that a runtime computes together: fewer of the last ones take as long.

onnxruntime on CPU works on 8 or 16 at a time, and falls back to a slower kernel where a number of inputs is no multiple
of 4 (``mlas``, NCHWc).
"""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class HiddenAxis:
    """Units that only a region's own sites make and read.

    Attributes:
        name: of the first site that reads them.
        size: how many there are.
        makers: the sites whose outputs they are.
        readers: the sites whose inputs they are.
    """

    name: str
    size: int
    makers: tuple[Site, ...]
    readers: tuple[Site, ...]

    def within(self, removal: Removal, loss: float) -> NDArray[np.intp]:
        """The units that go if ``loss`` of the variance may be lost; of channels whole ``LANES`` stay."""
        gone = removal.within(loss)
        if not any(site.kernel for site in self.readers):
            return gone
        kept = -(-(self.size - gone.size) // LANES) * LANES
        return gone[: max(self.size - kept, 0)]


def removed_units(context: CalibrationContext) -> Iterator[Family]:
    """One proposal per level."""
    axes = [axis for region in context.study.regions for axis in hidden_axes(context, region)]
    states = state_axes(context)
    total = sum(axis.size for axis in axes) + sum(axis.size for axis in states)

    @functools.cache
    def orders() -> list[tuple[HiddenAxis, Removal]]:
        return [(axis, removal_order(readers_of(context, axis))) for axis in axes]

    @functools.cache
    def state_orders() -> list[tuple[StateAxis, Removal]]:
        return [(axis, axis.removal(context)) for axis in states]

    def at(number: int) -> Proposal | None:
        loss = LEVELS[-1 - number]
        gone = {axis: axis.within(order, loss) for axis, order in orders()}
        count = sum(units.size for units in gone.values())
        masks = without_units(gone)
        for axis, order in state_orders():
            units = axis.within(order, loss)
            if units.size:
                axis.without(units, masks)
                count += units.size
        name = f"remove({count} of {total} hidden units)"
        return Proposal(name, masks) if count else None

    if axes or states:
        touched = entries_of(site for axis in axes for site in (*axis.makers, *axis.readers))
        touched += sum(axis.entries for axis in states)
        yield Family("remove", len(LEVELS), at, touched)


def hidden_axes(context: CalibrationContext, region: Region) -> Iterator[HiddenAxis]:
    """The axes of ``region`` whose units nothing outside makes or reads, if its sites can be refitted."""
    refittable = {site.name for site in context.sites}
    if not {site.name for site in region.sites} <= refittable:
        return
    for axis in range(len(region.axis_sizes)):
        if axis in region.entry_axes or axis in region.exit_axes:
            continue
        makers = tuple(site for site in region.sites if region.axis_of[site.output] == axis)
        readers = tuple(site for site in region.sites if region.axis_of[site.input] == axis)
        if makers and readers and not set(makers).intersection(readers):
            yield HiddenAxis(readers[0].name, region.axis_sizes[axis], makers, readers)


def readers_of(context: CalibrationContext, axis: HiddenAxis) -> list[Reader]:
    """What the sites that read ``axis`` see of it, on the part to fit on."""
    return [
        Reader(
            moments.xx, context.study.weight(site).astype(np.float64), moments.count, site.taps
        )
        for site in axis.readers
        for moments in (context.read(site),)
    ]


def without_units(
    gone: Mapping[HiddenAxis, NDArray[np.intp]],
) -> dict[str, NDArray[np.bool_]]:
    """Masks of all sites that make or read the axes, without the units that go."""
    masks: dict[str, NDArray[np.bool_]] = {}
    for axis, units in gone.items():
        for site in axis.makers:
            mask = masks.setdefault(site.name, np.ones(site.shape, dtype=bool))
            mask[:, units] = False
        for site in axis.readers:
            mask = masks.setdefault(site.name, np.ones(site.shape, dtype=bool))
            mask[site.rows(units)] = False
    return masks
