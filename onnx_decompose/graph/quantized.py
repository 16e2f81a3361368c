"""Weights that are stored as integers, and the operators that make them what a product reads.

    w_q --DequantizeLinear--> [Transpose, Identity, Cast] --> MatMul, Gemm
    w_q --Cast--> [Sub zero point] --> Mul scale --> [Transpose, ...] --> MatMul, Gemm
    w_q, zero point                                        --> MatMulInteger
    w_q, scale, zero point                                 --> QLinearMatMul

A dependency is absent where the integer is the zero point. Such a weight is taken apart as the integers that it is:
blocks are slices of them, scales and zero points are sliced with them, and the operators that follow are
repeated on the slices. No float that they make is ever stored.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.analysis.grid import Grid
from onnx_decompose.model.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.model.constants import Constants

    Array = NDArray[Any]
    IntArray = NDArray[np.intp]

__all__ = [
    "INTEGER_PRODUCTS",
    "Operand",
    "Quantized",
    "dequantized",
    "find_quantized",
    "grid_of",
    "input_codes",
    "integers",
    "is_integer_line",
    "nothing",
    "weight_position",
]

INTEGER_PRODUCTS = frozenset({"MatMulInteger", "QLinearMatMul"})
"""Operators that read the integers themselves."""

_STORED = {
    *(onnx.TensorProto.INT8, onnx.TensorProto.UINT8),
    *(onnx.TensorProto.INT16, onnx.TensorProto.UINT16),
}
_ZERO_POINTS = {"MatMulInteger": 3, "QLinearMatMul": 5}
_SCALES = {"QLinearMatMul": 4}
_PER_TENSOR = {"QLinearMatMul": (1, 2, 6, 7)}
"""Scales and zero points of what goes in and comes out."""

_STEPS = {"Cast", "DequantizeLinear", "Div", "Identity", "Mul", "Sub", "Transpose"}


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """A constant that has a part in a weight, and where it holds the weight's units.

    Attributes:
        maker: value that the node makes which reads it; empty for the site's own node.
        position: which of that node's inputs it is.
        name: the constant.
        rows: its axis that has the K inputs, negative; None where it has none.
        columns: the same for the N outputs.
    """

    maker: str
    position: int
    name: str
    rows: int | None
    columns: int | None

    def matrix(self, values: Array) -> Array:
        """``values``, in the form of the constant, as what broadcasts to (K, N)."""
        if self.rows is None and self.columns is None:
            return values.reshape(1, 1)
        axes = [axis for axis in (self.rows, self.columns) if axis is not None]
        ordered = values.transpose(
            [axis % values.ndim for axis in (*self._others(values.ndim), *axes)]
        )
        shape = [
            1 if axis is None else values.shape[axis] for axis in (self.rows, self.columns)
        ]
        return ordered.reshape(shape)

    def stored(self, matrix: Array, ndim: int) -> Array:
        """Inverse of :meth:`matrix`, for any rows and columns: as ``ndim`` axes of a constant."""
        shape = [1] * ndim
        for axis, size in zip((self.rows, self.columns), matrix.shape, strict=True):
            if axis is not None:
                shape[axis] = size
        swapped = None not in (self.rows, self.columns) and self.rows > self.columns  # type: ignore[operator]
        return np.ascontiguousarray(matrix.T if swapped else matrix).reshape(shape)

    def units(self, rows: IntArray, columns: IntArray) -> tuple[IntArray, IntArray]:
        """The rows and columns of :meth:`matrix` that belong to some of the inputs and outputs."""
        only = np.zeros(1, np.intp)
        return (
            only if self.rows is None else rows,
            only if self.columns is None else columns,
        )

    def _others(self, ndim: int) -> Iterator[int]:
        taken = {axis for axis in (self.rows, self.columns) if axis is not None}
        return (axis for axis in range(-ndim, 0) if axis not in taken)


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """How a weight is made of stored integers.

    Attributes:
        codes: the integers; they have both axes.
        zero_point: the integer that stands for nothing; None for 0.
        factors: what the difference from it is multiplied with, or divided by.
        made: values of the nodes that make the weight of the integers, in order; none where the site's own operator
            reads the integers.
        shape: (K, N).
        meets_integers: whether the product's input is made of integers too: a runtime multiplies these.
    """

    codes: Operand
    zero_point: Operand | None
    factors: tuple[tuple[Operand, bool], ...]
    made: tuple[str, ...]
    shape: tuple[int, int]
    meets_integers: bool

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The integers, and every constant beside them that has units."""
        others = (self.zero_point, *(factor for factor, _ in self.factors))
        return (
            self.codes,
            *(o for o in others if o is not None and (o.rows, o.columns) != (None, None)),
        )


def weight_position(op_type: str) -> int:
    """Which input of a product is its weight."""
    return 3 if op_type == "QLinearMatMul" else 1


def integers(quantized: Quantized, constants: Constants) -> Array:
    """The integers, (K, N): a view of the stored tensor."""
    return quantized.codes.matrix(constants.array(quantized.codes.name))


def nothing(quantized: Quantized, constants: Constants) -> Array:
    """The integer that stands for nothing, of the type of the integers, as what broadcasts to (K, N)."""
    dtype = integers(quantized, constants).dtype
    if quantized.zero_point is None:
        return np.zeros((1, 1), dtype)
    operand = quantized.zero_point
    return operand.matrix(constants.array(operand.name)).astype(dtype)


def dequantized(
    quantized: Quantized, constants: Constants, codes: Array | None = None
) -> NDArray[np.float32]:
    """What the integers stand for, (K, N), for evidence: a factor that comes after the product is not in it.

    Args:
        quantized: the weight.
        constants: the constants of the graph.
        codes: (K, N) integers in the place of those that are stored.
    """
    stored = integers(quantized, constants) if codes is None else codes
    values = stored.astype(np.float32)
    values -= nothing(quantized, constants).astype(np.float32)
    for operand, divides in quantized.factors:
        factor = operand.matrix(constants.array(operand.name)).astype(np.float32)
        values = values / factor if divides else values * factor
    return values


def grid_of(quantized: Quantized, constants: Constants) -> Grid:
    """The numbers that the integers of a weight can stand for, as of :func:`dequantized`."""
    step = np.ones((1, 1))
    for operand, divides in quantized.factors:
        factor = operand.matrix(constants.array(operand.name)).astype(np.float64)
        step = step / factor if divides else step * factor
    zero = nothing(quantized, constants).astype(np.float64)
    return Grid(step, zero, integers(quantized, constants).dtype)


def input_codes(node: onnx.NodeProto, maker: onnx.NodeProto | None) -> tuple[str, str]:
    """Scale and zero point of the integers that a product of integers reads, where they are known.

    Args:
        node: the product.
        maker: the node that makes its input, if any does.

    Returns:
        Names of values, empty for 1 and 0; both empty for a product of floats.
    """
    if node.op_type == "QLinearMatMul":
        return node.input[1], node.input[2]
    if node.op_type != "MatMulInteger":
        return "", ""
    zero = node.input[2] if len(node.input) > 2 else ""
    if maker is not None and maker.op_type == "DynamicQuantizeLinear":
        return maker.output[1], zero
    return (
        maker.input[1] if maker is not None and maker.op_type == "QuantizeLinear" else "",
        zero,
    )


def is_integer_line(
    name: str, makers: Mapping[str, onnx.NodeProto], constants: Constants
) -> bool:
    """Whether a value is made of a line of stored integers, as the bias of a quantized product is."""
    maker = makers.get(name)
    return (
        maker is not None
        and maker.op_type == "DequantizeLinear"
        and all(operand in constants for operand in maker.input if operand)
        and len(constants[maker.input[0]].shape) == 1
    )


def find_quantized(
    node: onnx.NodeProto,
    makers: Mapping[str, onnx.NodeProto],
    constants: Constants,
) -> Quantized | str | None:
    """How the weight of a product is made of integers.

    Args:
        node: the product.
        makers: the graph's nodes by what they make.
        constants: the constants of the graph.

    Returns:
        That; or why such a weight is left alone; or None where it is not made of integers in a known way.
    """
    try:
        if node.op_type in INTEGER_PRODUCTS:
            return _read_as_they_are(node, constants)
        return _followed(node, makers, constants)
    except _Unknown:
        return None
    except _Refused as refused:
        return str(refused)


class _Unknown(Exception):  # noqa: N818 (an outcome)
    """The weight is made in another way."""


class _Refused(Exception):  # noqa: N818 (an outcome)
    """The weight is made of integers, in a form that is left alone."""


def _read_as_they_are(node: onnx.NodeProto, constants: Constants) -> Quantized:
    name = node.input[weight_position(node.op_type)]
    if name not in constants:
        raise _Unknown
    codes = Operand("", weight_position(node.op_type), name, -2, -1)
    shape = _matrix_shape(codes, constants)

    def per_output(position: int | None) -> Operand | None:
        found = "" if position is None or len(node.input) <= position else node.input[position]
        if not found:
            return None
        if found not in constants:
            raise _Refused(f"the weight's scale or zero point '{found}' is not a constant")
        return _spread(Operand("", position or 0, found, None, -1), constants)

    for position in _PER_TENSOR.get(node.op_type, ()):
        if node.input[position] in constants and any(
            n != 1 for n in constants[node.input[position]].shape
        ):
            raise _Refused(f"'{node.input[position]}' is not one number for the whole tensor")
    zero_point = per_output(_ZERO_POINTS[node.op_type])
    scale = per_output(_SCALES.get(node.op_type))
    factors = () if scale is None else ((scale, False),)
    return Quantized(codes, zero_point, factors, (), shape, meets_integers=True)


def _followed(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], constants: Constants
) -> Quantized:
    """Back from the weight of a product to the stored integers, and forth again."""
    chain: list[onnx.NodeProto] = []
    name = node.input[1]
    while name not in constants:
        maker = makers.get(name)
        if maker is None or maker.op_type not in _STEPS or maker.domain not in {"", "ai.onnx"}:
            raise _Unknown
        chain.insert(0, maker)
        made = [n for n in maker.input if n not in constants]
        name = made[0] if maker.op_type == "Mul" and made else maker.input[0]
    if not chain or constants[name].data_type not in _STORED | _packed_types():
        raise _Unknown
    if constants[name].data_type not in _STORED:
        held = onnx.TensorProto.DataType.Name(constants[name].data_type)
        raise _Refused(f"the weight is stored as {held}, several numbers to a byte")
    flipped = any(a.name == "transB" and a.i for a in node.attribute)
    maker = makers.get(node.input[0])
    meets = maker is not None and maker.op_type == chain[0].op_type == "DequantizeLinear"
    return dataclasses.replace(
        _Forth(chain, name, flipped, constants).result(), meets_integers=meets
    )


def _packed_types() -> set[int]:
    names = ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    return {
        onnx.TensorProto.DataType.Value(name)
        for name in names
        if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118 (an enum wrapper, no mapping)
    }


class _Forth:
    """Goes through the nodes that make a weight of integers, and notes what each constant is in it."""

    def __init__(
        self, chain: Sequence[onnx.NodeProto], codes: str, flipped: bool, constants: Constants
    ) -> None:
        self._chain = chain
        self._constants = constants
        swaps = sum(node.op_type == "Transpose" for node in chain)
        # Whether the values at a step are (N, K).
        self._turned = (swaps % 2 == 1) != flipped
        self._zero_point: Operand | None = None
        self._factors: list[tuple[Operand, bool]] = []
        rows, columns = (-1, -2) if self._turned else (-2, -1)
        position = list(chain[0].input).index(codes)
        self._codes = Operand(chain[0].output[0], position, codes, rows, columns)
        self._shape = _matrix_shape(self._codes, constants)
        self._is_float = False

    def result(self) -> Quantized:
        """What was found."""
        for node in self._chain:
            self._step(node)
        if not self._is_float:
            raise _Unknown
        made = tuple(node.output[0] for node in self._chain)
        factors = tuple(self._factors)
        found = Quantized(
            self._codes, self._zero_point, factors, made, self._shape, meets_integers=False
        )
        _check_nothing(found, self._constants)
        return found

    def _step(self, node: onnx.NodeProto) -> None:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Transpose":
            if list(attributes.get("perm", (1, 0))) != [1, 0]:
                raise _Unknown
            self._turned = not self._turned
        elif node.op_type == "DequantizeLinear":
            self._dequantize(node, attributes)
        elif node.op_type == "Cast":
            if attributes.get("to") not in FLOAT_TYPES:
                raise _Unknown
            self._is_float = True
        elif node.op_type != "Identity":
            self._arithmetic(node)

    def _dequantize(self, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
        if self._is_float or any(n not in self._constants for n in node.input[1:] if n):
            raise _Unknown
        self._is_float = True
        scale = node.input[1]
        if attributes.get("block_size", 0) or len(self._constants[scale].shape) > 1:
            raise _Refused("the weight is quantized in blocks: its scales are no lines of it")
        # Per tensor, or per line along an axis.
        axis = attributes.get("axis", 1)
        place: tuple[int | None, int | None] = (-1, None) if axis in {0, -2} else (None, -1)
        self._factors.append((self._operand(node, 1, scale, place), False))
        if len(node.input) > 2 and node.input[2]:
            self._zero_point = self._operand(node, 2, node.input[2], place)

    def _arithmetic(self, node: onnx.NodeProto) -> None:
        """Sub of a zero point, Mul or Div by a scale."""
        positions = [p for p, name in enumerate(node.input) if name in self._constants]
        if not self._is_float or len(node.input) != 2 or len(positions) != 1:
            raise _Unknown
        (position,) = positions
        name = node.input[position]
        if len(self._constants[name].shape) > 2 or (position == 0 and node.op_type != "Mul"):
            raise _Unknown
        operand = self._operand(node, position, name, (-2, -1))
        if node.op_type != "Sub":
            self._factors.append((operand, node.op_type == "Div"))
        elif self._zero_point is None and not self._factors:
            self._zero_point = operand
        else:
            raise _Unknown

    def _operand(
        self,
        node: onnx.NodeProto,
        position: int,
        name: str,
        place: tuple[int | None, int | None],
    ) -> Operand:
        """A constant whose axes ``place`` lie along the two of the values at this step."""
        rows, columns = place[::-1] if self._turned else place
        return _spread(Operand(node.output[0], position, name, rows, columns), self._constants)


def _spread(operand: Operand, constants: Constants) -> Operand:
    """``operand`` without axes that it does not have, or along which one number is for all."""
    shape = constants[operand.name].shape

    def held(axis: int | None) -> int | None:
        return None if axis is None or len(shape) < -axis or shape[axis] == 1 else axis

    return dataclasses.replace(operand, rows=held(operand.rows), columns=held(operand.columns))


def _matrix_shape(codes: Operand, constants: Constants) -> tuple[int, int]:
    constant = constants[codes.name]
    if constant.data_type not in _STORED:
        held = onnx.TensorProto.DataType.Name(constant.data_type)
        raise _Refused(f"the weight is {held}, not an integer of 8 or 16 bits")
    if len(constant.shape) != 2:
        raise _Refused(f"the weight has {len(constant.shape)} axes, not 2")
    if 0 in constant.shape:
        raise _Refused("the weight is empty")
    assert codes.rows is not None
    assert codes.columns is not None
    return constant.shape[codes.rows], constant.shape[codes.columns]


def _check_nothing(quantized: Quantized, constants: Constants) -> None:
    """A zero point must be a number that the integers can be.

    Raises:
        _Refused: it is not.
    """
    if quantized.zero_point is None:
        return
    values = constants.array(quantized.zero_point.name)
    limits = np.iinfo(integers(quantized, constants).dtype)
    inside = (values >= limits.min) & (values <= limits.max)
    if not (inside & (values == np.round(values.astype(np.float64)))).all():
        raise _Refused("the weight's zero point is not one of the numbers that are stored")
