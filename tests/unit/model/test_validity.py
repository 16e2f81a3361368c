"""An unexpected error is the model's where the checker objects to it, and a defect where it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from onnx_decompose.errors import DataError, ModelError
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.validity import blaming
from tests.passes.harness import parse

if TYPE_CHECKING:
    import onnx

GOOD = parse(
    "g (float[N,2] x) => (float[N,3] y) { y = MatMul(x, w) }",
    {"w": np.ones((2, 3), np.float32)},
)
BAD = parse("g (float[N,2] x) => (float[N,3] y) { y = MatMul(x) }", {})


@pytest.mark.parametrize("models", [(BAD,), (GOOD, BAD)])
def test_the_model_that_is_not_valid_is_named(models: tuple[onnx.ModelProto, ...]) -> None:
    with (
        pytest.raises(ModelError, match=r"^model: not a valid ONNX model \(.*MatMul"),
        blaming(*map(Model, models)),
    ):
        raise IndexError


def test_a_defect_stays_one() -> None:
    with pytest.raises(IndexError, match="mine"), blaming(Model(GOOD)):
        raise IndexError("mine")


def test_our_own_errors_pass() -> None:
    with pytest.raises(DataError, match="given"), blaming(Model(BAD)):
        raise DataError("given")


def test_too_little_memory() -> None:
    with pytest.raises(ModelError, match="more memory"), blaming(Model(GOOD)):
        raise MemoryError
