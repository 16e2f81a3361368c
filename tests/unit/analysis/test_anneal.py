from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_decompose.analysis.anneal import anneal, fill


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
