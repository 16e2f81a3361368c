"""New numbers for the units of free spaces, so that a branch's units lie side by side where they come in and go out.

A permutation at a region's border then costs nothing at run time: the constants around the space are stored in the
new order (``passes.renumber``), and a Gather becomes a Split, a Slice, or nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.planning.borders import common_order
from onnx_decompose.planning.state_graph import Branch, is_cascade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.unit_spaces import UnitSpace
    from onnx_decompose.planning.plan import RegionPlan

    IntArray = NDArray[np.intp]

__all__ = ["Numbering", "choose_numbering"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Numbering:
    """The new order of each renumbered space.

    Attributes:
        orders: space, and the old number of the unit at each new place.
    """

    orders: tuple[tuple[UnitSpace, IntArray], ...] = ()

    def order_of(self, value: str, unit_axis: int = -1) -> IntArray | None:
        """Old numbers of a value's units in their new order; None where they keep their numbers."""
        return next(
            (
                order
                for space, order in self.orders
                if value in space.values and space.unit_axis == unit_axis
            ),
            None,
        )

    def plan(self, region: Region, plan: RegionPlan) -> RegionPlan:
        """``plan`` with the places of its border units, and each branch's units in the order of their places."""
        places = {
            region.axis_of[name]: np.argsort(order)
            for name in (*region.entries, *region.exits)
            if (order := self.order_of(name, region.unit_axis)) is not None
        }
        # In a cascade the order of all branches' units is part of the plan, whatever it is outside.
        sorting = {axis for axis in places if not is_cascade(plan.branches, axis)}

        def placed(units: tuple[IntArray, ...]) -> tuple[IntArray, ...]:
            return tuple(
                part[np.argsort(places[axis][part])] if axis in sorting else part
                for axis, part in enumerate(units)
            )

        branches = tuple(
            Branch(placed(branch.units), placed(branch.read)) for branch in plan.branches
        )
        return dataclasses.replace(plan, branches=branches, places=places)


def choose_numbering(
    spaces: Sequence[UnitSpace], rewrites: Sequence[tuple[Region, RegionPlan]]
) -> Numbering:
    """Number each free space as the region that it costs most wants it.

    Args:
        spaces: the spaces that may be renumbered.
        rewrites: regions and their plans; of two that want one space in different orders, the one with more entries
            in its weights is served, and the other one gathers.
    """
    space_of = {(value, space.unit_axis): space for space in spaces for value in space.values}
    orders: dict[int, tuple[UnitSpace, IntArray]] = {}
    for region, plan in sorted(
        rewrites, key=lambda item: -sum(site.size for site in item[0].sites)
    ):
        for name in (*region.entries, *region.exits):
            space = space_of.get((name, region.unit_axis))
            if space is None or id(space) in orders:
                continue
            order = _wanted(plan, region.axis_of[name], space.size)
            orders[id(space)] = (space, order)
    identity = [(s, o) for s, o in orders.values() if not np.array_equal(o, np.arange(o.size))]
    return Numbering(tuple(identity))


def _wanted(plan: RegionPlan, axis: int, size: int) -> IntArray:
    """The units of ``axis``, branch by branch; those that no branch has come last."""
    parts = [branch.units[axis] for branch in plan.branches]
    units = np.concatenate(parts)
    owned = units
    if np.unique(units).size < units.size:  # branches overlap
        common = common_order(parts)
        owned = np.unique(units) if common is None else common
    rest = np.setdiff1d(np.arange(size, dtype=np.intp), owned)
    return np.concatenate([owned, rest])
