"""Families of proposals: levels from strict to loose, of which only those are made that are looked at.

A family says at once how many entries it could remove at most. What it needs to make its proposals, such as an order
of removal or a tree of mergings, it works out when the first of them is asked for, so that a family that cannot be
better than what was found already costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from onnx_decompose.calibrated.context import CalibrationContext

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnx_decompose.calibrated.proposals import Proposal
    from onnx_decompose.graph.sites import Site

__all__ = ["Family", "Generator", "entries_of"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Proposals that are nested, or nearly so: a stricter one is a faster and a less exact one.

    Attributes:
        name: no other family of a model has it.
        size: number of levels.
        at: the proposal of a level, from the strictest, 0, on; None where it is none, or a looser one's. It gives the
            same for the same number, and is cheap from the second call on.
        removes: entries that go at most, whatever the level.
    """

    name: str
    size: int
    at: Callable[[int], Proposal | None]
    removes: int

    def __iter__(self) -> Iterator[Proposal]:
        """All proposals, from the strictest on, each set of masks once."""
        seen: set[bytes] = set()
        for number in range(self.size):
            proposal = self.at(number)
            if proposal is not None and proposal.digest not in seen:
                seen.add(proposal.digest)
                yield proposal


Generator = Callable[[CalibrationContext], Iterator[Family]]
"""Makes families from what the context holds, in any order; what takes long is left for ``Family.at``."""


def entries_of(sites: Iterable[Site]) -> int:
    """Stored entries of ``sites``, each counted once."""
    return sum(size for size in {site.name: site.size for site in sites}.values())
