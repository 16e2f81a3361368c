"""A proposal: a set of masks with a name, which entries of which sites may stay, and what else a refit starts from."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.pooling import Pools
    from onnx_decompose.analysis.refit import Groups
    from onnx_decompose.graph.recurrent import RecurrentWeight
    from onnx_decompose.graph.sites import Site

    Masks = Mapping[str, NDArray[np.bool_]]

__all__ = ["Focus", "Proposal"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Focus:
    """Rows that count for some outputs and not for others: a group's outputs are fitted where the group is active.

    Attributes:
        count: number of groups.
        entries: values of the original that tell.
        shares: from those values by name, (rows, groups): the weight of each row for each group.
        groups: by site name, the group of each output, (N,); negative for none.
    """

    count: int
    entries: tuple[str, ...]
    shares: Callable[[Mapping[str, NDArray[Any]]], NDArray[np.float64]]
    groups: Mapping[str, NDArray[np.intp]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """Which entries may stay.

    Attributes:
        name: for the report, such as ``support(4 components)``.
        masks: by site name, (K, N) bool; sites that are not named stay as they are.
        starts: entries to begin with in the place of the original's, (K, N) by site name.
        focus: which rows count for which outputs; None for all alike.
        equal: outputs that get one column, the mean of theirs, by site name; without a focus.
        remade: what each output is to be made of, (N, N) by site name: of the original's outputs y, biases included,
            it becomes y M. ``starts`` says so too, and what reads them. With a focus; not where outputs are ``equal``.
        recast: what becomes of inputs that are made of remade outputs, (K, K) by site name: of the original's x it is
            x M, as far as the original tells.
        pools: inputs that get one row, the mean of theirs, by the name of a site that alone reads its input and keeps
            all of it; without a focus.
    """

    name: str
    masks: Masks
    starts: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    focus: Focus | None = None
    equal: Mapping[str, Groups] = dataclasses.field(default_factory=dict)
    remade: Mapping[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict)
    recast: Mapping[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict)
    pools: Mapping[str, Pools] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        """The same for another proposal of the same family with the same masks, equal outputs and pools."""
        found = hashlib.sha256()
        for name, mask in self.masks.items():
            found.update(name.encode())
            # A mask that only repeats a line is read as that line.
            lines = mask[tuple(slice(None if step else 1) for step in mask.strides)]
            found.update(np.packbits(lines).tobytes())
        for name, groups in self.equal.items():
            found.update(name.encode())
            found.update(np.ascontiguousarray(groups.labels).tobytes())
        for name, pools in self.pools.items():
            found.update(name.encode())
            found.update(pools.labels.tobytes())
        return found.digest()

    @property
    def keeps_nothing(self) -> bool:
        """Whether no entry may stay."""
        return not any(mask.any() for mask in self.masks.values())

    def wanted(self, site: Site, weight: NDArray[Any]) -> NDArray[np.float64]:
        """(K, N) what a refit of ``site`` should make of the original's input, given the original's weight."""
        wide = weight.astype(np.float64)
        return wide @ self.remade[site.name] if site.name in self.remade else wide

    def start(self, site: Site | RecurrentWeight, weight: NDArray[Any]) -> NDArray[Any]:
        """The entries of ``site`` before any refit, (K, N), given the original's."""
        start = np.where(
            self.masks[site.name],
            self.starts.get(site.name, weight),
            np.zeros((), weight.dtype),
        )
        if site.name in self.pools:
            pools = self.pools[site.name]
            start = pools.mean(start)[pools.labels].astype(weight.dtype)
        if site.name not in self.equal:
            return start
        groups = self.equal[site.name]
        return groups.mean(start)[:, groups.labels].astype(weight.dtype)
