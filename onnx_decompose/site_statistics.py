"""What sites read, while a model runs: the model itself in onnxruntime, with the values between its nodes as outputs.

Batch by batch, and only as far into the graph as the values asked for. Values are handed on and forgotten: what is
kept is for the caller to add up (``analysis.gram``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

from onnx_decompose.analysis.gram import MomentAccumulator, Moments
from onnx_decompose.cases import SAMPLES_AT_A_TIME, open_model
from onnx_decompose.model_io import Model
from onnx_decompose.regions import reads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.samples import Samples
    from onnx_decompose.sessions import Provider

__all__ = ["input_moments", "observe", "side_by_side"]


def observe(
    model: Model, values: Sequence[str], samples: Samples, provider: Provider
) -> Iterator[dict[str, NDArray[Any]]]:
    """The named values of ``model`` on every batch of ``samples``.

    Args:
        model: the model.
        values: names of values of its main graph, inputs included.
        samples: what it is run on.
        provider: where it runs.
    """
    inputs = {value.name for value in model.proto.graph.input}
    made = [name for name in values if name not in inputs]
    session = open_model(_exposed(model, made), provider) if made else None
    for feeds, _ in samples.batches(SAMPLES_AT_A_TIME):
        found = {name: feeds[name] for name in values if name in inputs}
        if session is not None:
            given = {spec.name: feeds[spec.name] for spec in session.inputs}
            found |= session.run(given)
        yield found


def input_moments(
    model: Model, values: Sequence[str], samples: Samples, provider: Provider
) -> dict[str, Moments]:
    """Moments of each value with itself, by name."""
    adding = {name: MomentAccumulator() for name in values}
    for found in observe(model, values, samples, provider):
        for name, accumulator in adding.items():
            accumulator.update(found[name])
    return {name: accumulator.result() for name, accumulator in adding.items()}


def side_by_side(
    model: Model, original: Model, values: Sequence[str], samples: Samples, provider: Provider
) -> Iterator[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
    """The named values of ``model`` and of ``original`` on every batch; one run serves both where they are the same.

    Args:
        model: the model as it is now.
        original: as it was.
        values: names of values that both have.
        samples: what they are run on.
        provider: where they run.
    """
    before = observe(original, values, samples, provider)
    if model is original:
        yield from ((found, found) for found in before)
        return
    yield from zip(observe(model, values, samples, provider), before, strict=True)


def _exposed(model: Model, values: Sequence[str]) -> Model:
    """The part of ``model`` that makes ``values``, with them as its outputs."""
    graph = model.proto.graph
    wanted = set(values)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(reads(node))
    proto = onnx.ModelProto()
    proto.CopyFrom(_without_graph(model.proto))
    part = proto.graph
    part.name = graph.name
    part.node.extend(reversed(nodes))
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in wanted)
    part.sparse_initializer.extend(
        tensor for tensor in graph.sparse_initializer if tensor.values.name in wanted
    )
    part.input.extend(value for value in graph.input if value.name in wanted)
    part.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    return Model(proto, model.path)


def _without_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Everything but the graph: versions, operator sets, functions."""
    rest = onnx.ModelProto(ir_version=proto.ir_version)
    rest.opset_import.extend(proto.opset_import)
    rest.functions.extend(proto.functions)
    return rest
