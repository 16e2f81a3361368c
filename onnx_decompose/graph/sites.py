"""Sites: nodes with a constant weight, oriented (K inputs, N outputs)."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.errors import ModelError
from onnx_decompose.graph.quantized import (
    INTEGER_PRODUCTS,
    Quantized,
    dequantized,
    find_quantized,
    grid_of,
    integers,
    is_integer_line,
    nothing,
    weight_position,
)
from onnx_decompose.model.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.grid import Grid
    from onnx_decompose.model.constant_forms import Constant
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.model_io import Model

__all__ = [
    "OVERRIDABLE",
    "SITES",
    "Refusal",
    "Site",
    "attribute_values",
    "check_finite",
    "computed_reason",
    "find_sites",
    "is_standard",
    "node_names",
    "site_grid",
    "site_weight",
    "stored_as",
    "stored_nothing",
    "stored_values",
    "stored_weight",
]

OVERRIDABLE = "the weight is also a graph input, so it can be overridden at run time"

SITES = {"Conv", "Gemm", "MatMul"}
"""Operators whose weight may be taken apart where it is stored as floats."""

_ROWS_AT_A_TIME = 4096
_PRODUCTS = SITES | INTEGER_PRODUCTS


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A product with a constant weight, taken as a matrix.

    The units of a convolution are its channels. Each edge between two of them has a kernel, so that its matrix has as
    many rows for each input as the kernel has entries (*taps*): the rows of one input follow each other.

    Attributes:
        name: unique in the model: the node's name, or else its output's.
        node: index of the node in the graph.
        op_type: ``MatMul``, ``Gemm``, ``Conv``, ``MatMulInteger`` or ``QLinearMatMul``.
        input: the value read; its unit axis has the inputs.
        output: the value made; its unit axis has the N outputs.
        weight: the constant that the node reads.
        tensor: the stored tensor behind it (an initializer's name, or a Constant node's output).
        transposed: the stored tensor has the outputs first.
        shape: (K, N) of the matrix; K is the inputs times the taps.
        quantized: how the weight is made of integers; None where it is stored as floats.
        bias: what a Gemm adds, where that is made of integers too: it has the N outputs.
        kernel: sizes of a convolution's kernel; none for a product.
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
    quantized: Quantized | None = None
    bias: str = ""
    kernel: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def taps(self) -> int:
        """Entries of the weight for each edge."""
        return math.prod(self.kernel)

    @property
    def units(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.shape[0] // self.taps, self.shape[1]

    @property
    def unit_axis(self) -> int:
        """The axis of its values that has the units, counted from the last: -1, or before a convolution's positions."""
        return -1 - len(self.kernel)

    def edges(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the edges, (inputs, N), have a supported entry in ``mask``, (K, N)."""
        if self.taps == 1:
            return mask
        return np.asarray(mask.reshape(-1, self.taps, self.shape[1]).any(axis=1))

    def entries(self, edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The entries, (K, N), of ``edges``, (inputs, N)."""
        return edges if self.taps == 1 else np.repeat(edges, self.taps, axis=0)

    def rows(self, inputs: NDArray[np.intp]) -> NDArray[np.intp]:
        """The rows of the matrix that belong to ``inputs``."""
        if self.taps == 1:
            return inputs
        return (inputs[:, None] * self.taps + np.arange(self.taps)).ravel()

    def laid_out(self, matrix: NDArray[Any], node: onnx.NodeProto) -> NDArray[Any]:
        """A matrix of some inputs and outputs in the form in which ``node``, the site's own, reads its weight."""
        if self.kernel:
            return matrix.T.reshape(matrix.shape[1], -1, *self.kernel)
        return matrix.T if attribute_values(node).get("transB", 0) else matrix


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
    makers = {name: node for node in model.proto.graph.node for name in node.output}
    for index, node in enumerate(model.proto.graph.node):
        if not is_standard(node) or node.op_type not in _PRODUCTS:
            continue
        if not any(node.output):
            raise ModelError(
                f"{model.label}: a node of type {node.op_type} makes nothing; export the model again"
            )
        if len(node.input) < 2:
            raise ModelError(
                f"{model.label}: node '{names[index]}' ({node.op_type}) has {len(node.input)} inputs, "
                "not 2; export the model again"
            )
        first, second = _operands(node)
        if node.op_type == "Conv":
            first = second  # its data alone make no site
        if (
            not any(
                name in known
                for name in (first, second)
                for known in (constants, constants.computed)
            )
            and second not in constants.overridable
        ):
            continue
        quantized = None
        if node.op_type in INTEGER_PRODUCTS or (
            second in constants.computed and node.op_type != "Conv"
        ):
            quantized = find_quantized(node, makers, constants)
        reason = next(_objections(node, quantized, makers, constants), None)
        if reason is None:
            assert not isinstance(quantized, str)
            sites.append(_site(index, node, names[index], quantized, constants))
        else:
            refusals.append(Refusal(names[index], node.op_type, reason))
    return tuple(sites), tuple(refusals)


def site_weight(site: Site, constants: Constants) -> NDArray[Any]:
    """The weight of ``site``, (K, N): a view of the stored tensor, or the floats that its integers stand for."""
    if site.quantized is not None:
        return dequantized(site.quantized, constants)
    return stored_weight(site, constants)


def stored_weight(site: Site, constants: Constants) -> NDArray[Any]:
    """The entries that are stored for the weight of ``site``, (K, N): a view of the stored tensor."""
    if site.quantized is not None:
        return integers(site.quantized, constants)
    weight = constants.array(site.weight)
    if site.kernel:
        return weight.reshape(site.shape[1], site.shape[0]).T
    if site.transposed != constants[site.weight].transposed:
        weight = weight.T
    assert weight.shape == site.shape
    return weight


def stored_values(site: Site, stored: NDArray[Any], constants: Constants) -> NDArray[Any]:
    """What entries that could be stored for the weight of ``site``, (K, N), stand for."""
    if site.quantized is not None:
        return dequantized(site.quantized, constants, stored)
    return stored


def site_grid(site: Site, constants: Constants) -> Grid:
    """The numbers that can be stored for the weight of ``site``, which is of integers."""
    assert site.quantized is not None
    return grid_of(site.quantized, constants)


def stored_as(site: Site, weight: NDArray[Any], constants: Constants) -> NDArray[Any]:
    """What is stored for entries, (K, N), of ``site``: the nearest that its type, or its grid, has."""
    if site.quantized is not None:
        return site_grid(site, constants).codes(weight)
    with np.errstate(over="ignore"):
        return weight.astype(constants.array(site.weight).dtype, copy=False)


def stored_nothing(site: Site, constants: Constants) -> NDArray[Any]:
    """What is stored where there is no dependency, of the stored type, as what broadcasts to (K, N)."""
    if site.quantized is not None:
        return nothing(site.quantized, constants)
    return np.zeros((1, 1), constants.array(site.weight).dtype)


def check_finite(model: Model, sites: Iterable[Site], constants: Constants) -> None:
    """Refuse NaN and infinite weights: no test of a weight means anything then.

    Raises:
        ModelError: naming the tensor.
    """
    for site in {(site.tensor, site.weight): site for site in sites}.values():
        for name, stored in _floats(site, constants):
            for start in range(0, stored.shape[0], _ROWS_AT_A_TIME):
                if not np.isfinite(stored[start : start + _ROWS_AT_A_TIME]).all():
                    raise ModelError(
                        f"{model.label}: tensor '{name}' of node '{site.name}' holds NaN or infinite weights; "
                        "train or export the model again"
                    )


def _floats(site: Site, constants: Constants) -> Iterator[tuple[str, NDArray[Any]]]:
    """The stored floats behind a weight by name; row blocks of them are contiguous."""
    if site.quantized is None:
        weight = site_weight(site, constants)
        yield site.tensor, weight.T if site.transposed else weight
        return
    for factor, _ in site.quantized.factors:
        yield factor.name, np.atleast_1d(constants.array(factor.name))


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


def _operands(node: onnx.NodeProto) -> tuple[str, str]:
    """What a product multiplies: its input, and its weight."""
    position = weight_position(node.op_type)
    return node.input[0], node.input[position] if len(node.input) > position else ""


def _objections(
    node: onnx.NodeProto,
    quantized: Quantized | str | None,
    makers: Mapping[str, onnx.NodeProto],
    constants: Constants,
) -> Iterator[str]:
    """Why a product that reads a constant is not a site; the first reason is the plainest."""
    first, second = _operands(node)
    if second in constants.overridable:
        yield OVERRIDABLE
    if isinstance(quantized, str):
        yield quantized
    if quantized is None:
        yield from _float_objections(node, first, second, constants)
    if first in constants or first in constants.computed:
        yield "both sides are constant"
    if node.op_type == "Gemm":
        made = quantized is not None and is_integer_line(_bias(node), makers, constants)
        yield from _gemm_objections(node, made, constants)
    if node.op_type == "Conv":
        yield from _conv_objections(node, constants)


def _float_objections(
    node: onnx.NodeProto, first: str, second: str, constants: Constants
) -> Iterator[str]:
    """Why neither operand is a weight of floats where it should be."""
    if second in constants.computed:
        yield computed_reason(constants.computed[second])
    side = second if second in constants else first
    if side == first and node.op_type in INTEGER_PRODUCTS:
        yield "the constant is on the left side"
    if side in constants:
        yield from _weight_objections(node, constants[side])
    if side == first:
        yield "the constant is on the left side, and the rank of the other one is not known"


def _gemm_objections(
    node: onnx.NodeProto, made_of_integers: bool, constants: Constants
) -> Iterator[str]:
    if attribute_values(node).get("transA", 0):
        yield "transA is set: the units are on the batch axis"
    bias = _bias(node)
    if bias and bias not in constants and not made_of_integers:
        yield "the bias is not a constant"


def _conv_objections(node: onnx.NodeProto, constants: Constants) -> Iterator[str]:
    groups = attribute_values(node).get("group", 1)
    if groups != 1:
        yield f"the convolution has {groups} groups already"
    bias = _bias(node)
    if bias and bias not in constants:
        yield "the bias is not a constant"


def _bias(node: onnx.NodeProto) -> str:
    """The third input of a Gemm or a Conv."""
    return node.input[2] if len(node.input) > 2 else ""


def _weight_objections(node: onnx.NodeProto, weight: Constant) -> Iterator[str]:
    if weight.data_type not in FLOAT_TYPES:
        held = onnx.TensorProto.DataType.Name(weight.data_type)
        yield f"the weight is {held}, not a float of 16 bits or more"
    if node.op_type == "Conv":
        if len(weight.shape) < 3:
            yield f"the weight has {len(weight.shape)} axes, and a convolution's has 3 or more"
    elif len(weight.shape) != 2:
        yield f"the weight has {len(weight.shape)} axes, not 2"
    if 0 in weight.shape:
        yield "the weight is empty"


def _site(
    index: int,
    node: onnx.NodeProto,
    name: str,
    quantized: Quantized | None,
    constants: Constants,
) -> Site:
    weight = _operands(node)[1]
    kernel: tuple[int, ...] = ()
    flipped = node.op_type == "Gemm" and bool(attribute_values(node).get("transB", 0))
    if quantized is not None:
        constant, (inputs, outputs) = constants[quantized.codes.name], quantized.shape
        flipped = quantized.codes.rows == -1
    elif node.op_type == "Conv":
        constant = constants[weight]
        outputs, channels, *size = constant.shape
        inputs, kernel = channels * math.prod(size), tuple(size)
    else:
        constant = constants[weight]
        inputs, outputs = constant.shape[::-1] if flipped else constant.shape
    return Site(
        name=name,
        node=index,
        op_type=node.op_type,
        input=node.input[0],
        output=node.output[0],
        weight=weight,
        tensor=constant.source,
        transposed=node.op_type == "Conv" or constant.transposed != flipped,
        shape=(inputs, outputs),
        kernel=kernel,
        quantized=quantized,
        bias=next((bias for bias in node.input[2:3] if _is_made(bias, node, constants)), ""),
    )


def _is_made(bias: str, node: onnx.NodeProto, constants: Constants) -> bool:
    return bool(bias) and node.op_type == "Gemm" and bias not in constants
