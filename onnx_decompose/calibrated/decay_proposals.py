"""Proposals from weights that matter little: units that are left without a supported entry go, in cascade.

An entry's statistic is the spread of what it adds to its output, over the spread of that output:

    s_ij = |w_ij| std(x_i) / std(y_j)

A unit that no entry over the level feeds, or that feeds none, is dead, and its death may leave others dead. Between the
units that live all entries stay: a dense block stores them in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.structure import Edge, live_units
from onnx_decompose.calibrated.refitting import Proposal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.refitting import CalibrationContext
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

__all__ = ["decayed_units"]

LEVELS = tuple(10.0 ** (k / 4) for k in range(-26, -1))


def decayed_units(context: CalibrationContext) -> Iterator[Proposal]:
    """One proposal per level that lets another set of units go."""
    names = {site.name for site in context.sites}
    statistics = {site.name: _statistic(context, site) for site in context.sites}
    seen: set[bytes] = set()
    for level in LEVELS:
        masks: dict[str, NDArray[np.bool_]] = {}
        for region in context.study.regions:
            if {site.name for site in region.sites} <= names:
                masks |= _live_masks(region, statistics, level)
        key = b"".join(
            np.packbits(mask.any(axis=1)).tobytes() + np.packbits(mask.any(axis=0)).tobytes()
            for mask in masks.values()
        )
        if masks and key not in seen:
            seen.add(key)
            yield Proposal(f"decay({level:.2g})", masks, family="decay")


def _statistic(context: CalibrationContext, site: Site) -> NDArray[np.float64]:
    """(K, N) what each entry contributes to its output's spread; infinite where the output does not vary at all."""
    sizes = np.abs(context.study.weight(site).astype(np.float64))
    made = np.sqrt(context.power(site, context.fit))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = sizes * context.fit[site.input].spread[:, None] / made
    return np.nan_to_num(shares, nan=0.0)


def _live_masks(
    region: Region, statistics: dict[str, NDArray[np.float64]], level: float
) -> dict[str, NDArray[np.bool_]]:
    """Masks of a region whose units were removed in cascade; none where all of them live."""
    edges = [
        Edge(
            region.axis_of[site.input],
            region.axis_of[site.output],
            statistics[site.name] > level,
        )
        for site in region.sites
    ]
    varies, needed = live_units(region.axis_sizes, edges, region.entry_axes, region.exit_axes)
    live = [first & second for first, second in zip(varies, needed, strict=True)]
    if all(axis.all() for axis in live):
        return {}
    return {
        site.name: np.outer(live[edge.source], live[edge.target])
        for site, edge in zip(region.sites, edges, strict=True)
    }
