"""What operators make of a stored constant without computing: names, shapes, orders of axes, parts, float types."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.model.tensors import FLOAT_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Integers = Callable[[int, str], list[int] | None]

__all__ = ["Constant", "passed_on"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A constant value and the stored tensor behind it.

    Attributes:
        source: what stores it: an initializer's name, or a Constant node's output.
        tensor: the stored tensor; in a Constant node it may have any name or none.
        shape: of the value.
        data_type: of the value, an ONNX element type.
        transposed: the value is the stored matrix transposed, axes of size 1 aside.
        steps: what makes the value of the stored array, in order.
    """

    source: str
    tensor: onnx.TensorProto
    shape: tuple[int, ...]
    data_type: int
    transposed: bool = False
    steps: tuple[Callable[[Array], Array], ...] = ()

    @classmethod
    def stored(cls, source: str, tensor: onnx.TensorProto) -> Constant:
        """A tensor as it is stored."""
        return cls(source, tensor, tuple(tensor.dims), tensor.data_type)


def passed_on(
    node: onnx.NodeProto, source: Constant, constant_integers: Callable[[str], list[int] | None]
) -> Constant | None:
    """The constant ``source`` behind a ``node`` that reads it first; None if the node computes, or cannot be followed.

    Args:
        node: of the standard's own domain.
        source: the value of its first input.
        constant_integers: the integers of a constant by name, None where it is none.
    """
    maker = _MAKERS.get(node.op_type)
    if maker is None:
        return None

    def integers(position: int, attribute: str) -> list[int] | None:
        """A list that newer operator sets take as an input and older ones as an attribute."""
        if len(node.input) > position and node.input[position]:
            return constant_integers(node.input[position])
        return next((list(a.ints) for a in node.attribute if a.name == attribute), None)

    return maker(node, source, integers)


def _identity(_: onnx.NodeProto, source: Constant, __: Integers) -> Constant:
    return source


def _transpose(node: onnx.NodeProto, source: Constant, _: Integers) -> Constant | None:
    rank = len(source.shape)
    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    axes = list(range(rank))[::-1] if perm is None else perm
    if sorted(axes) != list(range(rank)):
        return None
    moved = axes if rank == 2 else [axis for axis in axes if source.shape[axis] != 1]
    swaps = len(moved) == 2 and moved[0] > moved[1]
    return dataclasses.replace(
        source,
        shape=tuple(source.shape[axis] for axis in axes),
        transposed=source.transposed != swaps,
        steps=(*source.steps, lambda values: values.transpose(axes)),
    )


def _cast(node: onnx.NodeProto, source: Constant, _: Integers) -> Constant | None:
    target = next((int(a.i) for a in node.attribute if a.name == "to"), 0)
    if source.data_type not in FLOAT_TYPES or target not in FLOAT_TYPES:
        return None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(target)

    def cast(values: Array) -> Array:
        # What is too large for the type becomes infinite, as in the model, and is refused as such.
        with np.errstate(over="ignore"):
            return values.astype(dtype, copy=False)

    return dataclasses.replace(source, data_type=target, steps=(*source.steps, cast))


def _reshape(node: onnx.NodeProto, source: Constant, integers: Integers) -> Constant | None:
    wanted = integers(1, "shape")
    if wanted is None:
        return None
    keeps_zero = any(a.name == "allowzero" and a.i for a in node.attribute)
    sizes = [
        source.shape[axis] if not size and not keeps_zero and axis < len(source.shape) else size
        for axis, size in enumerate(wanted)
    ]
    return _reshaped(source, sizes)


def _slice(node: onnx.NodeProto, source: Constant, integers: Integers) -> Constant | None:
    starts, ends = integers(1, "starts"), integers(2, "ends")
    given = [integers(3, "axes"), integers(4, "steps")]
    told = [len(node.input) > position and bool(node.input[position]) for position in (3, 4)]
    if not starts or not ends or any(t and g is None for t, g in zip(told, given, strict=True)):
        return None
    axes = given[0] or list(range(len(starts)))
    steps = given[1] or [1 for _ in starts]
    rank = len(source.shape)
    if not len(starts) == len(ends) == len(axes) == len(steps) or not all(
        -rank <= axis < rank for axis in axes
    ):
        return None
    if any(
        step < 1 for step in steps
    ):  # an end before the first entry has no spelling in Python
        return None
    places = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places[axis] = slice(start, end, step)
    where = tuple(places)
    shape = tuple(
        len(range(*place.indices(size)))
        for place, size in zip(where, source.shape, strict=True)
    )
    return dataclasses.replace(
        source, shape=shape, steps=(*source.steps, lambda values: values[where])
    )


def _squeeze(node: onnx.NodeProto, source: Constant, integers: Integers) -> Constant | None:
    axes = integers(1, "axes")
    if axes is None and any(node.input[1:]):
        return None
    rank = len(source.shape)
    gone = {
        axis
        for axis, size in enumerate(source.shape)
        if (size == 1 if axes is None else {axis, axis - rank}.intersection(axes))
    }
    return _reshaped(source, [n for axis, n in enumerate(source.shape) if axis not in gone])


def _unsqueeze(_: onnx.NodeProto, source: Constant, integers: Integers) -> Constant | None:
    axes = integers(1, "axes")
    if axes is None:
        return None
    rank = len(source.shape) + len(axes)
    added = {axis % rank for axis in axes}
    sizes = iter(source.shape)
    if len(added) != len(axes):
        return None
    return _reshaped(source, [1 if axis in added else next(sizes) for axis in range(rank)])


def _reshaped(source: Constant, sizes: Sequence[int]) -> Constant | None:
    """``source`` in another shape, -1 inferred; None where the entries do not fit."""
    count = math.prod(source.shape)
    known = [size for size in sizes if size != -1]
    if len(sizes) - len(known) > 1 or any(size < 0 for size in known):
        return None
    if len(known) < len(sizes):
        rest = math.prod(known)
        if not rest or count % rest:
            return None
        sizes = [count // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != count:
        return None
    # Entries that are cut into other rows make a matrix of their own, not the stored one transposed.
    same = [n for n in sizes if n != 1] == [n for n in source.shape if n != 1]
    shape = tuple(sizes)
    return dataclasses.replace(
        source,
        shape=shape,
        transposed=source.transposed and same,
        steps=(*source.steps, lambda values: values.reshape(shape)),
    )


_MAKERS: Mapping[str, Callable[[onnx.NodeProto, Constant, Integers], Constant | None]] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Cast": _cast,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
