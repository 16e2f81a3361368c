"""Support by data: which inputs are active together, and which units serve which group of inputs.

A unit is *active* in a row where it differs from its most frequent value, its *rest* (0 for a feature that is not
there). Two inputs are joined where they are active together more often than chance allows: under independence the
number of joint rows is hypergeometric, and the upper tail is tested for all pairs with Holm's bound on the smallest
p-value (Bonferroni), so that any false edge at all has probability alpha at most: one is enough to join two groups.
Independence of weak noise is what the test sees through; a dependence that is real but slight is told by its size, the
phi coefficient, which a level bounds from below.

Groups are the components of that graph. Units between inputs and outputs then belong where they are needed: what varies
when a group is active, and reaches the outputs that vary with it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse, special, stats
from scipy.sparse import csgraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = [
    "APART",
    "ActivityAccumulator",
    "Activity",
    "SpreadAccumulator",
    "coactive_groups",
    "influence",
    "resting_values",
    "where_it_varies",
]

_MOST_COUNTED = 1 << 24
APART = -1
"""Label of a unit that is in no group."""


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """How often inputs are active, alone and together.

    Attributes:
        rows: how many rows were seen.
        together: (K, K) rows in which both are active; the diagonal counts each alone.
    """

    rows: int
    together: FloatArray

    @property
    def alone(self) -> FloatArray:
        """(K,) rows in which each is active."""
        alone: FloatArray = self.together.diagonal()
        return alone

    @functools.cached_property
    def phi(self) -> FloatArray:
        """(K, K) phi coefficient of every pair."""
        first, second = self.alone[:, None], self.alone[None, :]
        expected = first * second / self.rows
        scale = np.sqrt(first * second * (1 - first / self.rows) * (1 - second / self.rows))
        found: FloatArray = np.divide(
            self.together - expected, scale, out=np.zeros_like(scale), where=scale > 0
        )
        return found

    def dependent(self, bound: float) -> BoolArray:
        """(K, K) pairs whose upper tail has a probability of ``bound`` or less; none with itself.

        The tail P(X >= t) lies between its first term and exp(-n KL(t/n, p)), p the share of rows in which the other
        one is active (Hoeffding 1963, for draws without replacement): it is summed up only where these two leave it
        open, as there are millions of pairs of a few thousand inputs.

        Args:
            bound: well under 1/2, so that no more joint rows than expected are no evidence.
        """
        first, second = np.nonzero(np.triu(self.phi > 0, 1))
        few, many = np.sort([self.alone[first], self.alone[second]], axis=0)
        joint = self.together[first, second]
        share, seen = many / self.rows, joint / few
        least = _log_choose(many, joint) + _log_choose(self.rows - many, few - joint)
        least -= _log_choose(np.float64(self.rows), few)
        most = -few * (special.rel_entr(seen, share) + special.rel_entr(1 - seen, 1 - share))
        found = most <= np.log(bound)
        (open_,) = np.nonzero(~found & (least <= np.log(bound)))
        tail = stats.hypergeom.sf(joint[open_] - 1, self.rows, many[open_], few[open_])
        found[open_] = tail <= bound
        edges = np.zeros(self.together.shape, dtype=bool)
        edges[first[found], second[found]] = True
        return edges | edges.T


class ActivityAccumulator:
    """Counts activity batch by batch; memory is K^2 numbers."""

    def __init__(self, rest: NDArray[Any]) -> None:
        self._rest = rest
        self._rows = 0
        self._together = np.zeros((rest.size, rest.size))

    def update(self, x: NDArray[Any]) -> None:
        """Add the rows of ``x``, (..., K)."""
        active = self.active(x).astype(np.float32)  # counts up to 2^24 are exact
        self._rows += active.shape[0]
        for part in np.array_split(active, 1 + active.shape[0] // _MOST_COUNTED):
            self._together += part.T @ part

    def active(self, x: NDArray[Any]) -> FloatArray:
        """(rows, K) 1 where a unit is active, 0 where it rests."""
        active: FloatArray = (x.reshape(-1, self._rest.size) != self._rest).astype(np.float64)
        return active

    def result(self) -> Activity:
        """What was counted so far."""
        return Activity(self._rows, self._together)


def _log_choose(total: FloatArray | np.float64, taken: FloatArray) -> FloatArray:
    found: FloatArray = special.gammaln(total + 1) - special.gammaln(taken + 1)
    found -= special.gammaln(total - taken + 1)
    return found


def resting_values(x: NDArray[Any]) -> NDArray[Any]:
    """The most frequent value of every unit of ``x``, (rows, K): the smallest of several that are as frequent."""
    ordered = np.sort(x, axis=0)
    rest = np.empty(x.shape[1], x.dtype)
    for unit in range(x.shape[1]):
        values, counts = np.unique(ordered[:, unit], return_counts=True)
        rest[unit] = values[counts.argmax()]
    return rest


def coactive_groups(
    activity: Activity, *, alpha: float = 0.01, level: float = 0.0
) -> tuple[IntArray, int]:
    """The groups of inputs that are active together.

    Args:
        activity: what was counted.
        alpha: probability of any false edge.
        level: smallest phi coefficient of an edge.

    Returns:
        (K,) group of each input, numbered by their first inputs, and the number of groups. Inputs without an edge join
        the group that they are most often active with; those that never are, and those that are never active, are
        ``APART``.
    """
    count = activity.alone.size
    bound = alpha / max(count * (count - 1) / 2, 1)
    edges = activity.dependent(bound) & (activity.phi >= level)
    _, found = csgraph.connected_components(sparse.csr_array(edges), directed=False)
    _join_the_rare(found, activity, bound)
    sizes = np.bincount(found)
    labels = np.full(count, APART, dtype=np.intp)
    groups = [k for k in dict.fromkeys(found.tolist()) if sizes[k] > 1]
    for number, group in enumerate(groups):
        labels[found == group] = number
    if not groups:
        return labels, 0
    member = labels[:, None] == np.arange(len(groups))
    # Mean over the group's inputs, so that the largest group does not win by its size.
    nearness = activity.together @ (member / np.maximum(activity.alone[:, None], 1))
    nearness /= member.sum(axis=0)
    loose = (labels == APART) & (nearness.max(axis=1) > 0)
    labels[loose] = nearness[loose].argmax(axis=1)
    return labels, len(groups)


def _join_the_rare(found: NDArray[np.integer[Any]], activity: Activity, bound: float) -> None:
    """Put groups that are active too rarely to be told from a part of another one into that one, in place.

    A few rows that all lie where another group is active would be no evidence of an edge, even if it were there, and
    are none that the groups are apart. Where a rare group is seen without the other, that is.
    """
    alone = activity.alone
    heads = {
        int(k): int(np.where(found == k, alone, -1).argmax())
        for k in np.flatnonzero(np.bincount(found) > 1)
    }
    for group, head in sorted(heads.items(), key=lambda item: alone[item[1]]):
        shares = {
            other: activity.together[head, found == other].max(initial=0.0) / alone[head]
            for other in heads
            if other != group and (found == other).any()
        }
        if not shares:
            return
        other = max(shares, key=lambda other: shares[other])
        often = alone[heads[other]]
        surest = stats.hypergeom.sf(alone[head] - 1, activity.rows, often, alone[head])
        if often > alone[head] and shares[other] >= often / activity.rows and surest > bound:
            found[found == group] = other


class SpreadAccumulator:
    """Variance of units within each group: over the rows in which the group is active, weighted by how much it is."""

    def __init__(self, units: int, groups: int) -> None:
        self._weight = np.zeros(groups)
        self._sum = np.zeros((units, groups))
        self._squares = np.zeros((units, groups))

    def update(self, values: NDArray[Any], share: FloatArray) -> None:
        """Add rows of ``values``, (..., units), with the ``share`` of each group in them, (rows, groups)."""
        rows = values.reshape(-1, self._sum.shape[0]).astype(np.float64)
        self._weight += share.sum(axis=0)
        self._sum += rows.T @ share
        self._squares += (rows**2).T @ share

    def result(self) -> FloatArray:
        """(units, groups) variance; 0 of a group that never was active."""
        weight = np.maximum(self._weight, 1e-300)
        mean = self._sum / weight
        variance: FloatArray = np.maximum(self._squares / weight - mean**2, 0.0)
        # What two large numbers leave of each other is rounding.
        variance[variance < 1e-12 * mean**2] = 0.0
        return variance


def where_it_varies(spread: FloatArray) -> IntArray:
    """The group with which each output varies most; ``APART`` for constants.

    Args:
        spread: (units, groups) variance within each group. It is compared as a share of what the group moves most: not
            of all that it moves, or a group of many outputs would lose some to one of few.
    """
    shares = spread / np.maximum(spread.max(axis=0), 1e-300)
    return np.where(spread.max(axis=1) > 0, shares.argmax(axis=1), APART)


def influence(weight: NDArray[Any], target: FloatArray) -> FloatArray:
    """What the inputs of a site do to each group of outputs: (K, G) from its weight, (K, N), and ``target``, (N, G)."""
    reached: FloatArray = weight.astype(np.float64) ** 2 @ target
    return reached
