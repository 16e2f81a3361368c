"""Operators that keep units apart: a unit of what they make depends on the same unit of what they read alone.

Elementwise operators do, along any axis. Where the units are channels, what works on each channel by itself does too:
normalization with stored statistics, pooling, a convolution with one filter per channel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from onnx_decompose.graph.sites import attribute_values, is_standard

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from onnx_decompose.model.constants import Constants

__all__ = [
    "constant_axis",
    "constant_units",
    "is_channelwise",
    "is_elementwise",
    "is_per_unit",
    "leads_with_ones",
    "neutral",
    "scaled_operand",
]

_ELEMENTWISE = {
    *("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round"),
    *("Sign", "Sin", "Sqrt", "Cast", "Clip", "Dropout", "Identity"),
    *("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"),
    *("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu"),
    *("Relu", "Selu", "Shrink", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh"),
    *("DequantizeLinear", "QuantizeLinear", "ThresholdedRelu"),
}
_QUANTIZERS = {"DequantizeLinear", "QuantizeLinear"}

_POOLING = {
    *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"),
}
_NORMALIZATIONS = {"BatchNormalization", "InstanceNormalization"}


def is_elementwise(node: onnx.NodeProto) -> bool:
    """Whether ``node`` works on single numbers, by the usual broadcasting rules."""
    return (
        node.op_type in _ELEMENTWISE
        and is_standard(node)
        and len(node.output) == 1
        # Dropout does nothing, unless it is told that this is training.
        and not (node.op_type == "Dropout" and len(node.input) > 2)
        # Operator sets under 7 had broadcasting rules of their own.
        and (
            node.op_type in _QUANTIZERS
            or not {"axis", "broadcast"}.intersection(attribute_values(node))
        )
    )


def is_per_unit(
    node: onnx.NodeProto, ranks: Mapping[str, int], constants: Constants, axis: int
) -> bool:
    """Whether a quantizer has one scale for the whole tensor, or one for each unit; true of any other node.

    Args:
        node: any node.
        ranks: axes of every value where they are known.
        constants: the constants of the graph.
        axis: the unit axis, counted from the last.
    """
    if node.op_type not in _QUANTIZERS:
        return True
    scale = node.input[1]
    if scale not in constants:
        return ranks.get(scale) == 0
    shape = constants[scale].shape
    if all(size == 1 for size in shape):
        return True
    rank = ranks.get(node.input[0])
    along = attribute_values(node).get("axis", 1)
    return len(shape) == 1 and along in {axis, None if rank is None else rank + axis}


def is_channelwise(
    node: onnx.NodeProto,
    constants: Constants,
    ranks: Mapping[str, int],
    axis: int,
) -> bool:
    """Whether ``node`` works on each channel of its first input by itself.

    Args:
        node: any node.
        constants: the constants of the graph.
        ranks: axes of every value where they are known.
        axis: the unit axis, counted from the last. Channels are the second one from the first.
    """
    if not is_standard(node) or len(node.output) != 1 or not node.input:
        return False
    if axis == -1 or ranks.get(node.input[0]) != 1 - axis:
        return False
    attributes = attribute_values(node)
    if node.op_type in _NORMALIZATIONS:
        held = all(name in constants for name in node.input[1:])
        trains = attributes.get("training_mode", 0) or not attributes.get("spatial", 1)
        return held and not trains
    if node.op_type in _POOLING:
        return True
    return node.op_type == "Conv" and _is_depthwise(node, constants)


def _is_depthwise(node: onnx.NodeProto, constants: Constants) -> bool:
    if len(node.input) < 2 or not all(name in constants for name in node.input[1:] if name):
        return False
    shape = constants[node.input[1]].shape
    groups = attribute_values(node).get("group", 1)
    return len(shape) > 2 and groups > 1 and shape[:2] == (groups, 1)


def constant_axis(node: onnx.NodeProto, position: int, axis: int) -> int:
    """The axis, counted from the last, along which a constant input of a node has its units.

    Args:
        node: that keeps units apart.
        position: of the input.
        axis: the unit axis of its values.
    """
    if position and node.op_type in _NORMALIZATIONS | _QUANTIZERS:
        return -1
    if node.op_type == "Conv":  # (N, 1, kernel), and (N,)
        return axis - 1 if position == 1 else -1
    return axis


def constant_units(constants: Constants, name: str, axis: int) -> int | None:
    """Size of ``axis`` of a constant; 1 where it has fewer axes; None where ``name`` is none."""
    if name not in constants:
        return None
    shape = constants[name].shape
    return shape[axis] if len(shape) >= -axis else 1


def neutral(node: onnx.NodeProto, position: int) -> float:
    """What a constant input holds at units that nothing reads, so that they stay finite."""
    if node.op_type in {"Add", "Sub", "Conv"}:
        return 0.0
    if node.op_type in _NORMALIZATIONS:  # scale, shift, mean, variance
        return 0.0 if position in {2, 3} else 1.0
    return 1.0


def leads_with_ones(constants: Constants, name: str, axis: int) -> bool:
    """Whether all axes before the units of a constant have size 1."""
    return math.prod(constants[name].shape[:axis]) == 1


def scaled_operand(
    node: onnx.NodeProto, constants: Constants, ranks: Mapping[str, int], axis: int
) -> tuple[str, str] | None:
    """What a node multiplies or divides by a constant per unit, and the constant: where that is one, nothing changes.

    Args:
        node: that keeps units apart.
        constants: the constants of the graph.
        ranks: axes of every value where they are known.
        axis: the unit axis of its values.

    Returns:
        None where the node does something else, or makes more positions than it reads.
    """
    if node.op_type not in {"Div", "Mul"}:
        return None
    first, second = node.input
    pairs = [(first, second)] if node.op_type == "Div" else [(first, second), (second, first)]
    for value, name in pairs:
        if name not in constants or value in constants:
            continue
        shape = list(constants[name].shape)
        if len(shape) > ranks.get(value, -axis):
            continue
        if len(shape) >= -axis:
            shape.pop(axis)
        if all(size == 1 for size in shape):
            return value, name
    return None
