"""Gates with a slope, y = x * sigmoid(b x), as trainable SiLU and swish have one: b per unit, or one for all.

With u = b x it is y = u * sigmoid(u) / b. Where x is a site's own value, u is the same site with its columns and bias
times b; and where only sites read y, 1 / b goes into their rows. The factor inside the gate is then one, and is gone.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.graph.biases import is_per_unit_constant, per_unit_row
from onnx_decompose.graph.per_unit import is_elementwise
from onnx_decompose.graph.regions import value_readers
from onnx_decompose.graph.sites import attribute_values, is_standard
from onnx_decompose.model.tensors import smallest_normal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.biases import Bias
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants

__all__ = ["Gate", "find_gates", "reading_sites", "with_slopes"]

_PASSED = {"Div", "Dropout", "Identity", "Mul", "Neg"}
"""Operators that a factor per unit passes through: one that comes in goes out."""

_LOST_RANGE = 1 / 8
"""Share of the exponents under one that a slope may cost.

Rounding is relative, so that no slope costs digits as long as nothing leaves the range of numbers that have all of
theirs. Under float16 that range is short: 14 exponents. Values times a slope of 2**-1.75 leave it that much earlier,
and for float32, with 126, it is 2**-15.75.
"""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """A value times the sigmoid of itself times a slope.

    Attributes:
        value: x, which nothing else reads.
        scaling: index of the Mul by the slope.
        sigmoid: index of the Sigmoid, all that reads that.
        output: y.
        slope: (N,) float64.
    """

    value: str
    scaling: int
    sigmoid: int
    output: str
    slope: NDArray[np.float64]


def find_gates(
    graph: onnx.GraphProto,
    sites: Iterable[Site],
    constants: Constants,
    places: Mapping[str, Bias],
) -> dict[str, Gate]:
    """The gate after each site that has one with a slope that the site can hold, by site name.

    Args:
        graph: the main graph.
        sites: sites of it.
        constants: its constants.
        places: the affine part of each site by name (``biases.find_biases``): a gate follows all of it.
    """
    readers = value_readers(graph)
    found: dict[str, Gate] = {}
    for site in sites:
        place = places[site.name]
        # A Gemm whose third input is no bias of its units, or integers, cannot be scaled as a whole.
        if site.quantized is not None or not (place.inside or site.op_type == "MatMul"):
            continue
        gate = _gate(graph, site, place, constants, readers)
        if gate is not None:
            found[site.name] = gate
    return found


def reading_sites(
    graph: onnx.GraphProto, gate: Gate, made_by: Site, sites: Iterable[Site]
) -> tuple[Site, ...]:
    """The sites that read a gate, each unit as one of its inputs; none where anything else depends on it.

    Args:
        graph: the main graph.
        gate: a gate of it.
        made_by: the site before it.
        sites: all sites that may read it.
    """
    readers = value_readers(graph)
    at = {site.node: site for site in sites if site.quantized is None}
    found: list[Site] = []
    passed: set[int] = set()
    values = [gate.output]
    while values:
        value = values.pop()
        for index in readers.get(value, {-1}):
            # Two ways to one node multiply: the factor would come in twice.
            if index < 0 or index in passed:
                return ()
            passed.add(index)
            node = graph.node[index]
            if index in at:
                site = at[index]
                fits = (site.units[0], site.unit_axis) == (made_by.shape[1], made_by.unit_axis)
                if not fits or list(node.input).count(value) > 1:
                    return ()
                found.append(site)
            elif _passes(node, value):
                values.append(node.output[0])
            else:
                return ()
    return tuple(found)


def with_slopes(
    graph: onnx.GraphProto,
    sites: Collection[Site],
    constants: Constants,
    places: Mapping[str, Bias],
    slopes: Collection[str],
) -> dict[str, Bias]:
    """The affine parts with the slopes of the gates after some sites in them, and with their inverses in other rows.

    Args:
        graph: the main graph.
        sites: all sites that hold a slope or read such a gate.
        constants: the constants of the graph.
        places: the affine part of each site by name, without any slope.
        slopes: names of the sites that take in the slope of the gate after them.
    """
    result = dict(places)
    holding = [site for site in sites if site.name in slopes]
    gates = find_gates(graph, holding, constants, places)
    for site in holding:
        gate = gates.get(site.name)
        reading = () if gate is None else reading_sites(graph, gate, site, sites)
        if gate is None or not reading:
            continue
        place = result[site.name]
        result[site.name] = dataclasses.replace(
            place, scale=place.scale * gate.slope, shift=place.shift * gate.slope
        )
        for reader in reading:
            place = result[reader.name]
            rows = place.rows / np.repeat(gate.slope, reader.taps)
            result[reader.name] = dataclasses.replace(place, rows=rows)
    return result


def _gate(
    graph: onnx.GraphProto,
    site: Site,
    place: Bias,
    constants: Constants,
    readers: Mapping[str, set[int]],
) -> Gate | None:
    both = readers.get(place.value, set())
    if len(both) != 2 or -1 in both:
        return None
    for scaling, product in itertools.permutations(both):
        slope = _slope(graph.node[scaling], site, place, constants)
        if slope is None:
            continue
        (sigmoid, *others) = readers.get(graph.node[scaling].output[0], {-1})
        if others or sigmoid < 0 or not _is_plain(graph.node[sigmoid], "Sigmoid"):
            continue
        opened = graph.node[sigmoid].output[0]
        node = graph.node[product]
        if readers.get(opened) != {product} or not _is_plain(node, "Mul"):
            continue
        if sorted(node.input) == sorted([place.value, opened]):
            return Gate(place.value, scaling, sigmoid, node.output[0], slope)
    return None


def _slope(
    node: onnx.NodeProto, site: Site, place: Bias, constants: Constants
) -> NDArray[np.float64] | None:
    """The factor of each unit, (N,), that a node multiplies the site's value by; None where it does something else."""
    if not _is_plain(node, "Mul") or len(node.input) != 2 or place.value not in node.input:
        return None
    first, second = node.input
    name = second if first == place.value else first
    if name not in constants or not is_per_unit_constant(
        constants, name, site.shape[1], site.unit_axis
    ):
        return None
    # With more axes than the value has, the product has more too.
    least = {"Gemm": 2, "Conv": 2 + len(site.kernel)}.get(site.op_type, place.axes + 1)
    if len(constants[name].shape) > least:
        return None
    size = np.abs(per_unit_row(constants, name))
    limit = smallest_normal(constants.array(name).dtype) ** _LOST_RANGE
    if not ((size >= limit) & (size <= 1 / limit)).all():
        return None
    return np.broadcast_to(per_unit_row(constants, name), (site.shape[1],))


def _passes(node: onnx.NodeProto, value: str) -> bool:
    """Whether a factor per unit of ``value`` is a factor of what ``node`` makes of it."""
    if node.op_type not in _PASSED or not is_elementwise(node):
        return False
    if node.op_type == "Div" and node.input[0] != value:
        return False
    return list(node.input).count(value) == 1


def _is_plain(node: onnx.NodeProto, op: str) -> bool:
    return node.op_type == op and is_standard(node) and not attribute_values(node)
