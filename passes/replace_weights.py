"""The annealed model: the original graph with other weights and biases in it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import onnx
import onnx_graphsurgeon as gs

from onnx_decompose.biases import find_biases
from onnx_decompose.constants import Constants
from onnx_decompose.model_io import Model
from onnx_decompose.passes.base import GraphPass, PassResult
from onnx_decompose.passes.splice import Fresh, constant_nodes, with_nodes
from onnx_decompose.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.biases import Bias
    from onnx_decompose.sites import Site

__all__ = ["ReplaceWeights"]


@dataclasses.dataclass(frozen=True, eq=False)
class ReplaceWeights(GraphPass):
    """Give some sites a new dense weight or bias, and leave every other reader of the old tensors alone.

    Attributes:
        weights: site -> its new weight, (K, N), of the old one's type.
        biases: site -> its new bias, (N,), of the weight's type; where ``biases.find_biases`` finds no place for
            it, an Add takes over the site's output.
        record: filled with the initializer that holds each new bias, by site name.
    """

    weights: Mapping[Site, NDArray[Any]]
    biases: Mapping[Site, NDArray[Any]] = dataclasses.field(default_factory=dict)
    record: dict[str, str] = dataclasses.field(default_factory=dict)

    def touched(self, model: Model) -> frozenset[int]:
        """The sites and their biases, which read tensors of their own now, and the constants that only they read."""
        sites = {site.node for site in (*self.weights, *self.biases)}
        adders = {bias.node for bias in self._places(model).values() if bias.node is not None}
        return frozenset(sites | adders | constant_nodes(model.proto.graph))

    def call(self, model: Model) -> PassResult:
        """Add an initializer for each new weight and bias, and point the node that uses it to it."""
        if not self.weights and not self.biases:
            return PassResult(model, modified=False)
        edit = _Edit(model.proto.graph)
        for site, weight in self.weights.items():
            flipped = bool(attribute_values(edit.nodes[site.node]).get("transB", 0))
            tensor = edit.constant(f"{site.tensor}.annealed", weight.T if flipped else weight)
            edit.own(site.node).input[1] = tensor
        constants = Constants(model)
        places = self._places(model)
        for site, values in self.biases.items():
            bias = places[site.name]
            wanted = f"{bias.constant or site.output + '.bias'}.folded"
            # As many axes as before, so that the sum has no more of them either.
            held = () if bias.constant is None else constants[bias.constant].shape[:-1]
            tensor = edit.constant(wanted, values.reshape(*held, -1))
            self.record[site.name] = tensor
            if bias.node is None:
                edit.add_after(site, tensor)
            else:
                edit.set_input(bias.node, bias.slot, tensor)
        proto = with_nodes(model.proto, edit.ordered(), edit.tensors.values())
        return PassResult(Model(proto, model.path), modified=True)

    def _places(self, model: Model) -> Mapping[str, Bias]:
        if not self.biases:
            return {}
        return find_biases(model.proto.graph, self.biases, Constants(model))


class _Edit:
    """A graph's nodes while some of them are replaced by changed copies; the graph itself stays as it is."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.tensors: dict[str, gs.Constant] = {}
        self._owned: set[int] = set()
        self._after: dict[int, onnx.NodeProto] = {}
        self._fresh = Fresh(graph)

    def constant(self, wanted: str, values: NDArray[Any]) -> str:
        """The name of a new initializer."""
        tensor = self._fresh.constant(wanted, values)
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

    def set_input(self, index: int, slot: int, name: str) -> None:
        """Let a node read ``name`` in its input ``slot``, which may be one that it did not use."""
        node = self.own(index)
        node.input.extend("" for _ in range(len(node.input), slot + 1))
        node.input[slot] = name

    def add_after(self, site: Site, tensor: str) -> None:
        """Let an Add of the constant ``tensor`` take over the site's output."""
        node = self.own(site.node)
        node.output[0] = self._fresh.name(f"{site.output}.product")
        name = self._fresh.name(f"{site.name}.bias")
        self._after[site.node] = onnx.helper.make_node(
            "Add", [node.output[0], tensor], [site.output], name
        )

    def ordered(self) -> list[onnx.NodeProto]:
        """All nodes, the new ones in their places."""
        result: list[onnx.NodeProto] = []
        for index, node in enumerate(self.nodes):
            result.append(node)
            if index in self._after:
                result.append(self._after[index])
        return result
