from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_decompose.analysis.anneal import anneal


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
