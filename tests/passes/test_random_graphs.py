"""Random structured graphs: whatever the plan makes of one, its function stays."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_decompose.graph import unit_layouts
from tests.passes.harness import blocks, check_parity, rewrite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.planning.state_graph import Emit

    Labels = NDArray[np.intp]

DOUBLE = onnx.TensorProto.DOUBLE  # so that sums that cancel cannot hide or feign an error
ACTIVATIONS = ["Relu", "Tanh", "Sigmoid", "Neg", "Identity"]
STEPS = [
    "site",
    "site",
    "site",
    "activation",
    "residual",
    "gate",
    "scale",
    "broadcast",
    "tap",
    "softmax",
]


@dataclasses.dataclass
class Builder:
    """Adds one node after another; every value has component labels for the units of its last axis."""

    rng: np.random.Generator
    batch: tuple[str, ...]
    opset: int
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    tensors: list[onnx.TensorProto] = dataclasses.field(default_factory=list)
    labels: dict[str, Labels] = dataclasses.field(default_factory=dict)
    taps: list[str] = dataclasses.field(default_factory=list)

    def constant(self, values: NDArray[Any]) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(values, np.float64), name))
        return name

    def add(self, op: str, inputs: list[str], labels: Labels, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        node_name = f"n{len(self.nodes)}" if self.rng.random() < 0.7 else ""
        self.nodes.append(helper.make_node(op, inputs, [name], node_name, **attributes))
        self.labels[name] = labels
        return name

    def new_labels(self, groups: int) -> Labels:
        size = int(self.rng.integers(1, 13))
        labels = self.rng.integers(-1 if self.rng.random() < 0.5 else 0, groups, size)
        return np.sort(labels) if self.rng.random() < 0.5 else labels

    def site(self, value: str, labels: Labels) -> str:
        weight = blocks(self.rng, self.labels[value].tolist(), labels.tolist())
        if self.rng.random() < 0.2:
            weight *= self.rng.random(weight.shape) < 0.7
        form = self.rng.choice(["matmul", "bias", "transposed", "gemm"])
        if form == "gemm" and len(self.batch) == 1:
            flipped = int(self.rng.integers(2))
            inputs = [value, self.constant(weight.T if flipped else weight)]
            if self.opset < 11 or self.rng.random() < 0.7:
                inputs.append(self.constant(self.rng.standard_normal(labels.size)))
            factor = float(self.rng.choice([0.5, 1.0]))
            return self.add("Gemm", inputs, labels, transB=flipped, alpha=factor)
        if form == "transposed":
            stored = self.add("Transpose", [self.constant(weight.T)], labels)
            del self.labels[stored]  # no value of the batch
            return self.add("MatMul", [value, stored], labels)
        made = self.add("MatMul", [value, self.constant(weight)], labels)
        if form == "bias":
            bias = self.constant(self.rng.standard_normal(labels.size))
            made = self.add("Add", [made, bias], labels)
        return made

    def activation(self, value: str) -> str:
        return self.add(str(self.rng.choice(ACTIVATIONS)), [value], self.labels[value])

    def residual(self, value: str) -> str:
        labels = self.labels[value]
        alike = [v for v, other in self.labels.items() if other is labels and v != value]
        other = str(self.rng.choice(alike)) if alike else self.site(value, labels)
        return self.add("Add", [value, other], labels)

    def gate(self, value: str) -> str:
        labels = self.labels[value]
        gate = self.add("Sigmoid", [self.site(value, labels)], labels)
        return self.add("Mul", [gate, value], labels)

    def scale(self, value: str) -> str:
        labels = self.labels[value]
        shape = [(), (1,), (labels.size,), (1, labels.size)][self.rng.integers(4)]
        factor = self.constant(self.rng.uniform(0.5, 1, shape))
        return self.add("Mul", [value, factor], labels)

    def broadcast(self, value: str) -> str:
        narrow = self.site(value, np.zeros(1, np.intp))
        return self.add("Mul", [value, narrow], self.labels[value])

    def softmax(self, value: str) -> str:
        return self.add("Softmax", [value], self.labels[value], axis=len(self.batch))

    def tap(self, value: str) -> str:
        self.taps.append(value)
        return value

    def model(self, size: int, output: str) -> onnx.ModelProto:
        outputs = dict.fromkeys([output, *self.taps])
        inputs = [helper.make_tensor_value_info("x", DOUBLE, [*self.batch, size])]
        given = "x" in outputs
        if given:
            outputs["x_out"] = outputs.pop("x")
            self.nodes.append(helper.make_node("Abs", ["x"], ["x_out"]))
            self.labels["x_out"] = self.labels["x"]
        made = [
            helper.make_tensor_value_info(name, DOUBLE, [*self.batch, self.labels[name].size])
            for name in outputs
        ]
        graph = helper.make_graph(self.nodes, "g", inputs, made, self.tensors)
        opset = helper.make_opsetid("", self.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=9),
    groups=st.integers(1, 3),
    axes=st.integers(1, 2),
    opset=st.sampled_from([9, 13, 17]),
    emit=st.sampled_from(["auto", "split", "shrink", "grouped", "triangular"]),
)
def test_the_function_stays(
    seed: int, steps: list[str], groups: int, axes: int, opset: int, emit: Emit
) -> None:
    rng = np.random.default_rng(seed)
    model = random_model(rng, steps, groups, axes, opset)
    result = rewrite(model, emit)
    check_parity(result, rng, tolerance=1e-9)
    check_parity(rewrite(result.proto, emit), rng, tolerance=1e-9)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6),
    groups=st.integers(2, 3),
    axes=st.integers(1, 2),
    opset=st.sampled_from([9, 13, 17]),
)
def test_convolutions_in_groups(
    seed: int, steps: list[str], groups: int, axes: int, opset: int
) -> None:
    """In doubles, which only the standard's reference implementation convolves."""
    rng = np.random.default_rng(seed)
    model = random_model(rng, steps, groups, axes, opset)
    with mock.patch.object(unit_layouts, "_CONVOLVED", {DOUBLE}):
        result = rewrite(model, "grouped", layout="columns")
    check_parity(result, rng, tolerance=1e-9, reference=True)


def random_model(
    rng: np.random.Generator, steps: list[str], groups: int, axes: int, opset: int
) -> onnx.ModelProto:
    builder = Builder(rng, ("B", "T")[:axes], opset)
    value = "x"
    builder.labels[value] = builder.new_labels(groups)
    size = builder.labels[value].size
    for kind in steps:
        if kind == "site":
            value = builder.site(value, builder.new_labels(groups))
        else:
            value = getattr(builder, kind)(value)
    return builder.model(size, value)
