"""Made-up inputs at sizes that a model accepts."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from onnx_decompose.errors import DataError
from onnx_decompose.model.external_data import set_entry
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.model.tensors import TensorSpec, graph_inputs
from onnx_decompose.runtime.cases import (
    is_large,
    made_up_cases,
    open_model,
    runnable,
    sample_cases,
    working_size,
)
from onnx_decompose.runtime.feeds import batch_sizes
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider, Session
from onnx_decompose.verification.claims import Inputs

FLOAT = np.dtype(np.float32)
STATUS = Path("/proc/self/status")


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
    monkeypatch.setattr("onnx_decompose.runtime.sessions._TRIAL", ENDS_ITSELF)
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
    small = [TensorSpec("y", FLOAT, ("B", "T"))]
    for inputs, outputs in ((specs, ()), (small, specs)):  # as an input, and as an output
        found = batch_sizes(inputs, outputs, (1, 5, 32), other=64, most_entries=1 << 20)
        assert found == expected


def test_samples_of_which_much_is_made_go_a_few_at_a_time() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    scores (int64[B, T] x) => (float[B, T, 32000] y) { y = Unknown(x) }"""
    proto = onnx.parser.parse_model(text)
    for length, expected in ((128, [2, 2, 1]), (1, [5])):
        rows = {"x": np.zeros((5, length), np.int64)}
        samples = samples_from_arrays(rows, graph_inputs(proto))
        sizes = [case.feeds["x"].shape[0] for case in sample_cases(proto, samples)]
        assert sizes == expected


def test_claim_b_is_measured_on_the_samples_where_there_are_any() -> None:
    model, _ = opened("{ y = Abs(x) }")
    samples = samples_from_arrays({"x": np.ones((3, 4))}, graph_inputs(model.proto))
    assert {case.kind for case in Inputs(samples).typical_cases(model)} == {"given"}
    assert {case.kind for case in Inputs().typical_cases(model)} == {"random"}
    assert {case.kind for case in Inputs(samples).cases(model)} > {"given", "random"}


def convolution(folder: Path, size: int, *, external: bool = True) -> Model:
    """A convolution of 1024 channels to ``size`` others."""
    weight = np.zeros((size, 1024, 1, 1), np.float32)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 1024, 2, 2])],
        [value("y", onnx.TensorProto.FLOAT, [1, size, 2, 2])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = onnx.helper.make_opsetid("", 17)
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    if not external:
        return Model(proto)
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="m.data")
    return load_model(folder / "m.onnx")


def anonymous() -> int:
    """Bytes of this process that only swapping could free."""
    (line,) = (n for n in STATUS.read_text().splitlines() if n.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.skipif(not STATUS.is_file(), reason="the system does not say what a process holds")
def test_weights_of_a_large_model_stay_in_their_file(tmp_path: Path, *, fast: bool) -> None:
    model = convolution(
        tmp_path, 1 << 14
    )  # 64 MiB: glibc takes no such piece from what it keeps
    feeds = {"x": np.ones((1, 1024, 2, 2), np.float32)}
    small = convolution(tmp_path, 64, external=False)
    open_model(small, Provider.CPU).run(feeds)  # loads the libraries
    before = anonymous()
    session = open_model(model, Provider.CPU, fast=fast, large=True)
    session.run(feeds)
    assert anonymous() - before < 1 << 24


def test_large_is_what_has_many_weights_and_some_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = convolution(tmp_path, 512)
    inside = convolution(tmp_path, 512, external=False)
    assert not is_large(outside)
    monkeypatch.setattr("onnx_decompose.runtime.cases._LARGE", 1 << 20)
    assert is_large(outside)
    assert not is_large(inside)
    # As the annealed form of a large model, whose new weights are not in a file.
    bias = onnx.numpy_helper.from_array(np.zeros(2048, np.float32), "b")
    inside.proto.graph.initializer.append(bias)
    set_entry(inside.proto.graph.initializer[1], "m.data", 0, bias.ByteSize())
    assert is_large(inside)
