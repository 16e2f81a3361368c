"""The planted network with weights of integers, in the forms that exporters and quantizers give them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.planted import SITES, array_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Coding:
    """How a weight is quantized.

    Attributes:
        lines: 0 for a scale and zero point per input, 1 per output, None for one of each.
        dtype: of the integers.
        zero: the zero points are drawn from so far around the middle of the type.
    """

    lines: int | None = None
    dtype: type[np.integer[Any]] = np.int8
    zero: int = 0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A quantized weight: integers (K, N), scale and zero point of one number, (K,) or (N,)."""

    values: Array
    scale: Array
    zero_point: Array
    lines: int | None

    def across(self, line: Array) -> Array:
        """A scale or zero point as what broadcasts to (K, N)."""
        return line[:, None] if self.lines == 0 else line

    @property
    def floats(self) -> Array:
        difference = self.values.astype(np.float32) - self.across(self.zero_point).astype(
            np.float32
        )
        return difference * self.across(self.scale)


def quantize(weight: Array, coding: Coding, rng: np.random.Generator) -> Codes:
    """Zero is the zero point, and nothing else is."""
    shape = () if coding.lines is None else (weight.shape[coding.lines],)
    limits = np.iinfo(coding.dtype)
    middle = (limits.max + limits.min + 1) // 2
    zero = middle + rng.integers(-coding.zero, coding.zero + 1, shape)
    scale = rng.uniform(0.008, 0.012, shape).astype(np.float32)
    plain = Codes(weight, scale, zero, coding.lines)
    steps = np.round(weight / plain.across(np.asarray(scale)))
    steps = np.where((steps == 0) & (weight != 0), 1, steps)
    values = np.clip(steps + plain.across(np.asarray(zero)), limits.min, limits.max)
    stored = values.astype(coding.dtype)
    moved = (stored == plain.across(np.asarray(zero))) & (weight != 0)
    assert not moved.any()
    return Codes(stored, scale, np.asarray(zero).astype(coding.dtype), coding.lines)


class Writer:
    """Collects the nodes and tensors of a network x -> y."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: list[str], output: str, name: str = "", **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name or output, **attrs))
        return output

    def store(self, name: str, values: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def scalar(self, name: str, value: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def codes(self, site: str, codes: Codes, *, turned: bool = False) -> list[str]:
        """Stores integers, scale and zero point."""
        values = codes.values.T if turned else codes.values
        self.store(f"{site}.weight", values)
        self.scalar(f"{site}.scale", codes.scale)
        self.scalar(f"{site}.zero", codes.zero_point)
        return [f"{site}.weight", f"{site}.scale", f"{site}.zero"]

    def rounded(self, value: str, scale: float, zero: int, name: str) -> str:
        """Through a pair of quantizers."""
        codes = self.coded(value, scale, zero, name)
        return self.add("DequantizeLinear", [codes, f"{name}.s", f"{name}.z"], f"{name}.d")

    def coded(self, value: str, scale: float, zero: int, name: str) -> str:
        """As integers."""
        pair = [
            self.scalar(f"{name}.s", np.float32(scale)),
            self.scalar(f"{name}.z", np.uint8(zero)),
        ]
        return self.add("QuantizeLinear", [value, *pair], f"{name}.q")


Product = "Callable[[Writer, str, str, Codes, Array, str], str]"


def qdq(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """Integers on both sides of a MatMul, its result quantized before the bias."""
    x = w.rounded(x, 0.05, 120, f"{site}.in")
    axis = 1 if codes.lines is None else codes.lines
    weight = w.add("DequantizeLinear", w.codes(site, codes), f"{site}.w", axis=axis)
    product = w.add("MatMul", [x, weight], f"{site}.product", site)
    product = w.rounded(product, 0.06, 130, f"{site}.out")
    return w.add("Add", [product, w.store(f"{site}.bias", bias)], output)


def qdq_codes(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """Everything is quantized, the constant of the Add too."""
    x = w.rounded(x, 0.05, 120, f"{site}.in")
    axis = 1 if codes.lines is None else codes.lines
    weight = w.add("DequantizeLinear", w.codes(site, codes), f"{site}.w", axis=axis)
    product = w.add("MatMul", [x, weight], f"{site}.product", site)
    product = w.rounded(product, 0.06, 130, f"{site}.out")
    stored = np.clip(np.round(bias / 0.04) + 128, 0, 255).astype(np.uint8)
    parts = [w.store(f"{site}.bias", stored), w.scalar(f"{site}.bias.s", np.float32(0.04))]
    parts.append(w.scalar(f"{site}.bias.z", np.uint8(128)))
    return w.add("Add", [product, w.add("DequantizeLinear", parts, f"{site}.b")], output)


def bare(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """Nothing is added."""
    del bias
    x = w.rounded(x, 0.05, 120, f"{site}.in")
    axis = 1 if codes.lines is None else codes.lines
    weight = w.add("DequantizeLinear", w.codes(site, codes), f"{site}.w", axis=axis)
    product = w.add("MatMul", [x, weight], f"{site}.product", site)
    return w.add("Identity", [w.rounded(product, 0.06, 130, f"{site}.out")], output)


def qdq_gemm(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """A Gemm with a transposed weight and a bias of integers of 32 bits."""
    x = w.rounded(x, 0.05, 120, f"{site}.in")
    names = w.codes(site, codes, turned=True)
    axis = 0 if codes.lines is None else 1 - codes.lines
    weight = w.add("DequantizeLinear", names, f"{site}.w", axis=axis)
    step = np.float32(0.05) * codes.scale
    stored = np.round(bias / step).astype(np.int32)
    parts = [w.store(f"{site}.bias", stored), w.scalar(f"{site}.bias.scale", step)]
    added = w.add("DequantizeLinear", parts, f"{site}.b", axis=0)
    made = w.add("Gemm", [x, weight, added], f"{site}.product", site, transB=1)
    return w.add("Identity", [w.rounded(made, 0.06, 130, f"{site}.out")], output)


def turned(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """The weight alone is quantized, and transposed after it is made of integers."""
    names = w.codes(site, codes, turned=True)
    axis = 1 if codes.lines is None else 1 - codes.lines
    made = w.add("DequantizeLinear", names, f"{site}.w", axis=axis)
    weight = w.add("Transpose", [made], f"{site}.t", perm=[1, 0])
    product = w.add("MatMul", [x, weight], f"{site}.product", site)
    return w.add("Add", [product, w.store(f"{site}.bias", bias)], output)


def cast_and_mul(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """Cast, minus the zero point, times the scale: no operator for quantization at all."""
    w.store(f"{site}.weight", codes.values)
    w.store(f"{site}.zero", np.atleast_1d(codes.across(codes.zero_point)).astype(np.float32))
    w.store(f"{site}.scale", np.atleast_2d(codes.across(codes.scale)))
    value = w.add("Cast", [f"{site}.weight"], f"{site}.f", to=TensorProto.FLOAT)
    value = w.add("Sub", [value, f"{site}.zero"], f"{site}.c")
    weight = w.add("Mul", [f"{site}.scale", value], f"{site}.w")
    product = w.add("MatMul", [x, weight], f"{site}.product", site)
    return w.add("Add", [product, w.store(f"{site}.bias", bias)], output)


def dynamic(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """The input is quantized as it comes, and the product of integers is scaled after it."""
    w.codes(site, codes)
    quantized = [f"{site}.q", f"{site}.qs", f"{site}.qz"]
    w.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], quantized, f"{site}.dynamic"))
    inputs = [quantized[0], f"{site}.weight", quantized[2], f"{site}.zero"]
    whole = w.add("MatMulInteger", inputs, f"{site}.whole", site)
    value = w.add("Cast", [whole], f"{site}.f", to=TensorProto.FLOAT)
    scale = w.add("Mul", [quantized[1], f"{site}.scale"], f"{site}.factor")
    product = w.add("Mul", [value, scale], f"{site}.product")
    return w.add("Add", [product, w.store(f"{site}.bias", bias)], output)


def qlinear(w: Writer, site: str, x: str, codes: Codes, bias: Array, output: str) -> str:
    """Integers in and out of one operator."""
    w.coded(x, 0.05, 120, f"{site}.in")
    names = w.codes(site, codes)
    out = [w.scalar(f"{site}.y.s", np.float32(0.06)), w.scalar(f"{site}.y.z", np.uint8(130))]
    inputs = [f"{site}.in.q", f"{site}.in.s", f"{site}.in.z", *names, *out]
    whole = w.add("QLinearMatMul", inputs, f"{site}.whole", site)
    product = w.add("DequantizeLinear", [whole, *out], f"{site}.product")
    return w.add("Add", [product, w.store(f"{site}.bias", bias)], output)


def quantized_network(
    model: onnx.ModelProto,
    product: Callable[[Writer, str, str, Codes, Array, str], str],
    coding: Coding,
    rng: np.random.Generator,
    opset: int = 17,
) -> onnx.ModelProto:
    """The network of ``plant`` with quantized weights."""
    writer, value = Writer(), "x"
    sizes: list[int] = []
    for site in SITES:
        weight, bias = array_of(model, f"{site}.weight"), array_of(model, f"{site}.bias")
        sizes.extend(weight.shape)
        output = "y" if site == SITES[-1] else f"{site}.sum"
        value = product(writer, site, value, quantize(weight, coding, rng), bias, output)
        if output != "y":
            value = writer.add("Relu", [value], f"{site}.active")
    graph = helper.make_graph(
        writer.nodes,
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", sizes[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", sizes[-1]])],
        writer.tensors,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
