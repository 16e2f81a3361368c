"""Products in other forms as products x @ W, by nodes that only move entries.

    W @ x                        (x^T @ W^T)^T; so is a Gemm with its constant on the left
    Gemm, transA                 a Transpose before it
    Gemm, any bias               an Add after it, where the bias is no constant
    Einsum of x and a constant   Transpose, Reshape, MatMul, Reshape, Transpose, as far as they are needed
    x @ stack of matrices        all of them side by side where x is the same for each; else one MatMul for each

What a form comes to is written down like the body of a function call: ``flat`` opens it, ``closing`` closes it again
where nothing was rewritten.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decompose.graph.einsum import Contraction, parse_contraction
from onnx_decompose.graph.refusals import equation_of
from onnx_decompose.graph.sites import attribute_values, is_standard
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.renames import defined_names
from onnx_decompose.model.shapes import infer_shapes, opset_of
from onnx_decompose.model.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.model.shapes import Dim

__all__ = ["Lowering"]

_MOST_MATRICES = 64
"""Of a stack that is taken one by one: each of them is a MatMul of its own."""


class Lowering:
    """Knows what each node of one model's main graph comes to; asked for one after another.

    Args:
        model: the model.
        like: that of another version of the model. What is known of shapes may differ between the two, and what forms
            come to must not: only what the other one lowered is lowered, with what it knows.

    Attributes:
        lowered: what nodes make that came to other nodes.
        turned: values that are others with their last two axes in turn. Where such a value is turned once more, the
            other one is there already: W2 @ relu((W1 @ x)^T)^T comes to one region of two products.
    """

    def __init__(self, model: Model, like: Lowering | None = None) -> None:
        self._model = model
        self._like = like
        self._names = set(defined_names(model.proto.graph))
        self.constants = Constants(model)
        self.opset = opset_of(model.proto)
        self.turned: dict[str, str] = {}
        self._new: set[str] = set()
        self.lowered: set[str] = set()

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[Dim, ...]]:
        """What is known of the values; most models need none of it."""
        shapes = infer_shapes(self._model.proto)
        return shapes if self._like is None else {**shapes, **self._like.shapes}

    def nodes(self, node: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
        """The nodes that ``node`` comes to; none where it stays as it is.

        Args:
            node: of the graph.
            name: unique; the product gets it.
        """
        form = _FORMS.get(node.op_type) if is_standard(node) else None
        if form is None or not all(node.input[:2]) or not any(node.output):
            return []
        group = _Group(self, node, name)
        if not form(group) or not self._may(group.output):
            return []
        new = {value for one in group.nodes for value in one.output}.difference(node.output)
        if not self._names.isdisjoint(new):
            return []
        self.lowered.add(group.output)
        last = group.nodes[-1]
        if last.op_type == "Transpose" and _swaps(last):
            self.turned[group.output] = last.input[0]
            self._new.add(group.output)
        return group.nodes

    def _may(self, name: str) -> bool:
        return self._like is None or name in self._like.lowered

    def is_new(self, name: str) -> bool:
        """Whether a value of :attr:`turned` is what some other form came to."""
        return name in self._new


class _Group:
    """The nodes that one node comes to, while they are written."""

    def __init__(self, lowering: Lowering, node: onnx.NodeProto, name: str) -> None:
        self.node = node
        self.name = name
        self.opset = lowering.opset
        self.attributes = dict(attribute_values(node))
        self.nodes: list[onnx.NodeProto] = []
        self._constants = lowering.constants
        self._lowering = lowering

    @property
    def output(self) -> str:
        """What the node makes."""
        return str(self.node.output[0])

    def is_new(self, name: str) -> bool:
        """Whether a value is turned, and another form came to it."""
        return self._lowering.is_new(name)

    def note_turned(self, name: str) -> None:
        """The node makes ``name`` with its last two axes in turn."""
        self._lowering.turned[self.output] = name

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the node's attributes."""
        return {name: self.attributes[name] for name in names if name in self.attributes}

    def weight(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant of floats that is not empty; None for other values."""
        if name not in self._constants:
            return None
        constant = self._constants[name]
        usable = constant.data_type in FLOAT_TYPES and 0 not in constant.shape
        return constant.shape if usable else None

    def is_known(self, name: str) -> bool:
        """Whether a value is the same in every run."""
        return name in self._constants or name in self._constants.computed

    def shape(self, name: str) -> tuple[Dim, ...] | None:
        """What is known of the shape of a value; None where its rank is not."""
        return self._lowering.shapes.get(name)

    def element(self, name: str) -> int:
        """The element type of a constant."""
        return self._constants[name].data_type

    def add(
        self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """A new node; without an ``output`` it makes a value of its own."""
        label = f"{self.name}//{len(self.nodes)}.{op}"
        made = label if output is None else output
        self.nodes.append(helper.make_node(op, inputs, [made], label, **attributes))
        return made

    def product(
        self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """The same for the product, which keeps the node's name, if that is not the name of a value."""
        made = self.add(op, inputs, output, **attributes)
        is_value = self.name in self.node.output
        self.nodes[-1].name = f"{self.name}//{op}" if is_value else self.name
        return made

    def integers(self, *values: int) -> str:
        """A constant list."""
        return self.constant(np.asarray(values, np.int64))

    def constant(self, values: Any) -> str:
        """A constant."""
        return self.add("Constant", [], value=numpy_helper.from_array(values))

    def turned(self, name: str, rank: int, output: str | None = None) -> str:
        """A value with its last two axes in turn; without an ``output``, the value that was turned already."""
        if output is None and name in self._lowering.turned:
            return self._lowering.turned[name]
        axes = [*range(rank - 2), rank - 1, rank - 2]
        return self.add("Transpose", [name], output, perm=axes)

    def moved(self, name: str, axes: Sequence[int], output: str | None = None) -> str:
        """A value with its axes in another order; the value itself where that is their own."""
        if output is None and list(axes) == sorted(axes):
            return name
        return self.add("Transpose", [name], output, perm=list(axes))


def _swaps(node: onnx.NodeProto) -> bool:
    """Whether a Transpose puts the last two axes in turn, and no others."""
    axes = list(attribute_values(node).get("perm", ()))
    order = list(range(len(axes)))
    return len(axes) > 1 and axes == [*order[:-2], order[-1], order[-2]]


def _transpose(group: _Group) -> bool:
    (value,) = group.node.input[:1]
    if group.is_known(value) or not _swaps(group.node):
        return False
    if group.is_new(value):
        group.add("Identity", [group.turned(value, 0)], group.output)
        return True
    group.note_turned(value)
    return False


def _matmul(group: _Group) -> bool:
    if len(group.node.input) < 2:
        return False
    first, second = group.node.input[:2]
    weight = group.weight(second)
    if weight is not None and len(weight) > 2 and not group.is_known(first):
        return _stack(group, first, second, weight)
    weight = group.weight(first)
    if weight is None or len(weight) != 2 or group.is_known(second):
        return False
    shape = group.shape(second)
    if not shape:
        return False
    matrix = group.add("Transpose", [first], perm=[1, 0])
    if len(shape) == 1:  # W @ x = x @ W^T
        group.product("MatMul", [second, matrix], group.output)
        return True
    product = group.product("MatMul", [group.turned(second, len(shape)), matrix])
    group.turned(product, len(shape), group.output)
    return True


def _gemm(group: _Group) -> bool:
    if len(group.node.input) < 2:
        return False
    first, second = group.node.input[:2]
    bias = group.node.input[2] if len(group.node.input) > 2 else ""
    if group.opset < 11:  # a Gemm needs a bias there
        return False
    weight = group.weight(second)
    if weight is not None and len(weight) == 2 and not group.is_known(first):
        apart = bool(bias) and group.weight(bias) is None
        if not apart and not group.attributes.get("transA", 0):
            return False
        return _plain_gemm(group, first, second, bias, apart=apart)
    weight = group.weight(first)
    if weight is not None and len(weight) == 2 and not group.is_known(second):
        return _left_gemm(group, first, second, bias)
    return False


def _plain_gemm(group: _Group, first: str, second: str, bias: str, *, apart: bool) -> bool:
    """A Gemm without transA, and without a bias that is no constant."""
    attributes = group.given("alpha", "transB")
    if group.attributes.get("transA", 0):
        first = group.turned(first, 2)
    if not apart:
        attributes |= group.given("beta")
        group.product(
            "Gemm", [first, second, *filter(None, [bias])], group.output, **attributes
        )
        return True
    product = group.product("Gemm", [first, second], **attributes)
    _add_bias(group, product, bias, second)
    return True


def _left_gemm(group: _Group, first: str, second: str, bias: str) -> bool:
    """(alpha op(x)^T @ op(W)^T + beta bias^T)^T, or the bias after that."""
    if not group.attributes.get("transB", 0):
        second = group.turned(second, 2)
    attributes = group.given("alpha")
    attributes["transB"] = int(not group.attributes.get("transA", 0))
    inside = group.weight(bias) if bias else None
    inputs = [second, first]
    if inside is not None and len(inside) == 2:
        inputs.append(group.add("Transpose", [bias], perm=[1, 0]))
        attributes |= group.given("beta")
        bias = ""
    product = group.product("Gemm", inputs, **attributes)
    if not bias:
        group.turned(product, 2, group.output)
        return True
    _add_bias(group, group.turned(product, 2), bias, first)
    return True


def _add_bias(group: _Group, product: str, bias: str, like: str) -> None:
    beta = group.attributes.get("beta", 1.0)
    if beta != 1.0:
        dtype = helper.tensor_dtype_to_np_dtype(group.element(like))
        bias = group.add("Mul", [bias, group.constant(np.asarray(beta, dtype))])
    group.add("Add", [product, bias], group.output)


def _stack(group: _Group, first: str, second: str, weight: tuple[int, ...]) -> bool:
    """The product of ``first`` with a stack of matrices, (B, K, N)."""
    shape = group.shape(first)
    if shape is None or len(weight) != 3 or len(shape) not in {2, 3}:
        return False
    count, inputs, outputs = weight
    if count == 1:
        matrix = group.add("Reshape", [second, group.integers(inputs, outputs)])
        if len(shape) == 3:
            group.product("MatMul", [first, matrix], group.output)
        else:
            product = group.product("MatMul", [first, matrix])
            _unsqueeze(group, product)
        return True
    if len(shape) == 2 or shape[0] == 1:
        return _side_by_side(group, first, second, weight, len(shape))
    if shape[0] != count or count > _MOST_MATRICES or group.opset < 13:
        return False
    parts = [f"{group.name}//{number}.part" for number in range(count)]
    _split(group, first, parts)
    made: list[str] = []
    for number, part in enumerate(parts):
        bounds = [group.integers(place) for place in (number, number + 1, 0)]
        one = group.add("Slice", [second, *bounds])
        matrix = group.add("Squeeze", [one, bounds[-1]])
        made.append(group.add("MatMul", [part, matrix]))
        group.nodes[-1].name = f"{group.name}.{number}"
    group.add("Concat", made, group.output, axis=0)
    return True


def _side_by_side(
    group: _Group, first: str, second: str, weight: tuple[int, ...], rank: int
) -> bool:
    """(B, M, N) of x (M, K) or (1, M, K): all matrices in one, (K, B * N), then the parts apart."""
    count, inputs, outputs = weight
    if rank == 3:
        first = group.add("Reshape", [first, group.integers(-1, inputs)])
    columns = group.add("Transpose", [second], perm=[1, 0, 2])
    matrix = group.add("Reshape", [columns, group.integers(inputs, count * outputs)])
    product = group.product("MatMul", [first, matrix])
    parts = group.add("Reshape", [product, group.integers(-1, count, outputs)])
    group.moved(parts, [1, 0, 2], group.output)
    return True


def _split(group: _Group, name: str, parts: Sequence[str]) -> None:
    node = helper.make_node("Split", [name], parts, f"{group.name}//Split", axis=0)
    if group.opset >= 18:
        node.attribute.append(helper.make_attribute("num_outputs", len(parts)))
    group.nodes.append(node)


def _unsqueeze(group: _Group, name: str) -> None:
    if group.opset >= 13:
        group.add("Unsqueeze", [name, group.integers(0)], group.output)
    else:
        group.add("Unsqueeze", [name], group.output, axes=[0])


def _einsum(group: _Group) -> bool:
    equation = equation_of(group.node)
    if len(group.node.input) != 2:
        return False
    first, second = group.node.input
    swapped = group.weight(first) is not None
    if swapped:
        first, second = second, first
    shape = group.shape(first)
    rank = None if shape is None else len(shape)
    contraction = parse_contraction(equation, rank, swapped=swapped)
    weight = group.weight(second)
    if weight is None or group.is_known(first) or contraction is None:
        return False
    if len(weight) != len(contraction.weight):
        return False
    return _contraction(
        group, contraction, first, second, dict(zip(contraction.weight, weight, strict=True))
    )


def _contraction(
    group: _Group, found: Contraction, first: str, second: str, sizes: Mapping[str, int]
) -> bool:
    """The value as (free axes, K), the weight as (K, N), and the product as the result."""
    summed, made = found.summed, found.made
    inputs = math.prod(sizes[letter] for letter in summed)
    outputs = math.prod(sizes[letter] for letter in made)
    value = group.moved(first, [found.value.index(letter) for letter in (*found.kept, *summed)])
    if len(summed) > 1:
        value = group.add("Reshape", [value, group.integers(*(0 for _ in found.kept), inputs)])
    matrix = group.moved(second, [found.weight.index(letter) for letter in (*summed, *made)])
    if len(sizes) > 2:
        matrix = group.add("Reshape", [matrix, group.integers(inputs, outputs)])
    axes = [(*found.kept, *made).index(letter) for letter in found.result]
    in_turn, apart = axes == sorted(axes), len(made) > 1
    product = group.product(
        "MatMul", [value, matrix], group.output if in_turn and not apart else None
    )
    if apart:
        shape = group.integers(*(0 for _ in found.kept), *(sizes[letter] for letter in made))
        product = group.add("Reshape", [product, shape], group.output if in_turn else None)
    if not in_turn:
        group.moved(product, axes, group.output)
    return True


_FORMS: Mapping[str, Callable[[_Group], bool]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Transpose": _transpose,
}
