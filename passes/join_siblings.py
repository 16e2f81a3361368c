"""Products of one value become one wider product, and a Split makes the values that they made.

    x -> MatMul -> Add -> q          x -> MatMul -> Add -> Split -> q, k
    x -> MatMul -> Add -> k

Of the main graph only: products inside bodies and functions stay apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_decompose.errors import PassError
from onnx_decompose.graph.regions import value_readers
from onnx_decompose.graph.sites import attribute_values, is_standard
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.shapes import infer_shapes, opset_of
from onnx_decompose.passes.base import GraphPass, PassResult, check_model
from onnx_decompose.passes.splice import Fresh, Placed, constant_nodes, splice
from onnx_decompose.passes.tensor_ops import TensorOps
from onnx_decompose.planning.siblings import Siblings, joined_cost, pays

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from onnx_decompose.passes.tensor_ops import Value
    from onnx_decompose.planning.cost import CostModel

__all__ = ["JoinSiblings", "Joined", "Place"]

_TYPES = {onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a weight or bias lies now.

    Attributes:
        tensor: the wider one.
        first: the first of its columns there.
        width: how many it has.
    """

    tensor: str
    first: int
    width: int


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """Products that became one.

    Attributes:
        input: the value that they read.
        products: the original's sites that they belong to.
        shape: inputs, and the outputs of all of them.
        widths: outputs of each.
        bias: whether each has a bias, which were joined as well.
        predicted: time of what is there now over that of the products, by the cost model.
    """

    input: str
    products: tuple[str, ...]
    shape: tuple[int, int]
    widths: tuple[int, ...]
    bias: bool
    predicted: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """One product: its node, the Add behind it, what it reads, and the value that the Split makes."""

    node: int
    add: int | None
    weight: str
    bias: str
    output: str

    @property
    def nodes(self) -> tuple[int, ...]:
        return (self.node,) if self.add is None else (self.node, self.add)


@dataclasses.dataclass(frozen=True, eq=False)
class JoinSiblings(GraphPass):
    """Join products of one value where that is predicted to be faster.

    They have one operator with the same attributes and weights of the same inputs and type that nothing else reads,
    and either all a bias or none.

    Attributes:
        cost: the provider's coefficients.
        products: the products that may be joined: the value that each makes, and the name of the original's site.
        biases: the constants that may be stored elsewhere; a product with another bias keeps it behind the Split.
        sizes: of dynamic axes but the batch, by symbol, at which it is to be faster.
        reserved: a graph whose names no new value may have.
        weights: filled with where each weight lies now, by the name of the value.
        rows: filled with where each bias lies now; one that several products had lies at several places.
        joined: filled with what was joined.
    """

    cost: CostModel
    products: Mapping[str, str]
    biases: Collection[str]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reserved: onnx.GraphProto = dataclasses.field(default_factory=onnx.GraphProto)
    weights: dict[str, Place] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[Place]] = dataclasses.field(default_factory=dict)
    joined: list[Joined] = dataclasses.field(default_factory=list)

    def touched(self, model: Model) -> frozenset[int]:
        """The products, their biases, and the constant nodes that only they read."""
        groups = _Finder(model, self).groups()
        nodes = {index for members, _ in groups for m in members for index in m.nodes}
        return frozenset(nodes | constant_nodes(model.proto.graph))

    def call(self, model: Model) -> PassResult:
        """Store what is side by side in new tensors, and put a product and a Split in the place of the first one."""
        finder = _Finder(model, self)
        groups = list(finder.groups())
        if not groups:
            return PassResult(model, modified=False)
        graph = model.proto.graph
        ops = TensorOps(opset_of(model.proto), finder.shapes, Fresh(graph, self.reserved))
        for members, siblings in groups:
            self._join(graph, finder.constants, ops, members, siblings)
        removed = {index for members, _ in groups for m in members for index in m.nodes}
        outputs = {member.output for members, _ in groups for member in members}
        proto = splice(model.proto, removed, ops.placed, unchanged=outputs)
        return PassResult(Model(proto, model.path), modified=True)

    def _join(
        self,
        graph: onnx.GraphProto,
        constants: Constants,
        ops: TensorOps,
        members: Sequence[_Member],
        siblings: Siblings,
    ) -> None:
        """Write one product and a Split for ``members``, and note what became of them."""
        nodes = [graph.node[member.node] for member in members]
        place, first = members[0].node, nodes[0]
        axis = 0 if attribute_values(first).get("transB", 0) else 1
        widths = siblings.widths
        starts = itertools.accumulate(widths[:-1], initial=0)
        spans = [*zip(members, starts, widths, strict=True)]
        weight = _side_by_side([m.weight for m in members], constants, ops, axis)
        for member, start, width in spans:
            self.weights[member.weight] = Place(weight.name, start, width)
        inputs = [gs.Variable(first.input[0]), weight]
        bias = None
        if members[0].bias:
            bias = _side_by_side([m.bias for m in members], constants, ops, -1)
            for member, start, width in spans:
                self.rows.setdefault(member.bias, []).append(Place(bias.name, start, width))
        made = gs.Variable(ops.fresh.name(f"{members[0].output}.joined"))
        if bias is None or members[0].add is None:
            _stand_for(nodes, [*inputs, *filter(None, [bias])], made, place, ops)
        else:
            product = gs.Variable(ops.fresh.name(f"{first.output[0]}.joined"))
            adds = [graph.node[member.add] for member in members if member.add is not None]
            _stand_for(nodes, inputs, product, place, ops)
            _stand_for(adds, [product, bias], made, place, ops)
        # Negative axes came with operator set 11.
        last = -1 if ops.opset >= 11 else len(ops.shapes[members[0].output]) - 1
        outputs = [gs.Variable(member.output) for member in members]
        ops.split(made, widths, outputs, place, axis=last)
        self.joined.append(
            Joined(
                first.input[0],
                tuple(self.products[node.output[0]] for node in nodes),
                (siblings.inputs, sum(widths)),
                widths,
                bias is not None,
                joined_cost(siblings, self.cost),
            )
        )

    def ensures(self, before: Model, after: Model) -> None:
        """Also: a model that was valid stays valid, with full shape inference."""
        GraphPass.ensures(self, before, after)
        fault = check_model(after)
        if fault is not None and check_model(before) is None:
            raise PassError(
                f"JoinSiblings: the model with joined products is not valid: {fault}"
            )


def _side_by_side(
    names: Sequence[str], constants: Constants, ops: TensorOps, axis: int
) -> gs.Constant:
    """One new tensor that holds the constants ``names`` one after another."""
    arrays = [constants.array(name) for name in names]
    joined = np.concatenate(arrays, axis)
    return ops.fresh.constant(f"{names[0]}.joined", joined, shared=False)


def _stand_for(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    output: Value,
    place: int,
    ops: TensorOps,
) -> None:
    """One node of the kind of ``nodes``, on constants that hold those of all."""
    name = ops.fresh.name(f"{nodes[0].name or nodes[0].output[0]}.joined")
    node = gs.Node(nodes[0].op_type, name, {}, [*inputs], [output])
    ops.placed.append(Placed(node, place, nodes[0], others=nodes[1:]))


class _Finder:
    """Finds what to join in one model."""

    def __init__(self, model: Model, asked: JoinSiblings) -> None:
        self._model = model
        self._asked = asked
        self._graph = model.proto.graph
        self.constants = Constants(model)
        self._readers = value_readers(self._graph)
        self._makers: Mapping[str, onnx.NodeProto] = {
            name: node for node in self._graph.node for name in node.output
        }
        self._sparse = {tensor.values.name for tensor in self._graph.sparse_initializer}
        self.shapes = infer_shapes(model.proto)
        self._names_axes_from_last = opset_of(model.proto) >= 11

    def groups(self) -> Iterator[tuple[list[_Member], Siblings]]:
        """Products to join, at least two at a time."""
        found: dict[tuple[Any, ...], list[_Member]] = {}
        for index, node in enumerate(self._graph.node):
            member = self._member(index, node)
            if member is not None and (
                self._names_axes_from_last or member.output in self.shapes
            ):
                found.setdefault(self._form(member), []).append(member)
        for members in found.values():
            siblings = self._siblings(members)
            if pays(siblings, self._asked.cost):
                yield members, siblings

    def _member(self, index: int, node: onnx.NodeProto) -> _Member | None:
        """The product that ``node`` is, where it may be joined."""
        if node.op_type not in {"Gemm", "MatMul"} or not is_standard(node):
            return None
        value, weight, *rest = node.input
        output = node.output[0]
        if output not in self._asked.products or value in self.constants.names:
            return None
        if not self._is_movable(weight):
            return None
        bias = rest[0] if rest else ""
        if bias:
            fits = bias in self._asked.biases and self._is_row(bias, self._width(node))
            return _Member(index, None, weight, bias, output) if fits else None
        return self._with_add(index, node)

    def _with_add(self, index: int, node: onnx.NodeProto) -> _Member:
        """A product, with the bias that the only reader of it adds to each unit, where a MatMul has one."""
        plain = _Member(index, None, node.input[1], "", node.output[0])
        (reader, *others) = self._readers.get(plain.output, {-1})
        if reader < 0 or others or node.op_type != "MatMul":
            return plain
        add = self._graph.node[reader]
        if add.op_type != "Add" or not is_standard(add):
            return plain
        names = [name for name in add.input if name != plain.output]
        if len(names) != 1 or names[0] not in self._asked.biases:
            return plain
        if not self._is_row(names[0], self._width(node)):
            return plain
        return _Member(index, reader, plain.weight, names[0], add.output[0])

    def _is_movable(self, name: str) -> bool:
        """Whether ``name`` is a matrix of floats as it is stored, and nothing else reads it or what it is made of."""
        if name not in self.constants:
            return False
        constant = self.constants[name]
        if constant.data_type not in _TYPES or constant.data_type != constant.tensor.data_type:
            return False
        if len(constant.shape) != 2 or 0 in constant.shape or constant.source in self._sparse:
            return False
        while len(self._readers[name]) == 1:
            maker = self._makers.get(name)
            if maker is None:
                return True
            if maker.op_type == "Constant":
                return all(a.name != "sparse_value" for a in maker.attribute)
            name = maker.input[0]
        return False

    def _is_row(self, name: str, width: int) -> bool:
        """Whether ``name`` is a constant with one number for each output."""
        if name not in self.constants:
            return False
        shape = self.constants[name].shape
        return shape[-1:] == (width,) and all(size == 1 for size in shape[:-1])

    def _width(self, node: onnx.NodeProto) -> int:
        """Outputs of a product."""
        flipped = bool(attribute_values(node).get("transB", 0))
        return int(self.constants[node.input[1]].shape[0 if flipped else 1])

    def _form(self, member: _Member) -> tuple[Any, ...]:
        """What members of one group have in common."""
        node = self._graph.node[member.node]
        weight = self.constants[member.weight]
        flipped = bool(attribute_values(node).get("transB", 0))
        bias = None
        if member.bias:
            constant = self.constants[member.bias]
            bias = (member.add is None, len(constant.shape), constant.data_type)
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        return (
            *(node.input[0], node.op_type, tuple(attributes)),
            *(weight.shape[1 if flipped else 0], weight.data_type, bias),
        )

    def _siblings(self, members: Sequence[_Member]) -> Siblings:
        weight = self.constants[members[0].weight]
        nodes = [self._graph.node[member.node] for member in members]
        widths = tuple(self._width(node) for node in nodes)
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        inputs = int(np.prod(weight.shape)) // widths[0]
        axes = self.shapes.get(nodes[0].input[0], (None,))[:-1]
        known = [
            axis if isinstance(axis, int) else self._asked.sizes.get(axis or "")
            for axis in axes
        ]
        positions = math.prod(size for size in known if size is not None)
        return Siblings(inputs, widths, itemsize, positions, not known or None in known)
