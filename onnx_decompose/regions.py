"""Regions: sites joined by elementwise ops, bounded by ops that couple units.

Every value of a region has a *unit axis*, its last one. Elementwise ops keep the units apart, so all values that
they connect share one axis; a site leads from one axis to another. The axes and sites of a region are its state
graph (``analysis.structure``).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onnx_decompose.disjoint_sets import DisjointSets
from onnx_decompose.sites import Site, attribute_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import onnx

    from onnx_decompose.constants import Constants
    from onnx_decompose.shapes import Dim

__all__ = [
    "Region",
    "elementwise_values",
    "find_regions",
    "reads",
    "single_site_regions",
    "value_readers",
]

_ELEMENTWISE = {
    *("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round"),
    *("Sign", "Sin", "Sqrt", "Cast", "Clip", "Dropout", "Identity"),
    *("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"),
    *("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu"),
    *("Relu", "Selu", "Shrink", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh"),
    "ThresholdedRelu",
}


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
    """

    name: str
    nodes: tuple[int, ...]
    sites: tuple[Site, ...]
    axis_of: Mapping[str, int]
    axis_sizes: tuple[int, ...]
    entries: tuple[str, ...]
    exits: tuple[str, ...]

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
    """The maximal regions of the main graph, in graph order; every site is in exactly one.

    Args:
        graph: the main graph.
        sites: the sites to join; others count as ops that couple units.
        constants: the constants of the graph.
        shapes: what ``shapes.infer_shapes`` found.
    """
    site_at = {site.node: site for site in sites}
    elementwise = elementwise_values(graph, sites, constants, shapes)
    members = _trimmed(graph, site_at, elementwise, constants)
    axes = DisjointSets()
    for index in members - site_at.keys():
        first, *others = elementwise[index]
        for other in others:
            axes.join(first, other)
    parts = DisjointSets()
    for site in sites:
        parts.join(axes.find(site.input), axes.find(site.output))
    grouped: dict[str, list[int]] = {}
    for index in sorted(members):
        value = graph.node[index].output[0]
        grouped.setdefault(parts.find(axes.find(value)), []).append(index)
    readers = value_readers(graph)
    return tuple(
        _region(graph, nodes, site_at, elementwise, axes, readers) for nodes in grouped.values()
    )


def single_site_regions(
    graph: onnx.GraphProto,
    sites: Sequence[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
) -> tuple[Region, ...]:
    """Each site as a region of its own, with its bias; arguments as of :func:`find_regions`."""
    site_at = {site.node: site for site in sites}
    elementwise = elementwise_values(graph, sites, constants, shapes)
    readers = value_readers(graph)
    regions: list[Region] = []
    for site in sites:
        nodes = [site.node]
        axes = DisjointSets()
        for index in readers.get(site.output, ()):
            if index in elementwise and _adds_constant(graph.node[index], constants):
                nodes.append(index)
                axes.join(site.output, graph.node[index].output[0])
        regions.append(_region(graph, sorted(nodes), site_at, elementwise, axes, readers))
    return tuple(regions)


def elementwise_values(
    graph: onnx.GraphProto,
    sites: Sequence[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
) -> dict[int, tuple[str, ...]]:
    """Index of each elementwise node -> the values that share its unit axis, its output first."""
    units = _unit_sizes(graph, sites, constants, shapes)
    return {
        index: values
        for index, node in enumerate(graph.node)
        if (values := _joined_values(node, units, constants)) is not None
    }


def _unit_sizes(
    graph: onnx.GraphProto,
    sites: Iterable[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
) -> dict[str, int]:
    """Size of the last axis by value name, where it is known; 1 also for a scalar."""
    units: dict[str, int] = {}
    for name, shape in shapes.items():
        last = shape[-1] if shape else 1
        if isinstance(last, int):
            units[name] = last
    for site in sites:
        units[site.input], units[site.output] = site.shape
    # Where inference failed, an elementwise op still has the size of its widest operand.
    for node in graph.node:
        if _is_elementwise(node) and node.output[0] not in units:
            known = [
                units.get(name, _constant_units(constants, name)) for name in node.input if name
            ]
            sizes = [size for size in known if size is not None]
            if sizes and len(sizes) == len(known):
                units[node.output[0]] = max(sizes)
    return units


def _is_elementwise(node: onnx.NodeProto) -> bool:
    """Whether a unit of the output depends on the same unit of the operands alone, by the usual broadcasting rules."""
    return (
        node.op_type in _ELEMENTWISE
        and node.domain in {"", "ai.onnx"}
        and len(node.output) == 1
        # Dropout does nothing, unless it is told that this is training.
        and not (node.op_type == "Dropout" and len(node.input) > 2)
        # Operator sets under 7 had broadcasting rules of their own.
        and not {"axis", "broadcast"}.intersection(attribute_values(node))
    )


def _constant_units(constants: Constants, name: str) -> int | None:
    if name not in constants:
        return None
    shape = constants[name].shape
    return shape[-1] if shape else 1


def _joined_values(
    node: onnx.NodeProto, units: Mapping[str, int], constants: Constants
) -> tuple[str, ...] | None:
    """The values of an elementwise ``node`` that share one unit axis, its output first; None if it is not such a node.

    Operands whose last axis has size 1 are broadcast to every unit and take no part.
    """
    if not _is_elementwise(node):
        return None
    size = units.get(node.output[0])
    if size is None or size <= 1:
        return None
    joined = [node.output[0]]
    for name in node.input:
        if not name:
            continue
        if name in constants:
            if _constant_units(constants, name) not in {1, size}:
                return None
        elif units.get(name) == size:
            joined.append(name)
        elif units.get(name) != 1:
            return None
    return tuple(joined) if len(joined) > 1 else None


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
            if _adds_constant(node, constants) and site_outputs.intersection(node.input):
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


def _adds_constant(node: onnx.NodeProto, constants: Constants) -> bool:
    return node.op_type == "Add" and any(name in constants for name in node.input)


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
        index: elementwise[index]
        if index in elementwise
        else (site_at[index].output, site_at[index].input)
        for index in nodes
    }
    sizes: dict[str, int] = {}
    for site in sites:
        sizes[axes.find(site.input)], sizes[axes.find(site.output)] = site.shape
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
    )
