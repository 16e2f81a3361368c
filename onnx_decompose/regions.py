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

_QUANTIZERS = {"DequantizeLinear", "QuantizeLinear"}
_ELEMENTWISE = {
    *("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round"),
    *("Sign", "Sin", "Sqrt", "Cast", "Clip", "Dropout", "Identity"),
    *("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"),
    *("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu"),
    *("Relu", "Selu", "Shrink", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh"),
    *("DequantizeLinear", "QuantizeLinear", "ThresholdedRelu"),
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
    readers = value_readers(graph)
    members = _trimmed(graph, site_at, elementwise, constants)
    members |= _borders(graph, members, elementwise, readers)
    axes = DisjointSets()
    for index in members - site_at.keys():
        first, *others = elementwise[index]
        for other in others:
            axes.join(first, other)
    for site in sites:
        axes.join(site.output, site.bias or site.output)
    parts = DisjointSets()
    for site in sites:
        parts.join(axes.find(site.input), axes.find(site.output))
    grouped: dict[str, list[int]] = {}
    for index in sorted(members):
        value = graph.node[index].output[0]
        grouped.setdefault(parts.find(axes.find(value)), []).append(index)
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
        nodes = {site.node}
        for index in readers.get(site.output, ()):
            if index in elementwise and _adds_constant(graph.node[index], constants):
                nodes.add(index)
        nodes |= _borders(graph, nodes, elementwise, readers)
        axes = DisjointSets()
        axes.join(site.output, site.bias or site.output)
        for index in nodes - {site.node}:
            first, *others = elementwise[index]
            for other in others:
                axes.join(first, other)
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
    ranks = {name: len(shape) for name, shape in shapes.items()}
    # What makes the weight of a site has the units of two axes.
    weights = {name for site in sites if site.quantized for name in site.quantized.made}
    return {
        index: values
        for index, node in enumerate(graph.node)
        if weights.isdisjoint(node.output)
        and _is_per_unit(node, ranks, constants)
        and (values := _joined_values(node, units, constants)) is not None
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
        and (
            node.op_type in _QUANTIZERS
            or not {"axis", "broadcast"}.intersection(attribute_values(node))
        )
    )


def _is_per_unit(node: onnx.NodeProto, ranks: Mapping[str, int], constants: Constants) -> bool:
    """Whether a quantizer has one scale for the whole tensor, or one for each unit; true of any other node."""
    if node.op_type not in _QUANTIZERS:
        return True
    scale = node.input[1]
    if scale not in constants:
        return ranks.get(scale) == 0
    shape = constants[scale].shape
    if all(size == 1 for size in shape):
        return True
    rank = ranks.get(node.input[0])
    axis = attribute_values(node).get("axis", 1)
    return len(shape) == 1 and (axis == -1 or rank == axis + 1)


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
        if others or len(elementwise.get(after, ())) != 2:
            return set()
        passed.add(after)
        if graph.node[after].op_type == "QuantizeLinear":
            return passed
        index = after


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
    # A line of stored integers makes one of floats: a bias, say.
    return tuple(joined) if len(joined) > 1 or node.op_type == "DequantizeLinear" else None


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
