"""What a site reads is a view of a value: its rows as they are, or the patches in a convolution's windows.

Sites with the same view multiply the same rows, whatever their weights are: moments, stages of a refit and everything
else that is known of what sites read goes by view.

Patches are made batch by batch. A value may have many positions, and neighbouring ones say nearly the same, so that at
most so many are drawn of each sample, at random and without repetition: ``POSITIONS``, or more where samples are few,
up to ``ROWS`` in all. Whoever begins with the same seed draws the same, so that the original and the model as annealed
so far are seen at the same positions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.windows import Window
from onnx_decompose.graph.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.sites import Site

__all__ = ["POSITIONS", "ROWS", "Rows", "View", "view_of"]

POSITIONS = 64
"""Of each sample, where there are many samples."""

ROWS = 1 << 15
"""Of all samples together, where they are few."""

_ENTRIES_AT_A_TIME = 1 << 23


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """How a site reads a value.

    Attributes:
        value: name of the value.
        window: of a convolution; None where the rows are the value's own, along its last axis.
    """

    value: str
    window: Window | None = None


def view_of(site: Site, node: onnx.NodeProto) -> View:
    """How ``site`` reads its input; ``node`` is its own."""
    if not site.kernel:
        return View(site.input)
    given = attribute_values(node)
    window = Window(
        site.kernel,
        tuple(given.get("strides", ())),
        tuple(given.get("dilations", ())),
        tuple(given.get("pads", ())),
        given.get("auto_pad", b"NOTSET").decode(),
    )
    # A window that says what is so without saying is the same one.
    strides, dilations = (
        () if set(steps) <= {1} else steps for steps in (window.strides, window.dilations)
    )
    pads = () if window.auto_pad != "NOTSET" or not any(window.pads) else window.pads
    return View(
        site.input, dataclasses.replace(window, strides=strides, dilations=dilations, pads=pads)
    )


class Rows:
    """The rows of a view, batch by batch, in the order of the samples.

    Args:
        view: whose rows.
        samples: how many there are in all.
        seed: of the positions that are drawn.
    """

    def __init__(self, view: View, samples: int, seed: int) -> None:
        self._window = view.window
        self._most = max(POSITIONS, ROWS // max(samples, 1))
        self._rng = np.random.default_rng(seed)

    def each(self, *values: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
        """The same rows, (rows, K), of each of ``values``: one batch of one value, of several models.

        Of a window, a number of whole samples at a time.
        """
        if self._window is None:
            yield tuple(value.reshape(-1, value.shape[-1]) for value in values)
            return
        count, channels, *sizes = values[0].shape
        total = math.prod(self._window.positions(sizes))
        chosen = self._drawn(count, total)
        width = channels * self._window.taps * max(chosen.shape[1], 1)
        step = max(_ENTRIES_AT_A_TIME // width, 1)
        for start in range(0, count, step):
            rows = chosen[start : start + step].ravel() - start * total
            part = slice(start, start + step)
            yield tuple(self._window.patches(value[part], rows) for value in values)

    def _drawn(self, count: int, total: int) -> NDArray[np.intp]:
        """(count, drawn) positions of each sample of a batch, numbered through all samples."""
        offsets = np.arange(count)[:, None] * total
        if total <= self._most:
            return offsets + np.arange(total)
        draws = [
            np.sort(self._rng.choice(total, self._most, replace=False, shuffle=False))
            for _ in range(count)
        ]
        return offsets + np.array(draws)
