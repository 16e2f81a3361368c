from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from onnx_decompose.analysis.anneal import anneal, fill, unify
from onnx_decompose.analysis.selection import SharedLines

if TYPE_CHECKING:
    from numpy.typing import NDArray


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_supported_entries_are_untouched_and_the_others_exactly_zero(
    dtype: Any, rng: np.random.Generator
) -> None:
    weight = rng.standard_normal((4, 3)).astype(dtype)
    mask = rng.random((4, 3)) < 0.5
    before = weight.copy()
    annealed = anneal(weight, mask)
    assert annealed.dtype == weight.dtype
    assert (annealed[mask] == before[mask]).all()
    assert (annealed[~mask] == 0).all()
    np.testing.assert_array_equal(weight, before)


def test_blocks_are_filled_between_units_that_have_an_entry() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True
    found = fill(
        mask, [(np.array([0, 1, 3]), np.array([0, 1, 3])), (np.array([2]), np.array([2]))]
    )
    expected = np.zeros((4, 4), bool)
    expected[:2, :2] = expected[2, 2] = True  # nothing leads from or to unit 3
    np.testing.assert_array_equal(found, expected)
    assert mask.sum() == 3


def test_without_blocks_nothing_is_filled() -> None:
    mask = np.eye(3, dtype=bool)
    np.testing.assert_array_equal(fill(mask, []), mask)


def group(weight: NDArray[Any], axis: int, members: list[int], deviation: float) -> SharedLines:
    lines = weight if axis == 0 else weight.T
    return SharedLines(axis, np.array(members), lines[members[0]].copy(), deviation)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_members_of_a_group_become_its_representative(
    axis: int, rng: np.random.Generator
) -> None:
    weight = rng.standard_normal((6, 8)).astype(np.float32)
    before = weight.copy()
    unified = unify(weight, [group(weight, axis, [1, 2, 5], 0.1)])
    lines, old = (unified, weight) if axis == 0 else (unified.T, weight.T)
    np.testing.assert_array_equal(lines[[1, 2, 5]], np.stack([old[1]] * 3))
    np.testing.assert_array_equal(lines[[0, 3, 4]], old[[0, 3, 4]])
    assert unified.dtype == weight.dtype
    np.testing.assert_array_equal(weight, before)


def test_groups_without_deviation_change_nothing(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((6, 8))
    weight[3] = weight[1]
    assert unify(weight, [group(weight, 0, [1, 3], 0.0)]) is weight
    assert unify(weight, []) is weight


def test_only_the_axis_with_more_to_spare_is_unified(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((6, 8))
    groups = [group(weight, 0, [0, 1], 0.1), group(weight, 1, [2, 3, 4, 5], 0.1)]
    unified = unify(weight, groups)
    np.testing.assert_array_equal(unified[:, [2, 3, 4, 5]], weight[:, [2] * 4])
    np.testing.assert_array_equal(unified[:, [0, 1, 6, 7]], weight[:, [0, 1, 6, 7]])
