"""The annealed model: the original graph with other weights and biases in it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import onnx

from onnx_decompose.graph.biases import find_biases
from onnx_decompose.graph.gates import find_gates
from onnx_decompose.graph.quantized import weight_position
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model
from onnx_decompose.passes.base import GraphPass, PassResult
from onnx_decompose.passes.splice import ORIGIN_KEY, Fresh, constant_nodes, with_nodes

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnx_decompose.graph.biases import Bias
    from onnx_decompose.graph.gates import Gate
    from onnx_decompose.graph.sites import Site

__all__ = ["ReplaceWeights"]


@dataclasses.dataclass(frozen=True, eq=False)
class ReplaceWeights(GraphPass):
    """Give some sites a new dense weight or bias, and leave every other reader of the old tensors alone.

    Attributes:
        weights: site -> what is stored for its new weight, (K, N), of the old one's type.
        biases: site -> its new bias, (N,), of the weight's type, stored where ``biases.find_biases`` says; where
            that is nowhere, an Add takes over the site's output.
        absorbed: site -> how many of the nodes after it (``biases.absorbable``) its new weight and bias stand for.
        slopes: sites whose new weight and bias hold the slope of the gate after them (``gates.find_gates``), which the
            weights of those that read the gate make up for.
        record: filled with the initializer that holds each new bias, by site name.
        outputs: filled with the value that a site's own node makes now, by site name, where it is another one.
    """

    weights: Mapping[Site, NDArray[Any]]
    biases: Mapping[Site, NDArray[Any]] = dataclasses.field(default_factory=dict)
    absorbed: Mapping[Site, int] = dataclasses.field(default_factory=dict)
    slopes: Collection[Site] = ()
    record: dict[str, str] = dataclasses.field(default_factory=dict)
    outputs: dict[str, str] = dataclasses.field(default_factory=dict)

    def touched(self, model: Model) -> frozenset[int]:
        """The sites and their biases, which read tensors of their own now, and the constants that only they read."""
        sites = {site.node for site in (*self.weights, *self.biases, *self.absorbed)}
        places = self._places(model)
        after = {node for bias in places.values() for node in bias.nodes}
        after |= {
            n for gate in self._gates(model, places) for n in (gate.scaling, gate.sigmoid)
        }
        return frozenset(sites | after | constant_nodes(model.proto.graph))

    def call(self, model: Model) -> PassResult:
        """Add an initializer for each new weight and bias, and point the node that uses it to it."""
        if not (self.weights or self.biases or self.absorbed or self.slopes):
            return PassResult(model, modified=False)
        edit = _Edit(model.proto.graph)
        for site, weight in self.weights.items():
            edit.weight(site, weight)
        places = self._places(model)
        for site in dict.fromkeys((*self.biases, *self.absorbed)):
            bias = places[site.name]
            stored: str | None = None
            if site in self.biases:
                wanted = f"{bias.constant or site.output + '.bias'}.folded"
                shape = (*(1 for _ in range(bias.axes)), -1)
                # Two sites that had one bias have one each now: what becomes of it is told by its name.
                stored = edit.constant(wanted, self.biases[site].reshape(shape), shared=False)
                self.record[site.name] = stored
            if bias.position is not None:
                assert stored is not None
                edit.own(bias.nodes[0]).input[bias.position] = stored
            else:
                assert not bias.integers
                self.outputs[site.name] = edit.affine(site, bias, stored)
        for gate in self._gates(model, places):
            edit.without_slope(gate)
        proto = with_nodes(model.proto, edit.ordered(), edit.tensors.values())
        return PassResult(Model(proto, model.path), modified=True)

    def _places(self, model: Model) -> Mapping[str, Bias]:
        sites = dict.fromkeys((*self.biases, *self.absorbed, *self.slopes))
        counts = {site.name: count for site, count in self.absorbed.items()}
        return find_biases(model.proto.graph, sites, Constants(model), counts) if sites else {}

    def _gates(self, model: Model, places: Mapping[str, Bias]) -> Collection[Gate]:
        if not self.slopes:
            return ()
        return find_gates(model.proto.graph, self.slopes, Constants(model), places).values()


class _Edit:
    """A graph's nodes while some of them are replaced by changed copies; the graph itself stays as it is."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.tensors: dict[str, gs.Constant] = {}
        self._owned: set[int] = set()
        self._before: dict[int, list[onnx.NodeProto]] = {}
        self._after: dict[int, onnx.NodeProto] = {}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._gone: set[int] = set()
        self._fresh = Fresh(graph)

    def constant(self, wanted: str, values: NDArray[Any], *, shared: bool = True) -> str:
        """The name of a new initializer; arguments as of :meth:`Fresh.constant`."""
        tensor = self._fresh.constant(wanted, values, shared=shared)
        self.tensors[tensor.name] = tensor
        return str(tensor.name)

    def own(self, index: int) -> onnx.NodeProto:
        """A node that may be changed."""
        if index not in self._owned:
            copy = onnx.NodeProto()
            copy.CopyFrom(self.nodes[index])
            self.nodes[index] = copy
            self._owned.add(index)
        return self.nodes[index]

    def weight(self, site: Site, weight: NDArray[Any]) -> None:
        """Let a site have another weight, stored as the old one is."""
        if site.quantized is None:
            laid = site.laid_out(weight, self.nodes[site.node])
            tensor = self.constant(f"{site.tensor}.annealed", laid)
            self.own(site.node).input[weight_position(site.op_type)] = tensor
            return
        codes = site.quantized.codes
        tensor = self.constant(f"{site.tensor}.annealed", codes.stored(weight, 2))
        renamed: dict[str, str] = {}
        for name in site.quantized.made:
            copy = onnx.NodeProto()
            copy.CopyFrom(self._makers[name])
            copy.input[:] = [renamed.get(operand, operand) for operand in copy.input]
            if name == codes.maker:
                copy.input[codes.position] = tensor
            renamed[name] = self._fresh.name(f"{name}.annealed")
            copy.output[0] = renamed[name]
            copy.name = self._fresh.name(f"{copy.name or name}.annealed")
            self._before.setdefault(site.node, []).append(copy)
        read = renamed[site.weight] if renamed else tensor
        self.own(site.node).input[weight_position(site.op_type)] = read

    def affine(self, site: Site, bias: Bias, tensor: str | None) -> str:
        """Let the constant ``tensor`` (None: nothing) take the place of a site's bias and the nodes that make it.

        Returns:
            The value that the site's own node makes now.
        """
        node = self.own(site.node)
        if not node.name:  # it is known by what it makes, which may change
            node.metadata_props.add(key=ORIGIN_KEY, value=node.output[0])
        last = self.nodes[bias.nodes[-1]].output[0] if bias.nodes else site.output
        if bias.inside and tensor is not None:
            node.input.extend("" for _ in range(len(node.input), 3))
            node.input[2] = tensor
        if bias.inside or tensor is None:
            node.output[0] = last
            self._gone.update(bias.nodes)
        elif bias.nodes:
            self._gone.update(bias.nodes[:-1])
            add = self.own(bias.nodes[-1])
            add.op_type = "Add"
            add.input[:] = [site.output, tensor]
        else:
            node.output[0] = self._fresh.name(f"{site.output}.product")
            name = self._fresh.name(f"{site.name}.bias")
            self._after[site.node] = onnx.helper.make_node(
                "Add", [node.output[0], tensor], [last], name
            )
        return str(node.output[0])

    def without_slope(self, gate: Gate) -> None:
        """Let a gate open by its value alone."""
        self._gone.add(gate.scaling)
        node = self.own(gate.sigmoid)
        node.input[0] = gate.value
        node.metadata_props.add(key=ORIGIN_KEY, value=node.name or node.output[0])

    def ordered(self) -> list[onnx.NodeProto]:
        """All nodes that are left, the new ones in their places."""
        result: list[onnx.NodeProto] = []
        for index, node in enumerate(self.nodes):
            result.extend(self._before.get(index, ()))
            if index not in self._gone:
                result.append(node)
            if index in self._after:
                result.append(self._after[index])
        return result
