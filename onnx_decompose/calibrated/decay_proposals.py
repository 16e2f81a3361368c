"""Proposals from weights that matter little: units that are left without a supported entry go, in cascade.

An entry's statistic is the spread of what it adds to its output, over the spread of that output:

    s_ij = |w_ij| std(x_i) / std(y_j)

That of an edge of a convolution is the spread of what its whole kernel adds, over that of the output.
A unit that no entry over the level feeds, or that feeds none, is dead, and its death may leave others dead. Between the
units that live all entries stay: a dense block stores them in any case.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.structure import Edge, live_units
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.proposals import Proposal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

__all__ = ["decayed_units"]

LEVELS = tuple(10.0 ** (k / 4) for k in range(-26, -1))


def decayed_units(context: CalibrationContext) -> Iterator[Family]:
    """One proposal per level."""
    names = {site.name for site in context.sites}
    regions = [
        region
        for region in context.study.regions
        if {site.name for site in region.sites} <= names
    ]

    sites = [site for region in regions for site in region.sites]

    @functools.cache
    def made() -> dict[str, NDArray[np.float64]]:
        return {site.name: np.sqrt(context.power(site)) for site in sites}

    def at(number: int) -> Proposal | None:
        level = LEVELS[-1 - number]
        supported = {
            site.name: _contribution(context, site) > level * made()[site.name]
            for site in sites
        }
        masks: dict[str, NDArray[np.bool_]] = {}
        for region in regions:
            masks |= _live_masks(region, supported)
        return Proposal(f"decay({level:.2g})", masks) if masks else None

    if sites:
        yield Family("decay", len(LEVELS), at, entries_of(sites))


def _contribution(context: CalibrationContext, site: Site) -> NDArray[np.float64]:
    """(inputs, N) the spread of what each edge adds to its output."""
    found = context.read(site).each(context.study.weight(site), site.taps)
    spread: NDArray[np.float64] = np.sqrt(found)
    return spread


def _live_masks(
    region: Region, supported: dict[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.bool_]]:
    """Masks of a region whose units were removed in cascade, by its supported edges; none where all of them live."""
    edges = [
        Edge(
            region.axis_of[site.input],
            region.axis_of[site.output],
            supported[site.name],
        )
        for site in region.sites
    ]
    varies, needed = live_units(region.axis_sizes, edges, region.entry_axes, region.exit_axes)
    live = [first & second for first, second in zip(varies, needed, strict=True)]
    if all(axis.all() for axis in live):
        return {}
    return {
        site.name: site.entries(np.outer(live[edge.source], live[edge.target]))
        for site, edge in zip(region.sites, edges, strict=True)
    }
