"""Convolutions: their channels are units, and blocks of them become groups, whatever stands between."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from tests.passes.harness import blocks, check_parity, parse, rewrite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.planning.state_graph import Emit

    Labels = NDArray[np.intp]

STEPS = [
    "site",
    "site",
    "activation",
    "normalize",
    "residual",
    "scale",
    "pool",
    "filter",
    "tap",
]


def kernels(
    rng: np.random.Generator, rows: Labels, columns: Labels, kernel: tuple[int, ...]
) -> Any:
    """A convolution's weight, (N, K, kernel), with edges where the labels are equal; -1 has none."""
    taps = int(np.prod(kernel))
    edges = blocks(rng, np.repeat(rows, taps).tolist(), columns.tolist())
    weight = edges.T.reshape(columns.size, rows.size, *kernel)
    # An edge has an entry, but not all of them.
    weight *= rng.random(weight.shape) < 0.8
    return (weight / np.sqrt(taps * rows.size)).astype(np.float32)


@dataclasses.dataclass
class Builder:
    """Adds one node after another; every value has component labels for its channels, and all have one grid."""

    rng: np.random.Generator
    spatial: int
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    tensors: list[onnx.TensorProto] = dataclasses.field(default_factory=list)
    labels: dict[str, Labels] = dataclasses.field(default_factory=dict)
    taps: list[str] = dataclasses.field(default_factory=list)

    def constant(self, values: NDArray[Any]) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
        return name

    def add(self, op: str, inputs: list[str], labels: Labels, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n{name}", **attributes))
        self.labels[name] = labels
        return name

    def site(self, value: str) -> str:
        labels = self.rng.integers(
            -1 if self.rng.random() < 0.3 else 0, 3, self.rng.integers(1, 13)
        )
        size = int(self.rng.choice([1, 3]))
        weight = kernels(self.rng, self.labels[value], labels, (size,) * self.spatial)
        inputs = [value, self.constant(weight)]
        if self.rng.random() < 0.6:
            inputs.append(self.constant(self.rng.standard_normal(labels.size)))
        return self.add("Conv", inputs, labels, pads=[size // 2] * 2 * self.spatial)

    def step(self, kind: str) -> None:
        rng, last = self.rng, self.nodes[-1].output[0] if self.nodes else "x"
        labels = self.labels[last]
        ones = (1,) * self.spatial
        if kind == "site":
            self.site(last)
        elif kind == "activation":
            self.add(str(rng.choice(["Relu", "Tanh", "Sigmoid", "Neg"])), [last], labels)
        elif kind == "normalize":
            held = [rng.uniform(0.5, 1.5, labels.size) for _ in range(4)]
            self.add("BatchNormalization", [last, *map(self.constant, held)], labels)
        elif kind == "residual":
            alike = [n for n, held in self.labels.items() if np.array_equal(held, labels)]
            self.add("Add", [last, str(rng.choice(alike))], labels)
        elif kind == "scale":
            scale = rng.uniform(0.5, 1.5, (labels.size, *ones))
            self.add(str(rng.choice(["Mul", "Add"])), [last, self.constant(scale)], labels)
        elif kind == "pool":
            kernel = [3] * self.spatial
            pads = [1] * 2 * self.spatial
            op = str(rng.choice(["MaxPool", "AveragePool"]))
            self.add(op, [last], labels, kernel_shape=kernel, pads=pads)
        elif kind == "filter" and labels.size > 1:
            weight = rng.uniform(0.5, 1, (labels.size, 1, *(3 for _ in ones))) / 3**self.spatial
            attributes = {"group": labels.size, "pads": [1] * 2 * self.spatial}
            self.add("Conv", [last, self.constant(weight)], labels, **attributes)
        elif kind == "tap":
            self.taps.append(last)

    def model(self) -> onnx.ModelProto:
        last = self.nodes[-1].output[0]
        grid = [4] * self.spatial
        made = [name for name in dict.fromkeys([*self.taps, last]) if name != "x"]

        def value(name: str) -> onnx.ValueInfoProto:
            shape: list[int | str | None] = ["B", self.labels[name].size, *grid]
            return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes, "g", [value("x")], [value(name) for name in made], self.tensors
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spatial=st.sampled_from([1, 2, 2, 3]),
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=8),
    emit=st.sampled_from(["auto", "split", "shrink", "grouped", "triangular"]),
)
def test_the_function_stays(seed: int, spatial: int, steps: list[str], emit: Emit) -> None:
    rng = np.random.default_rng(seed)
    builder = Builder(rng, spatial)
    builder.labels["x"] = rng.integers(0, 3, 9)
    builder.site("x")
    for step in steps:
        builder.step(step)
    result = rewrite(builder.model(), emit)
    check_parity(result, rng, exact=emit != "shared", sizes=(2,), tolerance=2e-5)


CHAIN = """g (float[B, 12, 6, 6] x) => (float[B, 9, 6, 6] y) {
    h = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) n = BatchNormalization(h, s, t, m, v) r = Relu(n)
    p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r) y = Conv(p, w2)
}"""


def chain(rng: np.random.Generator, sizes: tuple[int, ...] = (4, 4, 4)) -> onnx.ModelProto:
    """Blocks of 4 inputs, ``sizes`` channels and 3 outputs, hidden."""
    first, hidden, last = (
        rng.permutation(np.repeat(np.arange(3), counts))
        for counts in ((4,) * 3, sizes, (3,) * 3)
    )
    tensors = {
        "w1": kernels(rng, first, hidden, (3, 3)),
        "w2": kernels(rng, hidden, last, (1, 1)),
        **{
            name: rng.uniform(0.5, 1.5, hidden.size).astype(np.float32)
            for name in ("b1", *"stmv")
        },
    }
    return parse(CHAIN, tensors)


def test_equal_blocks_are_groups_of_one_convolution() -> None:
    rng = np.random.default_rng(0)
    result = rewrite(chain(rng), "grouped")
    assert result.ops == [
        "Gather",
        "Conv",
        "BatchNormalization",
        "Relu",
        "MaxPool",
        "Conv",
        "Gather",
    ]
    convolutions = [node for node in result.proto.graph.node if node.op_type == "Conv"]
    groups = [a.i for node in convolutions for a in node.attribute if a.name == "group"]
    assert groups == [3, 3]
    check_parity(result, rng)


@pytest.mark.parametrize("opset", [*range(7, 26)])
@pytest.mark.parametrize("emit", ["grouped", "split", "triangular"])
def test_every_operator_set(opset: int, emit: Emit) -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], 4))
    tensors = {
        "w": kernels(rng, labels, labels, (3, 3)),
        **{name: rng.uniform(0.5, 1.5, 8).astype(np.float32) for name in "stmv"},
    }
    text = """g (float[B, 8, 5, 5] x) => (float[B, 8, 3, 3] y) {
        a = Conv(x, w) n = BatchNormalization(a, s, t, m, v) y = Relu(n)
    }"""
    result = rewrite(parse(text, tensors, opsets=f'"": {opset}'), emit)
    assert [decision for decision, _ in result.decisions] == [emit]
    check_parity(result, rng)


@pytest.mark.parametrize("sizes", [(2, 4, 6), (1, 1, 10)])
def test_unequal_blocks(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    check_parity(rewrite(chain(rng, sizes), "grouped"), rng)
    result = rewrite(chain(rng, sizes), "split")
    assert result.ops.count("Conv") == 6
    check_parity(result, rng)


def test_one_filter_per_channel_keeps_channels_apart() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 6)[rng.permutation(12)]
    tensors = {
        "w1": kernels(rng, labels, labels, (1, 1)),
        "f": rng.standard_normal((12, 1, 3, 3)).astype(np.float32),
        "w2": kernels(rng, labels, labels, (1, 1)),
    }
    text = """g (float[B, 12, 5, 5] x) => (float[B, 12, 2, 2] y) {
        a = Conv(x, w1) b = Conv <group = 12, strides = [2, 2]> (a, f) c = Relu(b) y = Conv(c, w2)
    }"""
    result = rewrite(parse(text, tensors), "grouped")
    groups = [a.i for n in result.proto.graph.node for a in n.attribute if a.name == "group"]
    assert groups == [2, 12, 2]
    check_parity(result, rng)
    result = rewrite(parse(text, tensors), "split")
    groups = [a.i for n in result.proto.graph.node for a in n.attribute if a.name == "group"]
    assert groups == [6, 6]
    check_parity(result, rng)


def test_permutations_go_into_dense_convolutions_around() -> None:
    """Every constant between is stored in the new order, and nothing is gathered."""
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.repeat([0, 1, 2], 4))
    dense = np.zeros(12, np.intp)
    tensors = {
        "w0": kernels(rng, dense[:3], dense, (3, 3)),
        "w1": kernels(rng, labels, labels, (1, 1)),
        "w2": kernels(rng, dense, dense[:5], (3, 3)),
        **{name: rng.uniform(0.5, 1.5, 12).astype(np.float32) for name in ("b0", *"stmv")},
        "k": rng.uniform(0.5, 1.5, (12, 1, 1)).astype(np.float32),
        "i": rng.uniform(0.5, 1.5, (2, 12)).astype(np.float32)[0],
    }
    text = """g (float[B, 3, 6, 6] x) => (float[B, 5, 4, 4] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0) n = BatchNormalization(a, s, t, m, v)
        o = InstanceNormalization(n, i, i) c = Conv(o, w1) d = Mul(c, k) y = Conv(d, w2)
    }"""
    model = parse(text, tensors)
    assert rewrite(model, "grouped").ops.count("Gather") == 0
    check_parity(rewrite(model, "grouped"), rng)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("a = Conv(x, w) y = LRN <size = 3> (a)", "2, 8, 3, 3"),
        ("a = Conv(x, w) y = Flatten(a)", "2, 72"),
        ("a = Conv(x, w) y = Softmax <axis = 1> (a)", "2, 8, 3, 3"),
        ("a = Conv(x, w) y = Add(a, k)", "2, 8, 3, 3"),
    ],
)
def test_what_couples_channels_is_no_part(text: str, shape: str) -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1], 4)
    model = parse(
        f"g (float[2, 8, 3, 3] x, float[2, 1, 3, 3] k) => (float[{shape}] y) {{ {text} }}",
        {"w": kernels(rng, labels, labels, (1, 1))},
    )
    ((region, plan),) = rewrite(model, "split").plans
    assert region.axis_of.keys() == {"x", "a"}
    assert region.unit_axis == -3
    assert plan.decision == "split"
