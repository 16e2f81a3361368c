"""A model on given inputs without graphs inside its graph: the branch that an If takes, each run of a body, calls.

Names are those of the flat graph (``flat``); from the second run of a body on, they carry its number.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.graph.flat import flat_name, give_attributes
from onnx_decompose.graph.sites import attribute_values, is_standard, node_names
from onnx_decompose.model.model_io import Model, read_tensor
from onnx_decompose.model.renames import defined_names, function_key, renamed
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.verification.cut import with_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.runtime.feeds import Feeds
    from onnx_decompose.runtime.sessions import Provider

__all__ = ["unrolled"]

logger = logging.getLogger(__name__)

_MOST_NODES = 20_000
_AXES_AS_INPUT = 13
"""Operator set in which Unsqueeze takes its axes as an input."""
_SCANS_WITHOUT_BATCH = 9
"""Operator set in which Scan took the form that it has since."""


def unrolled(model: Model, feeds: Feeds, provider: Provider) -> Model:
    """The model as it runs on ``feeds``; itself where nothing is inside, or where that would be very long.

    Args:
        model: the whole.
        feeds: an array per input.
        provider: where conditions and numbers of runs are worked out.

    Raises:
        ModelError: it does not run.
    """
    current = model
    while True:  # one level of graphs at a time
        level = _Level(current, feeds, provider)
        if not level.opens:
            return current
        proto = level.opened()
        if len(proto.graph.node) > _MOST_NODES:
            logger.info("%s: too long to be looked into", model.label)
            return model
        current = Model(proto, model.path)


class _Level:
    """Everything that the main graph holds, opened once."""

    def __init__(self, model: Model, feeds: Feeds, provider: Provider) -> None:
        self._model = model
        self._feeds = feeds
        self._provider = provider
        self._opset = opset_of(model.proto)
        versions = {entry.domain: entry.version for entry in model.proto.opset_import}
        self._functions = {
            (f.domain, f.name, f.overload): f
            for f in model.proto.functions
            if all(versions.get(e.domain) == e.version for e in f.opset_import)
            and not set(f.input) & set(f.output)
        }
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._sparse: list[onnx.SparseTensorProto] = []
        self.opens = any(map(self._is_open, model.proto.graph.node))

    def _is_open(self, node: onnx.NodeProto) -> bool:
        if function_key(node) in self._functions:
            return True
        if not is_standard(node):
            return False
        if node.op_type == "Scan":
            return self._opset >= _SCANS_WITHOUT_BATCH
        return node.op_type in {"If", "Loop"}

    def opened(self) -> onnx.ModelProto:
        """The model with what this level holds in its main graph."""
        graph = self._model.proto.graph
        values = self._values()
        for node, name in zip(graph.node, node_names(graph), strict=True):
            if not self._is_open(node):
                self._nodes.append(node)
            elif node.op_type == "If" and is_standard(node):
                self._branch(node, name, bool(values[node.input[0]].reshape(-1)[0]))
            elif node.op_type == "Loop" and is_standard(node):
                self._loop(node, name, int(values[_counter(node)].reshape(-1)[0]))
            elif node.op_type == "Scan" and is_standard(node):
                self._scan(node, name, values)
            else:
                self._call(node, name)
        proto = onnx.ModelProto()
        proto.CopyFrom(self._model.proto)
        del proto.graph.node[:]
        proto.graph.node.extend(self._nodes)
        proto.graph.initializer.extend(self._tensors.values())
        proto.graph.sparse_initializer.extend(self._sparse)
        return proto

    def _values(self) -> Mapping[str, NDArray[Any]]:
        """Conditions, numbers of runs, and what is scanned."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._model.proto)
        wanted: list[str] = []
        for node in proto.graph.node:
            if not is_standard(node) or not self._is_open(node):
                continue
            if node.op_type == "If":
                wanted.append(node.input[0])
            elif node.op_type == "Loop":
                wanted.append(_count(node, proto.graph))
            elif node.op_type == "Scan":
                wanted += node.input[len(node.input) - _scanned(node) :]
        stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        known = dict(self._feeds)
        known |= {n: read_tensor(self._model, stored[n]) for n in wanted if n in stored}
        run = [name for name in dict.fromkeys(wanted) if name not in known]
        if run:
            model = with_outputs(Model(proto, self._model.path), run)
            known |= open_model(model, self._provider).run(self._feeds)
        return known

    def _branch(self, node: onnx.NodeProto, name: str, condition: bool) -> None:
        taken = "then_branch" if condition else "else_branch"
        made = self._body(attribute_values(node)[taken], f"{name}.{taken}", {})
        for value, output in zip(made, node.output, strict=True):
            self._is(output, value)

    def _loop(self, node: onnx.NodeProto, name: str, runs: int) -> None:
        body = attribute_values(node)["body"]
        states, count = list(node.input[2:]), len(node.input) - 2
        condition = node.input[1] or self._constant(flat_name(name, "go"), np.array(True))
        parts: list[list[str]] = [[] for _ in node.output[count:]]
        for number in range(runs):
            label = _label(f"{name}.body", number)
            step = self._constant(flat_name(label, "step"), np.array(number, np.int64))
            formal = [value.name for value in body.input]
            made = self._body(
                body, label, dict(zip(formal, [step, condition, *states], strict=True))
            )
            condition, states = made[0], made[1 : count + 1]
            for found, value in zip(parts, made[count + 1 :], strict=True):
                found.append(self._unsqueezed(value, 0))
        for value, output in zip(states, node.output, strict=False):
            self._is(output, value)
        for found, output in zip(parts, node.output[count:], strict=True):
            self._joined(found, output, 0)

    def _scan(self, node: onnx.NodeProto, name: str, values: Mapping[str, Any]) -> None:
        given = attribute_values(node)
        body, scanned = given["body"], given["num_scan_inputs"]
        count = len(node.input) - scanned
        states, sequences = list(node.input[:count]), node.input[count:]
        axes = given.get("scan_input_axes", [0] * scanned)
        backwards = given.get("scan_input_directions", [0] * scanned)
        made_axes = given.get("scan_output_axes", [0] * (len(node.output) - count))
        turned = given.get("scan_output_directions", [0] * (len(node.output) - count))
        runs = values[sequences[0]].shape[axes[0]]
        parts: list[list[str]] = [[] for _ in made_axes]
        for number in range(runs):
            label = _label(f"{name}.body", number)
            read = list(states)
            for position, value in enumerate(sequences):
                place = runs - 1 - number if backwards[position] else number
                index = self._constant(flat_name(label, f"at{position}"), np.array(place))
                one = flat_name(label, f"scanned{position}")
                self._nodes.append(
                    helper.make_node("Gather", [value, index], [one], axis=axes[position])
                )
                read.append(one)
            formal = [value.name for value in body.input]
            made = self._body(body, label, dict(zip(formal, read, strict=True)))
            states = made[:count]
            for found, value, axis in zip(parts, made[count:], made_axes, strict=True):
                found.append(self._unsqueezed(value, axis))
        for value, output in zip(states, node.output, strict=False):
            self._is(output, value)
        for found, output, axis, last in zip(
            parts, node.output[count:], made_axes, turned, strict=True
        ):
            self._joined(found[::-1] if last else found, output, axis)

    def _call(self, node: onnx.NodeProto, name: str) -> None:
        function = self._functions[function_key(node)]
        given = {attribute.name: attribute for attribute in function.attribute_proto}
        given |= {attribute.name: attribute for attribute in node.attribute}
        graph = onnx.GraphProto(node=function.node)
        for inner in graph.node:
            give_attributes(inner, given)
        values = dict.fromkeys(function.input, "")
        values |= dict(zip(function.input, node.input, strict=False))
        values |= {
            formal: made
            for formal, made in zip(function.output, node.output, strict=False)
            if made
        }
        self._body(graph, name, values)

    def _body(self, graph: onnx.GraphProto, label: str, given: Mapping[str, str]) -> list[str]:
        """Add what a graph holds; ``given``: what its values are outside. Returns what it makes."""
        own = set(defined_names(graph))

        def resolve(name: str) -> str:
            if name in given:
                return given[name]
            return flat_name(label, name) if name in own else name

        for tensor in graph.initializer:
            copy = self._tensors.setdefault(resolve(tensor.name), onnx.TensorProto())
            copy.CopyFrom(tensor)
            copy.name = resolve(tensor.name)
        for sparse in graph.sparse_initializer:
            other = onnx.SparseTensorProto()
            other.CopyFrom(sparse)
            other.values.name = resolve(sparse.values.name)
            self._sparse.append(other)
        for node, name in zip(graph.node, node_names(graph), strict=True):
            inner = renamed(node, resolve)
            inner.name = f"{label}/{name}"
            self._nodes.append(inner)
        return [resolve(value.name) for value in graph.output]

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self._tensors[name] = numpy_helper.from_array(values, name)
        return name

    def _is(self, output: str, value: str) -> None:
        if output:
            self._nodes.append(helper.make_node("Identity", [value], [output]))

    def _unsqueezed(self, value: str, axis: int) -> str:
        made = f"{value}//unsqueezed"
        if self._opset < _AXES_AS_INPUT:
            node = helper.make_node("Unsqueeze", [value], [made], axes=[axis])
        else:
            axes = self._constant(f"{made}//axes", np.array([axis], np.int64))
            node = helper.make_node("Unsqueeze", [value, axes], [made])
        self._nodes.append(node)
        return made

    def _joined(self, parts: Sequence[str], output: str, axis: int) -> None:
        if output:
            self._nodes.append(helper.make_node("Concat", parts, [output], axis=axis))


def _label(label: str, number: int) -> str:
    return f"{label}@{number}" if number else label


def _scanned(node: onnx.NodeProto) -> int:
    return int(attribute_values(node)["num_scan_inputs"])


def _counter(node: onnx.NodeProto) -> str:
    return f"{next(filter(None, node.output))}//runs"


def _count(node: onnx.NodeProto, graph: onnx.GraphProto) -> str:
    """Make a Loop count its runs, in one more state, which is returned."""
    (body,) = (attribute.g for attribute in node.attribute if attribute.name == "body")
    name, count = _counter(node), len(node.input) - 2
    node.output.insert(count, name)
    zero, one = f"{name}//zero", f"{name}//one"
    for tensor, number in ((zero, 0), (one, 1)):
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.int64), tensor))
    node.input.append(zero)
    before, after = f"{name}//before", f"{name}//after"
    body.input.append(helper.make_tensor_value_info(before, TensorProto.INT64, []))
    body.node.append(helper.make_node("Add", [before, one], [after]))
    body.output.insert(count + 1, helper.make_tensor_value_info(after, TensorProto.INT64, []))
    return name
