"""A part of a model as a model of its own, and values inside a model made visible as outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decompose.model.model_io import Model, read_tensor
from onnx_decompose.model.renames import defined_names, subgraphs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from onnx_decompose.runtime.feeds import Feeds

__all__ = ["cut", "reads", "varying", "with_outputs"]


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, in the graphs inside it too."""
    yield from filter(None, node.input)
    for _, body in subgraphs(node):
        own = set(defined_names(body))
        for inner in body.node:
            yield from (name for name in reads(inner) if name not in own)
        yield from (value.name for value in body.output if value.name not in own)


def varying(proto: onnx.ModelProto) -> list[str]:
    """What the main graph's nodes make of the inputs, in order; constants are left out."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    seen = {value.name for value in proto.graph.input} - stored
    made: list[str] = []
    for node in proto.graph.node:
        if not seen.isdisjoint(reads(node)):
            names = [name for name in node.output if name]
            seen.update(names)
            made += names
    return made


def with_outputs(model: Model, names: Sequence[str]) -> Model:
    """The model with ``names`` as its only outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    known = {value.name: value for value in (*proto.graph.output, *proto.graph.value_info)}
    wanted = [known.get(name) or onnx.ValueInfoProto(name=name) for name in names]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in wanted]
    del proto.graph.output[:]
    proto.graph.output.extend(copies)
    return Model(proto, model.path)


def cut(
    model: Model, frontier: Collection[str], target: str, values: Feeds
) -> tuple[onnx.ModelProto, list[str]]:
    """What makes ``target`` of the values at the ``frontier``.

    Args:
        model: the whole.
        frontier: where to stop.
        target: the only output.
        values: arrays of the frontier's values and of the target; they give the types.

    Returns:
        The part, with all its constants inside, and the names of its inputs.
    """
    graph = model.proto.graph
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    pending, nodes, inputs, constants = [target], set(), dict[str, None](), dict[str, None]()
    while pending:
        name = pending.pop()
        if name != target and name in frontier:
            inputs[name] = None
        elif name in maker:
            if maker[name] not in nodes:
                nodes.add(maker[name])
                pending.extend(reads(graph.node[maker[name]]))
        elif name in stored:
            constants[name] = None
        else:
            inputs[name] = None
    part = onnx.ModelProto(
        ir_version=model.proto.ir_version,
        opset_import=model.proto.opset_import,
        functions=model.proto.functions,
        graph=helper.make_graph(
            [graph.node[index] for index in sorted(nodes)],
            "cut",
            [_declared(name, values) for name in inputs],
            [_declared(target, values)],
            [
                numpy_helper.from_array(np.ascontiguousarray(read_tensor(model, stored[n])), n)
                for n in constants
            ],
        ),
    )
    return part, list(inputs)


def _declared(name: str, values: Mapping[str, np.ndarray]) -> onnx.ValueInfoProto:
    array = values[name]
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
    )
