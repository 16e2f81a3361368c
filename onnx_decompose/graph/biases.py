"""What follows a site and is affine per unit: where its bias lives, and the scales that can go into its weight.

Gemm, Conv              its third input
MatMul, then Add        the constant that the Add, the only reader of the product, adds to each unit
anything else           an Add that is not there yet
a weight of integers    the constant that is there (``integer_biases``), or none
... then Mul, Add, ...  per-unit constants, absorbed into weight and bias where that is asked for
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.graph.integer_biases import find_integer_bias
from onnx_decompose.graph.regions import Region, value_readers
from onnx_decompose.graph.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.grid import Grid
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants

    FloatArray = NDArray[np.float64]

__all__ = [
    "Bias",
    "absorbable",
    "find_biases",
    "is_per_unit_constant",
    "per_unit_row",
    "region_in",
]

_ROWS_AT_A_TIME = 1024

_AS_GOOD_AS_FLOATS = 4
"""Bytes of an integer."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """The affine part of one site: its value is ``scale * (alpha * (x * rows) W) + shift``.

    Attributes:
        nodes: indices of the Mul and Add nodes that are part of it, in order; none for a bias inside a Gemm.
        inside: the site adds it itself, as its third input; else the last of ``nodes``, or a new one.
        alpha: factor of the product inside the site; of a product of integers (N,) or (1,), up to the bias.
        beta: factor of the bias inside the site.
        scale: (N,) per-unit factor of what follows the site.
        shift: (N,) what is added in all.
        constant: name of the constant that the last addition reads now, if any.
        axes: axes of size 1 before the units in the stored bias.
        value: what is made of all that.
        rows: (K,) factor of what each row of the weight reads.
        dtype: of the stored bias.
        position: of a product with a weight of integers, which input of the first of ``nodes`` the constant is; all
            else about them stays. None where there is no constant, or the weight is of floats.
        integers: whether the weight is.
        grid: what a stored bias of integers stands for, (1, N); None for floats.
    """

    nodes: tuple[int, ...]
    inside: bool
    alpha: float | FloatArray
    beta: float
    scale: FloatArray
    shift: FloatArray
    constant: str | None
    axes: int
    value: str
    rows: FloatArray
    dtype: np.dtype[Any]
    position: int | None = None
    integers: bool = False
    grid: Grid | None = None

    @property
    def is_missing(self) -> bool:
        """Whether nothing can be added: an Add would tear the operators apart that a runtime takes as one product."""
        return self.integers and self.position is None

    @property
    def is_free(self) -> bool:
        """Whether it can be any number, as nearly as floats can: 32 bits of integers are as good."""
        if self.is_missing:
            return False
        return self.grid is None or self.dtype.itemsize >= _AS_GOOD_AS_FLOATS

    def stored(self, added: FloatArray | float) -> NDArray[Any]:
        """The bias as it is stored, (N,), with ``added`` (N,) to the product x W: float64 up to here, rounded once."""
        total = (self.shift + self.scale * (self.alpha * added)) / self.beta
        if self.grid is not None:
            return np.asarray(self.grid.codes(total[None])[0])
        with np.errstate(over="ignore"):
            return np.asarray(total.astype(self.dtype))

    def held(self, added: FloatArray) -> FloatArray:
        """What is really added to the product x W, (N,), where ``added`` was to be: 0 where there is no bias."""
        if self.is_missing:
            return np.zeros(added.shape)
        stored = self.stored(added)
        floats = stored.astype(np.float64) if self.grid is None else self.grid.values(stored)
        total = self.beta * floats.reshape(-1)
        found: FloatArray = (total - self.shift) / (self.scale * self.alpha)
        return found

    def scaled(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The weight, (K, N), with both factors in it: every entry times its row's and its unit's, rounded once."""
        if (self.scale == 1).all() and (self.rows == 1).all():
            return weight
        scaled: NDArray[Any] = np.empty(weight.shape, weight.dtype)
        with np.errstate(over="ignore"):
            for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
                part = slice(start, start + _ROWS_AT_A_TIME)
                wide = weight[part].astype(np.float64) * self.rows[part, None]
                scaled[part] = wide * self.scale
        return scaled


def find_biases(
    graph: onnx.GraphProto,
    sites: Iterable[Site],
    constants: Constants,
    absorbed: Mapping[str, int] | None = None,
) -> dict[str, Bias]:
    """The affine part of each site, by site name.

    Args:
        graph: the main graph.
        sites: sites of it.
        constants: its constants.
        absorbed: site name -> how many of the nodes of :func:`absorbable` belong to it; of other sites only an Add
            that makes up for a bias that a MatMul does not have.
    """
    readers = value_readers(graph)
    absorbed = absorbed or {}
    return {
        site.name: _bias(graph, site, constants, readers, absorbed.get(site.name))
        for site in sites
    }


def absorbable(
    graph: onnx.GraphProto, sites: Iterable[Site], constants: Constants, nodes: Collection[int]
) -> dict[str, int]:
    """How many of ``nodes`` after each site are Mul or Add of per-unit constants; only sites where one would go."""
    readers = value_readers(graph)
    found: dict[str, int] = {}
    for site in sites:
        steps = list(_steps(graph, site, constants, readers))
        inside = [index in nodes for index, _, _ in steps]
        count = inside.index(False) if False in inside else len(inside)
        # A MatMul needs one Add for its bias.
        adds = {graph.node[index].op_type for index, _, _ in steps[:count]} == {"Add"}
        if count > (1 if adds and site.op_type == "MatMul" else 0) and (
            _takes_bias(graph, site, constants) or site.op_type == "MatMul"
        ):
            found[site.name] = count
    return found


def region_in(
    region: Region, before: onnx.GraphProto, after: onnx.GraphProto, outputs: Mapping[str, str]
) -> Region:
    """``region`` of the graph ``before`` as it lies in a copy with other nodes.

    Args:
        region: of ``before``.
        before: the graph.
        after: the copy: values that both make are made by the same parts of the region.
        outputs: the value that a site's own node makes in the copy, by site name, where it is another one.
    """
    made = {name: index for index, node in enumerate(after.node) for name in node.output[:1]}
    axis_of = dict(region.axis_of)
    sites: list[Site] = []
    for site in region.sites:
        output = outputs.get(site.name, site.output)
        axis_of[output] = axis_of[site.output]
        sites.append(dataclasses.replace(site, node=made[output], output=output))
    kept = {before.node[index].output[0] for index in region.nodes} & made.keys()
    nodes = {made[name] for name in kept} | {site.node for site in sites}
    return dataclasses.replace(
        region, nodes=tuple(sorted(nodes)), sites=tuple(sites), axis_of=axis_of
    )


def _bias(
    graph: onnx.GraphProto,
    site: Site,
    constants: Constants,
    readers: Mapping[str, set[int]],
    count: int | None,
) -> Bias:
    if site.quantized is not None:
        return _integer_bias(graph, site, constants, readers)
    node, units = graph.node[site.node], site.shape[1]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(constants[site.weight].data_type)
    attributes = attribute_values(node)
    alpha = attributes.get("alpha", 1.0)
    scale, shift = np.ones(units), np.zeros(units)
    inside, rows = _takes_bias(graph, site, constants), np.ones(site.shape[0])
    name, axes, value = None, 0, site.output
    if site.op_type != "MatMul" and not inside:
        return Bias((), False, alpha, 1.0, scale, shift, None, 0, value, rows, dtype)
    beta = attributes.get("beta", 1.0) if inside else 1.0
    if inside and len(node.input) > 2 and node.input[2]:
        name = str(node.input[2])
        shift = shift + beta * per_unit_row(constants, name)
        axes = max(len(constants[name].shape) - 1, 0)
    nodes: list[int] = []
    for index, op, constant in _steps(graph, site, constants, readers):
        if len(nodes) == count or (count is None and (inside or nodes or op == "Mul")):
            break
        nodes.append(index)
        value = graph.node[index].output[0]
        row = per_unit_row(constants, constant)
        if op == "Mul":
            scale, shift = scale * row, shift * row
        else:
            name, shift = constant, shift + row
        if not inside:
            axes = max(axes, len(constants[constant].shape) - 1)
    return Bias(tuple(nodes), inside, alpha, beta, scale, shift, name, axes, value, rows, dtype)


def _integer_bias(
    graph: onnx.GraphProto,
    site: Site,
    constants: Constants,
    readers: Mapping[str, set[int]],
) -> Bias:
    units, rows = site.shape[1], np.ones(site.shape[0])
    scale, none = np.ones(units), np.zeros(units)
    found = find_integer_bias(graph, site, constants, readers)
    if found is None:
        dtype = np.dtype(np.float32)
        value = site.output
        return Bias(
            (), False, 1.0, 1.0, scale, none, None, 0, value, rows, dtype, integers=True
        )
    value = graph.node[found.nodes[-1]].output[0]
    return Bias(
        found.nodes,
        False,
        found.alpha,
        found.beta,
        scale,
        found.beta * found.values,
        found.constant,
        found.axes,
        value,
        rows,
        found.dtype,
        found.position,
        integers=True,
        grid=found.grid,
    )


def _takes_bias(graph: onnx.GraphProto, site: Site, constants: Constants) -> bool:
    """Whether a site's third input is a bias of its units alone, or could be."""
    if site.op_type == "MatMul":
        return False
    node = graph.node[site.node]
    if attribute_values(node).get("beta", 1.0) == 0:
        return False
    name = node.input[2] if len(node.input) > 2 else ""
    return not name or (
        name in constants and is_per_unit_constant(constants, name, site.shape[1], -1)
    )


def _steps(
    graph: onnx.GraphProto,
    site: Site,
    constants: Constants,
    readers: Mapping[str, set[int]],
) -> Iterator[tuple[int, str, str]]:
    """The Mul and Add nodes of per-unit constants after a site, each the only reader of the value before it.

    Yields:
        Index of the node, what it does, and the constant.
    """
    value = site.output
    while True:
        (index, *others) = readers.get(value, {-1})
        if index < 0 or others or graph.node[index].op_type not in {"Add", "Mul"}:
            return
        node = graph.node[index]
        names = [
            name
            for name in node.input
            if name in constants
            and is_per_unit_constant(constants, name, site.shape[1], site.unit_axis)
        ]
        if len(names) != 1 or attribute_values(node):
            return
        axes = {"Gemm": 2, "Conv": 2 + len(site.kernel)}.get(site.op_type)
        if axes is not None and len(constants[names[0]].shape) > axes:
            return  # the result has more axes than the site makes
        yield index, node.op_type, names[0]
        value = node.output[0]


def per_unit_row(constants: Constants, name: str) -> FloatArray:
    """A per-unit constant, (N,), or (1,) for all units."""
    return constants.array(name).reshape(-1).astype(np.float64)


def is_per_unit_constant(constants: Constants, name: str, units: int, axis: int) -> bool:
    """Whether a constant is one number per unit, or one for all, at every position."""
    shape = list(constants[name].shape)
    held = shape.pop(axis) if len(shape) >= -axis else 1
    return held in {1, units} and all(size == 1 for size in shape)
