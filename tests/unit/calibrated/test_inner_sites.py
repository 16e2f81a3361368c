"""What sites inside bodies and functions read: the same rows as an independent computation in numpy."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.inner_sites import rare_sites
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.search import GENERATORS
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.options import ProposalKind

    Array = NDArray[np.float32]

HEAD = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'

K = 6
"""Units of everything."""


def weights(*names: str) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {name: (rng.normal(size=(K, K)) / 2).astype(np.float32) for name in names}


def context_of(
    text: str, x: Array, tensors: dict[str, Array], seed: int = 0, **more: NDArray[Any]
) -> CalibrationContext:
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in tensors.items()
    )
    onnx.checker.check_model(proto, full_check=True)
    samples = samples_from_arrays({"x": x, **more}, graph_inputs(proto))
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


BEFORE_A_BRANCH = """
chosen (float[1, 6] x) => (float[1, 6] y)
{
    zero = Constant<value = float {0}>()
    [first] h = MatMul(x, w0)
    total = ReduceSum<keepdims=0>(h)
    go = Greater(total, zero)
    t = Tanh(h)
    [choice] y = If(go)<then_branch = yes () => (float[1, 6] a) { [mm] a = MatMul(t, w1) },
        else_branch = no () => (float[1, 6] b) { b = Neg(t) }>
}
"""


@pytest.mark.parametrize("sign", [-1, 1])
def test_where_the_annealed_model_takes_another_branch_the_originals_rows_count(
    sign: int, rng: np.random.Generator
) -> None:
    """Without its first product, the model takes one branch for all samples, that of the mean."""
    tensors = weights("w0", "w1")
    x = rng.normal(size=(400, 1, K)).astype(np.float32)
    x += (0.1 * sign * tensors["w0"].sum(axis=1)).astype(np.float32)
    context = dataclasses.replace(
        context_of(BEFORE_A_BRANCH, x, tensors), compensation="mean", neighbours=False
    )
    first, inner = context.sites
    keep = np.ones((K, K), dtype=bool)
    keep[:3] = False
    masks = {first.name: np.zeros((K, K), dtype=bool), inner.name: keep}
    refit = refitted(context, Proposal("both", masks))[inner.name]
    states = [one @ tensors["w0"] for one in each(context)]
    mean = np.concatenate(states).mean(axis=0, keepdims=True)
    assert np.sign(mean.sum()) == sign
    before = np.concatenate([np.tanh(h) for h in states if h.sum() > 0])
    assert 20 < len(before) < len(states) - 20
    # Where both take the branch, what is left reads the mean now; where the annealed model takes the other, it is
    # fitted to what the original reads.
    now = np.broadcast_to(np.tanh(mean), before.shape) if sign > 0 else before
    wanted = (before @ tensors["w1"]).mean(axis=0) - (now[:, 3:] @ tensors["w1"][3:]).mean(
        axis=0
    )
    np.testing.assert_allclose(refit.added, wanted, atol=1e-5)


CONVOLUTION = """
convolved (float[1, 3, 5, 5] x) => (float[1, 3, 5, 5] y)
{
    zero = Constant<value = float {0}>()
    times = Constant<value_int = 2>()
    go = Constant<value = bool {1}>()
    [steps] y = Loop(times, go, x)<body = step
        (int64 i, bool c, float[1, 3, 5, 5] h) => (bool c2, float[1, 3, 5, 5] h2)
    {
        c2 = Identity(c)
        sum = ReduceSum<keepdims=0>(h)
        large = Greater(sum, zero)
        [choice] h2 = If(large)<then_branch = yes () => (float[1, 3, 5, 5] a) { [conv] a = Conv<pads=[1,1,1,1]>(h, w) },
            else_branch = no () => (float[1, 3, 5, 5] b) { b = Sub(h, shift) }>
    }>
}
"""


def test_a_convolution_keeps_its_positions(rng: np.random.Generator) -> None:
    """What it reads comes out as (samples, channels, height, width), the iterations one after the other."""
    weight = (rng.normal(size=(3, 3, 3, 3)) / 4).astype(np.float32)
    tensors = {"w": weight, "shift": np.array(-0.5, np.float32)}
    x = rng.normal(size=(90, 3, 5, 5)).astype(np.float32)
    context = context_of(CONVOLUTION, x, tensors)
    (site,) = context.sites
    found = [one[site.input] for one in context.observe([site.input], context.parts.fit)]
    expected: list[Array] = []
    for one in each(context):
        h = one
        for _ in range(2):
            if h.sum() > 0:
                expected.append(h)
                padded = np.pad(h[0], ((0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
                h = np.einsum("chwij,ocij->ohw", windows, weight)[None]
            else:
                h = h + np.float32(0.5)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-4)
    moments = context.read(site)
    patches = np.concatenate(
        [
            np.lib.stride_tricks.sliding_window_view(
                np.pad(one[0], ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2)
            )
            .transpose(1, 2, 0, 3, 4)
            .reshape(25, 27)
            for one in expected
        ]
    )
    np.testing.assert_allclose(moments.mean_x, patches.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(moments.xx, np.cov(patches.T, bias=True), atol=1e-4)


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


RECURRENT = """
chosen (float[1, 4, 6] x, bool flag) => (float[1, 4, 6] y)
{
    [choice] y = If(flag)<then_branch = yes () => (float[1, 4, 6] a)
        { steps = Transpose<perm=[1, 0, 2]>(x)
          [rnn] all, last = RNN<hidden_size=6>(steps, W, R)
          first = Constant<value_ints=[1]>()
          one = Squeeze(all, first)
          b = Transpose<perm=[1, 0, 2]>(one)
          [mm] a = MatMul(b, w0) },
        else_branch = no () => (float[1, 4, 6] c) { c = Neg(x) }>
}
"""


def test_a_recurrent_operator_in_a_branch_is_left_and_the_product_behind_it_is_not(
    rng: np.random.Generator,
) -> None:
    tensors = weights("w0", "w1", "w2")
    cell = {"w0": tensors["w0"], "W": tensors["w1"][None], "R": tensors["w2"][None]}
    x = rng.normal(size=(100, 4, K)).astype(np.float32)
    context = context_of(RECURRENT, x, cell, flag=np.ones(100, bool))
    assert [site.name for site in context.sites] == ["choice.then_branch/mm"]
    assert set(context.left) == {"choice.then_branch/rnn.W", "choice.then_branch/rnn.R"}
    assert {*context.left.values()} == {"it is a recurrent operator inside a body"}
    assert context.read(context.sites[0]).count == 4 * context.parts.fit.count


def test_a_branch_that_too_few_samples_take_is_left_as_it_is(rng: np.random.Generator) -> None:
    x = rng.normal(size=(300, 1, K)).astype(np.float32)
    sums = x.sum(axis=(1, 2), keepdims=True)
    for share, left in ((0.5, set()), (0.05, {"choice.else_branch/mm"})):
        signs = np.where(rng.random(sums.shape) < share, -1, 1)
        context = context_of(IF, x * np.sign(sums) * signs.astype(np.float32), weights("w0"))
        unseen = rare_sites([context])
        assert set(unseen) == left
        assert all("of the rows that it needs" in reason for reason in unseen.values())


PLAIN = """
plain (float[N, 4, 24] x) => (float[N, 4, 600] y)
{
    a = MatMul(x, w0)
    b = Relu(a)
    y = MatMul(b, w1)
}
"""
CALLED = """
called (float[N, 4, 24] x) => (float[N, 4, 600] y)
{
    [net] y = local.net(x, w0, w1)
}
<domain: "local", opset_import: ["" : 17]>
net (x, w0, w1) => (y)
{
    a = MatMul(x, w0)
    b = Relu(a)
    y = MatMul(b, w1)
}
"""
STEPS = """
steps (float[N, 4, 24] x) => (float[M, 4, 600] y)
{
    xs = Transpose<perm=[1, 0, 2]>(x)
    made = Scan<num_scan_inputs=1, body = step (float[N, 24] e) => (float[N, 600] f)
    {
        a = MatMul(e, w0)
        b = Relu(a)
        f = MatMul(b, w1)
    }>(xs)
    y = Transpose<perm=[1, 0, 2]>(made)
}
"""


def wide_context(text: str) -> CalibrationContext:
    """Two groups of inputs, hidden units of every size, outputs in thirty kinds."""
    rng = np.random.default_rng(3)
    kinds = rng.normal(size=(40, 30))[:, rng.integers(0, 30, 600)]
    tensors = {
        "w0": rng.normal(size=(24, 40)).astype(np.float32),
        "w1": (np.geomspace(1, 1e-4, 40)[:, None] * kinds).astype(np.float32),
    }
    active = rng.integers(0, 2, (400, 4, 1)) == np.repeat([0, 1], 12)
    x = (active * rng.normal(size=(400, 4, 24))).astype(np.float32)
    return context_of(text, x, tensors)


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_every_kind_of_proposal_is_the_same_inside(kind: ProposalKind) -> None:
    """The same network on the same rows: in the main graph, as a call, as the body of a Scan."""
    plain, *others = (wide_context(text) for text in (PLAIN, CALLED, STEPS))
    first = list(GENERATORS[kind](plain))
    assert first
    for context in others:
        second = list(GENERATORS[kind](context))
        if context.inside.path(context.sites[0].input):
            # What a step reads is no input of the model, and what it makes is no output.
            first = [
                family for family in first if kind != "inputs" and "by use" not in family.name
            ]
        assert [family.size for family in first] == [family.size for family in second]
        for one, other in zip(first[:1], second[:1], strict=True):
            for level in (one.size // 3, one.size // 2, one.size - 1):
                outside, inside = one.at(level), other.at(level)
                assert (outside is None) == (inside is None)
                if outside is None or inside is None:
                    continue
                assert _told(outside) == _told(inside)
                error = _error(context, inside)
                assert _error(plain, outside) == pytest.approx(error, rel=0.1, abs=1e-5)


def _told(proposal: Proposal) -> str:
    return proposal.name.partition(",")[0]


def _error(context: CalibrationContext, proposal: Proposal) -> float:
    """Relative, of a refitted proposal on the part to judge on."""
    models = context.study.source, annealed_by(context.study, refitted(context, proposal))
    (feeds, _) = next(context.parts.judge.batches(256))
    before, after = (open_model(model, Provider.CPU).run(feeds)["y"] for model in models)
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))
