"""Small models whose structure is known because it was planted, and what the tests read back from a rewrite."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    IntArray = NDArray[np.intp]

Form = Literal["matmul", "gemm"]
SITES = ("up", "down")
ISOLATED = -1
HEADS = {"q": 4, "k": 4, "v": 3}
"""Heads of :func:`with_heads`, and their outputs."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """A feed-forward network x -> relu(x W_up + b_up) W_down + b_down -> y, and its block of every unit.

    Attributes:
        model: the network.
        labels: block numbers of the inputs, the hidden units and the outputs; ``ISOLATED`` without an edge.
    """

    model: onnx.ModelProto
    labels: tuple[IntArray, IntArray, IntArray]

    def partition(self, site: str) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(inputs, outputs) of every block of a site."""
        rows, columns = self.labels[SITES.index(site) :][:2]
        return {
            (
                tuple(np.flatnonzero(rows == block).tolist()),
                tuple(np.flatnonzero(columns == block).tolist()),
            )
            for block in range(int(rows.max()) + 1)
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What to plant.

    Attributes:
        blocks: (inputs, hidden units, outputs) of each block.
        isolated: inputs and outputs without any edge.
        shuffle: hide the blocks by random permutations of all three axes.
        form: MatMul + Add, or Gemm with transB.
        opset: operator set version.
        dtype: of weights, input and output.
        axes: of the input: 2 is (N, K), 3 is (N, T, K).
        weak: every second entry inside a block has this magnitude instead of about 0.5.
        noise: scale of the entries outside the blocks: standard deviation, or half width if uniform.
        family: of the noise; ``clipped`` is a normal redrawn until it lies within 1.5 deviations.
    """

    blocks: tuple[tuple[int, int, int], ...] = ((6, 12, 5),) * 8
    isolated: tuple[int, int] = (0, 0)
    shuffle: bool = True
    form: Form = "matmul"
    opset: int = 17
    dtype: type[np.floating[Any]] = np.float32
    axes: int = 2
    weak: float | None = None
    noise: float = 0.0
    family: Literal["normal", "uniform", "clipped"] = "normal"


def plant(recipe: Recipe, rng: np.random.Generator) -> Planted:
    """Make the network that ``recipe`` describes."""
    labels = tuple(
        _labels([block[axis] for block in recipe.blocks], isolated, recipe.shuffle, rng)
        for axis, isolated in enumerate((recipe.isolated[0], 0, recipe.isolated[1]))
    )
    weights = [_weight(labels[axis], labels[axis + 1], recipe, rng) for axis in (0, 1)]
    biases = [rng.normal(0, 0.1, (weight.shape[1],)) for weight in weights]
    assert len(labels) == 3
    return Planted(network(weights, biases, recipe), (labels[0], labels[1], labels[2]))


def dense_ffn(
    rng: np.random.Generator, sizes: tuple[int, int, int] = (20, 40, 10)
) -> onnx.ModelProto:
    """A network whose every weight is there."""
    weights = [rng.normal(size=shape) for shape in (sizes[:2], sizes[1:])]
    return network(weights, [rng.normal(size=(size,)) for size in sizes[1:]], Recipe())


def with_heads(rng: np.random.Generator) -> onnx.ModelProto:
    """A network that falls apart, and dense heads that read one value behind it."""
    model = plant(Recipe(blocks=((64, 128, 64),) * 4, shuffle=False), rng).model
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["ffn" if name == "y" else name for name in node.output]
    width = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    del graph.output[:]
    graph.node.append(helper.make_node("Softmax", ["ffn"], ["read"], "couples"))
    for name, size in HEADS.items():
        for what, shape in (("w", (width, size)), ("b", (size,))):
            array = rng.normal(size=shape).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(array, f"{name}.{what}"))
        graph.node.append(
            helper.make_node("MatMul", ["read", f"{name}.w"], [f"{name}.p"], f"head.{name}")
        )
        graph.node.append(helper.make_node("Add", [f"{name}.p", f"{name}.b"], [name]))
        graph.output.append(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", size])
        )
    return model


def network(
    weights: Sequence[NDArray[Any]], biases: Sequence[NDArray[Any]], recipe: Recipe
) -> onnx.ModelProto:
    """The network with these weights, (K, N) each, in the form that ``recipe`` asks for."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(recipe.dtype))
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    value = "x"
    for site, weight, bias in zip(SITES, weights, biases, strict=True):
        stored = weight.T if recipe.form == "gemm" else weight
        for name, array in ((f"{site}.weight", stored), (f"{site}.bias", bias)):
            content = np.ascontiguousarray(array, recipe.dtype)
            tensors.append(numpy_helper.from_array(content, name))
        output = "y" if site == SITES[-1] else f"{site}.sum"
        if recipe.form == "gemm":
            inputs = [value, f"{site}.weight", f"{site}.bias"]
            nodes.append(helper.make_node("Gemm", inputs, [output], site, transB=1))
        else:
            nodes.append(
                helper.make_node("MatMul", [value, f"{site}.weight"], [f"{site}.product"], site)
            )
            nodes.append(
                helper.make_node(
                    "Add", [f"{site}.product", f"{site}.bias"], [output], f"{site}.add"
                )
            )
        if output != "y":
            value = f"{site}.active"
            nodes.append(helper.make_node("Relu", [output], [value], f"{site}.relu"))
    batch: list[str | int] = ["batch"] if recipe.axes == 2 else ["batch", "time"]
    graph = helper.make_graph(
        nodes,
        "ffn",
        [helper.make_tensor_value_info("x", element, [*batch, weights[0].shape[0]])],
        [helper.make_tensor_value_info("y", element, [*batch, weights[-1].shape[1]])],
        tensors,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", recipe.opset)], ir_version=8
    )


def save(model: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a model, on request with its weights in ``<name>.data`` beside it."""
    if external:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        onnx.save_model(
            copy,
            path,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=0,
        )
    else:
        path.write_bytes(model.SerializeToString())
    return path


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The stored tensor of this name."""
    found: onnx.TensorProto = next(t for t in model.graph.initializer if t.name == name)
    return found


def array_of(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    """A copy of the values of an initializer."""
    return np.array(numpy_helper.to_array(initializer(model, name)))


def set_array(model: onnx.ModelProto, name: str, values: NDArray[Any]) -> None:
    """Give an initializer other values."""
    initializer(model, name).CopyFrom(numpy_helper.from_array(values, name))


def decomposition(model: onnx.ModelProto) -> dict[str, Any]:
    """The metadata that a rewritten model carries."""
    found: dict[str, Any] = json.loads(
        next(p.value for p in model.metadata_props if p.key == "onnx_decompose.decomposition")
    )
    return found


def units(text: str) -> tuple[int, ...]:
    """Unit numbers from the metadata's run-length text, read by the documented rule alone."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, stop = part.partition(":")
        numbers.extend(range(int(first), int(stop) if stop else int(first) + 1))
    return tuple(numbers)


def found_partition(
    model: onnx.ModelProto, site: str
) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, outputs) of every block that the rewritten model's metadata lists."""
    blocks = decomposition(model)["sites"][site]["blocks"]
    return {(units(block["rows"]), units(block["columns"])) for block in blocks}


def run(model: onnx.ModelProto | Path, x: NDArray[Any]) -> NDArray[Any]:
    """The output ``y`` in onnxruntime, without anything of onnx-decompose."""
    import onnxruntime  # noqa: PLC0415  (only the tests that run something wait for it)

    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def _labels(
    sizes: Sequence[int], isolated: int, shuffle: bool, rng: np.random.Generator
) -> IntArray:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.concatenate([labels, np.full(isolated, ISOLATED)])
    return rng.permutation(labels) if shuffle else labels


def _weight(
    rows: IntArray, columns: IntArray, recipe: Recipe, rng: np.random.Generator
) -> NDArray[np.float64]:
    shape = (rows.size, columns.size)
    sign = rng.choice([-1.0, 1.0], shape)
    values = sign * rng.uniform(0.3, 0.7, shape)
    if recipe.weak is not None:
        chessboard = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 2 == 0
        values[chessboard] = (sign * recipe.weak)[chessboard]
    noise = recipe.noise * _standard_noise(recipe.family, shape, rng)
    inside = (rows[:, None] == columns[None, :]) & (rows[:, None] != ISOLATED)
    return np.where(inside, values, noise)


def _standard_noise(
    family: str, shape: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float64]:
    if family == "uniform":
        return rng.uniform(-1.0, 1.0, shape)
    values = rng.normal(size=shape)
    while family == "clipped" and (far := np.abs(values) > 1.5).any():
        values[far] = rng.normal(size=np.count_nonzero(far))
    return values
