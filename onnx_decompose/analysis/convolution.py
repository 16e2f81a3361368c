"""Convolution over any number of axes, a product per place of the kernel: little memory, any precision."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.windows import Window

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
    window = Window(
        w.shape[2:], tuple(strides or ()), tuple(dilations or ()), tuple(pads or ()), auto_pad
    )
    padded, sizes = window.padded(x), window.positions(x.shape[2:])
    groups = x.shape[1] // w.shape[1]
    by_group = w.reshape(groups, -1, *w.shape[1:])
    y = np.zeros((x.shape[0], groups, by_group.shape[1], int(np.prod(sizes))), x.dtype)
    for place in itertools.product(*map(range, window.kernel)):
        seen = tuple(
            slice(first * hole, first * hole + (size - 1) * step + 1, step)
            for first, hole, size, step in zip(
                place, window.holes, sizes, window.steps, strict=True
            )
        )
        part = padded[(slice(None), slice(None), *seen)]
        columns = part.reshape(x.shape[0], groups, w.shape[1], -1)
        y = y + np.matmul(by_group[(slice(None),) * 3 + place], columns)
    return y.reshape(x.shape[0], w.shape[0], *sizes)
