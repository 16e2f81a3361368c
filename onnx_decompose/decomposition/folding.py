"""Units of a region that are constants, and the biases that take their place.

A unit that no supported entry feeds is its bias through its activations, in every run. What it adds to the sites
that read it is a constant too and goes into their biases; the unit is then read by nothing and can be dropped.

Constancy holds by construction: an elementwise operator's unit depends on the same unit of its operands alone, and
a site's unit on the units that its supported entries lead from.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.reference

from onnx_decompose.analysis.folding import Units, anything, fold_rows, read_by, settle
from onnx_decompose.decomposition.refits import weight_of
from onnx_decompose.graph.biases import Bias, find_biases
from onnx_decompose.graph.per_unit import is_elementwise
from onnx_decompose.graph.sites import attribute_values
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.model.tensors import is_float, largest_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.decomposition.refits import Refit
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study

    FloatArray = NDArray[np.float64]
    Masks = Mapping[str, NDArray[np.bool_]]

logger = logging.getLogger(__name__)

__all__ = ["Folding", "fold_region"]

_ADD_BROADCASTS_FROM = 7
_FLOAT_TYPES = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Folding:
    """What becomes of a region's sites when its constant units are folded.

    Attributes:
        masks: the supported entries of each site by name, (K, N), without the rows of constant units.
        added: what those rows add to the product x W of each site by name, (N,) float64; only sites where it is
            not all zero.
        rows: how many rows with supported entries were folded, over all sites.
    """

    masks: Masks
    added: Mapping[str, FloatArray]
    rows: int


def fold_region(
    study: Study, region: Region, masks: Masks, refits: Mapping[str, Refit] | None = None
) -> Folding | None:
    """Fold the constant units of ``region``; None where no site reads any.

    Args:
        study: the model.
        region: one of its regions.
        masks: the supported entries of every site by name.
        refits: weights that stand in the place of the original's, by site name; what they add is part of ``added``.
    """
    if any(site.quantized is not None for site in region.sites):
        return None  # what is folded is a float, and integers are rounded on the way
    walk = _Walk(study, region, masks, refits or {})
    for index in region.nodes:
        walk.step(index)
    return Folding(walk.masks, walk.added, walk.rows) if walk.rows else None


class _Walk:
    """One pass over a region's nodes, in order, with what is known of every value's units."""

    def __init__(
        self, study: Study, region: Region, masks: Masks, refits: Mapping[str, Refit]
    ) -> None:
        self._study = study
        self._refits = refits
        self._graph = study.model.proto.graph
        self._region = region
        self._sites = {site.node: site for site in region.sites}
        self._biases: Mapping[str, Bias] | None = None
        weight = study.weight(region.sites[0])
        self._largest = largest_number(weight.dtype)
        self._known = {name: anything(self._size(name)) for name in region.entries}
        self.masks = {site.name: masks[site.name] for site in region.sites}
        self.added: dict[str, FloatArray] = {
            site.name: refits[site.name].added for site in region.sites if site.name in refits
        }
        self.rows = 0

    def step(self, index: int) -> None:
        """Work out the units of one node's output."""
        node = self._graph.node[index]
        if index in self._sites:
            units = self._site(self._sites[index])
        else:
            units = self._elementwise(node)
        self._known[node.output[0]] = units

    def _size(self, name: str) -> int:
        return self._region.axis_sizes[self._region.axis_of[name]]

    def _site(self, site: Site) -> Units:
        units, mask = self._read_by(site), self.masks[site.name]
        if units.varies.all() and mask.any(axis=0).all():
            return anything(site.shape[1])
        folded, total = fold_rows(units, weight_of(self._study, site, self._refits), mask)
        if site.name in self._refits:
            total = total + self._refits[site.name].added
        if total.any() and not self._fits(site, total):
            return anything(site.shape[1])
        rows = int(np.count_nonzero(mask.any(axis=1) & ~units.varies))
        if rows:
            self.masks[site.name] = folded
            self.rows += rows
        if total.any():
            self.added[site.name] = total
        node = self._graph.node[site.node]
        attributes = attribute_values(node)
        total = total * attributes.get("alpha", 1.0)
        if len(node.input) > 2 and node.input[2]:
            held = self._study.constants.array(node.input[2]).astype(np.float64)
            total = total + attributes.get("beta", 1.0) * held
        return settle(total, np.asarray(folded.any(axis=0)), self._largest)

    def _read_by(self, site: Site) -> Units:
        """What is known of the unit behind each row of a site's weight.

        Padding is zero at the borders of a convolution, so that a constant is none there unless it is zero too.
        """
        units = self._known[site.input]
        if not site.kernel:
            return units
        node = self._graph.node[site.node]
        varies = units.varies if _is_unpadded(node) else units.varies | (units.value != 0)
        return Units(
            np.repeat(varies, site.taps),
            np.repeat(np.where(varies, 0.0, units.value), site.taps),
        )

    def _fits(self, site: Site, total: FloatArray) -> bool:
        """Whether ``total`` can be added where the bias is, in the weight's type."""
        if self._biases is None:  # only where something is constant: most regions never ask
            self._biases = find_biases(self._graph, self._region.sites, self._study.constants)
        bias = self._biases[site.name]
        if not np.isfinite(bias.stored(total)).all():
            return False
        if not bias.inside and not bias.nodes:
            return opset_of(self._study.model.proto) >= _ADD_BROADCASTS_FROM
        return set(bias.nodes) <= set(self._region.nodes)

    def _elementwise(self, node: onnx.NodeProto) -> Units:
        size = self._size(node.output[0])
        if not is_elementwise(node):
            return self._channelwise(node)
        names = [name for name in node.input if name]
        operands = [self._operand(name) for name in names]
        varies = read_by(operands, size, product=node.op_type == "Mul")
        if varies.all() or not _stays_float(node):
            return anything(size)
        feeds = {
            name: self._array(name, operand)
            for name, operand in zip(names, operands, strict=True)
        }
        values = _evaluate(node, self._study.model.proto.opset_import, feeds)
        if values is None:
            return anything(size)
        return settle(
            np.broadcast_to(values, (*values.shape[:-1], size)), varies, self._largest
        )

    def _channelwise(self, node: onnx.NodeProto) -> Units:
        """What an operator makes that works on each channel by itself."""
        units = self._known[node.input[0]]
        if node.op_type == "BatchNormalization":
            scale, shift, mean, variance = (
                self._study.constants.array(name).astype(np.float64) for name in node.input[1:5]
            )
            epsilon = attribute_values(node).get("epsilon", 1e-5)
            with np.errstate(all="ignore"):
                values = (units.value - mean) / np.sqrt(variance + epsilon) * scale + shift
            return settle(values, units.varies, self._largest)
        if node.op_type in {"GlobalAveragePool", "GlobalMaxPool", "MaxPool"}:
            return units  # whatever MaxPool pads with is never the largest
        if node.op_type == "AveragePool":
            return settle(units.value, ~units.is_zero, self._largest)
        return anything(units.varies.size)

    def _operand(self, name: str) -> Units:
        """What is known of an operand; a constant that differs between positions is steady nowhere."""
        if name in self._region.axis_of:
            return self._known[name]
        if name not in self._study.constants:
            return anything(1)
        values = np.atleast_1d(self._array(name, None))
        none = np.zeros(values.shape[-1:] or (1,), dtype=bool)
        if not is_float(
            values.dtype
        ):  # an exponent, say: nothing that could be zero times something
            return Units(none, np.ones(none.size))
        return settle(values, none, np.inf)

    def _array(self, name: str, operand: Units | None) -> NDArray[Any]:
        """What an operator is evaluated on: constants as they are, and what varies as some finite number."""
        if name in self._study.constants:
            values = self._study.constants.array(name)
            axis = self._region.unit_axis
            if axis < -1:  # the units of what is evaluated are the last axis
                values = (
                    np.moveaxis(values, axis, -1) if values.ndim >= -axis else values[..., None]
                )
            return values.astype(np.float64) if is_float(values.dtype) else values
        assert operand is not None
        return operand.value


def _is_unpadded(node: onnx.NodeProto) -> bool:
    """Whether a convolution reads nothing but its input."""
    attributes = attribute_values(node)
    pads_itself = attributes.get("auto_pad", b"NOTSET") not in {b"NOTSET", b"VALID"}
    return not pads_itself and not any(attributes.get("pads", ()))


def _stays_float(node: onnx.NodeProto) -> bool:
    """Integers follow other rules (they truncate); nothing is claimed of them."""
    if node.op_type in {"DequantizeLinear", "QuantizeLinear"}:
        return False
    return node.op_type != "Cast" or attribute_values(node).get("to") in _FLOAT_TYPES


def _evaluate(
    node: onnx.NodeProto,
    opsets: Sequence[onnx.OperatorSetIdProto],
    feeds: Mapping[str, NDArray[Any]],
) -> FloatArray | None:
    """The output of one node in float64, by the standard's reference implementation; None where it has none."""
    if node.op_type == "Cast":
        return next(iter(feeds.values()))
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.DOUBLE, None)
    graph = onnx.helper.make_graph([node], "node", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    try:
        with np.errstate(all="ignore"):
            (values,) = onnx.reference.ReferenceEvaluator(model).run(None, dict(feeds))
    except Exception as error:  # the reference's errors share no base class
        logger.info("%s '%s' is not folded: %s", node.op_type, node.output[0], error)
        return None
    return np.atleast_1d(np.asarray(values, np.float64))
