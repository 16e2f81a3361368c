from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from onnx_decompose.analysis.packed import packs


@packs("mask")
@dataclasses.dataclass(frozen=True, eq=False)
class Holder:
    mask: object
    other: int = 0


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 1), (0, 4), (100, 3)])
def test_an_equal_array_comes_back(shape: tuple[int, int], rng: np.random.Generator) -> None:
    mask = rng.random(shape) < 0.5
    holder = Holder(mask)
    np.testing.assert_array_equal(holder.mask, mask, strict=True)
    np.testing.assert_array_equal(Holder(mask.T).mask, mask.T, strict=True)
    changed = dataclasses.replace(holder, other=1)
    np.testing.assert_array_equal(changed.mask, mask, strict=True)


def test_a_tuple_of_arrays(rng: np.random.Generator) -> None:
    masks = tuple(rng.random((4, n)) < 0.5 for n in (1, 9))
    found = Holder(masks).mask
    assert isinstance(found, Sequence)
    assert len(found) == 2
    np.testing.assert_array_equal(found[1], masks[1], strict=True)
    np.testing.assert_array_equal(found[1:][0], masks[1], strict=True)
    with pytest.raises(IndexError):
        found[2]
    again: Any = dataclasses.replace(Holder(masks), other=1).mask
    for got, expected in zip(again, masks, strict=True):
        np.testing.assert_array_equal(got, expected, strict=True)
    for got, expected in zip(found, masks, strict=True):
        np.testing.assert_array_equal(got, expected, strict=True)


def test_an_eighth_of_the_bytes_is_kept() -> None:
    holder = Holder(np.ones((64, 64), np.bool_))
    (content,) = (value for name, value in vars(holder).items() if name != "other")
    assert content[0].nbytes == 64 * 64 / 8


def test_what_is_read_does_not_lead_back() -> None:
    holder = Holder(np.zeros((2, 2), np.bool_))
    np.asarray(holder.mask)[...] = True
    assert not np.asarray(holder.mask).any()
    with pytest.raises(dataclasses.FrozenInstanceError):
        holder.mask = None  # type: ignore[misc]
