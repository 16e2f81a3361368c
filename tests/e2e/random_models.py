"""Small whole models that mix what trained ones have: every form of a weight, a bias and a structure, side by side."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decompose.analysis.recurrence import GATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Labels = NDArray[np.intp]

NOISE = 0.02
"""Standard deviation of what stands where a trained entry does not."""

_STEPS = (
    *("site",) * 6,
    *("normalized",) * 2,
    *("activation",) * 3,
    *("affine", "affine", "residual", "residual", "gate", "branch", "scalar", "broadcast"),
    *("tap", "softmax", "normalization", "mean", "reshape", "flip", "repeat", "shape"),
    *("recurrent", "recurrent", "positions", "capture", "half"),
    *("convolution", "convolution", "integers"),
)
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "Relu": {},
    "Tanh": {},
    "Sigmoid": {},
    "Neg": {},
    "Abs": {},
    "Identity": {},
    "LeakyRelu": {"alpha": 0.1},
    "Elu": {},
    "HardSigmoid": {},
    "Softplus": {},
    "Exp": {},
    "Cos": {},
}
_FORMS = ("matmul", "bias", "bias", "gemm", "gemm")
_PLACES = (*("",) * 8, "function", "branch", "loop", "scan")
_NARROW = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_TYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What a model is made of.

    Attributes:
        seed: of everything random.
        steps: how many operators, about.
        groups: blocks that the weights have.
        rank: axes of the input.
        opset: operator set version.
        dtype: of all floats.
        noise: where blocks have no entries: 0, or the deviation of normal numbers.
        embedded: token numbers come in, and are looked up.
        inside: what all nodes are in: nothing but the main graph, a "function", or the body of a "branch", a "loop" or
            a "scan".
        siblings: what one site would read, several do.
    """

    seed: int
    steps: int = 6
    groups: int = 2
    rank: int = 2
    opset: int = 17
    dtype: str = "float32"
    noise: float = 0.0
    embedded: bool = False
    inside: str = ""
    siblings: bool = False

    @classmethod
    def drawn(cls, seed: int, noise: float = 0.0) -> Recipe:
        """Any recipe."""
        rng = np.random.default_rng(seed)
        return cls(
            seed,
            steps=int(rng.integers(2, 13)),
            groups=int(rng.choice([1, 2, 2, 3, 3])),
            rank=int(rng.choice([2, 2, 3, 3, 4])),
            opset=int(rng.choice([7, 9, 11, 13, 15, 17, 17, 18, 21])),
            dtype=str(rng.choice(["float32"] * 6 + ["float64", "float16"])),
            noise=noise,
            embedded=bool(rng.random() < 0.15),
            inside=str(rng.choice(_PLACES)),
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A value of the model.

    Attributes:
        name: its name.
        lead: sizes of the axes before the units.
        labels: block of each unit; -1 has none.
    """

    name: str
    lead: tuple[int | str, ...]
    labels: Labels

    @property
    def size(self) -> int:
        return self.labels.size


def random_model(recipe: Recipe) -> onnx.ModelProto:
    """The model that ``recipe`` describes."""
    return _Builder(recipe).build()


def _renamed(item: Any, names: dict[str, str]) -> Any:
    """A copy of a node, a value or a tensor, with other names for some values; graphs inside capture these."""
    copy = type(item)()
    copy.CopyFrom(item)
    if not isinstance(item, onnx.NodeProto):
        copy.name = names.get(item.name, item.name)
        return copy
    copy.input[:] = [names.get(name, name) for name in item.input]
    copy.output[:] = [names.get(name, name) for name in item.output]
    for attribute in copy.attribute:
        for node in attribute.g.node:
            node.CopyFrom(_renamed(node, names))
    return copy


class _Builder:
    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._rng = np.random.default_rng([recipe.seed, 1])
        self._gates = np.random.default_rng([recipe.seed, 2])
        self._dtype = np.dtype(recipe.dtype)
        self._type = _TYPES[recipe.dtype]
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []
        self._constants: dict[str, tuple[int, ...]] = {}
        self._weights: list[tuple[str, Labels, Labels]] = []
        self._pool: list[Labels] = []
        self._values: list[Value] = []
        self._taps: list[Value] = []

    def build(self) -> onnx.ModelProto:
        lead: tuple[int | str, ...] = ("B", 3, 2)[: self._recipe.rank - 1]
        if self._chance(0.1) and len(lead) == 2:
            lead = ("B", "T")
        if self._recipe.embedded:
            table = self._weight(np.arange(7) % self._recipe.groups, self._labels(), noise=1.0)
            labels = self._last_labels
            name = self._constant("table", table)
            value = self._add("Gather", [name, "x"], Value("", lead, labels))
            given = helper.make_tensor_value_info("x", onnx.TensorProto.INT64, lead)
        else:
            value = Value("x", lead, self._labels())
            self._values.append(value)
            shape = [*lead, value.size]
            given = helper.make_tensor_value_info("x", self._type, shape)
        for _ in range(self._recipe.steps):
            step: Callable[[Value], Value] = getattr(self, f"_{self._rng.choice(_STEPS)}")
            value = step(value)
        value = self._add("Identity", [value.name], value) if value.name == "x" else value
        outputs = {v.name: v for v in (value, *self._taps) if v.name != "x"}
        made = [
            helper.make_tensor_value_info(v.name, self._type, [*v.lead, v.size])
            for v in outputs.values()
        ]
        graph = helper.make_graph(self._nodes, "random", [given], made, self._tensors)
        opset = helper.make_opsetid("", self._recipe.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        if self._recipe.inside and self._recipe.opset >= 13:
            getattr(self, f"_into_{self._recipe.inside}")(model)
        return model

    def _into_function(self, model: onnx.ModelProto) -> None:
        """All nodes in a function that takes the stored tensors as arguments."""
        graph = model.graph
        taken = ["x", *(tensor.name for tensor in graph.initializer)]
        made = [value.name for value in graph.output]
        imports = list(model.opset_import)
        function = helper.make_function("own", "Network", taken, made, graph.node, imports)
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid("own", 1))
        call = helper.make_node("Network", taken, made, "network", domain="own")
        del graph.node[:]
        graph.node.append(call)

    def _into_branch(self, model: onnx.ModelProto) -> None:
        """All nodes in one branch of an If; the other makes twice as much of what that one does."""
        graph = model.graph
        branches = []
        own = list(graph.initializer) if self._chance(0.5) else []  # tensors stored in the body
        for label in ("then", "else"):
            names = {name: f"{label}_{name}" for node in graph.node for name in node.output}
            if label == "then":
                names |= {tensor.name: f"own_{tensor.name}" for tensor in own}
            made = [_renamed(value, names) for value in graph.output]
            nodes = [_renamed(node, names) for node in graph.node]
            if label == "else":
                for value in made:
                    nodes.append(
                        helper.make_node("Add", [value.name, value.name], [f"{value.name}_2"])
                    )
                    value.name += "_2"
            branches.append(helper.make_graph(nodes, label, [], made))
        stored = {tensor.name: f"own_{tensor.name}" for tensor in own}
        branches[0].initializer.extend(_renamed(tensor, stored) for tensor in own)
        graph.input.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
        node = helper.make_node(
            "If",
            ["flag"],
            [value.name for value in graph.output],
            "choice",
            then_branch=branches[0],
            else_branch=branches[1],
        )
        del graph.node[:]
        graph.node.append(node)

    def _into_loop(self, model: onnx.ModelProto) -> None:
        """All nodes in the body of a Loop that runs twice; every output gets an axis for the runs."""
        graph = model.graph
        states = [
            helper.make_tensor_value_info("step", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("more", onnx.TensorProto.BOOL, []),
        ]
        names = {name: f"body_{name}" for node in graph.node for name in node.output}
        nodes = [_renamed(node, names) for node in graph.node]
        nodes.append(helper.make_node("Identity", ["more"], ["still"]))
        still = helper.make_tensor_value_info("still", onnx.TensorProto.BOOL, [])
        made = [still, *(_renamed(value, names) for value in graph.output)]
        body = helper.make_graph(nodes, "body", states, made)
        graph.initializer.append(numpy_helper.from_array(np.array(2), "times"))
        outputs = [value.name for value in graph.output]
        node = helper.make_node("Loop", ["times", ""], outputs, "steps", body=body)
        for value in graph.output:
            sizes = [2, *(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)]
            value.CopyFrom(helper.make_tensor_value_info(value.name, self._type, sizes))
        del graph.node[:]
        graph.node.append(node)

    def _into_scan(self, model: onnx.ModelProto) -> None:
        """All nodes in the body of a Scan over two inputs at once; every value gets an axis for these."""
        graph = model.graph
        (given,) = graph.input
        inner = onnx.ValueInfoProto()
        inner.CopyFrom(given)
        inner.name = "body_x"
        names = {name: f"body_{name}" for node in graph.node for name in node.output}
        nodes = [_renamed(node, {**names, "x": "body_x"}) for node in graph.node]
        made = [_renamed(value, names) for value in graph.output]
        body = helper.make_graph(nodes, "body", [inner], made)
        outputs = [value.name for value in graph.output]
        node = helper.make_node("Scan", ["x"], outputs, "scan", body=body, num_scan_inputs=1)
        for value in (given, *graph.output):
            tensor = value.type.tensor_type
            sizes = [2, *(d.dim_value or d.dim_param for d in tensor.shape.dim)]
            value.CopyFrom(helper.make_tensor_value_info(value.name, tensor.elem_type, sizes))
        del graph.node[:]
        graph.node.append(node)

    def _chance(self, share: float) -> bool:
        return bool(self._rng.random() < share)

    def _labels(self) -> Labels:
        if self._pool and self._chance(0.6):
            self._last_labels = self._pool[int(self._rng.integers(len(self._pool)))]
            return self._last_labels
        size = int(self._rng.choice([1, 2, 3, 4, 5, 6, 6, 7, 8, 10, 12, 16]))
        lowest = -1 if self._chance(0.4) else 0
        labels = self._rng.integers(lowest, self._recipe.groups, size)
        self._last_labels = np.sort(labels) if self._chance(0.4) else labels
        self._pool.append(self._last_labels)
        return self._last_labels

    def _add(self, op: str, inputs: list[str], like: Value, **attributes: Any) -> Value:
        """A node that makes a value as ``like`` describes it."""
        value = dataclasses.replace(like, name=f"v{len(self._nodes)}")
        name = f"n{len(self._nodes)}" if self._chance(0.7) else ""
        self._nodes.append(helper.make_node(op, inputs, [value.name], name, **attributes))
        self._values.append(value)
        return value

    def _helper(self, op: str, inputs: list[str], **attributes: Any) -> str:
        """A node that makes a value that no step goes on with."""
        name = f"h{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [name], "", **attributes))
        return name

    def _constant(self, what: str, array: Array, *, dtype: Any = None) -> str:
        """A constant in one of its forms."""
        values = np.asarray(array, dtype or self._dtype)
        name = f"{what}{len(self._tensors) + len(self._nodes)}"
        form = self._rng.choice(
            ["stored", "stored", "stored", "node", "passed", "cast", "narrow"]
        )
        if form == "node" and (values.dtype.kind == "f" or self._recipe.opset >= 9):
            tensor = numpy_helper.from_array(values, name)
            return self._helper("Constant", [], value=tensor)
        if form == "cast" and values.dtype == np.float32:
            exact = values.astype(np.float64)
            self._tensors.append(numpy_helper.from_array(exact, name))
            return self._helper("Cast", [name], to=self._type)
        if form == "narrow" and values.dtype == np.float32:
            kind = "bfloat16" if self._recipe.opset >= 13 and self._chance(0.5) else "float16"
            self._tensors.append(numpy_helper.from_array(values.astype(_NARROW[kind]), name))
            return self._helper("Cast", [name], to=self._type)
        self._tensors.append(numpy_helper.from_array(values, name))
        return self._helper("Identity", [name]) if form == "passed" else name

    def _per_unit(self, value: Value, low: float, high: float) -> str:
        """A constant with an entry per unit, or one for all; sometimes one that is there already."""
        size = value.size
        extra = [(1,) * n for n in range(len(value.lead) + 1)]
        shapes = [(*ones, size) for ones in extra] + [(), (1,)]
        shape = shapes[int(self._rng.choice(len(shapes), p=self._shape_shares(len(shapes))))]
        known = [name for name, other in self._constants.items() if other == shape]
        if known and self._chance(0.4):
            return str(self._rng.choice(known))
        values = self._rng.uniform(low, high, shape)
        if size > 1 and self._chance(0.2):
            values = np.where(self._rng.random(shape) < 0.4, 0.0, values)
        if self._chance(0.2):
            values = np.full(shape, values.flat[0])
        name = self._constant("c", values)
        self._constants[name] = shape
        return name

    @staticmethod
    def _shape_shares(count: int) -> Array:
        shares = np.ones(count)
        shares[0] = 6
        found: Array = shares / shares.sum()
        return found

    def _weight(self, rows: Labels, columns: Labels, *, noise: float | None = None) -> Array:
        inside = (rows[:, None] == columns) & (rows[:, None] >= 0)
        form = self._rng.random()
        places = np.arange(rows.size)[:, None], np.arange(columns.size)
        if form < 0.05:  # each output reads a window of the inputs
            first = places[1] * max(rows.size - 2, 0) // max(columns.size, 1)
            inside = (places[0] >= first) & (places[0] < first + 3)
        elif form < 0.1:
            inside = places[0] <= places[1]
        elif form < 0.25:
            inside = inside & (self._rng.random(inside.shape) < 0.6)
        values = self._rng.uniform(0.5, 1.0, inside.shape)
        values *= self._rng.choice([-1, 1], inside.shape)
        values /= np.sqrt(np.maximum(inside.sum(axis=0), 1))
        values = np.where(inside, values, 0.0)
        if self._chance(0.2) and min(values.shape) > 1:
            axis = int(self._rng.integers(2))
            lines = self._rng.integers(0, values.shape[axis], values.shape[axis])
            values = np.take(values, lines, axis=axis)
        if self._chance(0.1):
            values = np.where(values == 0, -0.0, values)
        spread = self._recipe.noise if noise is None else noise
        if spread:
            rest = self._rng.normal(0, spread, values.shape)
            values = np.where(values == 0, rest, values)
        found: Array = values
        return found

    def _stored_weight(self, rows: Labels, columns: Labels) -> str:
        """A value that holds a weight, (K, N); sometimes one that is there already, or its transpose."""
        for name, inputs, outputs in self._weights:
            if inputs is rows and outputs is columns and self._chance(0.3):
                return name
            if inputs is columns and outputs is rows and self._chance(0.3):
                return self._helper("Transpose", [name], perm=[1, 0])
        # onnxruntime 1.32 does not load models with such weights outside the body that reads them.
        integers = self._dtype == np.float32 and self._recipe.opset >= 13
        if integers and self._recipe.inside in {"", "function"} and self._chance(0.1):
            name = self._quantized(self._weight(rows, columns))
            self._weights.append((name, rows, columns))
            return name
        if self._chance(0.2):
            name = self._constant("w", self._weight(columns, rows))
            self._weights.append((name, columns, rows))
            return self._helper("Transpose", [name], perm=[1, 0])
        name = self._constant("w", self._weight(rows, columns))
        self._weights.append((name, rows, columns))
        return name

    def _quantized(self, weight: Array) -> str:
        """A weight as integers of 8 bits, with a scale for all or one for each output."""
        per_output = self._chance(0.5)
        largest = np.abs(weight).max(axis=0 if per_output else None)
        scale = np.maximum(largest, 0.1) / 127
        zero = int(self._rng.choice([0, 0, 7]))
        stored = np.clip(np.rint(weight / scale) + zero, -128, 127)
        inputs = [
            self._stored("q", stored.astype(np.int8)),
            self._stored("scale", scale.astype(np.float32)),
            self._stored("zero", np.full(np.shape(scale), zero, np.int8)),
        ]
        return self._helper("DequantizeLinear", inputs, axis=1)

    def _stored(self, what: str, values: Any) -> str:
        name = f"{what}{len(self._tensors) + len(self._nodes)}"
        self._tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def _site(self, value: Value) -> Value:
        made = self._siblings(value) if self._recipe.siblings else self._product(value)
        return self._swish(made) if self._gates.random() < 0.2 else made

    def _swish(self, value: Value) -> Value:
        """A value times the sigmoid of itself times a slope, for each unit or for all."""
        shape = [(value.size,), (value.size,), (1,), ()][self._gates.integers(4)]
        slopes = self._gates.uniform(0.4, 2.0, shape) * self._gates.choice([-1, 1, 1], shape)
        slope = self._stored("slope", slopes.astype(self._dtype))
        opened = self._helper("Sigmoid", [self._helper("Mul", [value.name, slope])])
        return dataclasses.replace(value, name=self._helper("Mul", [opened, value.name]))

    def _siblings(self, value: Value) -> Value:
        """Products of one value, most of them of one form, each read on its own or not, then side by side."""
        form = str(self._rng.choice(_FORMS))
        made: list[Value] = []
        for _ in range(int(self._rng.integers(2, 5))):
            other = form if self._chance(0.8) else str(self._rng.choice(_FORMS))
            one = self._product(value, form=other)
            if self._chance(0.2):
                self._taps.append(one)
            made.append(self._activation(one) if self._chance(0.3) else one)
        labels = np.concatenate([one.labels for one in made])
        like = Value("", value.lead, labels)
        return self._add("Concat", [one.name for one in made], like, axis=len(value.lead))

    def _product(self, value: Value, labels: Labels | None = None, form: str = "") -> Value:
        labels = self._labels() if labels is None else labels
        like = Value("", value.lead, labels)
        form = form or str(self._rng.choice(_FORMS))
        if form == "gemm" and len(value.lead) == 1:
            flipped = int(self._rng.integers(2))
            pair = (labels, value.labels) if flipped else (value.labels, labels)
            name = self._stored_weight(*pair)
            inputs = [value.name, name]
            if self._recipe.opset < 11 or self._chance(0.7):
                shapes = [(labels.size,), (labels.size,), (1, labels.size), (1,), ()]
                shape = shapes[self._rng.integers(len(shapes))]
                inputs.append(self._constant("b", self._rng.standard_normal(shape)))
            factors = {"alpha": 0.5, "beta": 2.0} if self._chance(0.3) else {}
            if self._chance(0.2):
                inputs[0] = self._helper("Transpose", [value.name], perm=[1, 0])
                factors["transA"] = 1
            return self._add("Gemm", inputs, like, transB=flipped, **factors)
        made = self._add(
            "MatMul", [value.name, self._stored_weight(value.labels, labels)], like
        )
        return self._with_constant("Add", made, 0.1, 1.0) if form == "bias" else made

    def _with_constant(self, op: str, value: Value, low: float, high: float) -> Value:
        inputs = [value.name, self._per_unit(value, low, high)]
        if op in {"Add", "Mul"} and self._chance(0.3):
            inputs.reverse()
        return self._add(op, inputs, value)

    def _affine(self, value: Value) -> Value:
        for op in self._rng.choice(
            ["Mul", "Add", "Mul", "Add", "Sub"], self._rng.integers(1, 4)
        ):
            value = self._with_constant(str(op), value, -1.0, 1.0)
        return value

    def _normalized(self, value: Value) -> Value:
        """A site, and what a batch normalization leaves of itself behind it."""
        value = self._product(value)
        for op in ("Mul", "Add")[: self._rng.integers(1, 3)]:
            value = self._with_constant(op, value, -1.0, 1.0)
        return value

    def _scalar(self, value: Value) -> Value:
        divisor = self._constant("c", self._rng.uniform(1, 2, value.size))
        return self._add("Div", [value.name, divisor], value)

    def _activation(self, value: Value) -> Value:
        op = str(self._rng.choice(list(_ACTIVATIONS)))
        if self._dtype != np.float32 and op in {
            "LeakyRelu",
            "Elu",
            "Cos",
            "HardSigmoid",
            "Softplus",
        }:
            op = "Relu"  # onnxruntime has none of another type
        if op == "Exp":  # so that numbers stay small
            value = self._add("Tanh", [value.name], value)
        return self._add(op, [value.name], value, **_ACTIVATIONS[op])

    def _alike(self, value: Value) -> Value:
        """Another value of the same shape, or a new one."""
        alike = [
            other
            for other in self._values
            if other.lead == value.lead and other.labels is value.labels and other is not value
        ]
        if alike and self._chance(0.7):
            return alike[int(self._rng.integers(len(alike)))]
        return self._product(value, value.labels)

    def _residual(self, value: Value) -> Value:
        return self._add("Add", [value.name, self._alike(value).name], value)

    def _gate(self, value: Value) -> Value:
        gate = self._product(value, value.labels)
        gate = self._add("Sigmoid", [gate.name], gate)
        return self._add("Mul", [gate.name, value.name], value)

    def _branch(self, value: Value) -> Value:
        """Go on with an earlier value; this one is an output, so that it is not lost."""
        self._taps.append(value)
        return self._values[int(self._rng.integers(len(self._values)))]

    def _tap(self, value: Value) -> Value:
        self._taps.append(value)
        return value

    def _broadcast(self, value: Value) -> Value:
        narrow = self._product(value, np.zeros(1, np.intp))
        return self._add("Mul", [value.name, narrow.name], value)

    def _softmax(self, value: Value) -> Value:
        return self._add("Softmax", [value.name], value, axis=len(value.lead))

    def _normalization(self, value: Value) -> Value:
        if self._recipe.opset < 17 or self._dtype == np.float64:
            return value
        tensors = [self._per_unit_vector(value) for _ in range(int(self._rng.integers(1, 3)))]
        return self._add("LayerNormalization", [value.name, *tensors], value, epsilon=0.1)

    def _per_unit_vector(self, value: Value) -> str:
        return self._constant("c", self._rng.uniform(0.5, 1.5, value.size))

    def _mean(self, value: Value) -> Value:
        """Take the mean of the units away."""
        if self._recipe.opset >= 18:
            axes = self._constant("axes", np.array([len(value.lead)]), dtype=np.int64)
            mean = self._helper("ReduceMean", [value.name, axes], keepdims=1)
        else:
            mean = self._helper("ReduceMean", [value.name], axes=[len(value.lead)], keepdims=1)
        return self._add("Sub", [value.name, mean], value)

    def _reshape(self, value: Value) -> Value:
        """All positions on one axis, or back."""
        unknown = sum(isinstance(size, str) for size in value.lead)
        if len(value.lead) == 1 or unknown > 1:
            return value
        shape = self._constant("shape", np.array([-1, value.size]), dtype=np.int64)
        flat = self._add("Reshape", [value.name, shape], Value("", ("M",), value.labels))
        flat = self._product(flat, self._labels())
        sizes = [-1 if isinstance(size, str) else size for size in value.lead]
        shape = self._constant("shape", np.array([*sizes, flat.size]), dtype=np.int64)
        return self._add("Reshape", [flat.name, shape], Value("", value.lead, flat.labels))

    def _flip(self, value: Value) -> Value:
        """Exchange two axes before the units, work on them, and exchange them again."""
        if len(value.lead) < 2:
            return value
        order = list(range(len(value.lead) + 1))
        order[0], order[1] = 1, 0
        lead = tuple(value.lead[axis] for axis in order[:-1])
        value = self._add("Transpose", [value.name], Value("", lead, value.labels), perm=order)
        value = self._product(value)
        lead = tuple(value.lead[axis] for axis in order[:-1])
        return self._add("Transpose", [value.name], Value("", lead, value.labels), perm=order)

    def _repeat(self, value: Value) -> Value:
        """A value twice on an axis of fixed size, then one of the two."""
        axis = next((n for n, size in enumerate(value.lead) if isinstance(size, int)), None)
        if axis is None:
            return value
        lead = list(value.lead)
        size = int(lead[axis])
        lead[axis] = 2 * size
        both = Value("", tuple(lead), value.labels)
        both = self._add("Concat", [value.name, self._alike(value).name], both, axis=axis)
        places = self._constant("places", np.arange(size) * 2, dtype=np.int64)
        return self._add("Gather", [both.name, places], value, axis=axis)

    def _shape(self, value: Value) -> Value:
        """What was there is reshaped to its own shape."""
        return self._add("Reshape", [value.name, self._helper("Shape", [value.name])], value)

    def _positions(self, value: Value) -> Value:
        """A constant that differs between positions."""
        if not isinstance(value.lead[-1], int):
            return value
        shape = (value.lead[-1], int(self._rng.choice([1, value.size])))
        table = self._constant("c", self._rng.uniform(0.5, 1.0, shape))
        return self._add(str(self._rng.choice(["Add", "Mul"])), [value.name, table], value)

    def _capture(self, value: Value) -> Value:
        """A subgraph that reads the value."""
        yes = self._constant("yes", np.array(True), dtype=np.bool_)
        branches = []
        for op in ("Relu", "Neg"):
            out = f"s{len(self._nodes)}{op}"
            inner = [helper.make_node(op, [value.name], [out])]
            made = helper.make_tensor_value_info(out, self._type, [*value.lead, value.size])
            branches.append(helper.make_graph(inner, op, [], [made]))
        return self._add("If", [yes], value, then_branch=branches[0], else_branch=branches[1])

    def _half(self, value: Value) -> Value:
        """Units taken out of their order."""
        if value.size < 2:
            return value
        places = self._rng.permutation(value.size)[: max(value.size // 2, 1)]
        name = self._constant("places", places, dtype=np.int64)
        like = Value("", value.lead, value.labels[places])
        return self._add("Gather", [value.name, name], like, axis=len(value.lead))

    def _convolution(self, value: Value) -> Value:
        """One or two convolutions over the axes between the first and the units, which they see as channels."""
        axes = len(value.lead) - 1
        if not axes or self._dtype == np.float64:  # onnxruntime has none in doubles
            return value
        order = [0, axes + 1, *range(1, axes + 1)]
        channels = self._helper("Transpose", [value.name], perm=order)
        labels = value.labels
        for _ in range(int(self._rng.integers(1, 3))):
            rows, labels = labels, self._labels()
            size = int(self._rng.choice([1, 1, 3]))
            edges = np.stack([self._weight(rows, labels) for _ in range(size**axes)], axis=-1)
            kernel = edges.transpose(1, 0, 2).reshape(labels.size, rows.size, *(size,) * axes)
            inputs = [channels, self._constant("k", kernel / size**axes)]
            if self._chance(0.6):
                inputs.append(self._constant("b", self._rng.standard_normal(labels.size)))
            attributes: dict[str, Any] = (
                {"kernel_shape": [size] * axes} if self._chance(0.5) else {}
            )
            if size > 1:
                attributes |= (
                    {"pads": [1] * 2 * axes}
                    if self._chance(0.6)
                    else {"auto_pad": "SAME_UPPER"}
                )
            channels = self._helper("Conv", inputs, **attributes)
            if self._chance(0.5):
                channels = self._helper(str(self._rng.choice(["Relu", "Tanh"])), [channels])
        back = [0, *range(2, axes + 2), 1]
        like = Value("", value.lead, labels)
        return self._add("Transpose", [channels], like, perm=back)

    def _integers(self, value: Value) -> Value:
        """A product of integers: the input is quantized as it comes, the result is scaled."""
        if self._dtype != np.float32 or self._recipe.opset < 11:
            return value
        labels = self._labels()
        weight = self._weight(value.labels, labels)
        scale = max(float(np.abs(weight).max()), 0.1) / 127
        zero = int(self._rng.choice([0, 0, 5]))
        stored = np.clip(np.rint(weight / scale) + zero, -128, 127).astype(np.int8)
        number = len(self._nodes)
        parts = [f"iq{number}", f"is{number}", f"iz{number}"]
        self._nodes.append(helper.make_node("DynamicQuantizeLinear", [value.name], parts, ""))
        zeros = self._stored("zero", np.int8(zero))
        inputs = [parts[0], self._stored("q", stored), parts[2], zeros]
        whole = self._helper("MatMulInteger", inputs)
        floats = self._helper("Cast", [whole], to=onnx.TensorProto.FLOAT)
        factor = self._helper("Mul", [parts[1], self._stored("scale", np.float32(scale))])
        return self._add("Mul", [floats, factor], Value("", value.lead, labels))

    def _recurrent(self, value: Value) -> Value:
        """A recurrent operator over the first axis, with its groups in cascade."""
        if len(value.lead) != 2 or self._recipe.opset < 11 or self._dtype != np.float32:
            return value
        cells = list(GATES)
        cell = cells[int(self._rng.integers(len(cells)))]
        labels = self._labels()
        hidden, rows = labels.size, GATES[cell] * labels.size
        w = np.concatenate([self._weight(value.labels, labels).T for _ in range(GATES[cell])])
        own = (labels[:, None] == labels) | (self._chance(0.5) & (labels[:, None] < labels))
        r = [
            np.where(own, self._rng.uniform(-0.5, 0.5, own.shape), 0.0).T
            for _ in range(GATES[cell])
        ]
        stored = [
            self._constant("W", w[None]),
            self._constant("R", np.concatenate(r)[None]),
        ]
        if self._chance(0.7):
            stored.append(self._constant("B", self._rng.normal(0, 0.3, (1, 2 * rows))))
        number = len(self._nodes)
        made, last = f"y{number}", f"y_h{number}"
        outputs = [made, last] if self._chance(0.4) else [made]
        node = helper.make_node(
            cell, [value.name, *stored], outputs, f"n{number}", hidden_size=hidden
        )
        self._nodes.append(node)
        like = Value("", value.lead, labels)
        if self._recipe.opset >= 13:
            axes = self._constant("axes", np.array([1]), dtype=np.int64)
            result = self._add("Squeeze", [made, axes], like)
        else:
            result = self._add("Squeeze", [made], like, axes=[1])
        if len(outputs) > 1:
            self._taps.append(Value(last, (1, value.lead[1]), labels))
        return result


def quantize_some(model: onnx.ModelProto, rng: np.random.Generator) -> int:
    """Store about half of a model's float32 matrices that products read as integers; returns how many."""
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
    made: list[onnx.NodeProto] = []
    for tensor in list(model.graph.initializer):
        uses = readers.get(tensor.name, [])
        is_weight = len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
        products = {(node.op_type, position) for node, position in uses}
        if not is_weight or not products <= {("MatMul", 1), ("Gemm", 1)} or not products:
            continue
        if rng.random() < 0.5:
            model.graph.initializer.remove(tensor)
            made.extend(_of_integers(model.graph, tensor, rng))
    for node in reversed(made):
        model.graph.node.insert(0, node)
    return len({node.output[0].rpartition(".")[0] or node.output[0] for node in made})


def _of_integers(
    graph: onnx.GraphProto, tensor: onnx.TensorProto, rng: np.random.Generator
) -> list[onnx.NodeProto]:
    """The nodes that make ``tensor`` of integers in some form, and what they read."""
    values = numpy_helper.to_array(tensor)
    unsigned = bool(rng.random() < 0.5)
    lines = rng.choice([-1, 0, 1])
    shape = () if lines < 0 else (values.shape[lines],)
    zero = np.asarray(rng.integers(-9, 10, shape) + 128 * unsigned)
    scale = np.asarray(rng.uniform(0.008, 0.012, shape), np.float32)

    def across(line: Array) -> Array:
        return line[:, None] if lines == 0 else line

    dtype = np.uint8 if unsigned else np.int8
    limits = np.iinfo(dtype)
    codes = np.clip(np.round(values / across(scale)) + across(zero), limits.min, limits.max)
    name = tensor.name
    turned = bool(rng.random() < 0.3)
    codes = codes.T if turned else codes
    casts = bool(rng.random() < 0.5)
    # Lines along an axis, as the operators after it see the integers.
    last = lines >= 0 and (lines == 1) != turned
    line = zero.astype(np.float32 if casts else dtype)
    stored = {"codes": np.ascontiguousarray(codes).astype(dtype), "zero": line, "scale": scale}
    if casts and lines >= 0 and not last:
        stored |= {key: stored[key][:, None] for key in ("zero", "scale")}
    for key, array in stored.items():
        graph.initializer.append(numpy_helper.from_array(array, f"{name}.{key}"))
    floats = f"{name}.floats" if turned else name
    if casts:
        nodes = [
            helper.make_node("Cast", [f"{name}.codes"], [f"{name}.cast"], to=1),
            helper.make_node("Sub", [f"{name}.cast", f"{name}.zero"], [f"{name}.difference"]),
            helper.make_node("Mul", [f"{name}.difference", f"{name}.scale"], [floats]),
        ]
    else:
        inputs = [f"{name}.codes", f"{name}.scale", f"{name}.zero"]
        nodes = [helper.make_node("DequantizeLinear", inputs, [floats], axis=int(last))]
    if turned:
        nodes.append(helper.make_node("Transpose", [floats], [name], perm=[1, 0]))
    return nodes
