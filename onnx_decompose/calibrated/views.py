"""What a site reads is a view of a value: its rows as they are, what integers stand for, or a convolution's patches.

Sites with the same view multiply the same rows, whatever their weights are: moments, stages of a refit and everything
else that is known of what sites read goes by view.

Patches are made batch by batch. A value may have many positions, and neighbouring ones say nearly the same, so that no
more are drawn than there is use for, as many of each sample, at random and without repetition: ``ROWS`` in all, or
``ROWS_PER_ENTRY`` for each entry of a patch. Whoever begins with the same seed draws the same, so that the original and
the model as annealed so far are seen at the same positions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.windows import Window
from onnx_decompose.graph.quantized import INTEGER_PRODUCTS, input_codes
from onnx_decompose.graph.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants

__all__ = ["ROWS", "ROWS_PER_ENTRY", "Rows", "View", "comparable", "view_of"]

ROWS = 1 << 14
"""Positions of all samples together, and one of each sample in any case."""

ROWS_PER_ENTRY = 4
"""Where patches are large."""

_ENTRIES_AT_A_TIME = 1 << 23


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """How a site reads a value.

    Attributes:
        value: name of the value.
        window: of a convolution; None where the rows are the value's own, along its last axis.
        codes: scale and zero point of a value of integers, numbers or names of values; none where it is read as it is.
    """

    value: str
    window: Window | None = None
    codes: tuple[str | float, str | float] | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """Names of all values that it takes."""
        return (self.value, *(part for part in self.codes or () if isinstance(part, str)))

    def array(self, found: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The value as it is read, of the values by name."""
        value = found[self.value]
        if self.codes is None:
            return value
        scale, zero = (
            float(found[part].reshape(())) if isinstance(part, str) else part
            for part in self.codes
        )
        return (value.astype(np.float64) - zero) * scale

    def rows(self, found: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """(rows, K) the value as it is read, of a view without a window."""
        value = self.array(found)
        return value.reshape(-1, value.shape[-1])


def view_of(
    site: Site, node: onnx.NodeProto, maker: onnx.NodeProto | None, constants: Constants
) -> View | None:
    """How ``site`` reads its input; None where that is not a number for each unit.

    Args:
        site: the site.
        node: its own.
        maker: the node that makes its input, if any does.
        constants: the constants of the graph.
    """
    if site.op_type in INTEGER_PRODUCTS:
        parts: list[str | float] = []
        for name, default in zip(input_codes(node, maker), (1.0, 0.0), strict=True):
            if name in constants and constants.array(name).size != 1:
                return None  # one for each row of one sample
            held = float(constants.array(name).reshape(())) if name in constants else name
            parts.append(held or default)
        return View(site.input, codes=(parts[0], parts[1]))
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


def comparable(
    now: Mapping[str, NDArray[Any]], before: Mapping[str, NDArray[Any]], names: Iterable[str]
) -> bool:
    """Whether values have as many rows as before, and are finite: how many there are may hang on the data."""
    return all(
        now[name].shape == before[name].shape and bool(np.isfinite(now[name]).all())
        for name in names
    )


class Rows:
    """The rows of a view, batch by batch, in the order of the samples.

    Args:
        view: whose rows.
        samples: how many there are in all.
        seed: of the positions that are drawn.

    Attributes:
        worth: rows so far; of a window, the patches of one sample count only as far as windows fit in side by side.
    """

    def __init__(self, view: View, samples: int, seed: int) -> None:
        self._view, self._window = view, view.window
        self._samples = max(samples, 1)
        self._rng = np.random.default_rng(seed)
        self.worth = 0

    def each(self, *found: Mapping[str, NDArray[Any]]) -> Iterator[tuple[NDArray[Any], ...]]:
        """The same rows, (rows, K), of each of ``found``: one batch of the view's values by name, of several models.

        Of a window, those of some samples at a time.
        """
        if self._window is None:
            rows = tuple(self._view.rows(each) for each in found)
            self.worth += len(rows[0])
            yield rows
            return
        values = [self._view.array(each) for each in found]
        count, channels, *sizes = values[0].shape
        if not count:  # none of a branch, or of a loop, in this batch
            return
        total = math.prod(self._window.positions(sizes))
        entries = channels * self._window.taps
        most = max(max(ROWS, ROWS_PER_ENTRY * entries) // self._samples, 1)
        chosen = self._drawn(count, total, most)
        self.worth += count * min(chosen.shape[1], self._window.apart(sizes))
        step = max(_ENTRIES_AT_A_TIME // max(entries * chosen.shape[1], 1), 1)
        for start in range(0, count, step):
            places = (chosen[start : start + step] - start * total).ravel()
            part = slice(start, start + step)
            yield tuple(self._window.patches(value[part], places) for value in values)

    def _drawn(self, count: int, total: int, most: int) -> NDArray[np.intp]:
        """(count, drawn) positions of each sample of a batch, numbered through all samples."""
        offsets = np.arange(count)[:, None] * total
        if total <= most:
            return offsets + np.arange(total)
        draws = [
            np.sort(self._rng.choice(total, most, replace=False, shuffle=False))
            for _ in range(count)
        ]
        return offsets + np.array(draws)
