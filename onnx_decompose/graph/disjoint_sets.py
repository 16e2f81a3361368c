"""Sets of names that grow together."""

from __future__ import annotations

__all__ = ["DisjointSets"]


class DisjointSets:
    """Union-find over names (Tarjan 1975, with path halving)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that was asked for, in order."""
        return tuple(self._parent)

    def find(self, name: str) -> str:
        """The name that stands for the set of ``name``; a new name is a set of its own."""
        parent = self._parent.setdefault(name, name)
        while parent != name:
            self._parent[name] = grandparent = self._parent[parent]
            name, parent = grandparent, self._parent[grandparent]
        return name

    def join(self, first: str, second: str) -> None:
        """Make one set of two."""
        self._parent[self.find(first)] = self.find(second)
