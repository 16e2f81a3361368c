"""Proposals from hidden units that the rest can stand in for: those go, the sites that read them are refitted.

The units of convolutions are channels: with one of them go all of its taps.

One price for all sets of hidden units: the share of the variance that their readers may lose, as the covariance
predicts it, for the multiply-adds that go with a unit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from onnx_decompose.analysis.removal import (
    Product,
    Reader,
    Removal,
    at_price,
    removal_order,
)
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.state_axes import StateAxis, state_axes
from onnx_decompose.graph.study import axis_positions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.recurrent import RecurrentSite
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

__all__ = [
    "LANES",
    "HiddenAxis",
    "hidden_axes",
    "priced_units",
    "readers_of",
    "removed_units",
    "without_units",
]

PRICES = tuple(10.0 ** (k / 8) for k in range(-104, 9))
"""Shares of the variance for all of the work: the root is about the relative error that is made, from 1e-7 on."""

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
        return self.allowed(removal.within(loss))

    def allowed(self, gone: NDArray[np.intp]) -> NDArray[np.intp]:
        """So many of the units ``gone``, the first, that of channels whole ``LANES`` stay."""
        if not any(site.kernel for site in self.readers):
            return gone
        kept = -(-(self.size - gone.size) // LANES) * LANES
        return gone[: max(self.size - kept, 0)]


_Axis = TypeVar("_Axis", HiddenAxis, StateAxis, HiddenAxis | StateAxis)


def removed_units(context: CalibrationContext) -> Iterator[Family]:
    """One proposal per price."""
    axes = [axis for region in context.study.regions for axis in hidden_axes(context, region)]
    states = state_axes(context)
    total = sum(axis.size for axis in axes) + sum(axis.size for axis in states)
    positions = _positions(context)

    @functools.cache
    def orders() -> list[tuple[HiddenAxis | StateAxis, Removal]]:
        found: list[tuple[HiddenAxis | StateAxis, Removal]] = [
            (axis, removal_order(readers_of(context, axis))) for axis in axes
        ]
        found.extend((axis, axis.removal(context)) for axis in states)
        return found

    def at(number: int) -> Proposal | None:
        gone = priced_units(orders(), PRICES[-1 - number], positions)
        count = sum(units.size for units in gone.values())
        masks = without_units({a: gone[a] for a in gone if isinstance(a, HiddenAxis)})
        for axis, units in gone.items():
            if isinstance(axis, StateAxis) and units.size:
                axis.without(units, masks)
        name = f"remove({count} of {total} hidden units)"
        return Proposal(name, masks) if count else None

    if axes or states:
        touched = entries_of(site for axis in axes for site in (*axis.makers, *axis.readers))
        touched += sum(axis.entries for axis in states)
        yield Family("remove", len(PRICES), at, touched)


def priced_units(
    orders: Sequence[tuple[_Axis, Removal]],
    price: float,
    positions: Mapping[str, int] | None = None,
) -> dict[_Axis, NDArray[np.intp]]:
    """The units of each axis that go at one price (``analysis.removal.at_price``).

    Args:
        orders: the axes, and in which order their units go.
        price: the share of the variance that all of the work is worth.
        positions: by site name, how often its weight is read for a sample, or for a row; once by default.
    """
    axes: list[_Axis] = [axis for axis, _ in orders]
    products = [*_products_of_sites(axes, positions or {}), *_products_of_cells(axes)]
    removals = [order for _, order in orders]
    gone = at_price(removals, [axis.size for axis in axes], products, price)
    return {axis: axis.allowed(units) for axis, units in zip(axes, gone, strict=True)}


def _products_of_sites(
    axes: Sequence[HiddenAxis | StateAxis], positions: Mapping[str, int]
) -> Iterator[Product]:
    made: dict[str, int] = {}
    read: dict[str, int] = {}
    sites: dict[str, Site] = {}
    for number, axis in enumerate(axes):
        if isinstance(axis, HiddenAxis):
            makers, readers = axis.makers, axis.readers
        else:
            makers, readers = (), axis.readers.sites
        made |= {site.name: number for site in makers}
        read |= {site.name: number for site in readers}
        sites |= {site.name: site for site in (*makers, *readers)}
    for name, site in sites.items():
        inputs, outputs = site.units
        entries = site.taps * positions.get(name, 1)
        entries *= (1 if name in read else inputs) * (1 if name in made else outputs)
        yield Product(read.get(name), made.get(name), entries)


def _products_of_cells(axes: Sequence[HiddenAxis | StateAxis]) -> Iterator[Product]:
    """W and R of recurrent operators, at every step alike: R leads from their units to these themselves."""
    own = {
        a.cell.site.name: number for number, a in enumerate(axes) if isinstance(a, StateAxis)
    }
    fed: dict[str, int] = {}
    cells: dict[str, RecurrentSite] = {}
    for number, axis in enumerate(axes):
        if isinstance(axis, StateAxis):
            others = axis.readers.cells
            fed |= {other.name: number for other in others}
            cells |= {cell.name: cell for cell in (axis.cell.site, *others)}
    for name, cell in cells.items():
        for w, _ in cell.weights:
            inputs, columns = w.shape
            gates = columns // cell.hidden
            rows = 1 if name in fed else inputs
            if name in own:
                yield Product(own[name], own[name], gates)
                yield Product(fed.get(name), own[name], rows * gates)
            else:
                yield Product(fed.get(name), None, rows * columns)


def _positions(context: CalibrationContext) -> dict[str, int]:
    """By site name, at how many positions a convolution's weight is read; 1 for products, of rows of any number."""
    found: dict[str, int] = {}
    for region in context.study.regions:
        of_axis = axis_positions(region, context.study.shapes)
        for site in region.sites:
            found[site.name] = of_axis[region.axis_of[site.output]] if of_axis else 1
    return found


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
