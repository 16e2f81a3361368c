"""Channel edges: dependencies that hold several parameters each.

In the gates of a recurrent operator, stacked along the outputs as (K, channels x N), the
dependency of unit j on input i is the sequence of its parameters over the gates; in a
d -> c*d -> d block it runs over the c channels. One entry of the sequence says little, all of
them together more, and what is kept or removed is the dependency as a whole.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from onnx_decompose.analysis import scan
from onnx_decompose.analysis.groups import step_up
from onnx_decompose.analysis.null import Normal, Null, Zero
from onnx_decompose.analysis.pi0 import LAMBDA, pi0_from_count
from onnx_decompose.analysis.selection import Selection, looser_level, proven

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnx_decompose.analysis.evidence import Evidence

    FloatArray = NDArray[np.floating[Any]]

__all__ = ["ChannelEdges", "channel_edge_log_p", "stacked_channels"]


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelEdges:
    """Edges over ``channels`` blocks of outputs of one weight, Benjamini-Hochberg at ``alpha``.

    Without a number, over as many as the weight is known to stack: the gates of a recurrent
    operator, one block for any other weight. A weight whose outputs do not divide into so many
    blocks is judged with one channel, entry by entry.
    """

    alpha: float
    channels: int | None = None

    @property
    def name(self) -> str:
        """Such as ``channel(0.01)`` or ``channel:4(0.01)``."""
        number = "" if self.channels is None else f":{self.channels}"
        return f"channel{number}({self.alpha:g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """The same entries of every channel, but for exact zeros."""
        del rng
        weight = evidence.weight
        asked = evidence.channels if self.channels is None else self.channels
        channels = 1 if weight.shape[1] % asked else asked
        if evidence.untouched is not None:
            edges = stacked_channels(~evidence.untouched, channels).any(axis=0)
            null_edges = edges.size - int(np.count_nonzero(edges))
            share = null_edges / max(edges.size, 1)
            mask = np.tile(edges, channels) & (weight != 0)
            return Selection(mask, self.name, None, share, (share, share), evidence.note)
        if isinstance(evidence.null, Zero):
            decided = proven(self.name, evidence)
            assert decided is not None
            return decided
        values = stacked_channels(evidence.values, channels)
        p_values = np.exp(channel_edge_log_p(values, [evidence.null] * channels))
        edges = step_up(p_values.ravel(), self.alpha).reshape(p_values.shape)
        pi0 = pi0_from_count(int(np.count_nonzero(p_values > LAMBDA)), p_values.size)
        mask = np.tile(edges, channels) & (weight != 0)
        return Selection(mask, self.name, None, pi0.value, pi0.interval, evidence.note)

    def looser(self) -> ChannelEdges | None:
        """Four times the level, up to 0.5."""
        level = looser_level(self.alpha)
        return None if level is None else ChannelEdges(level, self.channels)


def stacked_channels(values: NDArray[Any], channels: int) -> NDArray[Any]:
    """(channels, K, N) view of blocks side by side, (K, channels x N), such as a GRU's gates."""
    inputs, outputs = values.shape
    return values.reshape(inputs, channels, outputs // channels).transpose(1, 0, 2)


def channel_edge_log_p(values: FloatArray, nulls: Sequence[Null]) -> FloatArray:
    """(K, N) log p-value of each dependency from its parameters over the channels.

    Chi-square with one degree of freedom per channel where every null is normal, Fisher's
    combination (1925) of the entries' p-values otherwise, as where families mix. An entry counts
    with the edge of its rounding cell that is nearest to the null's location.

    Args:
        values: (channels, K, N): edge (i, j) is the sequence ``values[:, i, j]``.
        nulls: one per channel.
    """
    normal = all(isinstance(null, Normal) for null in nulls)
    total = np.zeros(values.shape[1:])
    for channel, null in zip(values, nulls, strict=True):
        deviation = np.abs(channel.astype(np.float64) - null.location)
        deviation -= scan.resolution_of(channel).half_cell(channel)
        inner = np.maximum(deviation, 0.0, out=deviation)
        total += (inner / null.scale) ** 2 if normal else -2 * null.logsf(inner)
    return log_chi_square_sf(total, len(nulls) if normal else 2 * len(nulls))


def log_chi_square_sf(statistic: FloatArray, degrees: int) -> FloatArray:
    """Log survival function of chi-square, where the plain one underflows too."""
    a, x = degrees / 2, np.asarray(statistic, dtype=np.float64) / 2
    survival = special.gammaincc(a, x)
    # Upper incomplete gamma by its asymptotic series (DLMF 8.11.2), which ends or converges
    # fast for x far above a, the only place it is used.
    series, term = np.ones_like(x), np.ones_like(x)
    far = np.maximum(x, 100.0)
    for k in range(1, 20):
        term = term * (a - k) / far
        series += term
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = (a - 1) * np.log(far) - x - special.gammaln(a) + np.log(series)
        plain = np.log(survival)
    log_p: FloatArray = np.where(survival > 1e-250, plain, tail)
    return log_p
