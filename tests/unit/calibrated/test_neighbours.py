from __future__ import annotations

import numpy as np

from onnx_decompose.calibrated.neighbours import COPIES, ROWS, with_neighbours
from onnx_decompose.model.tensors import TensorSpec
from onnx_decompose.runtime.samples import Samples, samples_from_arrays

FLOAT = TensorSpec("x", np.dtype(np.float32), ("batch", 3))
TOKENS = TensorSpec("ids", np.dtype(np.int64), ("batch", 3))


def samples(rows: np.ndarray, spec: TensorSpec = FLOAT) -> Samples:
    return samples_from_arrays({spec.name: rows}, [spec])


def test_what_rests_stays_at_rest_and_the_rest_moves(rng: np.random.Generator) -> None:
    x = np.zeros((40, 3), np.float32)
    x[:12, 0], x[12:, 1] = rng.normal(2, 1, 12), rng.normal(-5, 3, 28)
    x[:, 2] = 7.0
    found = with_neighbours(samples(x), rng)
    assert found.count == 40 * (COPIES + 1)
    rows = found.rows["x"]
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[:40], x)
    resting = np.array([0.0, 0.0, 7.0])
    # -5 comes once, as every number that is not at rest: all of unit 1 that moved was not 0 before.
    np.testing.assert_array_equal(rows[40:] != resting, np.tile(x != resting, (COPIES, 1)))
    moved = (rows[40:] - np.tile(x, (COPIES, 1)))[:, 0]
    np.testing.assert_allclose(moved[moved != 0].std(), x[:12, 0].std() / 2, rtol=0.3)


def test_many_samples_and_token_numbers_are_left_as_they_are(rng: np.random.Generator) -> None:
    many = samples(rng.normal(size=(ROWS // 2 + 1, 3)).astype(np.float32))
    assert with_neighbours(many, rng) is many
    tokens = samples(rng.integers(0, 9, (20, 3)), TOKENS)
    assert with_neighbours(tokens, rng) is tokens


def test_one_source_of_randomness_one_result(rng: np.random.Generator) -> None:
    given = samples(rng.normal(size=(50, 3)).astype(np.float32))
    first, second = (with_neighbours(given, np.random.default_rng(3)).rows["x"] for _ in "ab")
    np.testing.assert_array_equal(first, second)
