"""Sites: nodes with a constant weight, oriented (K inputs, N outputs)."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.errors import ModelError
from onnx_decompose.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.constant_forms import Constant
    from onnx_decompose.constants import Constants
    from onnx_decompose.model_io import Model

__all__ = [
    "OVERRIDABLE",
    "Refusal",
    "Site",
    "attribute_values",
    "check_finite",
    "computed_reason",
    "find_sites",
    "is_standard",
    "node_names",
    "site_weight",
]

OVERRIDABLE = "the weight is also a graph input, so it can be overridden at run time"

_ROWS_AT_A_TIME = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A MatMul or Gemm with a constant weight.

    Attributes:
        name: unique in the model: the node's name, or else its output's.
        node: index of the node in the graph.
        op_type: ``MatMul`` or ``Gemm``.
        input: the value read; its last axis is the K inputs.
        output: the value made; its last axis is the N outputs.
        weight: the constant that the node reads.
        tensor: the stored tensor behind it (an initializer's name, or a Constant node's output).
        transposed: the stored tensor is (N, K).
        shape: (K, N).
    """

    name: str
    node: int
    op_type: str
    input: str
    output: str
    weight: str
    tensor: str
    transposed: bool
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A node that looks like a site and is left alone, and why."""

    node: str
    op_type: str
    reason: str


def find_sites(
    model: Model, constants: Constants
) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """All sites of the main graph, in graph order, and the nodes refused."""
    sites: list[Site] = []
    refusals: list[Refusal] = []
    names = node_names(model.proto.graph)
    for index, node in enumerate(model.proto.graph.node):
        if not is_standard(node) or node.op_type not in {"MatMul", "Gemm"}:
            continue
        if len(node.input) < 2:
            raise ModelError(
                f"{model.label}: node '{names[index]}' ({node.op_type}) has {len(node.input)} inputs, "
                "not 2; export the model again"
            )
        first, second = node.input[:2]
        if (
            not any(
                name in known
                for name in (first, second)
                for known in (constants, constants.computed)
            )
            and second not in constants.overridable
        ):
            continue
        reason = next(_objections(node, constants), None)
        if reason is None:
            sites.append(_site(index, node, names[index], constants))
        else:
            refusals.append(Refusal(names[index], node.op_type, reason))
    return tuple(sites), tuple(refusals)


def site_weight(site: Site, constants: Constants) -> NDArray[Any]:
    """The weight of ``site``, (K, N): a view of the stored tensor."""
    weight = constants.array(site.weight)
    if site.transposed != constants[site.weight].transposed:
        weight = weight.T
    assert weight.shape == site.shape
    return weight


def check_finite(model: Model, sites: Iterable[Site], constants: Constants) -> None:
    """Refuse NaN and infinite weights: no test of a weight means anything then.

    Raises:
        ModelError: naming the tensor.
    """
    for site in {site.tensor: site for site in sites}.values():
        weight = site_weight(site, constants)
        # Row blocks of the stored layout are contiguous.
        stored = weight.T if site.transposed else weight
        for start in range(0, stored.shape[0], _ROWS_AT_A_TIME):
            if not np.isfinite(stored[start : start + _ROWS_AT_A_TIME]).all():
                raise ModelError(
                    f"{model.label}: tensor '{site.tensor}' of node '{site.name}' holds NaN or infinite weights; "
                    "train or export the model again"
                )


def computed_reason(behind: Iterable[str]) -> str:
    """Why a weight that operators compute of constants is left alone; ``behind`` as of ``Constants.computed``."""
    return (
        f"the weight is not stored as floats but computed from constants ({', '.join(behind)})"
    )


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is an operator of the ONNX standard's own domain."""
    return node.domain in {"", "ai.onnx"}


def attribute_values(node: onnx.NodeProto) -> Mapping[str, Any]:
    """The attributes of ``node`` as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def node_names(graph: onnx.GraphProto) -> list[str]:
    """A name for each node, unique in the graph: its own, or else that of its first output."""
    count = collections.Counter(node.name for node in graph.node)
    maker = {node.output[0]: index for index, node in enumerate(graph.node) if node.output}
    return [
        node.name
        if node.name and count[node.name] == 1 and maker.get(node.name, index) == index
        else next(iter(node.output), "")
        for index, node in enumerate(graph.node)
    ]


def _objections(node: onnx.NodeProto, constants: Constants) -> Iterator[str]:
    """Why a MatMul or Gemm that reads a constant is not a site; the first reason is the plainest."""
    first, second = node.input[:2]
    if second in constants.overridable:
        yield OVERRIDABLE
    if second in constants.computed:
        yield computed_reason(constants.computed[second])
    if second not in constants:
        yield "the constant is on the left side"
        return
    yield from _weight_objections(constants[second])
    if first in constants or first in constants.computed:
        yield "both sides are constant"
    if node.op_type == "Gemm":
        if attribute_values(node).get("transA", 0):
            yield "transA is set: the units are on the batch axis"
        if any(name and name not in constants for name in node.input[2:]):
            yield "the bias is not a constant"


def _weight_objections(weight: Constant) -> Iterator[str]:
    if weight.data_type not in FLOAT_TYPES:
        held = onnx.TensorProto.DataType.Name(weight.data_type)
        yield f"the weight is {held}, not a float of 16 bits or more"
    if len(weight.shape) != 2:
        yield f"the weight has {len(weight.shape)} axes, not 2"
    if 0 in weight.shape:
        yield "the weight is empty"


def _site(index: int, node: onnx.NodeProto, name: str, constants: Constants) -> Site:
    constant = constants[node.input[1]]
    flipped = node.op_type == "Gemm" and bool(attribute_values(node).get("transB", 0))
    inputs, outputs = constant.shape[::-1] if flipped else constant.shape
    return Site(
        name=name,
        node=index,
        op_type=node.op_type,
        input=node.input[0],
        output=node.output[0],
        weight=node.input[1],
        tensor=constant.source,
        transposed=constant.transposed != flipped,
        shape=(inputs, outputs),
    )
