"""One model, taken apart for analysis: its sites, its regions, and what is known of each weight's beginnings."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from onnx_decompose.analysis.anneal import anneal
from onnx_decompose.analysis.structure import Edge
from onnx_decompose.graph.flat import Flat, flatten
from onnx_decompose.graph.recurrent import (
    RecurrentSite,
    RecurrentWeight,
    find_recurrent,
)
from onnx_decompose.graph.refusals import find_refusals
from onnx_decompose.graph.regions import Region, find_regions, single_site_regions
from onnx_decompose.graph.sites import (
    Refusal,
    Site,
    check_finite,
    find_sites,
    site_grid,
    site_weight,
    stored_as,
    stored_nothing,
    stored_values,
    stored_weight,
)
from onnx_decompose.graph.unit_layouts import fused_nodes, stack_form
from onnx_decompose.graph.unit_spaces import UnitSpace, find_unit_spaces
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.shapes import Dim, infer_shapes, opset_of
from onnx_decompose.planning.state_graph import StateGraph

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from onnx_decompose.analysis.grid import Grid
    from onnx_decompose.model.model_io import Model

__all__ = ["Study", "axis_positions", "state_graph", "study_model"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What the graph alone says.

    Attributes:
        flat: the model, and the flat graph that is studied in its place.
        constants: the flat graph's constants.
        shapes: what is known of its values' shapes.
        sites: all sites, in graph order.
        refused: nodes that look like sites and are left alone.
        regions: the maximal regions; every site is in exactly one.
        alone: by site name, the site as a region of its own.
        spaces: the unit spaces that may be renumbered.
        recurrent: the recurrent sites, in graph order; they are in no region.
    """

    flat: Flat
    constants: Constants
    shapes: Mapping[str, tuple[Dim, ...]]
    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    regions: tuple[Region, ...]
    alone: Mapping[str, Region]
    spaces: tuple[UnitSpace, ...]
    recurrent: tuple[RecurrentSite, ...] = ()

    @property
    def source(self) -> Model:
        """The model itself."""
        return self.flat.source

    @property
    def model(self) -> Model:
        """The flat model: all nodes and values of the study are its own."""
        return self.flat.model

    @property
    def weights(self) -> tuple[Site | RecurrentWeight, ...]:
        """Every weight that is tested, in graph order; their names are unique."""
        found: list[tuple[int, tuple[Site | RecurrentWeight, ...]]] = [
            *((site.node, (site,)) for site in self.sites),
            *((site.node, site.all_weights) for site in self.recurrent),
        ]
        return tuple(
            weight
            for _, weights in sorted(found, key=lambda item: item[0])
            for weight in weights
        )

    def weight(self, site: Site | RecurrentWeight) -> NDArray[Any]:
        """The weight of a site, (K, N), as floats."""
        if isinstance(site, RecurrentWeight):
            return site.array
        return site_weight(site, self.constants)

    def stored(self, site: Site | RecurrentWeight) -> NDArray[Any]:
        """The entries that are stored for the weight of a site, (K, N)."""
        if isinstance(site, RecurrentWeight):
            return site.array
        return stored_weight(site, self.constants)

    def stored_as(self, site: Site | RecurrentWeight, weight: NDArray[Any]) -> NDArray[Any]:
        """What is stored for other entries of a site, (K, N): the nearest that its type, or its grid, has."""
        if isinstance(site, RecurrentWeight):
            return weight.astype(site.array.dtype, copy=False)
        return stored_as(site, weight, self.constants)

    def grid(self, site: Site) -> Grid:
        """The numbers that can be stored for the weight of a site of integers."""
        return site_grid(site, self.constants)

    def values(self, site: Site | RecurrentWeight, stored: NDArray[Any]) -> NDArray[Any]:
        """What entries that could be stored for the weight of a site, (K, N), stand for."""
        if isinstance(site, RecurrentWeight):
            return stored
        return stored_values(site, stored, self.constants)

    def annealed(self, site: Site, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """The stored entries of a site, (K, N), without those that ``mask`` does not support."""
        return anneal(self.stored(site), mask, stored_nothing(site, self.constants))

    def itemsize(self, site: Site) -> int:
        """Bytes per element of the product that a site is at run time.

        A runtime multiplies integers where the input was dequantized too, and floats where only the weight was.
        """
        if site.quantized is None:
            return self.constants.array(site.weight).itemsize
        return self.stored(site).itemsize if site.quantized.meets_integers else 4

    def parts(self, region: Region) -> tuple[Region, ...]:
        """The sites of a region as regions of their own, where that is possible; none for a region of one site."""
        if len(region.sites) == 1:
            return ()
        return tuple(self.alone[site.name] for site in region.sites if site.name in self.alone)


def study_model(source: Model | Flat) -> Study:
    """Find the sites and regions of a model, or of one that is flat already.

    Raises:
        ModelError: a weight is not finite.
    """
    flat = source if isinstance(source, Flat) else flatten(source)
    model = flat.model
    constants = Constants(model)
    shapes = infer_shapes(model.proto)
    sites, refused = find_sites(model, constants)
    check_finite(model, sites, constants)
    regions: list[Region] = []
    recurrent, refused_cells = find_recurrent(model, constants)
    refusals = [*refused, *refused_cells, *find_refusals(model, constants, flat.hidden)]
    for region in find_regions(model.proto.graph, sites, constants, shapes):
        reason = _refuse(model, region, shapes)
        if reason is None:
            regions.append(region)
        else:
            refusals.extend(Refusal(site.name, site.op_type, reason) for site in region.sites)
    kept = {site for region in regions for site in region.sites}
    sites = tuple(site for site in sites if site in kept)
    alone = {
        region.name: region
        for region in single_site_regions(model.proto.graph, sites, constants, shapes)
        if _refuse(model, region, shapes) is None
    }
    spaces = find_unit_spaces(model.proto.graph, sites, constants, shapes)
    return Study(
        flat,
        constants,
        shapes,
        sites,
        tuple(refusals),
        tuple(regions),
        alone,
        spaces,
        recurrent,
    )


def _refuse(model: Model, region: Region, shapes: Mapping[str, tuple[Dim, ...]]) -> str | None:
    """Why no rewrite of ``region`` can be written down in the model's version of ONNX; None if it can."""
    version = model.proto.ir_version
    if version < 4:
        return (
            f"IR version {version} has no initializers that are not inputs too; convert the model "
            "to version 4 or later"
        )
    opset = opset_of(model.proto)
    if opset >= 11:
        return None
    for name in (*region.entries, *region.exits):
        if name not in shapes:
            return (
                f"the rank of '{name}' is not known, and operator set {opset} cannot count axes from the last; "
                "convert the model to operator set 11 or later"
            )
    return None


def state_graph(
    study: Study, region: Region, masks: Mapping[str, NDArray[np.bool_]]
) -> StateGraph:
    """The state graph of ``region``, with the supported mask of each site by name."""
    graph = study.model.proto.graph
    sites = {site.node for site in region.sites}
    free = {
        name
        for space in study.spaces
        if space.unit_axis == region.unit_axis
        for name in space.values
    }
    fused = set(fused_nodes(graph, region, study.constants))
    form = stack_form(graph, region, study.constants, study.shapes, opset_of(study.model.proto))
    return StateGraph(
        axis_sizes=region.axis_sizes,
        edges=tuple(
            Edge(
                region.axis_of[site.input],
                region.axis_of[site.output],
                site.edges(masks[site.name]),
            )
            for site in region.sites
        ),
        elementwise=tuple(
            region.axis_of[graph.node[index].output[0]]
            for index in region.nodes
            if index not in sites | fused
        ),
        entries=tuple(region.axis_of[name] for name in region.entries),
        exits=tuple(region.axis_of[name] for name in region.exits),
        itemsize=max(study.itemsize(site) for site in region.sites),
        inner=tuple(
            region.axis_of[name]
            for name in dict.fromkeys(site.input for site in region.sites)
            if name not in region.entries
        ),
        free=frozenset(
            region.axis_of[name] for name in (*region.entries, *region.exits) if name in free
        ),
        fused=tuple(region.axis_of[graph.node[index].output[0]] for index in sorted(fused)),
        layouts=form.layouts,
        unpadded=form.unpadded,
        unstacked=form.refusal,
        taps=tuple(site.taps for site in region.sites),
        positions=axis_positions(region, study.shapes),
    )


_POSITIONS = 256
"""Positions of a convolution's values where shapes do not tell: 16 x 16."""


def axis_positions(region: Region, shapes: Mapping[str, tuple[Dim, ...]]) -> tuple[int, ...]:
    """Per axis, positions that a convolution's values have for each sample; none where units are the last axis."""
    if region.unit_axis == -1:
        return ()
    found: dict[int, int] = {}
    for name, axis in region.axis_of.items():
        sizes = shapes.get(name, (None,))[region.unit_axis + 1 :]
        known = [size for size in sizes if isinstance(size, int)]
        if len(known) == len(sizes) == -1 - region.unit_axis:
            found[axis] = max(found.get(axis, 0), math.prod(known))
    # A single position is what pooling leaves: it does not tell what was pooled.
    default = max((count for count in found.values() if count > 1), default=_POSITIONS)
    return tuple(found.get(axis, default) for axis in range(len(region.axis_sizes)))
