"""Made-up inputs at sizes that a model accepts."""

from __future__ import annotations

import functools

import numpy as np
import onnx.parser
import pytest

from onnx_decompose.cases import made_up_cases, open_model, runnable, working_size
from onnx_decompose.errors import DataError
from onnx_decompose.feeds import batch_sizes
from onnx_decompose.model_io import Model
from onnx_decompose.sessions import Provider, Session
from onnx_decompose.tensors import TensorSpec

FLOAT = np.dtype(np.float32)


def opened(body: str, head: str = "float[B, T] x") -> tuple[Model, Session]:
    model = Model(
        onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> g ({head}) => (float[B, T] y) {body}'
        )
    )
    return model, open_model(model, Provider.CPU)


def accepted(model: Model, session: Session) -> list[tuple[int, ...]]:
    """Shapes of the first input in all cases that ran."""

    def cases(other: tuple[int, ...]) -> object:
        return made_up_cases(model.proto, seeds=1, rng=np.random.default_rng(0), other=other)

    found = runnable(functools.partial(cases), session)  # type: ignore[arg-type]
    return [next(iter(case.feeds.values())).shape for case, _ in found]


def test_the_usual_sizes_come_first() -> None:
    model, session = opened("{ y = Abs(x) }")
    shapes = accepted(model, session)
    assert {shape[1] for shape in shapes} == {32, 64}
    assert {shape[0] for shape in shapes} == {1, 5, 32}
    assert working_size(model.proto, session, np.random.default_rng(0)) == 64


AT_LEAST_100 = """<int64[1] hundred = {100}> {
    s = Shape <start = 1, end = 2> (x) n = Sub(s, hundred)
    z = ConstantOfShape <value = float[1] {0}> (n) m = ReduceSum <keepdims = 0> (z) y = Add(x, m)
}"""


def test_other_sizes_where_the_model_accepts_none_of_them() -> None:
    """ConstantOfShape refuses a negative size, with an error."""
    model, session = opened(AT_LEAST_100)
    assert {shape[1] for shape in accepted(model, session)} == {512, 1024}
    assert working_size(model.proto, session, np.random.default_rng(0)) == 1024


ENDS_ITSELF = """
import os, pathlib, signal, sys, numpy
for path in pathlib.Path(sys.argv[2]).glob("*.npy"):
    if numpy.load(path).shape[1] < 100:
        os.kill(os.getpid(), signal.SIGFPE)
"""


def test_sizes_at_which_native_code_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out, and nothing runs at them in this process."""
    monkeypatch.setattr("onnx_decompose.sessions._TRIAL", ENDS_ITSELF)
    model, session = opened("{ y = Abs(x) }")
    assert not session.survives([{"x": np.ones((1, 32), np.float32)}])
    assert session.survives([{"x": np.ones((1, 512), np.float32)}])
    assert {shape[1] for shape in accepted(model, session)} == {512, 1024}
    assert working_size(model.proto, session, np.random.default_rng(0)) == 1024


def test_a_model_that_accepts_nothing() -> None:
    body = "<float[3, 3] w = {1, 0, 0, 0, 1, 0, 0, 0, 1}> { y = MatMul(x, w) }"
    model, session = opened(body)
    with pytest.raises(DataError, match="does not run on made-up inputs"):
        accepted(model, session)


def test_an_error_in_the_other_process_is_no_crash() -> None:
    _, session = opened(AT_LEAST_100)
    assert session.survives([{"x": np.ones((1, 32), np.float32)}])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("B", 8), (1, 5, 32)),
        (("B", 1000, 161), (1, 5, 6)),
        (("B", 1000, 1000), (1, 2)),  # never under 2: one sample says nothing of a batch
        (("B", "T", 1000), (1, 5, 16)),
        ((4, 1000, 1000), (1, 5, 32)),
    ],
)
def test_batches_are_smaller_where_a_sample_is_large(
    shape: tuple[int | str, ...], expected: tuple[int, ...]
) -> None:
    specs = [TensorSpec("x", FLOAT, shape)]
    assert batch_sizes(specs, (1, 5, 32), other=64, most_entries=1 << 20) == expected
