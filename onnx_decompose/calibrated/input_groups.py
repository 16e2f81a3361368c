"""Groups of a region's inputs that are active together: which rows are whose, and which outputs.

What both kinds of proposals from groups (``support_proposals``, ``group_proposals``) start from.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.gram import MomentAccumulator, Moments
from onnx_decompose.analysis.support import (
    Activity,
    ActivityAccumulator,
    SpreadAccumulator,
    coactive_groups,
    resting_values,
    where_it_varies,
)
from onnx_decompose.calibrated.needed_outputs import needed_outputs
from onnx_decompose.calibrated.site_statistics import moment_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.views import View
    from onnx_decompose.graph.regions import Region

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

logger = logging.getLogger(__name__)

__all__ = ["LEVELS", "InputGroups", "Survey", "input_groups", "survey_inputs"]

LEVELS = (0.0, 0.1, 0.3, 0.6)
"""Smallest phi coefficients of an edge between two inputs."""

_RESTING_ROWS = 4096
"""Rows on which resting values are looked for."""

_ALWAYS = 0.9
"""Share of the rows: groups that are active in more of them, on average, are not apart. Values may come twice by
chance, as those of a frequent word do, and what rests with them is no group of its own for that."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """The entries of a region, their units side by side.

    Attributes:
        region: the region.
        entries: its entries, as they are read.
        counting: tells what is active.
        activity: what was counted on the part to fit on.
    """

    region: Region
    entries: tuple[View, ...]
    counting: ActivityAccumulator
    activity: Activity

    @property
    def values(self) -> tuple[str, ...]:
        """Names of all values that tell which groups are active."""
        return tuple(dict.fromkeys(name for view in self.entries for name in view.values))


@dataclasses.dataclass(frozen=True, eq=False)
class InputGroups:
    """Groups of the inputs of one region.

    Attributes:
        survey: the region.
        labels: the group of each input, those of all entries side by side.
        count: number of groups.
    """

    survey: Survey
    labels: IntArray
    count: int

    @property
    def region(self) -> Region:
        """Whose inputs they are."""
        return self.survey.region

    @functools.cached_property
    def member(self) -> FloatArray:
        """(K, groups) 1 over the group's size where an input is in it."""
        member = (self.labels[:, None] == np.arange(self.count)).astype(np.float64)
        scaled: FloatArray = member / member.sum(axis=0)
        return scaled

    def shares(self, values: Mapping[str, NDArray[Any]]) -> FloatArray:
        """(rows, groups) how much of what is active in each row belongs to each group."""
        entries = _side_by_side(self.survey.entries, values)
        assert entries is not None
        share = self.survey.counting.active(entries) @ self.member
        found: FloatArray = share / np.maximum(share.sum(axis=1, keepdims=True), 1e-300)
        return found

    def spreads(self, context: CalibrationContext) -> dict[int, FloatArray]:
        """(units, groups) variance of every axis within each group, over its values that are read or exit."""
        region = self.region
        read = (site.input for site in region.sites)
        values = list(dict.fromkeys((*region.entries, *read, *region.exits)))
        asked = list(dict.fromkeys((*self.survey.values, *values)))
        adding = {
            name: SpreadAccumulator(region.axis_sizes[region.axis_of[name]], self.count)
            for name in values
        }
        for found in context.observe(asked, context.parts.fit):
            share = self.shares(found)
            for name, accumulator in adding.items():
                accumulator.update(found[name], share)
        total = {
            axis: np.zeros((size, self.count)) for axis, size in enumerate(region.axis_sizes)
        }
        for name, accumulator in adding.items():
            total[region.axis_of[name]] += accumulator.result()
        return total

    @functools.cached_property
    def between(self) -> list[str]:
        """The values that sites read between entries and exits."""
        outer = self.region.entry_axes | self.region.exit_axes
        read = dict.fromkeys(site.input for site in self.region.sites)
        return [name for name in read if self.region.axis_of[name] not in outer]

    @property
    def moment_bytes(self) -> int:
        """What :meth:`moments` takes."""
        sizes = (self.region.axis_sizes[self.region.axis_of[name]] for name in self.between)
        return self.count * sum(moment_bytes(size) for size in sizes)

    def moments(self, context: CalibrationContext) -> list[dict[str, Moments]]:
        """Per group the moments of every value between, over the group's own rows, by their shares."""
        adding = [
            {name: MomentAccumulator() for name in self.between} for _ in range(self.count)
        ]
        views = {name: context.view_of_value(name) for name in self.between}
        read = (name for view in views.values() for name in view.values)
        asked = list(dict.fromkeys((*self.survey.values, *read)))
        samples = context.fitting
        for found in context.observe(asked, samples, context.held[samples]):
            shares = self.shares(found)
            for group, own in enumerate(adding):
                counts = np.flatnonzero(shares[:, group] > 0)
                for name, accumulator in own.items():
                    rows = views[name].rows(found)[counts]
                    accumulator.update(rows, weight=shares[counts, group])
        return [
            {name: accumulator.result() for name, accumulator in own.items()} for own in adding
        ]

    def outer_labels(
        self, context: CalibrationContext, spreads: Mapping[int, FloatArray]
    ) -> dict[int, IntArray]:
        """The group of each input and output of the region, by axis.

        Outputs go where the metric looks at them, as far as it tells, or else where they vary.
        """
        region = self.region
        labels: dict[int, IntArray] = {}
        start = 0
        for name in region.entries:
            size = region.axis_sizes[region.axis_of[name]]
            labels[region.axis_of[name]] = self.labels[start : start + size]
            start += size
        for axis in sorted(region.exit_axes - labels.keys()):
            labels[axis] = where_it_varies(spreads[axis])
            exits = [name for name in region.exits if region.axis_of[name] == axis]
            needed = None
            if len(exits) == 1:
                needed = needed_outputs(context, exits[0], self.survey.values, self.shares)
            if needed is not None:
                labels[axis] = np.where(needed.any(axis=1), needed.argmax(axis=1), labels[axis])
        return labels


def survey_inputs(context: CalibrationContext, region: Region) -> Survey | None:
    """Count what is active together at the entries; None where they do not go row by row, or hardly anything rests."""
    views = tuple(context.view_of_value(name) for name in region.entries)
    batches = _entries(context, views)
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
    for x in _entries(context, views):
        assert x is not None
        counting.update(x)
    return Survey(region, views, counting, counting.result())


def input_groups(
    context: CalibrationContext, survey: Survey | None, level: float
) -> InputGroups | None:
    """The groups at a level of association.

    None where they are not apart, a lower level has the same, or there is no room for their second moments.
    """
    if survey is None:
        return None
    activity = survey.activity
    labels, count = coactive_groups(activity, level=level)
    if count < 2:
        return None
    lower = (coactive_groups(activity, level=other)[0] for other in LEVELS if other < level)
    # In its turn, a family has the groups that it is named after, whether or not another one has them.
    if not context.turn and any(np.array_equal(labels, other) for other in lower):
        return None
    groups = InputGroups(survey, labels, count)
    active = (activity.alone / activity.rows) @ groups.member
    if active.mean() > _ALWAYS:
        return None
    if groups.moment_bytes > context.moment_bytes:
        logger.info(
            "region %s: second moments of %d groups would take %.1f GiB; there is room for %.1f",
            survey.region.name,
            count,
            groups.moment_bytes / 2**30,
            context.moment_bytes / 2**30,
        )
        return None
    return groups


def _entries(
    context: CalibrationContext, views: Sequence[View]
) -> Iterator[NDArray[Any] | None]:
    """The entries' units of every batch, (rows, K) for all of them together."""
    asked = list(dict.fromkeys(name for view in views for name in view.values))
    for values in context.observe(asked, context.parts.fit):
        yield _side_by_side(views, values)


def _side_by_side(
    views: Sequence[View], values: Mapping[str, NDArray[Any]]
) -> NDArray[Any] | None:
    rows = [view.rows(values) for view in views]
    if len({len(part) for part in rows}) > 1:
        return None
    return np.concatenate(rows, axis=1)
