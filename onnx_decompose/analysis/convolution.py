"""Convolution over any number of axes, a product per place of the kernel: little memory, any precision."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

__all__ = ["convolution"]


def convolution(
    x: Array,
    w: Array,
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
) -> Array:
    """The Conv of the ONNX standard, without its bias; the number of groups follows from the shapes.

    Args:
        x: (batch, groups * C, ...), the input.
        w: (N, C, ...), the kernel.
        strides: one per axis of the kernel.
        dilations: the same.
        pads: first all beginnings, then all ends.
        auto_pad: as in the standard; other than ``NOTSET`` it decides the pads.

    Returns:
        (batch, N, ...).
    """
    kernel = w.shape[2:]
    rank = len(kernel)
    steps, holes = list(strides or [1] * rank), list(dilations or [1] * rank)
    spans = [(size - 1) * hole + 1 for size, hole in zip(kernel, holes, strict=True)]
    edges = list(pads or [0] * (2 * rank))
    if auto_pad == "VALID":
        edges = [0] * (2 * rank)
    elif auto_pad != "NOTSET":
        wanted = [
            max((-(-size // step) - 1) * step + span - size, 0)
            for size, step, span in zip(x.shape[2:], steps, spans, strict=True)
        ]
        less, more = [n // 2 for n in wanted], [n - n // 2 for n in wanted]
        edges = [*less, *more] if auto_pad == "SAME_UPPER" else [*more, *less]
    padded = np.pad(x, [(0, 0), (0, 0), *zip(edges[:rank], edges[rank:], strict=True)])
    sizes = [
        (size - span) // step + 1
        for size, span, step in zip(padded.shape[2:], spans, steps, strict=True)
    ]
    groups = x.shape[1] // w.shape[1]
    by_group = w.reshape(groups, -1, *w.shape[1:])
    y = np.zeros((x.shape[0], groups, by_group.shape[1], int(np.prod(sizes))), x.dtype)
    for place in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(first * hole, first * hole + (size - 1) * step + 1, step)
            for first, hole, size, step in zip(place, holes, sizes, steps, strict=True)
        )
        part = padded[(slice(None), slice(None), *window)]
        columns = part.reshape(x.shape[0], groups, w.shape[1], -1)
        y = y + np.matmul(by_group[(slice(None),) * 3 + place], columns)
    return y.reshape(x.shape[0], w.shape[0], *sizes)
