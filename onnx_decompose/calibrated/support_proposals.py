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
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.forward import Need, draft_units
from onnx_decompose.analysis.gram import MomentAccumulator
from onnx_decompose.analysis.support import (
    APART,
    Activity,
    ActivityAccumulator,
    SpreadAccumulator,
    coactive_groups,
    influence,
    resting_values,
    where_it_varies,
)
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.needed_outputs import needed_outputs
from onnx_decompose.calibrated.refitting import Focus, Proposal
from onnx_decompose.calibrated.site_statistics import observe
from onnx_decompose.model.tensors import is_float

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.refitting import CalibrationContext
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["LEVELS", "LOSSES", "outer_labels", "supported_groups"]

LEVELS = (0.0, 0.1, 0.3, 0.6)
"""Smallest phi coefficients of an edge between two inputs."""

LOSSES = tuple(10.0 ** (-k / 8) for k in range(4, 33))
"""Shares of the variance that the units between inputs and outputs may cost each group, from strict to loose."""

_RESTING_ROWS = 4096
"""Rows on which resting values are looked for."""

_ALWAYS = 0.9
"""Share of the rows: groups that are active in more of them, on average, are not apart. Values may come twice by
chance, as those of a frequent word do, and what rests with them is no group of its own for that."""


def supported_groups(context: CalibrationContext) -> Iterator[Family]:
    """One family per region and level of association; a level of it is what each group may lose."""
    names = {site.name for site in context.sites}
    for region in context.study.regions:
        if {site.name for site in region.sites} <= names and region.entries:
            survey = functools.cache(functools.partial(_survey, context, region))
            for level in LEVELS:
                places = functools.cache(functools.partial(_places, context, survey, level))
                yield Family(
                    f"support({region.name}, level {level:g})",
                    len(LOSSES),
                    functools.partial(_proposal, places, level),
                    entries_of(region.sites),
                )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Survey:
    """The entries of a region, their units side by side.

    Attributes:
        region: the region.
        counting: tells what is active.
        activity: what was counted on the part to fit on.
    """

    region: Region
    counting: ActivityAccumulator
    activity: Activity

    def shares(self, values: Mapping[str, NDArray[Any]], member: FloatArray) -> FloatArray:
        """(rows, groups) how much of what is active belongs to each group, from ``member``, (K, groups)."""
        entries = _side_by_side([values[name] for name in self.region.entries])
        assert entries is not None
        share = self.counting.active(entries) @ member
        found: FloatArray = share / np.maximum(share.sum(axis=1, keepdims=True), 1e-300)
        return found


def _survey(context: CalibrationContext, region: Region) -> _Survey | None:
    """Count what is active together at the entries; None where they do not go row by row, or hardly anything rests."""
    batches = _entries(context, region)
    first: list[NDArray[Any]] = []
    for x in batches:
        if x is None:
            return None
        first.append(x)
        if sum(len(rows) for rows in first) >= _RESTING_ROWS:
            break
    head = np.concatenate(first)[:_RESTING_ROWS]
    counting = ActivityAccumulator(resting_values(head))
    if counting.active(head).mean(axis=0).min() > _ALWAYS:
        return None
    for x in _entries(context, region):
        assert x is not None
        counting.update(x)
    return _Survey(region, counting, counting.result())


def _entries(context: CalibrationContext, region: Region) -> Iterator[NDArray[Any] | None]:
    """The entries' units of every batch, (rows, K) for all of them together."""
    found = observe(context.study.source, region.entries, context.parts.fit, context.provider)
    for values in found:
        yield _side_by_side([values[name] for name in region.entries])


def _side_by_side(values: Sequence[NDArray[Any]]) -> NDArray[Any] | None:
    rows = [value.reshape(-1, value.shape[-1]) for value in values]
    if len({len(part) for part in rows}) > 1 or not all(is_float(part.dtype) for part in rows):
        return None
    return np.concatenate(rows, axis=1)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Who serves which group of a region's inputs.

    Attributes:
        survey: the region.
        inputs: the group of each input, those of all entries side by side.
        count: number of groups.
        labels: by level of ``LOSSES``, the group of each unit of every axis.
    """

    survey: _Survey
    inputs: IntArray
    count: int
    labels: Sequence[Mapping[int, IntArray]]


def _places(
    context: CalibrationContext, survey: Callable[[], _Survey | None], level: float
) -> _Places | None:
    """Who serves whom at a level of association; None where there are no groups, or a lower level has the same."""
    found = survey()
    if found is None:
        return None
    inputs, count = coactive_groups(found.activity, level=level)
    lower = (
        coactive_groups(found.activity, level=other)[0] for other in LEVELS if other < level
    )
    if count < 2:
        return None
    if not context.turn and any(np.array_equal(inputs, other) for other in lower):
        return None
    active = (found.activity.alone / found.activity.rows) @ _member(inputs, count)
    if active.mean() > _ALWAYS:
        return None
    region = found.region
    spread = _spreads(context, found, inputs, count)
    labels = outer_labels(context, found, inputs, spread)
    reach = _influence(context, region, labels, count)
    covariances = _covariances(context, found, inputs, count)
    pool = _Pool(context, region, labels, reach, spread, covariances)
    return _Places(found, inputs, count, [pool.drafted(loss) for loss in LOSSES])


def outer_labels(
    context: CalibrationContext,
    survey: _Survey,
    inputs: IntArray,
    spread: Mapping[int, FloatArray],
) -> dict[int, IntArray]:
    """The group of each input and output of a region, by axis.

    Outputs go where the metric looks at them, as far as it tells, or else where they vary.
    """
    region = survey.region
    labels: dict[int, IntArray] = {}
    start = 0
    for name in region.entries:
        size = region.axis_sizes[region.axis_of[name]]
        labels[region.axis_of[name]] = inputs[start : start + size]
        start += size
    member = _member(inputs, int(inputs.max()) + 1)
    for axis in sorted(region.exit_axes - labels.keys()):
        labels[axis] = where_it_varies(spread[axis])
        exits = [name for name in region.exits if region.axis_of[name] == axis]
        needed = None
        if len(exits) == 1:
            shares = functools.partial(survey.shares, member=member)
            needed = needed_outputs(context, exits[0], region.entries, shares)
        if needed is not None:
            labels[axis] = np.where(needed.any(axis=1), needed.argmax(axis=1), labels[axis])
    return labels


def _proposal(
    places: Callable[[], _Places | None], level: float, number: int
) -> Proposal | None:
    """The proposal of one level of ``LOSSES``."""
    found = places()
    if found is None:
        return None
    region, placed = found.survey.region, found.labels[number]
    outputs = {site.name: placed[region.axis_of[site.output]] for site in region.sites}
    member = _member(found.inputs, found.count)

    def shares(values: Mapping[str, NDArray[Any]]) -> FloatArray:
        return found.survey.shares(values, member)

    told = f"level {level:g}, " if level else ""
    return Proposal(
        f"support({found.count} groups, {told}{LOSSES[number]:.2g} lost)",
        _masks(region, placed),
        focus=Focus(found.count, region.entries, shares, outputs),
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
        covariances: (H, H) of what each site reads, by value and group, in the rows of the group.
    """

    context: CalibrationContext
    region: Region
    outer: Mapping[int, IntArray]
    reach: Mapping[int, FloatArray]
    spread: Mapping[int, FloatArray]
    covariances: Mapping[tuple[str, int], FloatArray]

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
                    Need(self.covariances[site.input, group], self._wanted(site, placed, group))
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


def _covariances(
    context: CalibrationContext, survey: _Survey, inputs: IntArray, count: int
) -> dict[tuple[str, int], FloatArray]:
    """(H, H) of what each site reads between inputs and outputs, by value and group, in the rows of the group."""
    region = survey.region
    outer = {region.axis_of[name] for name in region.entries} | set(region.exit_axes)
    values = list(
        dict.fromkeys(s.input for s in region.sites if region.axis_of[s.input] not in outer)
    )
    adding = {(value, group): MomentAccumulator() for value in values for group in range(count)}
    member = _member(inputs, count)
    wanted = list(dict.fromkeys((*region.entries, *values)))
    samples, held = context.fitting, context.held[context.fitting]
    for found in observe(context.study.source, wanted, samples, context.provider, held):
        shares = survey.shares(found, member)
        for (value, group), accumulator in adding.items():
            rows = found[value].reshape(-1, found[value].shape[-1])
            own = shares[:, group] > 0
            accumulator.update(rows[own], None, shares[own, group])
    return {key: accumulator.result().xx for key, accumulator in adding.items()}


def _spreads(
    context: CalibrationContext, survey: _Survey, inputs: IntArray, count: int
) -> dict[int, FloatArray]:
    """(units, groups) variance of every axis within each group, over all values of the axis that sites read or exit."""
    region = survey.region
    values = list(
        dict.fromkeys((*region.entries, *(s.input for s in region.sites), *region.exits))
    )
    adding = {
        name: SpreadAccumulator(region.axis_sizes[region.axis_of[name]], count)
        for name in values
    }
    member = _member(inputs, count)
    for found in observe(context.study.source, values, context.parts.fit, context.provider):
        share = survey.shares(found, member)
        for name, accumulator in adding.items():
            accumulator.update(found[name], share)
    total = {axis: np.zeros((size, count)) for axis, size in enumerate(region.axis_sizes)}
    for name, accumulator in adding.items():
        total[region.axis_of[name]] += accumulator.result()
    return total


def _member(labels: IntArray, count: int) -> FloatArray:
    """(K, groups) 1 over the group's size where an input is in it."""
    member = (labels[:, None] == np.arange(count)).astype(np.float64)
    scaled: FloatArray = member / member.sum(axis=0)
    return scaled


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
