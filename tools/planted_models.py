"""Models whose structure is known because it was planted: what the benchmark suite runs on.

Every builder hides its blocks by permutations of inputs, hidden units and outputs, unless told otherwise, and states
the truth: the block of every unit, by the name of a value that has those units.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    IntArray = NDArray[np.intp]
    Mask = NDArray[np.bool_]

Structure = Literal["blocks", "cascade", "band", "triangular", "none"]

OPSET = 17
TIME = 16
"""Steps of the recurrent models."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PlantedModel:
    """A model and the truth about it.

    Attributes:
        model: input ``x``, output ``y``, the batch axis is called ``batch``.
        structure: what was planted: independent blocks, strongly connected components in cascade, a band, a block
            triangular form, or nothing.
        truth: value name -> component of each of its units, or strongly connected component in a cascade, where the
            model's graph says which that is; empty where no region of sites has it (recurrent operators).
        weights: entries of the weights.
        planted: those of them inside the planted structure.
    """

    model: onnx.ModelProto
    structure: Structure
    truth: Mapping[str, IntArray]
    weights: int
    planted: int

    @property
    def ideal(self) -> float:
        """Speed-up if time were proportional to the weights."""
        return self.weights / self.planted


class _Builder:
    """Collects nodes and initializers, and counts weights."""

    def __init__(self, dtype: type[np.floating[Any]], rng: np.random.Generator) -> None:
        self._dtype = dtype
        self._rng = rng
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []
        self.weights = self.planted = 0

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node named as its output."""
        self._nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add an initializer of the model's type."""
        stored = np.ascontiguousarray(values, self._dtype)
        self._tensors.append(numpy_helper.from_array(stored, name))
        return name

    def weight(self, name: str, mask: Mask) -> str:
        """Add a weight with normal entries where ``mask``, (..., K, N), is true, scaled to keep variances."""
        fan_in = max(mask.sum(axis=-2).mean(), 1.0)
        values = np.where(mask, self._rng.standard_normal(mask.shape) / np.sqrt(fan_in), 0.0)
        # A drawn zero would be a hole in the truth; float16 has them.
        stored = values.astype(self._dtype)
        stored[mask & (stored == 0)] = 1e-3
        self.weights += mask.size
        self.planted += int(mask.sum())
        return self.constant(name, stored)

    def linear(
        self, value: str, name: str, mask: Mask, output: str, *, bias: bool = True
    ) -> str:
        """``output = value @ weight + bias``."""
        product = f"{name}.product" if bias else output
        self.node("MatMul", [value, self.weight(f"{name}.weight", mask)], product)
        if bias:
            shift = self._rng.normal(0, 0.1, (mask.shape[1],))
            self.node("Add", [product, self.constant(f"{name}.bias", shift)], output)
        return output

    def convolution(
        self, value: str, name: str, mask: Mask, output: str, *, kernel: int
    ) -> str:
        """``output``, a convolution of as many positions, with edges between channels where ``mask`` is true."""
        taps = kernel**2
        stored = self.weight(f"{name}.weight", np.repeat(mask, taps, axis=0))
        values = numpy_helper.to_array(self._tensors.pop())
        shaped = values.T.reshape(mask.shape[1], mask.shape[0], kernel, kernel)
        self.constant(stored, shaped)
        shift = self._rng.normal(0, 0.1, (mask.shape[1],))
        inputs = [value, stored, self.constant(f"{name}.bias", shift)]
        return self.node("Conv", inputs, output, pads=[kernel // 2] * 4)

    def finish(
        self,
        structure: Structure,
        truth: Mapping[str, IntArray],
        shape: Sequence[str | int],
        outputs: Sequence[str | int],
    ) -> PlantedModel:
        """The model with input ``x`` of ``shape`` and output ``y`` of shape ``outputs``."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self._dtype))
        graph = helper.make_graph(
            self._nodes,
            "planted",
            [helper.make_tensor_value_info("x", element, list(shape))],
            [helper.make_tensor_value_info("y", element, list(outputs))],
            self._tensors,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return PlantedModel(model, structure, truth, self.weights, self.planted)


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """How units are divided.

    Attributes:
        count: number of blocks.
        equal: whether all are of one size; else they grow by equal steps, the last about seven times the first.
        shuffle: hide them by permutations.
        cascade: block b is read by the blocks b, b + 1, ..., and not by itself alone.
    """

    count: int
    equal: bool = True
    shuffle: bool = True
    cascade: bool = False

    def mask(self, rows: IntArray, columns: IntArray) -> Mask:
        """Which entries a weight has between units with these labels, (K, N)."""
        inside: Mask = rows[:, None] <= columns if self.cascade else rows[:, None] == columns
        return inside

    @property
    def structure(self) -> Structure:
        """What such blocks are."""
        return "cascade" if self.cascade else "blocks"

    def labels(self, units: int, rng: np.random.Generator) -> IntArray:
        """The block of each of ``units`` units; every block has at least one."""
        share = np.ones(self.count) if self.equal else np.linspace(1, 7, self.count)
        ends = np.round(np.cumsum(share) / share.sum() * units).astype(int)
        labels = np.repeat(np.arange(self.count), np.diff(ends, prepend=0))
        return rng.permutation(labels) if self.shuffle else labels


def matmul(
    sizes: tuple[int, int],
    blocks: Blocks,
    dtype: type[np.floating[Any]],
    rng: np.random.Generator,
) -> PlantedModel:
    """One MatMul of ``sizes`` = (K, N)."""
    build = _Builder(dtype, rng)
    rows, columns = (blocks.labels(size, rng) for size in sizes)
    build.linear("x", "site", blocks.mask(rows, columns), "y", bias=False)
    return build.finish(
        "blocks", {"x": rows, "y": columns}, ("batch", sizes[0]), ("batch", sizes[1])
    )


def square(
    size: int, blocks: Blocks, dtype: type[np.floating[Any]], rng: np.random.Generator
) -> PlantedModel:
    """One MatMul whose inputs and outputs are the same units; no unit reads itself."""
    build = _Builder(dtype, rng)
    labels = blocks.labels(size, rng)
    mask = blocks.mask(labels, labels) & ~np.eye(size, dtype=bool)
    build.linear("x", "site", mask, "y", bias=False)
    truth = {"x": labels, "y": labels}
    return build.finish(blocks.structure, truth, ("batch", size), ("batch", size))


def ffn(
    sizes: tuple[int, int, int],
    blocks: Blocks,
    dtype: type[np.floating[Any]],
    rng: np.random.Generator,
) -> PlantedModel:
    """A feed-forward network, relu(x W_up + b_up) W_down + b_down."""
    build = _Builder(dtype, rng)
    inner, hidden, outer = (blocks.labels(size, rng) for size in sizes)
    build.linear("x", "up", blocks.mask(inner, hidden), "up.sum")
    build.node("Relu", ["up.sum"], "hidden")
    build.linear("hidden", "down", blocks.mask(hidden, outer), "y")
    truth = {"x": inner, "hidden": hidden, "y": outer}
    return build.finish(blocks.structure, truth, ("batch", sizes[0]), ("batch", sizes[2]))


def gated_ffn(
    sizes: tuple[int, int],
    blocks: Blocks,
    dtype: type[np.floating[Any]],
    rng: np.random.Generator,
) -> PlantedModel:
    """SwiGLU, (silu(x W_gate) * x W_up) W_down, with ``sizes`` = (width, hidden)."""
    build = _Builder(dtype, rng)
    inner, hidden, outer = (blocks.labels(sizes[axis], rng) for axis in (0, 1, 0))
    build.linear("x", "gate", blocks.mask(inner, hidden), "gate.sum", bias=False)
    build.node("Sigmoid", ["gate.sum"], "gate.sigmoid")
    build.node("Mul", ["gate.sum", "gate.sigmoid"], "gate.active")
    build.linear("x", "up", blocks.mask(inner, hidden), "up.sum", bias=False)
    build.node("Mul", ["gate.active", "up.sum"], "hidden")
    build.linear("hidden", "down", blocks.mask(hidden, outer), "y", bias=False)
    truth = {"x": inner, "hidden": hidden, "y": outer}
    return build.finish("blocks", truth, ("batch", sizes[0]), ("batch", sizes[0]))


def bottleneck(
    sizes: tuple[int, int, int],
    blocks: Blocks,
    dtype: type[np.floating[Any]],
    rng: np.random.Generator,
) -> PlantedModel:
    """Convolutions 1x1, 3x3 and 1x1 with ReLU between; ``sizes`` = (channels, channels inside, positions a side)."""
    build = _Builder(dtype, rng)
    width, inside, side = sizes
    labels = [blocks.labels(size, rng) for size in (width, inside, inside, width)]
    values = ["x", "reduced", "filtered", "y"]
    for number, (kernel, rows, columns) in enumerate(
        zip((1, 3, 1), labels[:-1], labels[1:], strict=True)
    ):
        made = values[number + 1]
        output = made if number == 2 else f"{made}.sum"
        mask = blocks.mask(rows, columns)
        build.convolution(values[number], f"site{number}", mask, output, kernel=kernel)
        if number < 2:
            build.node("Relu", [output], made)
    truth = dict(zip(values, labels, strict=True))
    shape = ("batch", width, side, side)
    return build.finish("blocks", truth, shape, shape)


def residual_stack(
    sizes: tuple[int, int],
    blocks: Blocks,
    dtype: type[np.floating[Any]],
    rng: np.random.Generator,
    *,
    depth: int = 4,
) -> PlantedModel:
    """``depth`` blocks x + relu(x W_up + b) W_down that share one state; ``sizes`` = (width, hidden).

    In a cascade the first and the last weight of every block let each group of units through to itself and later ones.
    """
    build = _Builder(dtype, rng)
    state = blocks.labels(sizes[0], rng)
    truth = {"x": state}
    value = "x"
    for number in range(depth):
        hidden = blocks.labels(sizes[1], rng)
        name = f"layer{number}"
        build.linear(value, f"{name}.up", blocks.mask(state, hidden), f"{name}.sum")
        build.node("Relu", [f"{name}.sum"], f"{name}.hidden")
        build.linear(
            f"{name}.hidden",
            f"{name}.down",
            blocks.mask(hidden, state),
            f"{name}.change",
            bias=False,
        )
        output = "y" if number == depth - 1 else f"{name}.state"
        value = build.node("Add", [value, f"{name}.change"], output)
        truth[f"{name}.hidden"] = hidden
    return build.finish(blocks.structure, truth, ("batch", sizes[0]), ("batch", sizes[0]))


def recurrent(
    op: Literal["LSTM", "GRU"],
    sizes: tuple[int, int],
    blocks: Blocks,
    dtype: type[np.floating[Any]],
    rng: np.random.Generator,
) -> PlantedModel:
    """A recurrent operator whose hidden units are strongly connected components in cascade.

    Block b of the hidden state is read by the blocks b, b + 1, ..., and the first block alone reads the inputs.
    ``sizes`` = (inputs, hidden units).
    """
    build = _Builder(dtype, rng)
    gates = {"LSTM": 4, "GRU": 3}[op]
    inputs, hidden = sizes
    labels = blocks.labels(hidden, rng)
    # ONNX keeps both as (directions, gates * hidden, K): the transpose of a site's (K, N).
    first = np.broadcast_to(labels == 0, (inputs, hidden))
    later = labels[:, None] <= labels[None, :]
    names = [
        build.weight(name, np.tile(mask, (1, gates)).T[None])
        for name, mask in (("W", first), ("R", later))
    ]
    bias = build.constant("B", rng.normal(0, 0.1, (1, 2 * gates * hidden)))
    build.node(op, ["x", *names, bias], "y", hidden_size=hidden)
    shape = (TIME, "batch", inputs)
    return build.finish("cascade", {}, shape, (TIME, 1, "batch", hidden))


def banded(
    size: int, half_width: int, dtype: type[np.floating[Any]], rng: np.random.Generator
) -> PlantedModel:
    """One MatMul whose entries lie within ``half_width`` of the diagonal: one component, in sight."""
    build = _Builder(dtype, rng)
    units = np.arange(size)
    build.linear("x", "site", abs(units[:, None] - units) <= half_width, "y", bias=False)
    one = np.zeros(size, np.intp)
    return build.finish("band", {"x": one, "y": one}, ("batch", size), ("batch", size))


def block_triangular(
    size: int, blocks: Blocks, dtype: type[np.floating[Any]], rng: np.random.Generator
) -> PlantedModel:
    """One MatMul in which output block b reads the input blocks 0 to b: one component."""
    build = _Builder(dtype, rng)
    rows, columns = blocks.labels(size, rng), blocks.labels(size, rng)
    build.linear("x", "site", rows[:, None] <= columns, "y", bias=False)
    one = np.zeros(size, np.intp)
    return build.finish("triangular", {"x": one, "y": one}, ("batch", size), ("batch", size))


def control(
    sizes: tuple[int, int, int],
    density: float,
    dtype: type[np.floating[Any]],
    rng: np.random.Generator,
) -> PlantedModel:
    """An FFN whose entries are there at random: one component, nothing to find."""
    build = _Builder(dtype, rng)
    up, down = (rng.random(shape) < density for shape in (sizes[:2], sizes[1:]))
    build.linear("x", "up", up, "up.sum")
    build.node("Relu", ["up.sum"], "hidden")
    build.linear("hidden", "down", down, "y")
    names = dict(zip(("x", "hidden", "y"), sizes, strict=True))
    truth = {name: np.zeros(size, np.intp) for name, size in names.items()}
    return build.finish("none", truth, ("batch", sizes[0]), ("batch", sizes[2]))
