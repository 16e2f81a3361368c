"""Rows or columns that are indistinguishable from each other.

Lines that no sample ever singled out only received what all of them received, such as the
softmax's common gradient for tokens that never occurred. They ended as one common vector, up to
rounding, whatever that vector is. Computing it once is enough.

No pair of lines is ever compared. Bitwise equal lines are found by hashing. The others are
projected on a few random directions; equal ones land together, so the densest place of a
projection names candidates. Their median is the common vector, every line's distance to it is
computed in one pass, and the members are those before the gap in the sorted distances. The
members are set aside and the search goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis import scan
from onnx_decompose.analysis.selection import Selection, SharedLines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.analysis.evidence import Evidence

    FloatArray = NDArray[np.floating[Any]]
    IntArray = NDArray[np.intp]

__all__ = ["Shared", "equal_lines", "shared_lines"]

_DIRECTIONS = 8
_GAP = 2.0
"""Smallest ratio of consecutive distances that separates members from the others."""
_CHANCE = 0.01
_NEAR = 0.1
"""Members lie within this share of the typical distance of all lines."""
_ALL_NEAR = 1e-3
_ROUNDINGS = 4.0
_MEDIAN_OF = 255
_SMALLEST = 1e-30
_MOST_GROUPS = 64
_ENTRIES_AT_A_TIME = 1 << 20
_LOOSEST, _TIGHTER, _TIGHTEST = 0.1, 10.0, 1e-4
"""Levels of the schedule after the first: 0.01, 0.001 and 0.0001."""
_SAMPLED = 16
"""Entries of a line that are compared before the line is read as a whole."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """Finds equal rows and equal columns; every nonzero entry stays supported.

    Attributes:
        within: largest deviation of a group's members, relative to the root mean square of their common vector;
            0 for bitwise equal lines only, of which one can stand for all without changing anything.
    """

    within: float = math.inf

    @property
    def name(self) -> str:
        """``shared``, or with its bound, such as ``shared(0.01)``."""
        return "shared" if math.isinf(self.within) else f"shared({self.within:g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """The groups are in ``shared``; pi0 is the share of columns or rows beyond the first."""
        weight = evidence.weight
        groups = tuple(group for axis in (1, 0) for group in self._groups(weight, axis, rng))
        spare = [
            sum(g.members.size - 1 for g in groups if g.axis == axis)
            / max(weight.shape[axis], 1)
            for axis in (0, 1)
        ]
        note = "; ".join(
            f"{g.members.size} of {weight.shape[g.axis]} {('rows', 'columns')[g.axis]} equal one "
            f"vector within {g.deviation:.2g}"
            for g in groups[:4]
        )
        share = max(spare)
        return Selection(
            weight != 0, self.name, None, share, (share, share), note, shared=groups
        )

    def looser(self) -> Shared | None:
        """Groups that the data's own gap found, with a tighter bound: a loose one must not cost the others."""
        level = min(self.within, _LOOSEST) / _TIGHTER
        return Shared(level) if level >= _TIGHTEST else None

    def _groups(
        self, weight: FloatArray, axis: int, rng: np.random.Generator
    ) -> tuple[SharedLines, ...]:
        if self.within > 0:
            found = shared_lines(weight, axis, rng=rng)
            return tuple(group for group in found if _relative(group) <= self.within)
        lines = weight if axis == 0 else weight.T
        return tuple(
            SharedLines(axis, members, lines[members[0]].copy(), 0.0)
            for members in equal_lines(weight, axis)
        )


def _relative(group: SharedLines) -> float:
    size = float(np.sqrt(np.mean(np.square(group.representative.astype(np.float64)))))
    return group.deviation / size if size else math.inf


def shared_lines(
    weight: FloatArray, axis: int, *, rng: np.random.Generator
) -> tuple[SharedLines, ...]:
    """Groups of two or more lines along ``axis`` of ``weight``, (K, N), largest first.

    Args:
        weight: finite entries.
        axis: 0 groups rows, 1 groups columns.
        rng: for the projections' directions.
    """
    lines = weight if axis == 0 else weight.T
    classes = _equal_classes(lines)
    unique = np.array([members[0] for members in classes], dtype=np.intp)
    rounding = 2.0 ** (1 - scan.resolution_of(weight).bits)
    found = _near_groups(lines, unique, rounding, rng) if lines.shape[1] > 1 else []
    class_of = {int(members[0]): members for members in classes}
    groups = []
    for heads in found:
        members = np.sort(np.concatenate([class_of.pop(int(head)) for head in heads]))
        centre = _median_line(lines, members)
        deviation = _deviation(lines, centre, members)
        groups.append(SharedLines(axis, members, centre.astype(lines.dtype), deviation))
    groups += [
        SharedLines(axis, members, lines[members[0]].copy(), 0.0)
        for members in class_of.values()
        if members.size > 1
    ]
    return tuple(sorted(groups, key=lambda g: (-g.members.size, int(g.members[0]))))


def equal_lines(weight: FloatArray, axis: int) -> tuple[IntArray, ...]:
    """Bitwise equal lines along ``axis`` of ``weight``, (K, N): classes of two or more, ascending.

    In order of their first member; lines of zeros are isolated nodes and in no class.
    """
    lines = weight if axis == 0 else weight.T
    entries = np.linspace(0, lines.shape[1] - 1, min(_SAMPLED, lines.shape[1])).astype(np.intp)
    sampled = np.ascontiguousarray(lines[:, entries])
    keys = sampled.view(np.dtype((np.void, sampled.itemsize * entries.size))).ravel()
    _, place, count = np.unique(keys, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(count[place] > 1)
    return tuple(members for members in _equal_classes(lines, suspects) if members.size > 1)


def _equal_classes(lines: FloatArray, among: IntArray | None = None) -> list[IntArray]:
    """Bitwise equal lines together, in order of their first; lines of zeros are left out."""
    classes: dict[bytes, list[int]] = {}
    waiting = np.arange(lines.shape[0]) if among is None else among
    for part, block in _row_blocks(lines, waiting):
        nonzero = block.any(axis=1)
        for line, number in zip(block[nonzero], waiting[part][nonzero], strict=True):
            digest = hashlib.blake2b(line.tobytes(), digest_size=16).digest()
            classes.setdefault(digest, []).append(int(number))
    return [np.array(members, dtype=np.intp) for members in classes.values()]


def _near_groups(
    lines: FloatArray, waiting: IntArray, rounding: float, rng: np.random.Generator
) -> list[IntArray]:
    """Groups among the different lines ``waiting`` that differ by drift's rounding only."""
    if waiting.size < 2:
        return []
    directions = rng.standard_normal((lines.shape[1], _DIRECTIONS))
    largest = max(float(np.abs(block).max()) for _, block in _row_blocks(lines, waiting))
    directions = (directions / max(largest, _SMALLEST)).astype(np.float32)  # none overflows
    places = np.empty((waiting.size, _DIRECTIONS), dtype=np.float32)
    for part, block in _row_blocks(lines, waiting):
        places[part] = block.astype(np.float32) @ directions
    groups: list[IntArray] = []
    left = np.ones(waiting.size, dtype=bool)
    while np.count_nonzero(left) >= 2 and len(groups) < _MOST_GROUPS:
        members = _one_group(lines, places[left], waiting[left], rounding)
        if members.size < 2:
            break
        groups.append(members)
        left &= ~np.isin(waiting, members)
    return groups


def _one_group(
    lines: FloatArray, places: FloatArray, waiting: IntArray, rounding: float
) -> IntArray:
    """Members of one group among ``waiting``, from the most crowded place; empty if none."""
    for seeds in _dense_places(places):
        centre = _median_line(lines, waiting[seeds])
        members = _before_the_gap(lines, centre, waiting, rounding)
        if members.size >= 2:
            return members
    return np.empty(0, dtype=np.intp)


def _dense_places(places: FloatArray) -> list[IntArray]:
    """Sets of lines that crowd in a projection: for shares from a half down to a pair."""
    count = places.shape[0]
    sets = []
    order = np.argsort(places, axis=0)
    spread = np.take_along_axis(places, order, axis=0)
    sizes = sorted({max(2, math.ceil(count * share)) for share in (0.5, 0.1, 0.02, 0.004, 0.0)})
    for size in reversed(sizes):
        widths = spread[size - 1 :] - spread[: count - size + 1]
        start, direction = np.unravel_index(int(np.argmin(widths)), widths.shape)
        sets.append(order[start : start + size, direction])
    return sets


def _before_the_gap(
    lines: FloatArray, centre: FloatArray, waiting: IntArray, rounding: float
) -> IntArray:
    """Lines nearer to ``centre`` than the first clear gap in the distances; empty if there is none."""
    distances = np.empty(waiting.size)
    for part, block in _row_blocks(lines, waiting):
        apart = block.astype(np.float64) - centre
        distances[part] = np.sqrt(np.einsum("ij,ij->i", apart, apart))
    # Nothing is nearer than rounding can tell.
    floor = _ROUNDINGS * rounding * float(np.linalg.norm(centre)) + 1e-300
    order = np.argsort(distances, kind="stable")
    ascending = np.maximum(distances[order], floor)
    farthest = lines[waiting[order[-_MEDIAN_OF:]]].astype(np.float64)
    typical = float(np.median(np.linalg.norm(farthest, axis=1)))
    near = int(np.searchsorted(ascending, max(_NEAR * typical, floor), side="right"))
    if ascending[-1] <= _ALL_NEAR * typical:
        return np.sort(waiting)  # all are one vector, so there is nothing to be apart from
    # The gap lies between near ones or right after them. Even lines that differ along a single
    # direction leave a gap of ratio g behind k members with probability g ** -k, by chance.
    following = ascending[2 : near + 1]
    ratios = following / ascending[1 : 1 + following.size]
    behind = np.arange(1, following.size + 1)
    clear = ratios >= np.maximum(_GAP, (ascending.size / _CHANCE) ** (1 / behind))
    if not clear.any():
        return np.empty(0, dtype=np.intp)
    last = int(np.argmax(np.where(clear, ratios, 0)))
    return np.sort(waiting[order[: last + 2]])


def _median_line(lines: FloatArray, members: IntArray) -> FloatArray:
    """Entrywise median of evenly chosen ``members``, (N,), in float64."""
    chosen = members[:: max(1, members.size // _MEDIAN_OF)]
    if chosen.size == 2:
        chosen = chosen[:1]  # the middle of two different lines would be neither
    return np.median(lines[chosen].astype(np.float64), axis=0)


def _deviation(lines: FloatArray, centre: FloatArray, members: IntArray) -> float:
    largest = 0.0
    for _, block in _row_blocks(lines, members):
        largest = max(largest, float(np.abs(block - centre).max()))
    return largest


def _row_blocks(lines: FloatArray, members: IntArray) -> Iterator[tuple[slice, FloatArray]]:
    """Slices of ``members`` and the lines they name, a bounded number of entries at a time."""
    step = max(1, _ENTRIES_AT_A_TIME // max(lines.shape[1], 1))
    for start in range(0, members.size, step):
        part = slice(start, start + step)
        chosen = members[part]
        together = chosen[-1] - chosen[0] + 1 == chosen.size
        yield part, lines[chosen[0] : chosen[-1] + 1] if together else lines[chosen]
