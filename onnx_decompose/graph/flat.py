"""A model with graphs inside its graph as one flat graph: sites in bodies and functions are found like all others.

A node of the main graph that holds weights further inside is *opened*: what is inside stands before it, between two
markers.

    If, Loop, Scan  their bodies, and a stand-in in the node's own place; a body reads the constants of outer graphs as
                    they are, and every other outer value as an input of its own, so that no region leaves it
    function call   the function's nodes on the call's own values, and nothing in the call's place

``closing`` puts bodies back into their nodes, and calls where nothing inside was rewritten. Flat names are the same for
every version of a model: for values ``owner.attribute//value`` and ``call//value``, for nodes ``owner.attribute/name``
and ``call/name``.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import TYPE_CHECKING

import onnx
from onnx import helper

from onnx_decompose.graph.lowering import Lowering
from onnx_decompose.graph.refusals import holds_weights
from onnx_decompose.graph.regions import reads
from onnx_decompose.graph.sites import OVERRIDABLE, computed_reason, is_standard, node_names
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.renames import (
    all_nodes,
    defined_names,
    function_key,
    renamed,
    subgraphs,
)
from onnx_decompose.model.shapes import inferred, known_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Functions = Mapping[tuple[str, str, str], onnx.FunctionProto]

logger = logging.getLogger(__name__)

__all__ = [
    "CLOSED_DOMAIN",
    "RESERVED_KEY",
    "Flat",
    "Opened",
    "flat_name",
    "flatten",
    "give_attributes",
    "marker",
]

CLOSED_DOMAIN = "onnx_decompose.closed"
"""Domain of the node that stands for an opened If, Loop or Scan."""

RESERVED_KEY = "onnx_decompose.reserved"
"""Metadata of the flat graph: names that are not in it, and are in the model that it stands for."""

_BEGIN, _END = "onnx_decompose//begin//", "onnx_decompose//end//"
_STATE = "its weight is a state of the loop, which an iteration may change"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """What lies between two markers.

    Attributes:
        owner: the call, or the node whose body it is, as it would stand closed in the flat graph.
        body: what messages call the attribute that is the body; None for a call.
        label: what its names begin with.
        values: flat name -> name inside a body, for its own values and those it captures.
        nodes: flat name -> name inside a body, None for a node without one.
    """

    owner: onnx.NodeProto
    body: str | None
    label: str
    values: Mapping[str, str]
    nodes: Mapping[str, str | None]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A model in the form in which it is studied.

    Attributes:
        model: the flat model; the source itself where there is nothing to open.
        source: the model that it stands for.
        hidden: values that look like inputs of a body and begin as a constant; and why they are none.
        opened: what lies between each two markers.
        lowering: what found the products in other forms.
    """

    model: Model
    source: Model
    hidden: Mapping[str, str] = dataclasses.field(default_factory=dict)
    opened: tuple[Opened, ...] = ()
    lowering: Lowering | None = None


def flatten(model: Model, like: Flat | None = None) -> Flat:
    """``model`` with everything open that holds weights inside, and products in other forms as products x @ W.

    Args:
        model: the model.
        like: another version of it: what form a product is taken to have follows that one.
    """
    return _lowered(_opened(model), None if like is None else like.lowering)


def _lowered(flat: Flat, like: Lowering | None) -> Flat:
    """The same with the nodes of products in other forms in place of these."""
    graph = flat.model.proto.graph
    lowering = Lowering(flat.model, like)
    groups = [
        lowering.nodes(node, name)
        for node, name in zip(graph.node, node_names(graph), strict=True)
    ]
    if not any(groups):
        return dataclasses.replace(flat, lowering=lowering)
    read = {value.name for value in graph.output}
    for node, group in zip(graph.node, groups, strict=True):
        read.update(name for one in group or [node] for name in reads(one))
    nodes: list[onnx.NodeProto] = []
    opened = list(flat.opened)
    for node, group in zip(graph.node, groups, strict=True):
        # Where all that turns a value back takes it as it was, nothing turns it.
        idle = (
            node.output[:1] and node.output[0] in lowering.turned and node.output[0] not in read
        )
        if not group and not idle:
            nodes.append(node)
            continue
        begin, end = _marks(len(opened))
        opened.append(Opened(node, None, "", {}, {}))
        nodes += [begin, *(group[:-1] if idle else group), end]
    proto = onnx.ModelProto()
    proto.CopyFrom(flat.model.proto)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = Model(proto, flat.model.path)
    return Flat(model, flat.source, flat.hidden, tuple(opened), lowering)


def _marks(number: int) -> list[onnx.NodeProto]:
    """The two markers of a segment."""
    return [
        helper.make_node(
            "Constant",
            [],
            [f"{kind}{number}"],
            f"{kind}{number}",
            value=helper.make_tensor("", onnx.TensorProto.INT64, [], [number]),
        )
        for kind in (_BEGIN, _END)
    ]


def _opened(model: Model) -> Flat:
    """``model`` with everything open that holds weights inside."""
    functions = _functions(model.proto)
    if not any(_opens(node, functions) for node in model.proto.graph.node):
        return Flat(model, model)
    flattener = _Flattener(model, functions)
    flat = flattener.flat()
    made = collections.Counter(defined_names(flat.model.proto.graph))
    stored = {tensor.name for tensor in model.proto.graph.initializer}
    if any(count > 1 for name, count in made.items() if name not in stored):
        logger.info("names of inner graphs cannot be told from outer ones; they stay closed")
        return Flat(model, model)
    return flat


def flat_name(label: str, name: str) -> str:
    """What a value of a body is called; one that was inside a call or a product already has a path for a name."""
    return f"{label}/{name}" if "//" in name else f"{label}//{name}"


def marker(node: onnx.NodeProto) -> tuple[int, bool] | None:
    """The number of what begins or ends at ``node``, and whether it ends; None for what is no marker."""
    for kind in (_BEGIN, _END):
        if node.op_type == "Constant" and node.name.startswith(kind):
            return int(node.name.removeprefix(kind)), kind == _END
    return None


def _opens(node: onnx.NodeProto, functions: Functions) -> bool:
    """Whether ``node`` holds weights further inside."""
    function = functions.get(function_key(node))
    if function is not None:
        return _holds(function.node, functions)
    return any(_holds(graph.node, functions) for _, graph in subgraphs(node))


def _holds(nodes: Iterable[onnx.NodeProto], functions: Functions) -> bool:
    return any(holds_weights(node) or _opens(node, functions) for node in nodes)


def _functions(proto: onnx.ModelProto) -> Functions:
    """The model's own functions but those that call themselves."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    called = {
        key: {function_key(node) for node in all_nodes(function.node)} & functions.keys()
        for key, function in functions.items()
    }
    open_ended = True
    while open_ended:  # leaves go first; what stays calls itself
        done = [key for key, others in called.items() if not others & called.keys()]
        open_ended = bool(done)
        for key in done:
            del called[key]
    return {key: function for key, function in functions.items() if key not in called}


@dataclasses.dataclass(slots=True, eq=False)
class _Scope:
    """What the names of one graph are in the flat one.

    Attributes:
        label: what its own begin with; empty in the main graph.
        outer: the graph around a body.
        values: name -> flat name.
        nodes: flat name of a node -> its own.
        captured: flat name of a value from outside -> its flat name there.
    """

    label: str = ""
    outer: _Scope | None = None
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    nodes: dict[str, str | None] = dataclasses.field(default_factory=dict)
    captured: dict[str, str] = dataclasses.field(default_factory=dict)

    def value(self, name: str) -> str:
        """The flat name of a value of its own."""
        return flat_name(self.label, name)

    def inside(self, name: str) -> str:
        """``name`` as a path from the main graph."""
        return f"{self.label}/{name}" if self.label else name


class _Flattener:
    """Builds the flat graph of one model."""

    def __init__(self, model: Model, functions: Functions) -> None:
        self._source = model
        self._functions = functions
        self._constants = Constants(model)
        self._followed = {name for name in self._constants.names if name in self._constants}
        self._hidden = dict.fromkeys(self._constants.overridable, OVERRIDABLE)
        self._hidden |= {
            name: computed_reason(behind) for name, behind in self._constants.computed.items()
        }
        self._types: dict[str, onnx.TypeProto] = {}
        self._labels: set[str] = set()
        self._opened: list[Opened] = []
        self._versions = {_domain(e.domain): e.version for e in model.proto.opset_import}
        self._nodes: list[onnx.NodeProto] = []
        self._graph = onnx.GraphProto()
        """Inputs, outputs, tensors and what is said of values, as far as they come from inside."""
        self._reserved: set[str] = set()

    def flat(self) -> Flat:
        """The flat graph."""
        known = inferred(self._source.proto).graph
        scope = _Scope()
        self._add_graph(self._source.proto.graph, known, scope)
        if not self._opened:
            return Flat(self._source, self._source)
        proto = onnx.ModelProto()
        proto.CopyFrom(self._source.proto)
        graph = proto.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        for field in (
            "input",
            "output",
            "initializer",
            "sparse_initializer",
            "value_info",
            "quantization_annotation",
        ):
            getattr(graph, field).extend(getattr(self._graph, field))
        graph.metadata_props.add(key=RESERVED_KEY, value="\n".join(sorted(self._reserved)))
        proto.opset_import.add(domain=CLOSED_DOMAIN, version=1)
        outer = self._constants.overridable | self._constants.computed.keys()
        return Flat(
            Model(proto, self._source.path),
            self._source,
            {name: why for name, why in self._hidden.items() if name not in outer},
            tuple(self._opened),
        )

    def _add_graph(self, graph: onnx.GraphProto, known: onnx.GraphProto, scope: _Scope) -> None:
        """Add the nodes of a graph; ``known`` is the same graph with what inference says of its values."""
        for name, value in known_values(known).items():
            self._types[scope.values.get(name, name)] = value.type
        for node, name, twin in zip(graph.node, node_names(graph), known.node, strict=True):
            self._add(node, name, twin, scope)

    def _add(
        self, node: onnx.NodeProto, name: str, known: onnx.NodeProto, scope: _Scope
    ) -> None:
        """Add a node, open or as it is; ``name`` is unique in its graph."""
        closed = self._closed(node, name, scope)
        function = self._functions.get(function_key(node))
        if function is not None:
            if _holds(function.node, self._functions) and self._fits(function, node):
                self._open_call(closed, function, scope.inside(name))
                return
        elif _opens(node, self._functions):
            self._open_bodies(node, closed, known, scope, scope.inside(name))
            return
        self._nodes.append(closed)
        if is_standard(node) and node.op_type == "Constant":
            self._followed.update(closed.output)

    def _closed(self, node: onnx.NodeProto, name: str, scope: _Scope) -> onnx.NodeProto:
        """``node`` as it stands in the flat graph."""
        if not scope.label:
            return node
        closed = renamed(node, lambda value: self._resolve(value, scope))
        closed.name = scope.inside(name)
        scope.nodes[closed.name] = node.name if node.HasField("name") else None
        return closed

    def _resolve(self, name: str, scope: _Scope) -> str:
        """The flat name of a value."""
        if not name or not scope.label:
            return name
        if name in scope.values:
            return scope.values[name]
        if scope.outer is None:  # a function that reads what nothing makes
            return scope.value(name)
        outside = self._resolve(name, scope.outer)
        if outside in self._followed:
            return outside
        flat = scope.value(name)
        scope.values[name] = flat
        scope.captured[flat] = outside
        self._add_input(flat, self._types.get(outside))
        if outside in self._hidden:
            self._hidden[flat] = self._hidden[outside]
        return flat

    def _add_input(self, name: str, kind: onnx.TypeProto | None) -> None:
        value = self._graph.input.add(name=name)
        if kind is not None:
            value.type.CopyFrom(kind)
            self._types[name] = kind

    # Bodies

    def _open_bodies(
        self,
        node: onnx.NodeProto,
        closed: onnx.NodeProto,
        known: onnx.NodeProto,
        scope: _Scope,
        path: str,
    ) -> None:
        stand_in = onnx.NodeProto(
            op_type=node.op_type,
            domain=CLOSED_DOMAIN,
            name=closed.name,
            input=closed.input,
            output=closed.output,
            attribute=[a for a in node.attribute if not a.HasField("g") and not a.graphs],
        )
        for (attribute, graph), (_, twin) in zip(
            subgraphs(node), subgraphs(known), strict=True
        ):
            inner = _Scope(self._label(f"{path}.{attribute}"), scope)
            self._declare(graph, closed, inner)
            with_known = known_values(twin)
            for value in graph.input:
                self._add_input(
                    inner.values[value.name],
                    with_known[value.name].type if value.name in with_known else value.type,
                )
            begin, end = _marks(len(self._opened))
            self._nodes.append(begin)
            names = {flat: name for name, flat in inner.values.items()}
            self._opened.append(Opened(closed, attribute, inner.label, names, inner.nodes))
            self._add_graph(graph, twin, inner)
            self._nodes.append(end)
            self._say(graph, inner)
            names.update(inner.captured)
            stand_in.input.extend(
                name for name in inner.captured.values() if name not in stand_in.input
            )
        self._nodes.append(stand_in)
        outer_says = {value.name for value in self._source.proto.graph.value_info}
        outer_says |= {value.name for value in self._source.proto.graph.output}
        for name in filter(None, closed.output):
            if name in self._types and name not in outer_says:
                self._graph.value_info.add(name=name, type=self._types[name])

    def _declare(self, graph: onnx.GraphProto, closed: onnx.NodeProto, inner: _Scope) -> None:
        """Name everything that a body brings, and add its tensors."""
        for name in defined_names(graph):
            inner.values[name] = inner.value(name)
            self._reserved.add(name)
        for tensor in graph.initializer:
            copy = self._graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = inner.values[tensor.name]
            self._followed.add(copy.name)
        for sparse in graph.sparse_initializer:
            other = self._graph.sparse_initializer.add()
            other.CopyFrom(sparse)
            other.values.name = inner.values[sparse.values.name]
            self._followed.add(other.values.name)
        # The inputs of a Loop's body and of a Scan's are those of the node, in order, Loop's condition and iteration
        # number included.
        for value, outside in zip(graph.input, closed.input, strict=False):
            if outside in self._followed or outside in self._hidden:
                self._hidden[inner.values[value.name]] = _STATE

    def _say(self, graph: onnx.GraphProto, inner: _Scope) -> None:
        """Add a body's outputs, and what it says of its values."""
        there = {value.name for value in self._graph.output}
        there |= {value.name for value in self._source.proto.graph.output}
        for value in graph.output:
            flat = self._resolve(value.name, inner)
            if flat not in there:
                there.add(flat)
                self._graph.output.add(name=flat, type=self._types.get(flat, value.type))
        for value in graph.value_info:
            if value.name in inner.values:
                copy = self._graph.value_info.add()
                copy.CopyFrom(value)
                copy.name = inner.values[value.name]
        for annotation in graph.quantization_annotation:
            if annotation.tensor_name in inner.values:
                other = self._graph.quantization_annotation.add()
                other.CopyFrom(annotation)
                other.tensor_name = inner.values[annotation.tensor_name]

    # Calls

    def _fits(self, function: onnx.FunctionProto, node: onnx.NodeProto) -> bool:
        """Whether the nodes of ``function`` mean the same in the main graph."""
        return (
            all(
                self._versions.get(_domain(entry.domain)) == entry.version
                for entry in function.opset_import
            )
            and not set(function.input) & set(function.output)
            and len(node.input) <= len(function.input)
            and len(node.output) <= len(function.output)
        )

    def _open_call(self, call: onnx.NodeProto, function: onnx.FunctionProto, path: str) -> None:
        scope = _Scope(self._label(path))
        for node in function.node:
            for name in filter(None, node.output):
                scope.values[name] = scope.value(name)
        scope.values |= dict.fromkeys(function.input, "")
        scope.values |= dict(zip(function.input, call.input, strict=False))
        scope.values |= {
            name: flat for name, flat in zip(function.output, call.output, strict=False) if flat
        }
        given = {attribute.name: attribute for attribute in function.attribute_proto}
        given |= {attribute.name: attribute for attribute in call.attribute}
        graph = onnx.GraphProto(node=function.node)
        for node in graph.node:
            give_attributes(node, given)
        begin, end = _marks(len(self._opened))
        self._nodes.append(begin)
        self._opened.append(Opened(call, None, scope.label, {}, {}))
        self._add_graph(graph, graph, scope)
        self._nodes.append(end)

    # Marks

    def _label(self, wanted: str) -> str:
        while wanted in self._labels:
            wanted += "'"
        self._labels.add(wanted)
        return wanted


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def give_attributes(node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto]) -> None:
    """Put a call's attributes in the places of a function's node that refer to them."""
    attributes: list[onnx.AttributeProto] = []
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            attributes.append(attribute)
        elif attribute.ref_attr_name in given:
            copy = onnx.AttributeProto()
            copy.CopyFrom(given[attribute.ref_attr_name])
            copy.name = attribute.name
            attributes.append(copy)
    del node.attribute[:]
    node.attribute.extend(attributes)
    for _, graph in subgraphs(node):
        for inner in graph.node:
            give_attributes(inner, given)
