"""Proposals from groups of inputs that are active together.

Every unit goes to the group that it serves, and the edges between groups are cut:

    inputs    the groups themselves (``analysis.support``)
    outputs   the group with which they vary most, as shares of what the group moves
    between   as much as a unit varies with a group, times what it does to that group's outputs, under equal capacities

Nothing but inputs is needed: no labels, and no word on which output belongs to which input. An output that varies with
a group it was never meant for is cut off from it; whether that matters, the metric tells.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.support import (
    APART,
    Activity,
    ActivityAccumulator,
    SpreadAccumulator,
    assign,
    coactive_groups,
    influence,
    resting_values,
)
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.refitting import Focus, Proposal
from onnx_decompose.calibrated.site_statistics import observe
from onnx_decompose.model.tensors import is_float

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.refitting import CalibrationContext
    from onnx_decompose.graph.regions import Region

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["LEVELS", "WIDTHS", "supported_groups"]

LEVELS = (0.0, 0.1, 0.3, 0.6)
"""Smallest phi coefficients of an edge between two inputs."""

WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25)
"""Shares of the units between inputs and outputs that may stay."""

_RESTING_ROWS = 4096
"""Rows on which resting values are looked for."""

_ALWAYS = 0.9
"""Share of the rows: groups that are active in more of them, on average, are not apart. Values may come twice by
chance, as those of a frequent word do, and what rests with them is no group of its own for that."""


def supported_groups(context: CalibrationContext) -> Iterator[Family]:
    """One family per region, level of association, and way of dealing out units; a level of it is a width."""
    names = {site.name for site in context.sites}
    for region in context.study.regions:
        if {site.name for site in region.sites} <= names and region.entries:
            survey = functools.cache(functools.partial(_survey, context, region))
            for level in LEVELS:
                places = functools.cache(functools.partial(_places, context, survey, level))
                for balanced, focused in itertools.product((True, False), (True, False)):
                    way = _Way(level, balanced, focused)
                    yield Family(
                        f"support({', '.join(filter(None, (region.name, way.told)))})",
                        len(WIDTHS),
                        functools.partial(_proposal, places, way),
                        entries_of(region.sites),
                    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """How the units of a region are dealt out to the groups of one level of association."""

    level: float
    balanced: bool
    focused: bool

    @property
    def told(self) -> str:
        told = (
            f"level {self.level:g}" if self.level else "",
            "equal" if self.balanced else "",
            "own rows" if self.focused else "",
        )
        return ", ".join(filter(None, told))


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
    """Count what is active together at the entries; None where they do not go row by row, or hardly ever rest."""
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
    """What is known of a region's units once its inputs are in groups.

    Attributes:
        survey: the region.
        labels: the group of each unit of the axes where inputs and outputs are.
        count: number of groups.
        scores: how much each other unit serves each group, (units, groups) by axis.
    """

    survey: _Survey
    labels: Mapping[int, IntArray]
    count: int
    scores: Mapping[int, FloatArray]


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
    if count < 2 or any(np.array_equal(inputs, other) for other in lower):
        return None
    active = (found.activity.alone / found.activity.rows) @ _member(inputs, count)
    if active.mean() > _ALWAYS:
        return None
    region = found.region
    spread = _spreads(context, found, inputs, count)
    labels: dict[int, IntArray] = {}
    start = 0
    for name in region.entries:
        size = region.axis_sizes[region.axis_of[name]]
        labels[region.axis_of[name]] = inputs[start : start + size]
        start += size
    for axis in sorted(region.exit_axes - labels.keys()):
        labels[axis] = _where_it_varies(spread[axis])
    reach = _influence(context, region, labels, count)
    scores = {
        axis: spread[axis] * reach[axis]
        for axis in range(len(region.axis_sizes))
        if axis not in labels
    }
    return _Places(found, labels, count, scores)


def _proposal(places: Callable[[], _Places | None], way: _Way, number: int) -> Proposal | None:
    """The proposal of one width, from the narrowest, 0, on."""
    found, width = places(), WIDTHS[-1 - number]
    if found is None:
        return None
    region = found.survey.region
    placed = dict(found.labels)
    for axis, scores in found.scores.items():
        units = max(int(width * region.axis_sizes[axis]), found.count)
        placed[axis] = _placed(scores, units, balanced=way.balanced)
    outputs = {site.name: placed[region.axis_of[site.output]] for site in region.sites}
    inputs = np.concatenate([found.labels[region.axis_of[name]] for name in region.entries])
    member = _member(inputs, found.count)

    def shares(values: Mapping[str, NDArray[Any]]) -> FloatArray:
        return found.survey.shares(values, member)

    told = (f"{found.count} groups", way.told, "" if width == 1 else f"width {width:g}")
    return Proposal(
        f"support({', '.join(filter(None, told))})",
        _masks(region, placed),
        focus=Focus(found.count, region.entries, shares, outputs) if way.focused else None,
    )


def _placed(scores: FloatArray, units: int, *, balanced: bool) -> IntArray:
    """The group of each unit between inputs and outputs, ``units`` of them in all."""
    groups = scores.shape[1]
    capacity = units // groups if balanced else units
    return _within(assign(scores, np.full(groups, capacity)), scores, units)


def _within(labels: IntArray, scores: FloatArray, units: int) -> IntArray:
    """At most ``units`` units: those that do most of their group's work."""
    kept = np.flatnonzero(labels != APART)
    if kept.size <= units:
        return labels
    shares = scores / np.maximum(scores.sum(axis=0), 1e-300)
    worth = shares[kept, labels[kept]]
    gone = kept[np.argsort(-worth, kind="stable")[units:]]
    result = labels.copy()
    result[gone] = APART
    return result


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


def _where_it_varies(spread: FloatArray) -> IntArray:
    """The group with which each output varies most, as a share of what the group moves; ``APART`` for constants."""
    shares = spread / np.maximum(spread.sum(axis=0), 1e-300)
    return np.where(spread.max(axis=1) > 0, shares.argmax(axis=1), APART)


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
