"""Proposals from groups of inputs that are active together.

Every unit goes to the group that it serves, and the edges between groups are cut:

    inputs    the groups themselves (``analysis.support``)
    outputs   the group with which they vary most, as shares of what the group moves
    between   the group that needs it most: each group chooses units until nothing much of its outputs is missing
              (``analysis.forward``), on its own rows; what no group chose goes

Nothing but inputs is needed: no labels, and no word on which output belongs to which input. An output that varies with
a group it was never meant for is cut off from it; whether that matters, the metric tells.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.forward import Need, draft_units
from onnx_decompose.analysis.support import APART, influence
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.input_groups import (
    LEVELS,
    InputGroups,
    input_groups,
    survey_inputs,
)
from onnx_decompose.calibrated.proposals import Focus, Proposal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments
    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.input_groups import Survey
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["LOSSES", "supported_groups"]

LOSSES = tuple(10.0 ** (-k / 8) for k in range(4, 33))
"""Shares of the variance that the units between inputs and outputs may cost each group, from strict to loose."""


def supported_groups(context: CalibrationContext) -> Iterator[Family]:
    """One family per region and level of association; a level of it is what each group may lose."""
    names = {site.name for site in context.sites}
    for region in context.study.regions:
        rows = region.unit_axis == -1  # the same ones from the inputs on, and no positions
        if rows and {site.name for site in region.sites} <= names and region.entries:
            survey = functools.cache(functools.partial(survey_inputs, context, region))
            for level in LEVELS:
                places = functools.cache(functools.partial(_places, context, survey, level))
                yield Family(
                    f"support({region.name}, level {level:g})",
                    len(LOSSES),
                    functools.partial(_proposal, places, level),
                    entries_of(region.sites),
                )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Who serves which group of a region's inputs.

    Attributes:
        groups: of the inputs.
        labels: by level of ``LOSSES``, the group of each unit of every axis.
    """

    groups: InputGroups
    labels: Sequence[Mapping[int, IntArray]]


def _places(
    context: CalibrationContext, survey: Callable[[], Survey | None], level: float
) -> _Places | None:
    """Who serves whom at a level of association; None where there are no groups."""
    groups = input_groups(context, survey(), level)
    if groups is None:
        return None
    spread = groups.spreads(context)
    labels = groups.outer_labels(context, spread)
    reach = _influence(context, groups.region, labels, groups.count)
    pool = _Pool(context, groups.region, labels, reach, spread, groups.moments(context))
    return _Places(groups, [pool.drafted(loss) for loss in LOSSES])


def _proposal(
    places: Callable[[], _Places | None], level: float, number: int
) -> Proposal | None:
    """The proposal of one level of ``LOSSES``."""
    found = places()
    if found is None:
        return None
    groups, placed = found.groups, found.labels[number]
    region = groups.region
    outputs = {site.name: placed[region.axis_of[site.output]] for site in region.sites}
    told = f"level {level:g}, " if level else ""
    return Proposal(
        f"support({groups.count} groups, {told}{LOSSES[number]:.2g} lost)",
        _masks(region, placed),
        focus=Focus(groups.count, groups.survey.values, groups.shares, outputs),
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """The units between the inputs and the outputs of a region, and what groups want of them.

    Attributes:
        context: the model.
        region: the region.
        outer: the group of each input and output, by axis.
        reach: (units, groups) what every axis does to each group's outputs.
        spread: (units, groups) variance of every axis within each group.
        moments: of what each site reads, by group and value, over the rows of the group.
    """

    context: CalibrationContext
    region: Region
    outer: Mapping[int, IntArray]
    reach: Mapping[int, FloatArray]
    spread: Mapping[int, FloatArray]
    moments: Sequence[Mapping[str, Moments]]

    def drafted(self, loss: float) -> dict[int, IntArray]:
        """The group of each unit of every axis, as many in each as ``loss`` asks for.

        From the outputs on backwards, so that of the axis behind only what was chosen has to be made, each unit as
        far as it moves the group's outputs.
        """
        region = self.region
        placed = dict(self.outer)
        readers: dict[int, list[Site]] = {}
        for site in region.sites:
            readers.setdefault(region.axis_of[site.input], []).append(site)
        place = {site: number for number, site in enumerate(region.sites)}
        last = {axis: max(place[site] for site in sites) for axis, sites in readers.items()}
        for axis in sorted(readers.keys() - placed.keys(), key=lambda axis: -last[axis]):
            groups = range(self.reach[axis].shape[1])
            needs = [
                [
                    Need(self.moments[group][site.input].xx, self._wanted(site, placed, group))
                    for site in readers[axis]
                ]
                for group in groups
            ]
            placed[axis] = draft_units(needs, loss, self._belongs(axis)).within(loss)
        for axis, size in enumerate(region.axis_sizes):
            placed.setdefault(axis, np.full(size, APART))  # nothing reads it
        return placed

    def _belongs(self, axis: int) -> FloatArray:
        """(units, groups) the share of each group in what a unit does: how much it varies, times how far it reaches."""
        scores = self.spread[axis] * self.reach[axis]
        scores /= np.maximum(
            scores.sum(axis=0), 1e-300
        )  # groups count alike, whatever their scale
        shares: FloatArray = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-300)
        return shares

    def _wanted(self, site: Site, placed: Mapping[int, IntArray], group: int) -> FloatArray:
        """(K, n) the weight of a site to those of its outputs that a group needs, each as far as it counts."""
        target = self.region.axis_of[site.output]
        weight = self.context.study.weight(site).astype(np.float64)
        columns = np.ones(weight.shape[1], dtype=bool)
        if target in placed:
            columns = placed[target] == group
        counts = np.ones(weight.shape[1])
        if target not in self.outer:  # the region's own outputs count alike
            counts = np.sqrt(self.reach[target][:, group])
        wanted: FloatArray = weight[:, columns] * counts[columns]
        return wanted


def _influence(
    context: CalibrationContext, region: Region, labels: Mapping[int, IntArray], count: int
) -> dict[int, FloatArray]:
    """(units, groups) what every axis does to each group's exits, through the squares of the weights."""
    reach = {axis: np.zeros((size, count)) for axis, size in enumerate(region.axis_sizes)}
    for axis in region.exit_axes:
        reach[axis] += labels[axis][:, None] == np.arange(count)
    for site in reversed(region.sites):
        source, target = region.axis_of[site.input], region.axis_of[site.output]
        # Scales of layers do not matter, those of units within one do.
        scale = max(float(reach[target].max()), 1e-300)
        reach[source] += influence(context.study.weight(site), reach[target] / scale)
    return reach


def _masks(region: Region, labels: Mapping[int, IntArray]) -> dict[str, NDArray[np.bool_]]:
    masks: dict[str, NDArray[np.bool_]] = {}
    for site in region.sites:
        source, target = labels[region.axis_of[site.input]], labels[region.axis_of[site.output]]
        masks[site.name] = (source[:, None] == target[None, :]) & (source[:, None] != APART)
    return masks
