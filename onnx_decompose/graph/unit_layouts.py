"""Which regions can be written in stacks, and what that asks of their values.

A stack's values have their units on another axis than the model's. Every operator of the region has to work there
too, and on padding: units that no one reads, whose weights are zero.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx

from onnx_decompose.graph.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.shapes import Dim
    from onnx_decompose.planning.stacks import StackLayout

__all__ = ["StackForm", "folded_biases", "fused_nodes", "stack_form"]

_OLDEST = 7
"""Operator set with the usual broadcasting rules."""

_CONVOLVED = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
"""Types that runtimes have a convolution for."""

_COUNTING = {"Compress", "Loop", "NonMaxSuppression", "NonZero", "Unique"}
"""Operators whose data decide how large their outputs are: there may be no rows at all."""

_FUSED = {"HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"}
"""Activations that onnxruntime takes into the product before them."""


@dataclasses.dataclass(frozen=True, slots=True)
class StackForm:
    """What stacks of a region look like.

    Attributes:
        layouts: those that it can be written in; none where ``refusal`` says why.
        rank: axes of every value that has units.
        flat: sizes of the axes before the units, -1 for one that is not known, where they can be taken together.
        unpadded: axes whose units must not be padded.
        refusal: why there are no stacks.
    """

    layouts: frozenset[StackLayout]
    rank: int = 0
    flat: tuple[int, ...] | None = None
    unpadded: frozenset[int] = frozenset()
    refusal: str = ""


def stack_form(
    graph: onnx.GraphProto,
    region: Region,
    constants: Constants,
    shapes: Mapping[str, tuple[Dim, ...]],
    opset: int,
) -> StackForm:
    """How ``region`` can be written in stacks.

    Args:
        graph: the main graph.
        region: a region of it.
        constants: the constants of the graph.
        shapes: what ``shapes.infer_shapes`` found.
        opset: version of the standard operator set.
    """
    survey = _Survey(graph, region, constants, shapes)
    if region.unit_axis != -1:
        return StackForm(frozenset({"channels"}), unpadded=survey.unpadded())
    refusal = (
        f"operator set {opset} is older than {_OLDEST}"
        if opset < _OLDEST
        else next(survey.objections(), "")
    )
    if refusal:
        return StackForm(frozenset(), refusal=refusal)
    rank = survey.ranks().pop()
    flat = survey.flat()
    layouts: set[StackLayout] = {"rows"}
    types = {constants[site.weight].data_type for site in region.sites}
    # onnxruntime has products of no rows, and no convolutions of them.
    counting = not _COUNTING.isdisjoint(_operators(graph))
    if types <= _CONVOLVED and (rank <= 3 or flat is not None) and not counting:
        layouts.add("columns")
    return StackForm(frozenset(layouts), rank, flat, survey.unpadded())


class _Survey:
    def __init__(
        self,
        graph: onnx.GraphProto,
        region: Region,
        constants: Constants,
        shapes: Mapping[str, tuple[Dim, ...]],
    ) -> None:
        self._region = region
        self._constants = constants
        self._shapes = shapes
        sites = {site.node for site in region.sites}
        self._elementwise = [graph.node[i] for i in region.nodes if i not in sites]
        self._site_nodes = [graph.node[site.node] for site in region.sites]
        nodes = [graph.node[index] for index in region.nodes]
        named = dict.fromkeys(name for node in nodes for name in (*node.input, *node.output))
        self._values = [name for name in named if name in region.axis_of]

    def ranks(self) -> set[int]:
        return {len(self._shapes[name]) for name in self._values}

    def objections(self) -> Iterator[str]:
        """Why there are no stacks; the first reason is the plainest."""
        for name in self._values:
            if name not in self._shapes:
                yield f"the rank of '{name}' is not known"
                return
        if len(self.ranks()) > 1:
            yield "its values have different ranks"
        if min(self.ranks()) < 2:
            yield "its values have a single axis"
        for site, node in zip(self._region.sites, self._site_nodes, strict=True):
            yield from self._site_objections(site, node)
        for node in self._elementwise:
            for name in node.input:
                yield from self._operand_objections(node, name)

    def _site_objections(self, site: Site, node: onnx.NodeProto) -> Iterator[str]:
        if site.quantized is not None:
            yield f"the weight of '{site.name}' is quantized"
            return
        factors = attribute_values(node)
        if factors.get("alpha", 1.0) != 1.0 or factors.get("beta", 1.0) != 1.0:
            yield f"'{site.name}' has a factor alpha or beta"
        if len(node.input) > 2 and node.input[2]:
            if not _is_vector(self._constants[node.input[2]].shape):
                yield f"the bias of '{site.name}' is not one number per unit"

    def _operand_objections(self, node: onnx.NodeProto, name: str) -> Iterator[str]:
        region = self._region
        if name in region.axis_of:
            if region.axis_of[name] != region.axis_of[node.output[0]]:
                yield f"'{name}' is broadcast to the units of another axis"
        elif name and name not in self._constants:
            shape = self._shapes.get(name)
            if shape is None:
                yield f"the rank of '{name}' is not known"
            elif len(shape) not in {0, 1, *self.ranks()}:
                yield f"'{name}' is broadcast along more than the units"

    def flat(self) -> tuple[int, ...] | None:
        """Sizes of the axes before the units, where all values have the same and at most one is not known."""
        leads = {self._shapes[name][:-1] for name in self._region.entries}
        for node in self._elementwise:
            for name in node.input:
                if name in self._region.axis_of or not name:
                    continue
                if name in self._constants:
                    if not _is_vector(self._constants[name].shape):
                        return None
                elif len(self._shapes[name]) > 1:
                    leads.add(self._shapes[name][:-1])
        if len(leads) != 1:
            return None
        lead = leads.pop()
        unknown = sum(not isinstance(size, int) for size in lead)
        # Two unknown sizes of the same axis are not known to be the same.
        if unknown > 1 or (None in lead and len(self._region.entries) > 1) or 0 in lead:
            return None
        return tuple(size if isinstance(size, int) else -1 for size in lead)

    def unpadded(self) -> frozenset[int]:
        """Axes with an operator that is not finite at the padding that a site makes: zero, plus constants of one."""
        made = frozenset(self._region.axis_of[site.output] for site in self._region.sites)
        return made & frozenset(
            self._region.axis_of[node.output[0]]
            for node in self._elementwise
            if not self._is_finite_at_padding(node)
        )

    def _is_finite_at_padding(self, node: onnx.NodeProto) -> bool:
        if node.op_type in {"Log", "Reciprocal"}:
            return False
        if node.op_type == "Div":
            return node.input[1] in self._constants
        if node.op_type == "Pow":
            exponent = node.input[1]
            return exponent in self._constants and bool(
                (self._constants.array(exponent) >= 0).all()
            )
        return True


def folded_biases(
    graph: onnx.GraphProto, region: Region, constants: Constants
) -> Mapping[int, int]:
    """Node of each MatMul -> node of the constant Add that is all that reads it: a convolution's bias."""
    readers: dict[str, list[int]] = {}
    for index in region.nodes:
        for name in graph.node[index].input:
            readers.setdefault(name, []).append(index)
    found: dict[int, int] = {}
    for site in region.sites:
        node, reading = graph.node[site.node], readers.get(site.output, [])
        if len(node.input) > 2 or site.output in region.exits or len(reading) != 1:
            continue
        after = graph.node[reading[0]]
        added = [name for name in after.input if name in constants]
        if after.op_type == "Add" and added and _is_vector(constants[added[0]].shape):
            found[site.node] = reading[0]
    return found


def fused_nodes(graph: onnx.GraphProto, region: Region, constants: Constants) -> Iterable[int]:
    """Elementwise nodes that a runtime takes into the product before them: its bias, and its activation."""
    biases = folded_biases(graph, region, constants)
    fused = set(biases.values())
    ends = {graph.node[biases.get(site.node, site.node)].output[0] for site in region.sites}
    reads = [name for index in region.nodes for name in graph.node[index].input]
    alone = {name for name in ends if reads.count(name) == 1 and name not in region.exits}
    for index in region.nodes:
        node = graph.node[index]
        if node.op_type in _FUSED and node.input[0] in alone:
            fused.add(index)
    return fused


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    """The operators of a graph and its subgraphs."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


def _is_vector(shape: tuple[int, ...]) -> bool:
    """Whether a constant is one number, or one per unit."""
    return all(size == 1 for size in shape[:-1])
