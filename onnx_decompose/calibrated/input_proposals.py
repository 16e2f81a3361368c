"""Proposals from inputs that hardly matter, such as words that hardly any text has.

    fewer inputs   those that add least to what they are read for go, and hidden units with them: one level for both,
                   the share of the variance that may be lost. What an input adds in the mean goes into biases, and
                   those that vary with it take over as far as they can. Those of a convolution are channels.
    pooled inputs  they are added up and get one row (``analysis.pooling``), or a few: for a wide first product.

Inputs are the model's own, as far as a region reads them as they are, or quantized. One that never varies on the
part to fit on goes at any level.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.pooling import least_telling, pooled
from onnx_decompose.analysis.removal import Removal, removal_order
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.removal_proposals import (
    hidden_axes,
    readers_of,
    without_units,
)
from onnx_decompose.graph.sites import is_standard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site

__all__ = ["spare_inputs"]

LOSSES = tuple(10.0 ** (-k / 4) for k in range(1, 25))
"""Shares of the variance that may be lost, from strict to loose."""
_SAME_UNITS = {"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"}
_FEWEST = 256
"""Inputs of a site of which some may be pooled: with fewer, adding them up costs more than is saved."""
POOLS = (1, 8)
"""How many rows the inputs that hardly matter share."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _EntryAxis:
    """Units that a region reads from outside.

    Attributes:
        readers: the sites that read them.
        size: how many there are.
    """

    readers: tuple[Site, ...]
    size: int

    def removal(self, context: CalibrationContext) -> Removal:
        """The inputs, least first, and the share of each reader's variance that is lost with them, added up."""
        adds = np.zeros(self.size)
        for site in self.readers:
            own = context.read(site).each(context.study.weight(site), site.taps)
            adds += own.sum(axis=1) / max(float(context.power(site).sum()), 1e-300)
        order = np.argsort(adds, kind="stable")
        return Removal(order, np.cumsum(adds[order]))


def spare_inputs(context: CalibrationContext) -> Iterator[Family]:
    """Fewer inputs of all regions together; pooled inputs of each wide site that reads a region's entry."""
    axes = [axis for region in context.study.regions for axis in _entry_axes(context, region)]
    if axes:
        yield _fewer(context, axes)
    for axis in axes:
        # Inputs of integers are not added up, nor are channels.
        plain = axis.readers[0].quantized is None and not axis.readers[0].kernel
        if len(axis.readers) == 1 and axis.size >= _FEWEST and plain:
            for rows in POOLS:
                yield _pooled(context, axis.readers[0], rows)


def _entry_axes(context: CalibrationContext, region: Region) -> Iterator[_EntryAxis]:
    """The axes of ``region`` that are inputs of the model and nothing else, if its sites can be refitted."""
    if not {site.name for site in region.sites} <= {site.name for site in context.sites}:
        return
    inputs = {value.name for value in context.study.source.proto.graph.input}
    for node in context.study.source.proto.graph.node:
        if node.op_type in _SAME_UNITS and is_standard(node) and node.input[0] in inputs:
            inputs.add(node.output[0])
    others = {region.axis_of[name] for name in region.axis_of if name not in inputs}
    for axis in sorted(region.entry_axes - others):
        readers = tuple(site for site in region.sites if region.axis_of[site.input] == axis)
        if readers:
            yield _EntryAxis(readers, region.axis_sizes[axis])


def _fewer(context: CalibrationContext, axes: list[_EntryAxis]) -> Family:
    """Inputs and hidden units go at one level."""
    hidden = [axis for region in context.study.regions for axis in hidden_axes(context, region)]
    total = sum(axis.size for axis in axes), sum(axis.size for axis in hidden)

    @functools.cache
    def inputs() -> list[Removal]:
        return [axis.removal(context) for axis in axes]

    @functools.cache
    def orders() -> list[Removal]:
        return [removal_order(readers_of(context, axis)) for axis in hidden]

    def at(number: int) -> Proposal | None:
        gone = [order.within(LOSSES[number]) for order in inputs()]
        count = sum(units.size for units in gone)
        if not count and not context.turn:  # other turns have what the first one asks for
            return None  # what is left is a removal of hidden units alone
        less = {
            axis: axis.within(order, LOSSES[number])
            for axis, order in zip(hidden, orders(), strict=True)
        }
        masks = without_units(less)
        for axis, units in zip(axes, gone, strict=True):
            for site in axis.readers:
                masks.setdefault(site.name, np.ones(site.shape, dtype=bool))[
                    site.rows(units)
                ] = False
        hidden_count = sum(units.size for units in less.values())
        return Proposal(
            f"remove({count} of {total[0]} inputs, {hidden_count} of {total[1]} hidden units)",
            masks,
        )

    sites = [site for axis in axes for site in axis.readers]
    sites += [site for axis in hidden for site in (*axis.makers, *axis.readers)]
    return Family("fewer inputs", len(LOSSES), at, entries_of(sites))


def _pooled(context: CalibrationContext, site: Site, rows: int) -> Family:
    """The inputs of one site that matter least share ``rows`` rows."""

    @functools.cache
    def at(number: int) -> Proposal | None:
        weight = context.study.weight(site)
        variance = np.maximum(np.diagonal(context.read(site).xx), 0.0)
        order, share = least_telling(weight, variance)
        members = np.sort(order[: np.searchsorted(share, LOSSES[number], side="right")])
        if members.size <= rows and not context.turn:
            return None
        pools = pooled(weight, variance, members, rows)
        name = f"inputs({members.size} of {site.shape[0]} added up to {rows})"
        mask = np.broadcast_to(np.True_, site.shape)
        return Proposal(name, {site.name: mask}, pools={site.name: pools})

    return Family(f"{rows} pools of {site.name}", len(LOSSES), at, site.size)
