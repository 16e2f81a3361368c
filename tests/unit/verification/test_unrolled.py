"""A model without graphs inside it makes what the model makes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.model.renames import subgraphs
from onnx_decompose.runtime.cases import made_up_cases, open_model
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification import unrolled as module
from onnx_decompose.verification.unrolled import unrolled
from tests.e2e.random_models import Recipe, random_model
from tests.e2e.wrapped import wrapped
from tests.passes.harness import parse


def made(seed: int, inside: str, opset: int) -> Model:
    return load_model(random_model(Recipe(seed, opset=opset, inside=inside, rank=3)))


def check(model: Model) -> None:
    case = next(made_up_cases(model.proto, seeds=1, rng=np.random.default_rng(0)))
    plain = unrolled(model, case.feeds, Provider.CPU)
    for node in plain.proto.graph.node:
        assert node.domain == ""
        assert not list(subgraphs(node))
    expected, got = (open_model(m, Provider.CPU).run(case.feeds) for m in (model, plain))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("inside", ["function", "branch", "loop", "scan"])
@pytest.mark.parametrize("seed", range(3))
def test_all_in_one_node(seed: int, inside: str, opset: int) -> None:
    check(made(seed, inside, opset))


def test_calls_in_branches() -> None:
    model = random_model(Recipe(3, opset=17))
    check(Model(wrapped(model, "nested", np.random.default_rng(0))))


def test_a_loop_ends_when_its_condition_says_so() -> None:
    """It stops at the third run of nine; one state, one value for each run, the numbers of runs in use."""
    model = parse(
        """g (float[2] x) => (float[2] y, float[n, 2] each) {
        times = Constant <value_int: int = 9> () limit = Constant <value_float: float = 10.0> ()
        y, each = Loop <body: graph = body (int64 i, bool go, float[2] s) => (bool more, float[2] t, float[2] u) {
            f = Cast <to: int = 1> (i) v = Add(s, f) one = Constant <value_float: float = 1.0> ()
            t = Add(v, one) u = Identity(v) sum = ReduceSum <keepdims: int = 0> (t) more = Less(sum, limit)
        }> (times, , x) }""",
        {},
    )
    feeds = {"x": np.array([-1.0, 0.5], np.float32)}
    plain = unrolled(Model(model), feeds, Provider.CPU)
    expected, got = (open_model(m, Provider.CPU).run(feeds) for m in (Model(model), plain))
    assert expected["each"].shape == (3, 2)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_a_scan_backwards_and_across() -> None:
    model = parse(
        """g (float[2] s, float[2, 3] x) => (float[2] last, float[2, 3] each) {
        last, each = Scan <num_scan_inputs: int = 1, scan_input_axes: ints = [1], scan_input_directions: ints = [1],
            scan_output_axes: ints = [1], scan_output_directions: ints = [1],
            body: graph = body (float[2] a, float[2] b) => (float[2] c, float[2] d) { c = Add(a, b) d = Neg(c) }
        > (s, x) }""",
        {},
    )
    rng = np.random.default_rng(0)
    feeds = {
        n: rng.normal(size=shape).astype(np.float32) for n, shape in (("s", 2), ("x", (2, 3)))
    }
    plain = unrolled(Model(model), feeds, Provider.CPU)
    expected, got = (open_model(m, Provider.CPU).run(feeds) for m in (Model(model), plain))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_what_would_be_very_long_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(0, "loop", 17)
    case = next(made_up_cases(model.proto, seeds=1, rng=np.random.default_rng(0)))
    monkeypatch.setattr(module, "_MOST_NODES", 5)
    assert unrolled(model, case.feeds, Provider.CPU) is model


def test_a_model_with_nothing_inside_is_itself() -> None:
    model = Model(random_model(dataclasses.replace(Recipe.drawn(1), inside="")))
    case = next(made_up_cases(model.proto, seeds=1, rng=np.random.default_rng(0)))
    if not any(list(subgraphs(node)) for node in model.proto.graph.node):
        assert unrolled(model, case.feeds, Provider.CPU) is model
