"""A model in other words: nodes in branches of an If or as a call of a function; products in other forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import onnx
from onnx import helper

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

Wrapping = Literal["branches", "call", "nested"]


def wrapped(model: onnx.ModelProto, how: Wrapping, rng: np.random.Generator) -> onnx.ModelProto:
    """A run of the nodes inside; ``nested``: the nodes inside a branch of it once more, as calls."""
    count = len(model.graph.node)
    first = int(rng.integers(0, count))
    last = int(rng.integers(first, count)) + 1
    result = _wrapped(model, "branches" if how == "nested" else how, first, last, rng)
    if how == "nested":
        result = _wrapped(result, "call", 0, len(result.graph.node), rng)
    onnx.checker.check_model(result, full_check=True)
    return result


def reformed(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The model with some of its products in other forms."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*known.value_info, *known.input, *known.output)
    }
    stored = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        fits = node.op_type == "MatMul" and stored.get(node.input[1]) == 2
        form = str(rng.choice(["as it is", "left", "einsum"])) if fits else "as it is"
        if form == "einsum" and model.opset_import[0].version < 12:
            form = "left"
        rank = ranks.get(node.input[0], 0) if fits else 0
        if form == "as it is" or rank < 2:
            nodes.append(node)
        elif form == "einsum":
            equation = rng.choice(
                ["...i,ij->...j", f"{'abc'[: rank - 1]}i,ij->{'abc'[: rank - 1]}j"]
            )
            nodes.append(
                helper.make_node(
                    "Einsum", node.input, node.output, node.name, equation=str(equation)
                )
            )
        else:
            made, perm = node.output[0], [*range(rank - 2), rank - 1, rank - 2]
            nodes += [
                helper.make_node("Transpose", [node.input[0]], [f"{made}.x"], perm=perm),
                helper.make_node("Transpose", [node.input[1]], [f"{made}.w"], perm=[1, 0]),
                helper.make_node(
                    "MatMul", [f"{made}.w", f"{made}.x"], [f"{made}.p"], node.name
                ),
                helper.make_node("Transpose", [f"{made}.p"], [made], perm=perm),
            ]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(result, full_check=True)
    return result


def _wrapped(
    model: onnx.ModelProto, how: str, first: int, last: int, rng: np.random.Generator
) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes = list(graph.node)
    inside = nodes[first:last]
    made = [name for node in inside for name in node.output if name]
    read = list(
        dict.fromkeys(n for node in inside for n in _reads(node) if n and n not in made)
    )
    outside = {n for node in [*nodes[:first], *nodes[last:]] for n in _reads(node)}
    outside |= {value.name for value in graph.output}
    kept = [name for name in made if name in outside]
    if not kept:
        return result
    if how == "call":
        new = _call(result, inside, read, kept)
    else:
        new = _branches(result, inside, kept, rng)
    del graph.node[:]
    graph.node.extend([*nodes[:first], new, *nodes[last:]])
    return result


def _reads(node: onnx.NodeProto) -> list[str]:
    names = list(node.input)
    for attribute in node.attribute:
        own = {name for inner in attribute.g.node for name in inner.output}
        names += [n for inner in attribute.g.node for n in _reads(inner) if n not in own]
    return names


def _call(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    read: Sequence[str],
    kept: Sequence[str],
) -> onnx.NodeProto:
    formal = {name: f"formal.{number}" for number, name in enumerate([*read, *kept])}
    body: list[onnx.NodeProto] = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        _rename(copy, formal)
        body.append(copy)
    function = helper.make_function(
        "inner",
        f"Part{len(model.functions)}",
        [formal[name] for name in read],
        [formal[name] for name in kept],
        body,
        list(model.opset_import),
    )
    model.functions.append(function)
    if "inner" not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("inner", 1))
    return helper.make_node(function.name, read, kept, "part", domain="inner")


def _branches(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    kept: Sequence[str],
    rng: np.random.Generator,
) -> onnx.NodeProto:
    """Both branches do the same; one of them may hold constants of its own."""
    known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = {v.name: v for v in (*known.value_info, *known.output)}
    branches: list[onnx.GraphProto] = []
    for label in ("one", "other"):
        names = {name: f"{label}.{name}" for node in nodes for name in node.output if name}
        graph = onnx.GraphProto(name=label)
        if label == "one":
            taken = {name for node in nodes for name in node.input}
            for tensor in model.graph.initializer:
                if tensor.name in taken and rng.random() < 0.3:
                    own = graph.initializer.add()
                    own.CopyFrom(tensor)
                    own.name = names[tensor.name] = f"{label}.{tensor.name}"
        for node in nodes:
            copy = graph.node.add()
            copy.CopyFrom(node)
            _rename(copy, names)
        for name in kept:
            value = graph.output.add()
            value.CopyFrom(values[name])
            value.name = names[name]
        branches.append(graph)
    model.graph.input.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    return helper.make_node(
        "If", ["flag"], kept, "choice", then_branch=branches[0], else_branch=branches[1]
    )


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _rename(inner, names)
        for value in attribute.g.output:
            value.name = names.get(value.name, value.name)
