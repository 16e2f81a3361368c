"""Proposals from a given number of groups: balanced, cut where the least is lost, whether or not there is a seam.

The energy of an entry is the share of its output's variance that would be gone with it, if a refit made up for it as
far as the other inputs tell:

    e_ij = w_ij^2 own_i / var(y_j)      own_i = 1 / (C^-1)_ii, the variance of x_i that no other input explains

(C is the covariance with a ridge, as all the other inputs will not be there.) With var(x_i) in the place of own_i,
inputs that say the same thing would be put into one group, and the others left without. The energy of an edge of a
convolution is that of its kernel, with blocks of taps in the place of numbers.

``analysis.partition`` puts the units of a region into G groups of equal size: all regions into as many groups each, and
then, where there are several, only those whose predicted loss is inside a level, into the most groups that are. The
loss of a region is that of its worst site: the share of the outputs' variance that is missing after a refit, as the
covariance predicts it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from onnx_decompose.analysis.gram import diagonal_blocks
from onnx_decompose.analysis.partition import Energy, partition
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.proposals import Proposal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.intp]

__all__ = ["GROUPS", "Cut", "cut_region", "partitioned_regions"]

GROUPS = (8, 4, 2)
"""Numbers of groups, strictest first."""

LEVELS = tuple(10.0 ** (k / 2) for k in range(-2, -9, -1))
"""Shares of the variance that the worst site of a region may lose."""

_OWN_RIDGE = 0.1
"""Of the mean variance of an input: what the others tell if many of them are gone."""

_RIDGE = 1e-6
"""Of the mean variance of an input: a covariance of few samples has no inverse."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A region in groups.

    Attributes:
        groups: how many.
        labels: per unit axis of the region, the group of each unit.
        masks: by site name, (K, N) what stays.
        kept: share of the energy within groups.
        loss: predicted share of the variance that the worst site loses, refitted.
    """

    groups: int
    labels: tuple[IntArray, ...]
    masks: dict[str, BoolArray]
    kept: float
    loss: float


def partitioned_regions(context: CalibrationContext) -> Iterator[Family]:
    """All regions alike, then each as far as its own loss goes."""
    names = {site.name for site in context.sites}
    regions = [
        region
        for region in context.study.regions
        if {site.name for site in region.sites} <= names
        and max(region.axis_sizes) >= min(GROUPS)
    ]

    @functools.cache
    def cut(number: int, groups: int) -> Cut:
        return cut_region(context, regions[number], groups)

    def alike(groups: int) -> Proposal:
        cuts = [cut(number, groups) for number in range(len(regions))]
        return _proposal(f"partition({groups} groups)", cuts)

    def apart(level: float) -> Proposal | None:
        found: list[Cut] = []
        for number in range(len(regions)):
            cuts = (cut(number, groups) for groups in GROUPS)
            found.extend(itertools.islice((c for c in cuts if c.loss <= level), 1))
        counts = " or ".join(str(count) for count in sorted({each.groups for each in found}))
        name = f"partition({counts} groups in {len(found)} of {len(regions)} regions)"
        return _proposal(name, found) if found else None

    def at(number: int) -> Proposal | None:
        if number < len(GROUPS):
            return alike(GROUPS[number])
        return apart(LEVELS[number - len(GROUPS)])

    if regions:
        size = len(GROUPS) + (len(LEVELS) if len(regions) > 1 else 0)
        removes = sum(_removed_at_most(region) for region in regions)
        yield Family("partition", size, at, removes)


def cut_region(context: CalibrationContext, region: Region, groups: int) -> Cut:
    """The units of ``region`` in ``groups`` groups."""
    edges = [
        Energy(region.axis_of[site.input], region.axis_of[site.output], _energy(context, site))
        for site in region.sites
    ]
    found = partition(region.axis_sizes, edges, groups, rng=context.rng)
    masks: dict[str, BoolArray] = {}
    worst = 0.0
    for site, edge in zip(region.sites, edges, strict=True):
        source, target = found.labels[edge.source], found.labels[edge.target]
        masks[site.name] = site.entries(source[:, None] == target)
        worst = max(worst, _loss(context, site, source, target))
    return Cut(groups, found.labels, masks, found.kept, worst)


def _removed_at_most(region: Region) -> int:
    """Entries that go at most: each of as many groups as there may be keeps some of every axis, or may be empty."""
    groups = max(GROUPS)
    fewest = [size - (groups - 1) * -(-size // groups) for size in region.axis_sizes]
    if min(fewest) <= 0:  # what is in a group without an output goes with it
        return entries_of(region.sites)
    kept = 0
    for site in region.sites:
        inputs, outputs = site.units
        source, target = (fewest[region.axis_of[name]] for name in (site.input, site.output))
        kept += max(source * outputs, inputs * target) * site.taps
    return entries_of(region.sites) - kept


def _proposal(name: str, cuts: Sequence[Cut]) -> Proposal:
    masks: dict[str, BoolArray] = {}
    for each in cuts:
        masks |= each.masks
    return Proposal(name, masks)


def _energy(context: CalibrationContext, site: Site) -> NDArray[np.float64]:
    """(inputs, N) share of each output's variance that goes with each edge."""
    weight = context.study.weight(site).astype(np.float64)
    own = _own_covariance(context.read(site).xx, site.taps)
    blocks = weight.reshape(-1, site.taps, weight.shape[1])
    lost = np.maximum(((own @ blocks) * blocks).sum(axis=1), 0.0)
    power = context.power(site)
    shares: NDArray[np.float64] = np.divide(
        lost, power, out=np.zeros_like(lost), where=power > 0
    )
    return shares


def _own_covariance(covariance: NDArray[np.float64], taps: int = 1) -> NDArray[np.float64]:
    """(inputs, taps, taps) what the other inputs leave of the covariance of the rows of each."""
    ridge = _OWN_RIDGE * float(np.diagonal(covariance).mean())
    if ridge <= 0:
        return np.zeros((covariance.shape[0] // taps, taps, taps))
    inverse = scipy.linalg.inv(covariance + ridge * np.eye(covariance.shape[0]))
    own = np.linalg.inv(diagonal_blocks(inverse, taps)) - ridge * np.eye(taps)
    return own.astype(np.float64)


def _loss(context: CalibrationContext, site: Site, source: IntArray, target: IntArray) -> float:
    """Share of the outputs' variance that a refit within groups misses, the mean over the outputs."""
    moments = context.read(site).through(context.study.weight(site))
    varies = moments.yy > 0
    missing = np.where(varies, moments.yy, 0.0)
    for group in np.unique(target):
        rows = site.rows(np.flatnonzero(source == group))
        outputs = np.flatnonzero(target == group)
        if not rows.size:
            continue
        gram = moments.xx[np.ix_(rows, rows)]
        gram = gram + max(_RIDGE * float(np.diagonal(gram).mean()), 1e-30) * np.eye(rows.size)
        wanted = moments.xy[np.ix_(rows, outputs)]
        found = scipy.linalg.solve(gram, wanted, assume_a="pos")
        missing[outputs] -= (wanted * found).sum(axis=0)
    if not varies.any():
        return 0.0
    return float((np.maximum(missing, 0.0)[varies] / moments.yy[varies]).mean())
