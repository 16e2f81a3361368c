"""Where a site's bias lives: what has to change when a constant is added to a site's outputs.

Gemm              its third input
MatMul, then Add  the constant that the Add, the only reader of the product, adds to each unit
anything else     an Add that is not there yet
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.regions import Region, value_readers
from onnx_decompose.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.constants import Constants
    from onnx_decompose.sites import Site

__all__ = ["Bias", "bias_of", "find_biases", "region_with_biases"]


@dataclasses.dataclass(frozen=True, slots=True)
class Bias:
    """The place of one site's bias.

    Attributes:
        node: index of the node that adds it; None where a new Add has to follow the site.
        slot: which input of that node it is.
        constant: the constant that is there now, one number per unit or one for all; None for none.
        factor: what 1 in the product of input and weight is worth there (the alpha and beta of Gemm).
    """

    node: int | None
    slot: int = 1
    constant: str | None = None
    factor: float = 1.0


def find_biases(
    graph: onnx.GraphProto, sites: Iterable[Site], constants: Constants
) -> dict[str, Bias]:
    """The place of each site's bias, by site name."""
    readers = value_readers(graph)
    return {site.name: _find(graph, site, constants, readers) for site in sites}


def bias_of(site: Site, bias: Bias, constants: Constants, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers that a site's bias holds now, (N,) of ``dtype``; zeros where there is none."""
    if bias.constant is None:
        return np.zeros(site.shape[1], dtype)
    values = constants.array(bias.constant).reshape(-1).astype(dtype)
    return np.broadcast_to(values, (site.shape[1],)).copy()


def region_with_biases(
    region: Region, inserted: Sequence[Site], graph: onnx.GraphProto
) -> Region:
    """``region`` in a graph where an Add follows each of some sites.

    Args:
        region: of the graph before.
        inserted: the sites, of any region, that got a new Add right after them.
        graph: the graph with the new nodes.
    """
    places = sorted(site.node for site in inserted)
    names = {site.name for site in inserted}

    def moved(node: int) -> int:
        return node + bisect.bisect_left(places, node)

    nodes = {moved(node) for node in region.nodes}
    sites: list[Site] = []
    axis_of = dict(region.axis_of)
    for site in region.sites:
        node = moved(site.node)
        if site.name in names:
            nodes.add(node + 1)
            axis_of[graph.node[node].output[0]] = axis_of[site.output]
        sites.append(
            dataclasses.replace(site, node=node, output=str(graph.node[node].output[0]))
        )
    return dataclasses.replace(
        region, nodes=tuple(sorted(nodes)), sites=tuple(sites), axis_of=axis_of
    )


def _find(
    graph: onnx.GraphProto,
    site: Site,
    constants: Constants,
    readers: Mapping[str, set[int]],
) -> Bias:
    node = graph.node[site.node]
    units = site.shape[1]
    if site.op_type == "Gemm":
        attributes = attribute_values(node)
        alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
        name = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if beta == 0 or not (name is None or _is_per_unit(constants, name, units)):
            return Bias(None, factor=alpha)
        return Bias(site.node, 2, name, alpha / beta)
    (reader, *others) = readers.get(site.output, {-1})
    if reader < 0 or others or graph.node[reader].op_type != "Add":
        return Bias(None)
    for slot, name in enumerate(graph.node[reader].input):
        if name in constants and _is_per_unit(constants, name, units):
            return Bias(reader, slot, name)
    return Bias(None)


def _is_per_unit(constants: Constants, name: str, units: int) -> bool:
    """Whether a constant is one number per unit, or one for all, at every position."""
    shape = constants[name].shape
    return all(size == 1 for size in shape[:-1]) and shape[-1:] in {(), (1,), (units,)}
