"""Units in another order: every constant of a unit space is stored anew, and no operator is added."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_decompose.graph.sites import SITES, node_names
from onnx_decompose.model.metadata import Block, Reordered

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnx_decompose.graph.unit_spaces import UnitSpace
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.passes.splice import Fresh

    Orders = Sequence[tuple[UnitSpace, NDArray[np.intp]]]

__all__ = ["Renumbered", "renumber"]


class Renumbered:
    """The nodes of a graph with their constants in the new order, and what became of them.

    Attributes:
        nodes: all nodes of the graph, in their places.
        tensors: the new initializers.
        blocks: site name -> where its reordered weight is stored.
        reordered: name of each other new initializer -> the constant it was.
    """

    def __init__(self, nodes: Sequence[onnx.NodeProto]) -> None:
        self.nodes = list(nodes)
        self.tensors: list[gs.Constant] = []
        self.blocks: dict[str, tuple[Block, ...]] = {}
        self.reordered: dict[str, Reordered] = {}


def renumber(
    graph: onnx.GraphProto,
    constants: Constants,
    orders: Orders,
    fresh: Fresh,
    *,
    inside: Collection[int],
) -> Renumbered:
    """Store the constants of some unit spaces in another order of their units.

    Args:
        graph: the main graph.
        constants: its constants.
        orders: spaces, and which old unit stands at each place.
        fresh: names that are not taken.
        inside: nodes that are written anew by someone who knows the order: they are left alone here.
    """
    result = Renumbered(graph.node)
    names = node_names(graph)
    for (index, position), axes in _uses(orders).items():
        if index in inside:
            continue
        node = onnx.NodeProto()
        node.CopyFrom(result.nodes[index])
        name = node.input[position]
        constant = Reordered(name, axes)
        tensor = fresh.constant(f"{name}.renumbered", constant.apply(constants.array(name)))
        node.input[position] = tensor.name
        result.nodes[index] = node
        result.tensors.append(tensor)
        if position == 1 and _is_site(node):
            result.blocks[names[index]] = (_block(node, axes, tensor),)
        else:
            result.reordered[tensor.name] = constant
    return result


def _uses(orders: Orders) -> Mapping[tuple[int, int], dict[int, NDArray[np.intp]]]:
    """Node and input -> the new order of each of the constant's axes that has one."""
    uses: dict[tuple[int, int], dict[int, NDArray[np.intp]]] = {}
    for space, order in orders:
        for use in space.constants:
            uses.setdefault((use.node, use.input), {})[use.axis] = order
    return uses


def _is_site(node: onnx.NodeProto) -> bool:
    """Whether a node whose second input is of units is a site: of a convolution in groups those are no inputs."""
    return node.op_type in SITES and not any(
        a.name == "group" and a.i != 1 for a in node.attribute
    )


def _block(
    node: onnx.NodeProto, axes: Mapping[int, NDArray[np.intp]], tensor: gs.Constant
) -> Block:
    """A site's whole weight, its units in the order that they are stored in."""
    if node.op_type == "Conv":
        outputs, inputs, *kernel = tensor.values.shape
        taps = math.prod(kernel)
        units = axes.get(1 - tensor.values.ndim, np.arange(inputs, dtype=np.intp))
        made = axes.get(-tensor.values.ndim, np.arange(outputs, dtype=np.intp))
        entries = (units[:, None] * taps + np.arange(taps)).ravel()
        return Block(entries, made, tensor.name, True)
    flipped = any(a.name == "transB" and a.i for a in node.attribute)
    stored = {
        axis: axes.get(axis, np.arange(tensor.values.shape[axis], dtype=np.intp))
        for axis in (-2, -1)
    }
    rows, columns = (-1, -2) if flipped else (-2, -1)
    return Block(stored[rows], stored[columns], tensor.name, flipped)
