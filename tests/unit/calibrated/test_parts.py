"""Samples in three parts, and in turns."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.calibrated.parts import rotated_samples, split_samples
from onnx_decompose.errors import DataError
from onnx_decompose.model.tensors import TensorSpec
from onnx_decompose.runtime.samples import Samples, samples_from_arrays

SPEC = TensorSpec("x", np.dtype(np.float32), ("N", 1))


def numbered(count: int) -> Samples:
    return samples_from_arrays({"x": np.arange(count, dtype=np.float32)[:, None]}, [SPEC])


def which(samples: Samples) -> set[int]:
    return set(samples.rows["x"][:, 0].astype(int).tolist())


@pytest.mark.parametrize("count", [3, 10, 101, 539])
def test_whose_turn_it_is_to_choose_on_is_never_fitted_to_and_judged_is_neither(
    count: int,
) -> None:
    turns = rotated_samples(numbered(count), 3)
    judged = which(turns[0].judge)
    for parts in turns:
        fit, choose = which(parts.fit), which(parts.choose)
        assert which(parts.judge) == judged
        assert not fit & choose
        assert not judged & (fit | choose)
        assert fit | choose | judged == set(range(count))


def test_every_sample_that_is_not_judged_has_its_turn_once() -> None:
    turns = rotated_samples(numbered(539), 0)
    assert len(turns) == 4
    chosen = [which(parts.choose) for parts in turns]
    assert sum(map(len, chosen)) == len(set.union(*chosen)) == 431
    assert {len(part) for part in chosen} <= {107, 108}


def test_the_first_turn_is_the_split_itself() -> None:
    samples = numbered(50)
    first, parts = rotated_samples(samples, 7)[0], split_samples(samples, 7)
    assert which(first.fit) == which(parts.fit)
    assert which(first.choose) == which(parts.choose)


def test_two_samples_are_too_few() -> None:
    with pytest.raises(DataError, match="holds 2 samples; at least 3"):
        split_samples(numbered(2), 0)
