"""Masks kept as bits: as bytes, those of all sites would take a quarter of a float32 model's memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["packs"]

T = TypeVar("T")


def packs(field: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass without slots keep ``field``, a bool array or a tuple of such, as bits.

    Every time the field is read an equal array is made anew.
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
        return (
            tuple(map(_unpacked, content)) if isinstance(content, list) else _unpacked(content)
        )

    def __set__(self, instance: Any, value: Any) -> None:
        packed: Any = [*map(_packed, value)] if isinstance(value, tuple) else _packed(value)
        instance.__dict__[self._key] = packed


def _packed(mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    return np.packbits(np.ascontiguousarray(mask, np.bool_)), mask.shape


def _unpacked(bits: tuple[NDArray[np.uint8], tuple[int, ...]]) -> NDArray[np.bool_]:
    packed, shape = bits
    return np.unpackbits(packed, count=math.prod(shape)).view(np.bool_).reshape(shape)
