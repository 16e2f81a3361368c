"""Where the constant is that is added to a product with a weight of integers, and in which form it is stored.

    Gemm's third input <--DequantizeLinear-- integers
    product --[QuantizeLinear, DequantizeLinear, Cast, Mul by scales]--> Add <-- floats, or as above

Nothing else about the graph changes: the constant is replaced, at the node that reads it, by another of its type. An
Add that is not there is not put there, as a runtime would no longer see the quantized product as one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx

from onnx_decompose.analysis.grid import Grid
from onnx_decompose.graph.per_unit import constant_units, leads_with_ones
from onnx_decompose.graph.quantized import input_codes, is_integer_line
from onnx_decompose.graph.sites import attribute_values, is_standard
from onnx_decompose.model.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants

    FloatArray = NDArray[np.float64]

__all__ = ["IntegerBias", "find_integer_bias"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class IntegerBias:
    """A constant that is added, in floats, to ``alpha * x W``: times ``beta`` it is the bias.

    Attributes:
        nodes: indices of the nodes that belong to it: what reads the constant, and where it is of integers and not
            inside the site, the Add.
        position: which input of the first of ``nodes`` the constant is.
        constant: its name.
        alpha: (1,) or (N,) what the product x W is multiplied with before.
        beta: factor of the bias.
        values: (N,) what is added now, without ``beta``.
        grid: of the integers, (1, N); None where floats are stored.
        dtype: of what is stored.
        axes: axes of size 1 before the units in the stored constant.
    """

    nodes: tuple[int, ...]
    position: int
    constant: str
    alpha: FloatArray
    beta: float
    values: FloatArray
    grid: Grid | None
    dtype: np.dtype[Any]
    axes: int


class _Lines:
    """Constants with an entry for each unit, or one for all, as floats or as a line of integers."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        constants: Constants,
        readers: Mapping[str, set[int]],
        units: int,
    ) -> None:
        self._graph, self._constants, self._readers = graph, constants, readers
        self._units = units
        self._makers = {name: i for i, node in enumerate(graph.node) for name in node.output}

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value."""
        return self._graph.node[self._makers[name]] if name in self._makers else None

    def floats(self, name: str) -> FloatArray | None:
        """(N,) or (1,) the constant ``name``, if it is one number per unit, or one for all."""
        constants = self._constants
        if name not in constants or constants[name].data_type not in FLOAT_TYPES:
            return None
        held = constant_units(constants, name, -1)
        if held not in {1, self._units} or not leads_with_ones(constants, name, -1):
            return None
        return constants.array(name).reshape(-1).astype(np.float64)

    def leaves_room(self, node: onnx.NodeProto) -> bool:
        """Whether a QuantizeLinear has numbers on both sides of zero: with none on one, it stands for a Relu too."""
        name = node.input[2] if len(node.input) > 2 else ""
        if name not in self._constants:
            return False
        zero = self._constants.array(name)
        try:
            # Of 4 bits too, which numpy does not know.
            limits = ml_dtypes.iinfo(zero.dtype)  # type: ignore[no-untyped-call]
        except ValueError:  # 8 bits of floats
            return False
        return bool(((zero > limits.min) & (zero < limits.max)).all())

    def bias(
        self, index: int, position: int, alpha: FloatArray, beta: float
    ) -> IntegerBias | None:
        """The constant behind an input of the node of that index."""
        name = self._graph.node[index].input[position]
        row = self.floats(name)
        if row is not None:
            found = self._constants[name]
            values = np.broadcast_to(row, self._units)
            dtype, axes = _dtype(found.data_type), max(len(found.shape) - 1, 0)
            return IntegerBias((index,), position, name, alpha, beta, values, None, dtype, axes)
        maker = self.maker(name)
        makers = {} if maker is None else {name: maker}
        if not is_integer_line(name, makers, self._constants) or maker is None:
            return None
        if self._readers.get(name) != {index}:
            return None  # another reader's bias would change with it
        codes, grid = self._constants.array(maker.input[0]), self._grid(maker)
        if codes.shape != (self._units,) or grid is None:
            return None
        adds = self._graph.node[index].op_type == "Add"
        nodes = (self._makers[name], index) if adds else (self._makers[name],)
        values = grid.values(codes[None])[0]
        return IntegerBias(nodes, 0, maker.input[0], alpha, beta, values, grid, codes.dtype, 0)

    def _grid(self, node: onnx.NodeProto) -> Grid | None:
        """What integers that a DequantizeLinear reads stand for, a row of them."""
        lines = [
            self._constants.array(name).reshape(1, -1).astype(np.float64)
            for name in node.input[1:]
            if name
        ]
        if any(line.size not in {1, self._units} for line in lines):
            return None
        zero = lines[1] if len(lines) > 1 else np.zeros((1, 1))
        stored = self._constants[node.input[0]].data_type
        return Grid(lines[0], zero, _dtype(stored)) if (lines[0] != 0).all() else None


def find_integer_bias(
    graph: onnx.GraphProto,
    site: Site,
    constants: Constants,
    readers: Mapping[str, set[int]],
) -> IntegerBias | None:
    """The constant that is added to the product of ``site``, whose weight is of integers; None where there is none.

    Args:
        graph: the main graph.
        site: a site of it.
        constants: its constants.
        readers: its nodes by what they read (``regions.value_readers``).
    """
    lines = _Lines(graph, constants, readers, site.shape[1])
    node = graph.node[site.node]
    attributes = attribute_values(node) if site.op_type == "Gemm" else {}
    alpha = np.full(1, attributes.get("alpha", 1.0))
    if site.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        beta = attributes.get("beta", 1.0)
        return lines.bias(site.node, 2, alpha, beta) if alpha.all() and beta else None
    scale, _ = input_codes(node, lines.maker(site.input))
    scaled = site.op_type != "MatMulInteger"  # by the scale of the input
    value = site.output
    while True:
        (index, *others) = readers.get(value, {-1})
        if index < 0 or others or not is_standard(graph.node[index]):
            return None
        after = graph.node[index]
        if after.op_type == "Add" and list(after.input).count(value) == 1:
            position = 1 - list(after.input).index(value)
            ready = scaled and alpha.all()
            return lines.bias(index, position, alpha, 1.0) if ready else None
        passed = _passed(lines, after, value, "" if scaled else scale)
        if passed is None:
            return None
        alpha, scaled = alpha * passed.factor, scaled or passed.scaled
        value = after.output[0]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Passed:
    """What a node multiplies a value with.

    Attributes:
        factor: (1,) or (N,), constants.
        scaled: whether by the scale of the product's input too.
    """

    factor: FloatArray
    scaled: bool = False


def _passed(lines: _Lines, node: onnx.NodeProto, value: str, scale: str) -> _Passed | None:
    """What ``node`` multiplies ``value`` with; None where a constant after it is not one before it, up to a factor."""
    if node.op_type in {"Cast", "DequantizeLinear"} or (
        node.op_type == "QuantizeLinear" and lines.leaves_room(node)
    ):
        return _Passed(np.ones(1))
    if node.op_type != "Mul" or list(node.input).count(value) != 1:
        return None
    (name,) = (name for name in node.input if name != value)
    row = lines.floats(name)
    if row is None and scale:
        row = _beside(lines, name, scale)
        return None if row is None else _Passed(row, scaled=True)
    return None if row is None else _Passed(row)


def _beside(lines: _Lines, name: str, scale: str) -> FloatArray | None:
    """What a value is made of beside ``scale``: constants that it is multiplied with."""
    if name == scale:
        return np.ones(1)
    maker = lines.maker(name)
    if maker is None or maker.op_type != "Mul" or scale not in maker.input:
        return None
    others = [other for other in maker.input if other != scale]
    return lines.floats(others[0]) if len(others) == 1 else None


def _dtype(data_type: int) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(data_type)
