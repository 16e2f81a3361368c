"""The planted network in every place where a site may be: bodies, branches of branches, calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.e2e.planted import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SQUARE = Recipe(blocks=((6, 12, 6),) * 8)
"""As many outputs as inputs, for states."""


def value(name: str, kind: int = TensorProto.FLOAT, shape: Any = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def body_of(
    model: onnx.ModelProto,
    name: str,
    renamed: dict[str, str] | None = None,
    *,
    own: bool = False,
    inputs: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.GraphProto:
    """The planted network as a graph of its own, on the outer ``x`` or on inputs; ``own``: with its weights in it."""
    names = renamed or {}
    graph = onnx.GraphProto(name=name)
    for node in model.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(n, n) for n in node.input]
        copy.output[:] = [names.get(n, n) for n in node.output]
    graph.input.extend(inputs)
    graph.output.append(value(names.get("y", "y"), shape=["rows", 48]))
    if own:
        graph.initializer.extend(model.graph.initializer)
    return graph


def with_main(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    *,
    keep: bool = True,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.ModelProto:
    """The model with other nodes in its main graph."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.input.extend(inputs)
    result.graph.output.extend(outputs)
    if not keep:
        del result.graph.initializer[:]
    return result


def branch(model: onnx.ModelProto, *, own: bool = False) -> onnx.ModelProto:
    """The network in one branch of an If."""
    there = body_of(model, "there", {"y": "then.y"}, own=own)
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["else.y"])], "other", [], [value("else.y")]
    )
    node = helper.make_node(
        "If", ["flag"], ["y"], "choice", then_branch=there, else_branch=other
    )
    return with_main(model, [node], keep=not own, inputs=[value("flag", TensorProto.BOOL, [])])


def branch_with_its_own_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    return branch(model, own=True)


def loop(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network applied twice."""
    states = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])]
    body = body_of(
        model, "step", {"x": "h", "y": "h2"}, inputs=[*states, value("h", shape=["rows", 48])]
    )
    body.node.insert(0, helper.make_node("Identity", ["go"], ["go2"]))
    body.output.insert(0, value("go2", TensorProto.BOOL, []))
    result = with_main(
        model, [helper.make_node("Loop", ["times", "", "x"], ["y"], "steps", body=body)]
    )
    result.graph.initializer.append(helper.make_tensor("times", TensorProto.INT64, [], [2]))
    return result


def scan(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network over the first axis of a sequence, with a running sum."""
    body = body_of(
        model,
        "step",
        {"x": "e", "y": "e2"},
        inputs=[value("s", shape=[1, 48]), value("e", shape=[1, 48])],
    )
    body.node.append(helper.make_node("Add", ["s", "e2"], ["s2"]))
    body.output.insert(0, value("s2", shape=[1, 48]))
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["rows"]),
        helper.make_node(
            "Scan", ["start", "rows"], ["last", "each"], "steps", body=body, num_scan_inputs=1
        ),
        helper.make_node("Squeeze", ["each", "axis"], ["y"]),
    ]
    result = with_main(model, nodes)
    result.graph.initializer.extend(
        [
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("start", TensorProto.FLOAT, [1, 48], np.zeros(48)),
        ]
    )
    return result


def nested(model: onnx.ModelProto) -> onnx.ModelProto:
    """In a branch of a branch."""
    inner = branch(model)
    graph = body_of(inner, "outer", {"y": "outer.y"})
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["none.y"])], "none", [], [value("none.y")]
    )
    node = helper.make_node(
        "If", ["flag"], ["y"], "first", then_branch=graph, else_branch=other
    )
    return with_main(inner, [node])


def call(model: onnx.ModelProto) -> onnx.ModelProto:
    """As two calls of one function, with an activation between them; and a third that is left alone."""
    function = helper.make_function(
        "local",
        "Linear",
        ["i", "k", "c"],
        ["o"],
        [
            helper.make_node("MatMul", ["i", "k"], ["p"], "mm"),
            helper.make_node("Add", ["p", "c"], ["o"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node(
            "Linear", ["x", "up.weight", "up.bias"], ["up.sum"], "up", domain="local"
        ),
        helper.make_node("Relu", ["up.sum"], ["up.active"], "relu"),
        helper.make_node(
            "Linear", ["up.active", "down.weight", "down.bias"], ["y"], "down", domain="local"
        ),
        helper.make_node("Linear", ["x", "dense", "up.bias"], ["z"], "other", domain="local"),
    ]
    result = with_main(model, nodes, outputs=[value("z", shape=["batch", 96])])
    rng = np.random.default_rng(0)
    result.graph.initializer.append(
        helper.make_tensor("dense", TensorProto.FLOAT, [48, 96], rng.normal(size=48 * 96))
    )
    result.functions.append(function)
    result.opset_import.append(helper.make_opsetid("local", 1))
    return result


def function_with_its_own_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    function = helper.make_function(
        "local",
        "Net",
        ["x"],
        ["y"],
        [*constants, *model.graph.node],
        [helper.make_opsetid("", 17)],
    )
    node = helper.make_node("Net", ["x"], ["y"], "net", domain="local")
    result = with_main(model, [node], keep=False)
    result.functions.append(function)
    result.opset_import.append(helper.make_opsetid("local", 1))
    return result


FORMS: dict[Callable[[onnx.ModelProto], onnx.ModelProto], tuple[str, str]] = {
    branch: ("choice.then_branch/up", "choice.then_branch/down"),
    branch_with_its_own_weights: ("choice.then_branch/up", "choice.then_branch/down"),
    loop: ("steps.body/up", "steps.body/down"),
    scan: ("steps.body/up", "steps.body/down"),
    nested: (
        "first.then_branch/choice.then_branch/up",
        "first.then_branch/choice.then_branch/down",
    ),
    call: ("up/mm", "down/mm"),
    function_with_its_own_weights: ("net/up", "net/down"),
}
