"""Masks kept as bits: as bytes, those of all sites would take a quarter of a float32 model's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["packs"]

T = TypeVar("T")
_Bits = tuple[NDArray[np.uint8], tuple[int, ...]]


def packs(field: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass without slots keep ``field``, a bool array or a tuple of such, as bits.

    Every time the field is read an equal array is made anew; of a tuple, each array when it is asked for.
    """

    def decorated(owner: type[T]) -> type[T]:
        setattr(owner, field, _Packed(f"_{field}_bits"))
        return owner

    return decorated


class _Packed:
    """The descriptor that does it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        content = instance.__dict__[self._key]
        return _Several(content) if isinstance(content, list) else _unpacked(content)

    def __set__(self, instance: Any, value: Any) -> None:
        if isinstance(value, _Several):
            packed: Any = value.bits
        else:
            packed = [*map(_packed, value)] if isinstance(value, tuple) else _packed(value)
        instance.__dict__[self._key] = packed


class _Several(Sequence[NDArray[np.bool_]]):
    """Arrays that are unpacked one at a time."""

    def __init__(self, bits: list[_Bits]) -> None:
        self.bits = bits

    def __len__(self) -> int:
        return len(self.bits)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.bool_]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[NDArray[np.bool_], ...]: ...
    def __getitem__(
        self, index: int | slice
    ) -> NDArray[np.bool_] | tuple[NDArray[np.bool_], ...]:
        if isinstance(index, slice):
            return tuple(map(_unpacked, self.bits[index]))
        return _unpacked(self.bits[index])


def _packed(mask: NDArray[np.bool_]) -> _Bits:
    return np.packbits(np.ascontiguousarray(mask, np.bool_)), mask.shape


def _unpacked(bits: _Bits) -> NDArray[np.bool_]:
    packed, shape = bits
    return np.unpackbits(packed, count=math.prod(shape)).view(np.bool_).reshape(shape)
