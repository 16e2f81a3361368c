"""Regions: sites joined by elementwise ops, bounded by ops that couple units.

Every value of a region has its units on one axis: the last one, or before the positions of a convolution. Elementwise
ops keep the units apart, so all values that they connect share one *unit axis*; a site leads from one to another. The
unit axes and sites of a region are its state graph (``analysis.structure``).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onnx_decompose.graph.disjoint_sets import DisjointSets
from onnx_decompose.graph.per_unit import (
    constant_axis,
    constant_units,
    is_channelwise,
    is_elementwise,
    is_per_unit,
    leads_with_ones,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import onnx

    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.shapes import Dim

__all__ = [
    "Region",
    "elementwise_values",
    "find_regions",
    "reads",
    "single_site_regions",
    "value_readers",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A set of nodes that can run as independent branches.

    Attributes:
        name: the first site's name.
        nodes: indices of the graph's nodes, ascending.
        sites: the sites among them, in graph order.
        axis_of: value name -> axis number, for every value of the region that has a unit axis.
        axis_sizes: units of each axis.
        entries: values with a unit axis that are read inside and made outside.
        exits: values made inside and read outside, or read inside in full: broadcast to the units of another axis.
        unit_axis: the axis of its values that has the units, counted from the last.
    """

    name: str
    nodes: tuple[int, ...]
    sites: tuple[Site, ...]
    axis_of: Mapping[str, int]
    axis_sizes: tuple[int, ...]
    entries: tuple[str, ...]
    exits: tuple[str, ...]
    unit_axis: int = -1

    @property
    def entry_axes(self) -> set[int]:
        """Axes whose units come from outside."""
        return {self.axis_of[name] for name in self.entries}

    @property
    def exit_axes(self) -> set[int]:
        """Axes whose units are read outside."""
        return {self.axis_of[name] for name in self.exits}


def find_regions(
    graph: onnx.GraphProto,
    sites: Sequence[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
) -> tuple[Region, ...]:
    """The maximal regions of the main graph, in graph order; every site is in exactly one, and no node in two.

    Args:
        graph: the main graph.
        sites: the sites to join; others count as ops that couple units.
        constants: the constants of the graph.
        shapes: what ``shapes.infer_shapes`` found.
    """
    readers = value_readers(graph)
    found: list[Region] = []
    taken: set[int] = set()
    for axis in _unit_axes(sites):
        alike = {site.node: site for site in sites if site.unit_axis == axis}
        elementwise = {
            index: values
            for index, values in elementwise_values(
                graph, sites, constants, shapes, axis
            ).items()
            if index not in taken
        }
        members = _trimmed(graph, alike, elementwise, constants)
        members |= _borders(graph, members, elementwise, readers)
        taken |= members
        axes = DisjointSets()
        for index in members - alike.keys():
            first, *others = elementwise[index]
            for other in others:
                axes.join(first, other)
        for site in alike.values():
            axes.join(site.output, site.bias or site.output)
        parts = DisjointSets()
        for site in alike.values():
            parts.join(axes.find(site.input), axes.find(site.output))
        grouped: dict[str, list[int]] = {}
        for index in sorted(members):
            value = graph.node[index].output[0]
            grouped.setdefault(parts.find(axes.find(value)), []).append(index)
        found.extend(
            _region(graph, nodes, alike, elementwise, axes, readers)
            for nodes in grouped.values()
        )
    return tuple(sorted(found, key=lambda region: region.nodes[0]))


def single_site_regions(
    graph: onnx.GraphProto,
    sites: Sequence[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
) -> tuple[Region, ...]:
    """Each site as a region of its own, with its bias; arguments as of :func:`find_regions`."""
    site_at = {site.node: site for site in sites}
    elementwise = {
        axis: elementwise_values(graph, sites, constants, shapes, axis)
        for axis in _unit_axes(sites)
    }
    readers = value_readers(graph)
    regions: list[Region] = []
    for site in sites:
        apart = elementwise[site.unit_axis]
        nodes = {site.node}
        for index in readers.get(site.output, ()):
            if index in apart and _is_affine(graph.node[index], constants):
                nodes.add(index)
        nodes |= _borders(graph, nodes, apart, readers)
        axes = DisjointSets()
        axes.join(site.output, site.bias or site.output)
        for index in nodes - {site.node}:
            first, *others = apart[index]
            for other in others:
                axes.join(first, other)
        regions.append(_region(graph, sorted(nodes), site_at, apart, axes, readers))
    return tuple(regions)


def elementwise_values(
    graph: onnx.GraphProto,
    sites: Sequence[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
    axis: int = -1,
) -> dict[int, tuple[str, ...]]:
    """Index of each node that keeps units apart -> the values that share its unit axis, its output first.

    Args:
        graph: the main graph.
        sites: all sites of it.
        constants: the constants of the graph.
        shapes: what ``shapes.infer_shapes`` found.
        axis: the axis that has the units, counted from the last.
    """
    units = _unit_sizes(graph, sites, constants, shapes, axis)
    ranks = {name: len(shape) for name, shape in shapes.items()}
    # What makes the weight of a site has the units of two axes.
    weights = {name for site in sites if site.quantized for name in site.quantized.made}
    found: dict[int, tuple[str, ...]] = {}
    for index, node in enumerate(graph.node):
        if not weights.isdisjoint(node.output):
            continue
        if is_elementwise(node) and is_per_unit(node, ranks, constants, axis):
            values = _joined_values(node, units, constants, axis)
        elif is_channelwise(node, constants, ranks, axis):
            values = _passed_values(node, units, constants, axis)
        else:
            continue
        if values is not None:
            found[index] = values
    return found


def _unit_axes(sites: Iterable[Site]) -> list[int]:
    """The unit axes of all sites, convolutions first: they are few, and what follows them is theirs."""
    return sorted({site.unit_axis for site in sites})


def _unit_sizes(
    graph: onnx.GraphProto,
    sites: Iterable[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
    axis: int,
) -> dict[str, int]:
    """Size of the unit axis by value name, where it is known; 1 where the value has fewer axes."""
    units: dict[str, int] = {}
    for name, shape in shapes.items():
        size = shape[axis] if len(shape) >= -axis else 1
        if isinstance(size, int):
            units[name] = size
    for site in sites:
        if site.unit_axis == axis:
            units[site.input], units[site.output] = site.units
    # Where inference failed, an elementwise op still has the size of its widest operand.
    for node in graph.node:
        if is_elementwise(node) and node.output[0] not in units:
            known = [
                units.get(name, constant_units(constants, name, axis))
                for name in node.input
                if name
            ]
            sizes = [size for size in known if size is not None]
            if sizes and len(sizes) == len(known):
                units[node.output[0]] = max(sizes)
    return units


def _borders(
    graph: onnx.GraphProto,
    members: set[int],
    elementwise: Mapping[int, tuple[str, ...]],
    readers: Mapping[str, set[int]],
) -> set[int]:
    """Nodes at a region's borders that belong inside.

    A value is cut and joined as the integers that it is quantized to: they are smaller, and a runtime sees the product
    between its quantizers that it takes as one. So does a bias that is made of integers.
    """
    found: set[int] = set()
    for index in members:
        found.update(_up_to_quantizer(graph, index, elementwise, readers))
    found -= members
    for index in range(len(graph.node) - 1, -1, -1):
        if index not in elementwise or index in members:
            continue
        node = graph.node[index]
        if node.op_type == "DequantizeLinear":
            if readers.get(node.output[0], {-1}) <= members | found:
                found.add(index)
    return found


def _up_to_quantizer(
    graph: onnx.GraphProto,
    index: int,
    elementwise: Mapping[int, tuple[str, ...]],
    readers: Mapping[str, set[int]],
) -> set[int]:
    """The nodes after node ``index``, each all that reads the one before it, up to one that quantizes."""
    passed: set[int] = set()
    while True:
        (after, *others) = readers.get(graph.node[index].output[0], {-1})
        turns_round = after in passed  # in a graph that is no graph: a value that makes itself
        if others or turns_round or len(elementwise.get(after, ())) != 2:
            return set()
        passed.add(after)
        if graph.node[after].op_type == "QuantizeLinear":
            return passed
        index = after


def _joined_values(
    node: onnx.NodeProto, units: Mapping[str, int], constants: Constants, axis: int
) -> tuple[str, ...] | None:
    """The values of an elementwise ``node`` that share one unit axis, its output first; None where they do not.

    Operands with a single unit are broadcast to every unit and take no part.
    """
    size = units.get(node.output[0])
    if size is None or size <= 1:
        return None
    joined = [node.output[0]]
    for position, name in enumerate(node.input):
        if not name:
            continue
        if name in constants:
            if not _is_of_units(node, position, size, constants, axis):
                return None
        elif units.get(name) == size:
            joined.append(name)
        elif units.get(name) != 1:
            return None
    # A line of stored integers makes one of floats: a bias, say.
    return tuple(joined) if len(joined) > 1 or node.op_type == "DequantizeLinear" else None


def _passed_values(
    node: onnx.NodeProto, units: Mapping[str, int], constants: Constants, axis: int
) -> tuple[str, ...] | None:
    """The two values of a ``node`` that works on each channel by itself; None where its constants do not fit."""
    size = units.get(node.input[0])
    if size is None or size <= 1:
        return None
    fit = all(
        _is_of_units(node, position, size, constants, axis)
        for position in range(1, len(node.input))
        if node.input[position]
    )
    return (node.output[0], node.input[0]) if fit else None


def _is_of_units(
    node: onnx.NodeProto, position: int, size: int, constants: Constants, axis: int
) -> bool:
    """Whether a constant input has an entry, or several, for each of ``size`` units, or is the same for all."""
    name, along = node.input[position], constant_axis(node, position, axis)
    held = constant_units(constants, name, along)
    # Of a constant that is cut, the units are the last axis, or the first one that is not 1.
    return held == 1 or (
        held == size and (along == -1 or leads_with_ones(constants, name, along))
    )


def _trimmed(
    graph: onnx.GraphProto,
    site_at: Mapping[int, Site],
    elementwise: Mapping[int, tuple[str, ...]],
    constants: Constants,
) -> set[int]:
    """Sites and the elementwise nodes worth running per branch: those between two sites, and biases."""
    after: set[str] = set()
    bias: set[int] = set()
    site_outputs = {site.output for site in site_at.values()}
    for index, node in enumerate(graph.node):
        if index in site_at:
            after.add(node.output[0])
        elif index in elementwise and after.intersection(node.input):
            after.add(node.output[0])
            if _is_affine(node, constants) and site_outputs.intersection(node.input):
                bias.add(index)
    before: set[str] = set()
    members = set(site_at)
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if index in site_at:
            before.add(site_at[index].input)
        elif index in elementwise and node.output[0] in after:
            feeds_site = node.output[0] in before
            if feeds_site or index in bias:
                members.add(index)
            if feeds_site:
                before.update(elementwise[index][1:])
    return members


def _is_affine(node: onnx.NodeProto, constants: Constants) -> bool:
    """Whether a runtime takes ``node`` into the site before it: a bias, or stored statistics."""
    adds = node.op_type == "Add" and any(name in constants for name in node.input)
    return adds or node.op_type == "BatchNormalization"


def value_readers(graph: onnx.GraphProto) -> dict[str, set[int]]:
    """Value name -> indices of the nodes that read it; the graph's own outputs count as node -1."""
    readers: dict[str, set[int]] = {}
    for index, node in enumerate(graph.node):
        for name in reads(node):
            readers.setdefault(name, set()).add(index)
    for value in graph.output:
        readers.setdefault(value.name, set()).add(-1)
    return readers


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The values that ``node`` reads, those that its subgraphs capture included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from reads(inner)
            for value in graph.output:
                yield value.name


def _site_values(site: Site) -> tuple[str, ...]:
    """The values of a site that have units."""
    return (site.output, site.input, *((site.bias,) if site.bias else ()))


def _region(
    graph: onnx.GraphProto,
    nodes: Sequence[int],
    site_at: Mapping[int, Site],
    elementwise: Mapping[int, tuple[str, ...]],
    axes: DisjointSets,
    readers: Mapping[str, set[int]],
) -> Region:
    sites = tuple(site_at[index] for index in nodes if index in site_at)
    joined = {
        index: elementwise[index] if index in elementwise else _site_values(site_at[index])
        for index in nodes
    }
    sizes: dict[str, int] = {}
    for site in sites:
        sizes[axes.find(site.input)], sizes[axes.find(site.output)] = site.units
    number = {axis: position for position, axis in enumerate(sizes)}
    axis_of: dict[str, int] = {}
    for index in nodes:
        for name in joined[index]:
            axis_of[name] = number[axes.find(name)]
    made = {graph.node[index].output[0] for index in nodes}
    by_unit = {(name, index) for index in nodes for name in joined[index]}
    return Region(
        name=sites[0].name,
        nodes=tuple(nodes),
        sites=sites,
        axis_of=axis_of,
        axis_sizes=tuple(sizes.values()),
        entries=tuple(name for name in axis_of if name not in made),
        exits=tuple(
            name
            for name in axis_of
            if name in made
            and any((name, index) not in by_unit for index in readers.get(name, ()))
        ),
        unit_axis=sites[0].unit_axis,
    )
