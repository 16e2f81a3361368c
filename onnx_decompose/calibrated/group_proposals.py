"""Proposals that give every group of inputs a smaller network of its own, cut from the one that all of them share.

``support_proposals`` deals units out: each to one group. Where all groups pass through the same units, a trunk or a
residual stream, each of them serves one, and the others do without. But a group needs little of them, and its inputs
alone are active when it is: on its own rows

    a stream, whose values are only ever added up, moves in few directions. A change of basis of all that write it and
    read it changes nothing, so that a group takes directions instead of units (``analysis.subspaces``; cf. the
    invariance in SliceGPT, Ashkboos et al. 2024)
    other units between inputs and outputs are copied: each group keeps those that the rest of them cannot stand in
    for (``analysis.removal``), whichever other groups keep them too

as long as all groups together find room on the axis. What a group's inputs, copies and directions are made of is the
start of the refit, and what they should be follows from the original (``Proposal.remade``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.removal import Reader, Removal, removal_order
from onnx_decompose.analysis.subspaces import Subspace, telling_directions
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.input_groups import (
    LEVELS,
    InputGroups,
    input_groups,
    survey_inputs,
)
from onnx_decompose.calibrated.proposals import Focus, Proposal
from onnx_decompose.graph.biases import find_biases
from onnx_decompose.graph.per_unit import is_elementwise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments
    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.input_groups import Survey
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["LOSSES", "group_needs", "group_networks"]

LOSSES = tuple(10.0 ** (-k / 8) for k in range(6, 49))
"""Shares of a group's own variance that its readers may lose at every axis, from strict to loose."""

_SUMS = frozenset({"Add", "Sub", "Identity"})


def group_networks(context: CalibrationContext) -> Iterator[Family]:
    """One family per region with room for it and level of association; a level of it is a loss."""
    names = {site.name for site in context.sites}
    for region in context.study.regions:
        if not {site.name for site in region.sites} <= names or not region.entries:
            continue
        between = _between(context, region)
        if not between:
            continue
        survey = functools.cache(functools.partial(survey_inputs, context, region))
        for level in LEVELS:
            needs = functools.cache(functools.partial(_needs, context, survey, between, level))
            yield Family(
                f"networks of {region.name}, level {level:g}",
                len(LOSSES),
                functools.partial(_proposal, needs, level),
                entries_of(region.sites),
            )


def group_needs(context: CalibrationContext) -> Iterator[tuple[str, list[Subspace]]]:
    """What each group needs of every stream: its name and size, and per group its directions, for reports."""
    for region in context.study.regions:
        between = _between(context, region)
        survey = functools.partial(survey_inputs, context, region)
        found = _needs(context, survey, between, LEVELS[0]) if between else None
        for axis, needs in found.needs.items() if found is not None else ():
            directions = [need for need in needs if isinstance(need, Subspace)]
            if directions:
                name = next(value for value in region.axis_of if region.axis_of[value] == axis)
                yield f"{name}, {region.axis_sizes[axis]}", directions


def _needs(
    context: CalibrationContext,
    survey: Callable[[], Survey | None],
    between: Mapping[int, bool],
    level: float,
) -> _Needs | None:
    """What the groups at a level of association need; None where there are no groups."""
    groups = input_groups(context, survey(), level)
    return None if groups is None else _Needs(context, groups, between)


def _proposal(needs: Callable[[], _Needs | None], level: float, number: int) -> Proposal | None:
    """The proposal of one loss; None where a smaller loss leaves the same units."""
    found = needs()
    return (
        None if found is None else found.proposal(number, f"level {level:g}, " if level else "")
    )


def _between(context: CalibrationContext, region: Region) -> dict[int, bool]:
    """The axes between entries and exits, and whether each is a stream: values that are only ever added up.

    None at all between convolutions, and where one of them has constants of its own units that are no site's bias: a
    copy would need them too.
    """
    if region.unit_axis != -1:  # its sites do not read the same rows
        return {}
    graph, constants = context.study.model.proto.graph, context.study.constants
    places = find_biases(graph, region.sites, constants)
    biases = {node for bias in places.values() for node in bias.nodes}
    sites = {site.node for site in region.sites}
    outer = region.entry_axes | region.exit_axes
    found = {axis: True for axis in range(len(region.axis_sizes)) if axis not in outer}
    for index in region.nodes:
        node = graph.node[index]
        axis = region.axis_of.get(node.output[0])
        if index in sites or index in biases or axis not in found:
            continue
        others = [name for name in node.input if name and name not in region.axis_of]
        if not is_elementwise(node) or any(
            name in constants and constants.array(name).size > 1 for name in others
        ):
            return {}
        if node.op_type not in _SUMS or others:
            found[axis] = False
    made = {region.axis_of[site.output] for site in region.sites}
    read = {region.axis_of[site.input] for site in region.sites}
    return found if found.keys() <= made & read else {}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a group has of an axis: new units as sums of the original's, and back.

    Attributes:
        encode: (size, units) each new unit in terms of the original's.
        decode: (units, size) what the readers of new units take the original's for.
    """

    encode: FloatArray
    decode: FloatArray


class _Needs:
    """What each group of the inputs of one region needs of every axis between inputs and outputs."""

    def __init__(
        self,
        context: CalibrationContext,
        groups: InputGroups,
        between: Mapping[int, bool],
    ) -> None:
        self._context, self._groups, self._between = context, groups, between
        self._region, self._count = groups.region, groups.count
        self._weights = {
            site.name: context.study.weight(site).astype(np.float64)
            for site in self._region.sites
        }
        self._outer = groups.outer_labels(context, groups.spreads(context))
        moments = groups.moments(context)
        self.needs = {
            axis: [self._need(axis, group, own) for group, own in enumerate(moments)]
            for axis in between
        }

    def proposal(self, number: int, told: str) -> Proposal:
        """The proposal of one loss."""
        loss = LOSSES[number]
        parts = {axis: self._parts(axis, needs, loss) for axis, needs in self.needs.items()}
        return self._proposal(parts, f"networks({self._count} groups, {told}loss {loss:.2g})")

    def _need(self, axis: int, group: int, own: Mapping[str, Moments]) -> Subspace | Removal:
        """What one group needs of one axis, in order, by the moments over its own rows."""
        readers = [
            Reader(own[site.input].xx, self._read(site, group))
            for site in self._region.sites
            if self._region.axis_of[site.input] == axis
        ]
        if self._between[axis]:
            return telling_directions(
                [reader.covariance for reader in readers], [reader.weight for reader in readers]
            )
        return removal_order(readers)

    def _read(self, site: Site, group: int) -> FloatArray:
        """(K, N) what a site does with its inputs that matters to a group: all, or its own outputs."""
        weight, axis = self._weights[site.name], self._region.axis_of[site.output]
        return weight[:, self._outer[axis] == group] if axis in self._outer else weight

    def _parts(self, axis: int, needs: list[Subspace | Removal], loss: float) -> list[_Part]:
        """What each group has of an axis: at the loss, or the least loss above at which all find room."""
        size = self._region.axis_sizes[axis]
        for level in reversed(LOSSES):
            parts = [_part(need, level, size) for need in needs]
            if level >= loss and sum(part.encode.shape[1] for part in parts) <= size:
                return parts
        share = size // self._count
        parts = [_part(need, LOSSES[0], size) for need in needs]
        return [_Part(part.encode[:, :share], part.decode[:share]) for part in parts]

    def _proposal(self, parts: Mapping[int, list[_Part]], name: str) -> Proposal:
        region = self._region
        labels, encode, decode = dict(self._outer), {}, {}
        for axis, own in parts.items():
            size = region.axis_sizes[axis]
            labels[axis] = np.full(size, -1, dtype=np.intp)
            encode[axis], decode[axis] = np.zeros((size, size)), np.zeros((size, size))
            start = 0
            for group, part in enumerate(own):
                place = slice(start, start + part.encode.shape[1])
                labels[axis][place] = group
                encode[axis][:, place], decode[axis][place] = part.encode, part.decode
                start = place.stop
        masks: dict[str, NDArray[np.bool_]] = {}
        starts: dict[str, NDArray[Any]] = {}
        remade: dict[str, FloatArray] = {}
        recast: dict[str, FloatArray] = {}
        for site in region.sites:
            source, target = region.axis_of[site.input], region.axis_of[site.output]
            first, second = labels[source], labels[target]
            masks[site.name] = (first[:, None] == second) & (first[:, None] >= 0)
            start_of = self._weights[site.name]
            if source in decode:
                start_of = decode[source] @ start_of
                recast[site.name] = encode[source]
            if target in encode:
                start_of = start_of @ encode[target]
                remade[site.name] = encode[target]
            starts[site.name] = start_of.astype(self._context.study.weight(site).dtype)
        outputs = {site.name: labels[region.axis_of[site.output]] for site in region.sites}
        focus = Focus(self._count, self._groups.survey.values, self._groups.shares, outputs)
        return Proposal(name, masks, starts, focus, remade=remade, recast=recast)


def _part(need: Subspace | Removal, loss: float, size: int) -> _Part:
    if isinstance(need, Subspace):
        count = need.within(loss)
        return _Part(need.encode[:, :count], need.decode[:count])
    units = np.eye(size)[np.setdiff1d(np.arange(size), need.within(loss))]
    return _Part(units.T, units)
