"""What sites inside bodies and functions read: the same rows as an independent computation in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.inner_sites import rare_sites
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

HEAD = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'

K = 6
"""Units of everything."""


def weights(*names: str) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {name: (rng.normal(size=(K, K)) / 2).astype(np.float32) for name in names}


def context_of(
    text: str, x: Array, tensors: dict[str, Array], seed: int = 0
) -> CalibrationContext:
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in tensors.items()
    )
    onnx.checker.check_model(proto, full_check=True)
    samples = samples_from_arrays({"x": x}, graph_inputs(proto))
    return CalibrationContext(
        study_model(Model(proto)), split_samples(samples, seed), Provider.CPU, seed
    )


def rows_of(context: CalibrationContext, name: str) -> Array:
    """Everything that a site reads on the part to fit on."""
    (site,) = [site for site in context.sites if site.name == name]
    found = context.observe([site.input], context.parts.fit)
    return np.concatenate([values[site.input].reshape(-1, K) for values in found])


def check(context: CalibrationContext, name: str, expected: Array) -> None:
    """The rows, in order, and their moments."""
    np.testing.assert_allclose(rows_of(context, name), expected, rtol=1e-5, atol=1e-6)
    (site,) = [site for site in context.sites if site.name == name]
    moments = context.read(site)
    wide = expected.astype(np.float64)
    assert moments.count == len(wide)
    np.testing.assert_allclose(moments.mean_x, wide.mean(axis=0), rtol=1e-5, atol=1e-6)
    covariance = np.cov(wide.T, bias=True)
    np.testing.assert_allclose(moments.xx, covariance, rtol=1e-4, atol=1e-6)


def each(context: CalibrationContext) -> Iterator[Array]:
    """The samples to fit on, one by one."""
    for feeds, _ in context.parts.fit.batches(1):
        yield feeds["x"]


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


CALLS = """
twice (float[N, 6] x) => (float[N, 6] y)
{
    [first] h = local.layer(x, w0)
    [second] y = local.layer(h, SECOND)
}
<domain: "local", opset_import: ["" : 17]>
layer (i, w) => (o)
{
    r = Relu(i)
    [mm] o = MatMul(r, w)
}
"""


@pytest.mark.parametrize("second", ["w0", "w1"])
def test_each_call_of_a_function_has_rows_of_its_own(
    second: str, rng: np.random.Generator
) -> None:
    tensors = weights("w0", "w1")
    x = rng.normal(size=(300, K)).astype(np.float32)
    context = context_of(CALLS.replace("SECOND", second), x, tensors)
    seen = np.concatenate(list(each(context)))
    check(context, "first/mm", relu(seen))
    check(context, "second/mm", relu(relu(seen) @ tensors["w0"]))


SCAN = """
scanned (float[N, 5, 6] x) => (float[N, 6] last, float[A, B, 6] all)
{
    xs = Transpose<perm=[1, 0, 2]>(x)
    start = ReduceMean<axes=[1], keepdims=0>(x)
    last, all = Scan<num_scan_inputs=1, scan_input_directions=[1], scan_output_axes=[1], body = step
        (float[N, 6] h, float[N, 6] e) => (float[N, 6] h2, float[N, 6] made)
    {
        [state] a = MatMul(h, w0)
        s = Add(a, e)
        t = Tanh(s)
        [out] h2 = MatMul(t, w1)
        made = Identity(h2)
    }>(start, xs)
}
"""


def test_every_step_of_a_scan_counts(rng: np.random.Generator) -> None:
    tensors = weights("w0", "w1")
    x = rng.normal(size=(300, 5, K)).astype(np.float32)
    context = context_of(SCAN, x, tensors)
    states: list[Array] = []
    hidden: list[Array] = []
    for feeds, _ in context.parts.fit.batches(256):
        h = feeds["x"].mean(axis=1)
        for step in reversed(range(5)):
            states.append(h)
            hidden.append(np.tanh(h @ tensors["w0"] + feeds["x"][:, step]))
            h = hidden[-1] @ tensors["w1"]
    check(context, "last.body/state", np.concatenate(states))
    check(context, "last.body/out", np.concatenate(hidden))


LOOP = """
looped (float[1, 6] x) => (float[M, 6] y)
{
    one = Constant<value_int = 1>()
    most = Constant<value_int = 9>()
    zero = Constant<value = float {0}>()
    total = ReduceSum<keepdims=0>(x)
    go = Greater(total, zero)
    y = Loop(most, go, x)<body = step (int64 i, bool c, float[M, 6] h) => (bool c2, float[P, 6] h2)
    {
        [mm] a = MatMul(h, w0)
        t = Tanh(a)
        last = Gather<axis=0>(t, i)
        row = Unsqueeze(last, axis)
        [again] b = MatMul(row, w1)
        h2 = Concat<axis=0>(h, b)
        sum = ReduceSum<keepdims=0>(b)
        c2 = Less(sum, bound)
    }>
}
"""


def test_iterations_may_be_none_and_of_other_shapes_each_time(rng: np.random.Generator) -> None:
    tensors = weights("w0", "w1")
    constants = {
        **tensors,
        "axis": np.array([0]),
        "bound": np.array(0.3, np.float32),
    }
    x = rng.normal(size=(400, 1, K)).astype(np.float32)
    context = context_of(LOOP, x, constants)
    states: list[Array] = []
    rows: list[Array] = []
    counts = set()
    for one in each(context):
        h, go, step = one, one.sum() > 0, 0
        while go and step < 9:
            states.append(h)
            rows.append(np.tanh(h @ tensors["w0"])[step : step + 1])
            made = rows[-1] @ tensors["w1"]
            h, go, step = np.concatenate([h, made]), made.sum() < 0.3, step + 1
        counts.add(step)
    assert len(counts) > 4
    assert 0 in counts
    check(context, "y.body/mm", np.concatenate(states))
    check(context, "y.body/again", np.concatenate(rows))


IF = """
chosen (float[1, 6] x) => (float[1, 6] y)
{
    zero = Constant<value = float {0}>()
    total = ReduceSum<keepdims=0>(x)
    go = Greater(total, zero)
    h = Tanh(x)
    [choice] y = If(go)<then_branch = yes () => (float[1, 6] a) { [mm] a = MatMul(h, w0) },
        else_branch = no () => (float[1, 6] b) { r = Relu(h)  [mm] c = MatMul(r, w0)  b = Neg(c) }>
}
"""


def test_only_samples_that_took_the_branch_count(rng: np.random.Generator) -> None:
    x = rng.normal(size=(400, 1, K)).astype(np.float32)
    context = context_of(IF, x, weights("w0"))
    taken = [np.tanh(one) for one in each(context) if one.sum() > 0]
    others = [relu(np.tanh(one)) for one in each(context) if one.sum() <= 0]
    check(context, "choice.then_branch/mm", np.concatenate(taken))
    check(context, "choice.else_branch/mm", np.concatenate(others))


NESTED = """
nested (float[1, 6] x) => (float[1, 6] y)
{
    zero = Constant<value = float {0}>()
    go = Constant<value = bool {1}>()
    times = Constant<value_int = 4>()
    [steps] y = Loop(times, go, x)<body = step (int64 i, bool c, float[1, 6] h) => (bool c2, float[1, 6] h2)
    {
        c2 = Identity(c)
        sum = ReduceSum<keepdims=0>(h)
        large = Greater(sum, zero)
        [choice] h2 = If(large)<then_branch = yes () => (float[1, 6] a) { [call] a = local.layer(h, w0) },
            else_branch = no () => (float[1, 6] b) { d = Sub(h, w2)  b = Identity(d) }>
    }>
}
<domain: "local", opset_import: ["" : 17]>
layer (i, w) => (o)
{
    r = Tanh(i)
    [mm] o = MatMul(r, w)
}
"""


def test_a_call_in_a_branch_in_a_loop(rng: np.random.Generator) -> None:
    tensors = weights("w0")
    shift = np.full((1, K), -0.4, np.float32)
    x = rng.normal(size=(300, 1, K)).astype(np.float32)
    context = context_of(NESTED, x, {**tensors, "w2": shift})
    rows: list[Array] = []
    for one in each(context):
        h = one
        for _ in range(4):
            if h.sum() > 0:
                rows.append(np.tanh(h))
                h = rows[-1] @ tensors["w0"]
            else:
                h = h - shift
    check(context, "steps.body/choice.then_branch/call/mm", np.concatenate(rows))


LOOP_IN_SCAN = """
nested (float[2, 4, 6] x) => (float[2, 6] last)
{
    xs = Transpose<perm=[1, 0, 2]>(x)
    start = ReduceMean<axes=[1], keepdims=0>(x)
    [outer] last = Scan<num_scan_inputs=1, body = step (float[2, 6] h, float[2, 6] e) => (float[2, 6] h2)
    {
        times = Constant<value_int = 3>()
        go = Constant<value = bool {1}>()
        s = Add(h, e)
        [inner] h2 = Loop(times, go, s)<body = again (int64 i, bool c, float[2, 6] g) => (bool c2, float[2, 6] g2)
        {
            c2 = Identity(c)
            m = Add(g, e)
            [mm] p = MatMul(m, w0)
            g2 = Tanh(p)
        }>
    }>(start, xs)
}
"""


def test_a_loop_in_a_scan(rng: np.random.Generator) -> None:
    tensors = weights("w0")
    x = rng.normal(size=(200, 4, K)).astype(np.float32)
    context = context_of(LOOP_IN_SCAN, x, tensors)
    rows: list[Array] = []
    for pair in each(context):
        h = pair.mean(axis=1)
        for step in range(4):
            h = h + pair[:, step]
            for _ in range(3):
                rows.append(h + pair[:, step])
                h = np.tanh(rows[-1] @ tensors["w0"])
    check(context, "outer.body/inner.body/mm", np.concatenate(rows))


BRANCH_IN_SCAN = """
nested (float[1, 4, 6] x) => (float[1, 6] last)
{
    xs = Transpose<perm=[1, 0, 2]>(x)
    start = ReduceMean<axes=[1], keepdims=0>(x)
    [outer] last = Scan<num_scan_inputs=1, body = step (float[1, 6] h, float[1, 6] e) => (float[1, 6] h2)
    {
        sum = ReduceSum<keepdims=0>(h)
        large = Greater(sum, zero)
        [choice] h2 = If(large)<then_branch = yes () => (float[1, 6] a) { [mm] a = MatMul(h, w0) },
            else_branch = no () => (float[1, 6] b) { b = Add(h, e) }>
    }>(start, xs)
}
"""


def test_a_branch_in_a_scan_is_left_as_it_is(rng: np.random.Generator) -> None:
    tensors = {**weights("w0"), "zero": np.array(0, np.float32)}
    x = rng.normal(size=(100, 4, K)).astype(np.float32)
    context = context_of(BRANCH_IN_SCAN, x, tensors)
    assert not context.sites
    (reason,) = context.left.values()
    assert "a branch inside a Scan" in reason


def test_a_branch_that_too_few_samples_take_is_left_as_it_is(rng: np.random.Generator) -> None:
    x = rng.normal(size=(300, 1, K)).astype(np.float32)
    sums = x.sum(axis=(1, 2), keepdims=True)
    for share, left in ((0.5, set()), (0.05, {"choice.else_branch/mm"})):
        signs = np.where(rng.random(sums.shape) < share, -1, 1)
        context = context_of(IF, x * np.sign(sums) * signs.astype(np.float32), weights("w0"))
        unseen = rare_sites([context])
        assert set(unseen) == left
        assert all("of the rows that it needs" in reason for reason in unseen.values())
