"""The annealed model: the original graph with other weights in it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import onnx

from onnx_decompose.model_io import Model
from onnx_decompose.passes.base import GraphPass, PassResult
from onnx_decompose.passes.splice import Fresh, constant_nodes, with_nodes
from onnx_decompose.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnx_decompose.sites import Site

__all__ = ["ReplaceWeights"]


@dataclasses.dataclass(frozen=True, eq=False)
class ReplaceWeights(GraphPass):
    """Give each of some sites a new dense weight, and leave every other reader of the old tensor alone.

    Attributes:
        weights: site -> its new weight, (K, N), of the old one's type.
    """

    weights: Mapping[Site, NDArray[Any]]

    def touched(self, model: Model) -> frozenset[int]:
        """The sites, which read tensors of their own now, and the constant nodes that only they read."""
        sites = {site.node for site in self.weights}
        return frozenset(sites | constant_nodes(model.proto.graph))

    def call(self, model: Model) -> PassResult:
        """Add an initializer for each new weight and point the site's node to it."""
        if not self.weights:
            return PassResult(model, modified=False)
        nodes = list(model.proto.graph.node)
        fresh = Fresh(model.proto.graph)
        tensors: dict[str, gs.Constant] = {}
        for site, weight in self.weights.items():
            node = onnx.NodeProto()
            node.CopyFrom(nodes[site.node])
            flipped = bool(attribute_values(node).get("transB", 0))
            tensor = fresh.constant(f"{site.tensor}.annealed", weight.T if flipped else weight)
            node.input[1] = tensor.name
            tensors[tensor.name] = tensor
            nodes[site.node] = node
        proto = with_nodes(model.proto, nodes, tensors.values())
        return PassResult(Model(proto, model.path), modified=True)
