"""Which entries of a value a convolution reads, position by position: its windows, and the patches in them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    IntArray = NDArray[np.intp]

__all__ = ["Window"]


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The geometry of a Conv of the ONNX standard, over any number of axes.

    Attributes:
        kernel: entries along each axis.
        strides: steps between positions, one per axis; all 1 by default.
        dilations: steps between the entries of one window, one per axis; all 1 by default.
        pads: zeros around the value, first all beginnings, then all ends; none by default.
        auto_pad: as in the standard; other than ``NOTSET`` it decides the pads.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"

    @property
    def taps(self) -> int:
        """Entries of a window in each channel."""
        return math.prod(self.kernel)

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides, one per axis."""
        return self.strides or (1,) * len(self.kernel)

    @property
    def holes(self) -> tuple[int, ...]:
        """The dilations, one per axis."""
        return self.dilations or (1,) * len(self.kernel)

    @property
    def spans(self) -> tuple[int, ...]:
        """Entries from the first to the last of a window, along each axis."""
        return tuple(
            (size - 1) * hole + 1 for size, hole in zip(self.kernel, self.holes, strict=True)
        )

    def edges(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The zeros around a value of those sizes: first all beginnings, then all ends."""
        rank = len(self.kernel)
        if self.auto_pad == "VALID":
            return (0,) * (2 * rank)
        if self.auto_pad == "NOTSET":
            return self.pads or (0,) * (2 * rank)
        wanted = [
            max((-(-size // step) - 1) * step + span - size, 0)
            for size, step, span in zip(sizes, self.steps, self.spans, strict=True)
        ]
        less, more = [n // 2 for n in wanted], [n - n // 2 for n in wanted]
        return (*less, *more) if self.auto_pad == "SAME_UPPER" else (*more, *less)

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Positions along each axis of a value of those sizes."""
        edges, rank = self.edges(sizes), len(self.kernel)
        return tuple(
            (size + before + after - span) // step + 1
            for size, before, after, span, step in zip(
                sizes, edges[:rank], edges[rank:], self.spans, self.steps, strict=True
            )
        )

    def apart(self, sizes: Sequence[int]) -> int:
        """How many of the windows of a value of those sizes reach over none of each other."""
        each = (
            -(-count // -(-span // step))
            for count, span, step in zip(
                self.positions(sizes), self.spans, self.steps, strict=True
            )
        )
        return math.prod(each)

    def padded(self, x: NDArray[Any]) -> NDArray[Any]:
        """``x``, (batch, C, ...), with the zeros around it."""
        edges, rank = self.edges(x.shape[2:]), len(self.kernel)
        if not any(edges):
            return x
        return np.pad(x, [(0, 0), (0, 0), *zip(edges[:rank], edges[rank:], strict=True)])

    def patches(self, x: NDArray[Any], chosen: IntArray | None = None) -> NDArray[Any]:
        """The patches of ``x`` row by row: with the weight as a matrix, (C * taps, N), they make the convolution.

        Args:
            x: (batch, C, ...).
            chosen: (rows,) positions, numbered through (batch, positions along each axis); all by default.

        Returns:
            (rows, C * taps), the taps of one channel after another.
        """
        rank = len(self.kernel)
        counts = (x.shape[0], *self.positions(x.shape[2:]))
        chosen = np.arange(math.prod(counts)) if chosen is None else chosen
        windows = sliding_window_view(self.padded(x), self.spans, tuple(range(2, 2 + rank)))
        every = (slice(None), slice(None), *(slice(None, None, n) for n in self.steps))
        windows = windows[(*every, *(slice(None, None, n) for n in self.holes))]
        sample, *places = np.unravel_index(chosen, counts)
        index: tuple[Any, ...] = (sample, slice(None), *places)
        found: NDArray[Any] = windows[index]
        return found.reshape(len(chosen), -1)
