"""Unit spaces: values that hold the same units along their unit axes, over the whole graph.

Within a region elementwise operators keep units apart. Many operators that couple units still do not care for
their order: LayerNormalization, Softmax over the units, a mean over them, an embedding's look-up. The values
that such operators connect share one *unit space*. A space that nothing outside sees, and that nothing ties to an
order of its units, may be renumbered: the constants around it are stored in the new order, and no operator is added.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onnx_decompose.graph.disjoint_sets import DisjointSets
from onnx_decompose.graph.per_unit import constant_axis, constant_units
from onnx_decompose.graph.regions import elementwise_values, reads
from onnx_decompose.graph.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import onnx

    from onnx_decompose.graph.quantized import Quantized
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.shapes import Dim

__all__ = ["UnitConstant", "UnitSpace", "find_unit_spaces"]

_NORMALIZATIONS = {"LayerNormalization", "RMSNormalization"}
_REDUCTIONS = {
    f"Reduce{what}" for what in ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")
} | {"ReduceLogSum", "ReduceSumSquare"}


@dataclasses.dataclass(frozen=True, slots=True)
class UnitConstant:
    """Where a constant holds one number, or one vector, per unit of a space.

    Attributes:
        node: index of the node that reads it.
        input: which of the node's inputs it is.
        axis: the constant's axis that has the units, negative.
    """

    node: int
    input: int
    axis: int


@dataclasses.dataclass(frozen=True, slots=True)
class UnitSpace:
    """A space that may be renumbered.

    Attributes:
        size: number of units.
        values: the values that have it on their unit axis.
        constants: all that has to be stored in the new order.
        unit_axis: the axis of the values, counted from the last.
    """

    size: int
    values: frozenset[str]
    constants: tuple[UnitConstant, ...]
    unit_axis: int = -1


def find_unit_spaces(
    graph: onnx.GraphProto,
    sites: Sequence[Site],
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
) -> tuple[UnitSpace, ...]:
    """The spaces that may be renumbered, in graph order, those on an axis before the last first.

    Args:
        graph: the main graph.
        sites: the sites; their weights can be stored in any order of inputs and outputs.
        constants: the constants of the graph.
        shapes: what ``shapes.infer_shapes`` found.
    """
    axes = sorted({site.unit_axis for site in sites})
    return tuple(
        space
        for axis in axes
        for space in _spaces_on(
            axis, graph, sites, _Survey(graph, sites, constants, shapes, axis)
        )
    )


def _spaces_on(
    axis: int, graph: onnx.GraphProto, sites: Sequence[Site], survey: _Survey
) -> Iterable[UnitSpace]:
    spaces = DisjointSets()
    pinned: set[str] = {value.name for value in (*graph.input, *graph.output)}
    users: dict[str, list[UnitConstant]] = {}
    sizes: dict[str, int] = {}
    weights = {name for site in sites if site.quantized for name in site.quantized.made}
    for index, node in enumerate(graph.node):
        if node.output and (node.output[0] in survey.constants or node.output[0] in weights):
            continue  # a constant, in whatever form
        roles = survey.roles(index, node)
        named = {name for role in roles for name in role.values}
        pinned.update(name for name in (*reads(node), *node.output) if name not in named)
        for role in roles:
            first, *others = role.values
            for other in others:
                spaces.join(first, other)
            users.setdefault(first, []).extend(role.constants)
            sizes[first] = role.size
            pinned.update(role.values if survey.shared(role.constants) else ())
    return _assemble(spaces, pinned, users, sizes, axis)


def _assemble(
    spaces: DisjointSets,
    pinned: set[str],
    users: Mapping[str, list[UnitConstant]],
    sizes: Mapping[str, int],
    axis: int,
) -> Iterable[UnitSpace]:
    values: dict[str, set[str]] = {}
    for name in spaces.names:
        values.setdefault(spaces.find(name), set()).add(name)
    found: dict[str, list[UnitConstant]] = {}
    size_of: dict[str, int] = {}
    for name, uses in users.items():
        space = spaces.find(name)
        values.setdefault(space, set()).add(name)
        found.setdefault(space, []).extend(uses)
        size_of[space] = sizes[name]
    for space, uses in found.items():
        if not values[space] & pinned:
            yield UnitSpace(size_of[space], frozenset(values[space]), tuple(uses), axis)


@dataclasses.dataclass(frozen=True, slots=True)
class _Role:
    """What one node has to do with one space."""

    size: int
    values: tuple[str, ...]
    constants: tuple[UnitConstant, ...] = ()


class _Survey:
    """Which operators keep units together in which way."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        sites: Sequence[Site],
        constants: Constants,
        shapes: Mapping[str, tuple[Dim, ...]],
        axis: int,
    ) -> None:
        self._graph = graph
        self._makers = {n: index for index, node in enumerate(graph.node) for n in node.output}
        self._axis = axis
        self._sites = {site.node: site for site in sites if site.unit_axis == axis}
        self.constants = constants
        self._shapes = shapes
        self._elementwise = elementwise_values(graph, sites, constants, shapes, axis)
        self._readers: dict[str, int] = {}
        for node in graph.node:
            for name in reads(node):
                self._readers[name] = self._readers.get(name, 0) + 1
        self._handlers: dict[str, Callable[[int, onnx.NodeProto], tuple[_Role, ...]]] = {}
        if axis != -1:  # of channels only what keeps them apart is known
            return
        self._handlers = {
            **dict.fromkeys(_NORMALIZATIONS, self._normalization),
            **dict.fromkeys(_REDUCTIONS, self._reduction),
            **dict.fromkeys(("Softmax", "LogSoftmax"), self._softmax),
            **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Expand"), self._same_units),
            **dict.fromkeys(("Shape", "Size"), self._shape_only),
            "Concat": self._concat,
            "Gather": self._gather,
            "Transpose": self._transpose,
        }

    def roles(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        """Empty for an operator that ties its values to the order of their units."""
        site = self._sites.get(index)
        if site is not None:
            return self._site(site, node)
        if index in self._elementwise:
            return self._per_unit(index, node)
        handler = self._handlers.get(node.op_type)
        if handler is None or node.domain not in {"", "ai.onnx"}:
            return ()
        if (
            not node.input or not node.output
        ):  # not a node of this operator, whatever it is called
            return ()
        return handler(index, node)

    def shared(self, constants: Iterable[UnitConstant]) -> bool:
        """Whether one of ``constants`` is a matrix that others read too: it stays shared, in its order."""
        for use in constants:
            name = self._graph.node[use.node].input[use.input]
            constant = self.constants[name]
            readers = max(
                self._readers.get(name, 0),
                self._readers.get(constant.source, 0),
            )
            if len(constant.shape) > 1 and readers > 1:
                return True
        return False

    def _site(self, site: Site, node: onnx.NodeProto) -> tuple[_Role, ...]:
        if site.quantized is not None:
            return self._quantized_site(site, site.quantized, node)
        inputs, outputs = site.units
        flipped = bool(site.kernel) or bool(attribute_values(node).get("transB", 0))
        # A convolution's weight is (N, K, kernel): with as many axes as its values, K on their unit axis.
        first, second = (site.unit_axis, site.unit_axis - 1) if flipped else (-2, -1)
        bias = (
            [UnitConstant(site.node, 2, -1)] if self._is_per_unit(node, 2, outputs, -1) else []
        )
        return (
            _Role(inputs, (site.input,), (UnitConstant(site.node, 1, first),)),
            _Role(outputs, (site.output,), (UnitConstant(site.node, 1, second), *bias)),
        )

    def _quantized_site(
        self, site: Site, quantized: Quantized, node: onnx.NodeProto
    ) -> tuple[_Role, ...]:
        if any(self._readers.get(name, 0) > 1 for name in quantized.made):
            return ()  # others read the same weight
        uses: tuple[list[UnitConstant], list[UnitConstant]] = ([], [])
        for operand in quantized.operands:
            index = self._makers[operand.maker] if operand.maker else site.node
            for found, axis in zip(uses, (operand.rows, operand.columns), strict=True):
                if axis is not None:
                    found.append(UnitConstant(index, operand.position, axis))
        if site.op_type == "Gemm" and self._is_per_unit(node, 2, site.shape[1]):
            uses[1].append(UnitConstant(site.node, 2, -1))
        bias = (site.bias,) if site.bias else ()
        return (
            _Role(site.shape[0], (site.input,), tuple(uses[0])),
            _Role(site.shape[1], (site.output, *bias), tuple(uses[1])),
        )

    def _is_per_unit(
        self, node: onnx.NodeProto, position: int, size: int, axis: int = -1
    ) -> bool:
        """Whether an input is a constant with one entry per unit along ``axis``."""
        if len(node.input) <= position:
            return False
        return constant_units(self.constants, node.input[position], axis) == size

    def _per_unit(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        size = self._units(node.output[0]) or max(
            (self._units(name) or 0 for name in node.input), default=0
        )
        if size <= 1:
            return ()
        per_unit = tuple(
            UnitConstant(index, position, axis)
            for position in range(len(node.input))
            if self._is_per_unit(
                node, position, size, axis := constant_axis(node, position, self._axis)
            )
        )
        return (_Role(size, self._elementwise[index], per_unit),)

    def _units(self, name: str) -> int | None:
        """Size of the unit axis, where it is known."""
        shape = self._shapes.get(name, ())
        size = shape[self._axis] if len(shape) >= -self._axis else None
        return size if isinstance(size, int) else None

    def _rank(self, name: str) -> int | None:
        shape = self._shapes.get(name)
        return None if shape is None else len(shape)

    def _is_last(self, name: str, axis: int) -> bool | None:
        """Whether ``axis`` of a value is its last one; None where its rank is not known."""
        if axis < 0:
            return axis == -1
        rank = self._rank(name)
        return None if rank is None else axis == rank - 1

    def _normalization(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        size = self._units(node.input[0])
        axis = attribute_values(node).get("axis", -1)
        affine = [position for position in (1, 2) if len(node.input) > position]
        if (
            size is None
            or not self._is_last(node.input[0], axis)
            or not all(self._is_per_unit(node, position, size) for position in affine)
        ):
            return ()
        uses = tuple(UnitConstant(index, position, -1) for position in affine)
        return (_Role(size, (node.output[0], node.input[0]), uses),)

    def _softmax(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        del index
        size = self._units(node.input[0])
        # Before operator set 13 the default was 1, and all axes from there on were taken together.
        axis = attribute_values(node).get("axis")
        if size is None or axis is None or not self._is_last(node.input[0], axis):
            return ()
        return (_Role(size, (node.output[0], node.input[0])),)

    def _reduction(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        del index
        size = self._units(node.input[0])
        axes = self._axes(node)
        if size is None or not axes:
            return ()
        last = [self._is_last(node.input[0], axis) for axis in axes]
        if any(last):
            return (_Role(size, (node.input[0],)),)  # every unit takes part alike
        return () if None in last else (_Role(size, (node.output[0], node.input[0])),)

    def _axes(self, node: onnx.NodeProto) -> list[int]:
        """The axes that a reduction names; none where they are not constant, or all are meant."""
        if len(node.input) > 1 and node.input[1] in self.constants:
            return [int(axis) for axis in self.constants.array(node.input[1]).ravel()]
        return list(attribute_values(node).get("axes", []))

    def _gather(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        data, axis = node.input[0], attribute_values(node).get("axis", 0)
        if data in self.constants:
            shape = self.constants[data].shape
            if len(shape) < 2 or axis in {-1, len(shape) - 1}:
                return ()
            return (_Role(shape[-1], (node.output[0],), (UnitConstant(index, 0, -1),)),)
        size = self._units(data)
        if size is None or self._is_last(data, axis) is not False:
            return ()
        return (_Role(size, (node.output[0], data)),)

    def _transpose(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        del index
        order = attribute_values(node).get("perm", ())
        size = self._units(node.input[0])
        if size is None or not order or order[-1] != len(order) - 1:
            return ()
        return (_Role(size, (node.output[0], node.input[0])),)

    def _shape_only(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        del index
        size = self._units(node.input[0])
        return () if size is None else (_Role(size, (node.input[0],)),)

    def _same_units(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        """In row-major order the units stay together where the last axis keeps its size."""
        del index
        size = self._units(node.input[0])
        if size is None or size <= 1 or size != self._units(node.output[0]):
            return ()
        return (_Role(size, (node.output[0], node.input[0])),)

    def _concat(self, index: int, node: onnx.NodeProto) -> tuple[_Role, ...]:
        size = self._units(node.output[0])
        axis = attribute_values(node).get("axis", -1)
        if size is None or self._is_last(node.output[0], axis) is not False:
            return ()
        values = tuple(name for name in node.input if name not in self.constants)
        uses = tuple(
            UnitConstant(index, position, -1)
            for position, name in enumerate(node.input)
            if name in self.constants
        )
        return (_Role(size, (node.output[0], *values), uses),)
