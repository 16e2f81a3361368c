"""The emission ``grouped``: regions in stacks of equal or padded blocks, in both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_decompose.passes.splice import ORIGIN_KEY
from tests.passes.harness import Rewritten, blocks, check_parity, parse, rewrite, run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.planning.stacks import StackLayout

BOTH = pytest.mark.parametrize("layout", ["columns", "rows"])

IN_ORDER = [0] * 16 + [1] * 16
MIXED = [0, 1] * 16
HIDDEN = ([0] * 3 + [1] * 5) * 6 + [0] * 12 + [1] * 4  # 30 and 34 units
WIDE = [1] * 32 + [0] * 32
OUT = [1, 0, 0, 1] * 8
FFN = """g (float[B, 32] x) => (float[B, 32] y) {
    h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
}"""
ENTER, LEAVE = ["Transpose", "Gather"], ["Gather", "Squeeze", "Transpose"]


def ffn(  # noqa: PLR0913 (what a test may vary)
    rng: np.random.Generator,
    text: str = FFN,
    *,
    rows: list[int] = MIXED,
    hidden: list[int] = WIDE,
    columns: list[int] = OUT,
    dtype: Any = np.float32,
    more: dict[str, NDArray[Any]] | None = None,
    **model: Any,
) -> onnx.ModelProto:
    tensors = {
        "w1": blocks(rng, rows, hidden, dtype),
        "b1": rng.standard_normal(len(hidden)).astype(dtype),
        "w2": blocks(rng, hidden, columns, dtype),
        "b2": rng.standard_normal(len(columns)).astype(dtype),
        **(more or {}),
    }
    read = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return parse(text, {n: t for n, t in tensors.items() if n in read}, **model)


def stored(result: Rewritten) -> dict[str, NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in result.proto.graph.initializer}


def reason(result: Rewritten) -> str:
    ((_, plan),) = result.plans
    return plan.reason


def test_columns(rng: np.random.Generator) -> None:
    result = rewrite(ffn(rng), "grouped", layout="columns")
    assert result.decisions == [("grouped", 2)]
    assert "; 2 branches in 1 stack in columns, predicted to take " in reason(result)
    assert result.ops == [*ENTER, "Conv", "Relu", "Conv", *LEAVE]
    values = stored(result)
    assert values["w1.stack0"].shape == (64, 16, 1, 1)
    assert values["w2.stack0"].shape == (32, 32, 1, 1)
    assert (values["b1.stack0"].shape, values["b2.stack0"].shape) == ((64,), (32,))
    assert values["x.units.order"].shape == (1, 32, 1)
    for node in result.proto.graph.node:
        if node.op_type == "Conv":
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert given == {"group": 2, "kernel_shape": [1, 1]}
            assert [e.value for e in node.metadata_props if e.key == ORIGIN_KEY] == [
                {"a": "h", "y": "o"}[node.output[0].split(".")[0]]
            ]
    check_parity(result, rng)


def test_rows(rng: np.random.Generator) -> None:
    result = rewrite(ffn(rng), "grouped", layout="rows")
    assert result.decisions == [("grouped", 2)]
    assert "; 2 branches in 1 stack in rows, predicted to take " in reason(result)
    assert result.ops == [
        *("Gather", "Transpose", "MatMul", "Add", "Relu", "MatMul", "Add"),
        *("Transpose", "Reshape", "Gather"),
    ]
    values = stored(result)
    assert values["w1.stack0"].shape == (2, 16, 32)
    assert values["b1.stack0"].shape == (2, 1, 32)
    check_parity(result, rng)


@pytest.mark.parametrize(
    ("layout", "enter", "leave"),
    [
        ("columns", ["Unsqueeze", "Transpose"], ["Transpose", "Squeeze"]),
        ("rows", ["Reshape", "Transpose"], ["Transpose", "Reshape"]),
    ],
)
def test_blocks_in_turn_are_not_gathered(
    layout: StackLayout, enter: list[str], leave: list[str], rng: np.random.Generator
) -> None:
    model = ffn(rng, rows=IN_ORDER, columns=IN_ORDER)
    result = rewrite(model, "grouped", layout=layout)
    inside = [op for op in result.ops if op not in {*enter, *leave}]
    assert result.ops == [*enter, *inside, *leave]
    check_parity(result, rng)


@BOTH
def test_a_free_border_is_renumbered(layout: StackLayout, rng: np.random.Generator) -> None:
    text = """g (float[B, 5] x) => (float[B, 3] y) {
        i = MatMul(x, w0) n = Softmax <axis = -1> (i) h = MatMul(n, w1) r = Tanh(h) o = MatMul(r, w2)
        s = Softmax <axis = -1> (o) y = MatMul(s, w3) }"""
    more = {
        "w0": rng.standard_normal((5, 32)).astype(np.float32),
        "w3": rng.standard_normal((32, 3)).astype(np.float32),
    }
    result = rewrite(ffn(rng, text, more=more), "grouped", layout=layout)
    assert result.decisions == [("dense", 0), ("grouped", 2), ("dense", 0)]
    assert "Gather" not in result.ops
    check_parity(result, rng)


@BOTH
def test_unequal_blocks_are_padded(layout: StackLayout, rng: np.random.Generator) -> None:
    rows = [0] * 10 + [1] * 22
    result = rewrite(ffn(rng, rows=rows, hidden=HIDDEN), "grouped", layout=layout)
    assert result.decisions == [("grouped", 2)]
    check_parity(result, rng)
    for block in result.record["h"]:
        values = stored(result)[block.initializer]
        used = np.zeros(values.shape, bool)
        block.view(used)[np.ix_(*block.places)] = True
        assert block.read(values).shape == (block.rows.size, block.columns.size)
        assert (block.stored_rows is None) == (block.view(values).shape[0] == block.rows.size)


def test_channels_are_padded_to_whole_kernels(rng: np.random.Generator) -> None:
    model = ffn(
        rng, rows=[0] * 5 + [1] * 27, hidden=[0] * 3 + [1] * 33, columns=[1] * 20 + [0] * 12
    )
    result = rewrite(model, "grouped", layout="columns")
    for node in result.proto.graph.node:
        if node.op_type == "Conv":
            weight = stored(result)[node.input[1]]
            group = next(a.i for a in node.attribute if a.name == "group")
            assert weight.shape[0] % (16 * group) == weight.shape[1] % 16 == 0
    assert "padding" in reason(result)
    check_parity(result, rng)


@BOTH
def test_stacks_of_different_sizes(layout: StackLayout, rng: np.random.Generator) -> None:
    """Two branches of one size and one that is much larger."""
    labels = [0] * 16 + [1] * 16 + [2] * 64
    rows, hidden, columns = (rng.permutation(labels).tolist() for _ in range(3))
    text = FFN.replace("32", "96")
    result = rewrite(
        ffn(rng, text, rows=rows, hidden=hidden, columns=columns), "grouped", layout=layout
    )
    assert result.decisions == [("grouped", 3)]
    assert f"3 branches in 2 stacks in {layout}, predicted" in reason(result)
    assert result.ops.count("Conv" if layout == "columns" else "MatMul") == 4
    assert result.ops.count("Concat") == 1
    check_parity(result, rng)


@BOTH
@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize(
    ("axes", "layouts"),
    [
        ("T, 32", {"columns", "rows"}),
        ("B, T, 32", {"columns", "rows"}),
        ("4, T, 32", {"columns", "rows"}),
        ("2, B, 3, 32", {"columns", "rows"}),
        ("2, 4, 3, 32", {"columns", "rows"}),
        ("2, B, T, 32", {"rows"}),
    ],
)
def test_inputs_of_any_rank(
    axes: str,
    layouts: set[StackLayout],
    opset: int,
    in_turn: bool,
    layout: StackLayout,
    rng: np.random.Generator,
) -> None:
    order = IN_ORDER if in_turn else MIXED
    text = FFN.replace("B, 32", axes)
    model = ffn(rng, text, rows=order, columns=order, opsets=f'"": {opset}')
    result = rewrite(model, "grouped", layout=layout)
    assert result.decisions == [("grouped", 2) if layout in layouts else ("dense", 0)]
    assert not {"Shape", "Expand", "Range"} & set(result.ops)
    if result.decisions[0][0] == "grouped":
        check_parity(result, rng)


@BOTH
@pytest.mark.parametrize("opset", [*range(7, 26)])
@pytest.mark.parametrize(
    "rows", [IN_ORDER, MIXED, [-1, *MIXED[1:]]], ids=["order", "mixed", "dead"]
)
def test_every_operator_set(
    rows: list[int], opset: int, layout: StackLayout, rng: np.random.Generator
) -> None:
    model = ffn(rng, rows=rows, opsets=f'"": {opset}', ir_version=10)
    result = rewrite(model, "grouped", layout=layout)
    assert result.decisions == [("grouped", 2)]
    check_parity(result, rng)


@pytest.mark.parametrize(
    ("dtype", "name", "layouts"),
    [
        (np.float16, "float16", {"columns", "rows"}),
        (np.float64, "double", {"rows"}),
        (ml_dtypes.bfloat16, "bfloat16", {"rows"}),
    ],
)
@BOTH
def test_other_floats(
    dtype: Any, name: str, layouts: set[str], layout: StackLayout, rng: np.random.Generator
) -> None:
    """onnxruntime has no convolution of doubles on a CPU, and ONNX none of bfloat16 in older operator sets."""
    model = ffn(rng, FFN.replace("float[", f"{name}["), dtype=dtype)
    result = rewrite(model, "grouped", layout=layout)
    assert result.decisions == [("grouped", 2) if layout in layouts else ("dense", 0)]
    if layout in layouts:
        check_parity(result, rng, reference=name == "bfloat16")


@BOTH
def test_elementwise_operators_with_constants_of_any_form(
    layout: StackLayout, rng: np.random.Generator
) -> None:
    text = """g (float[B, 4, 32] x, float[B, 4, 1] z, float s) => (float[B, 4, 32] y) {
        h = MatMul(x, w1) a = Mul(h, vector) b = Mul(matrix, a) c = Add(b, column) d = Sub(c, one)
        e = PRelu(d, slope) f = Clip(e, , high) p = Mul(f, z) q = Add(p, s) r = Mul(q, scalar)
        t = Max(r, vector, single) o = MatMul(t, w2) y = Mul(b2, o)
    }"""
    more = {
        "vector": rng.standard_normal(64).astype(np.float32),
        "matrix": rng.standard_normal((1, 64)).astype(np.float32),
        "column": rng.standard_normal((4, 1)).astype(np.float32),
        "one": rng.standard_normal(1).astype(np.float32),
        "slope": rng.standard_normal((1, 4, 64)).astype(np.float32),
        "high": np.array(2, np.float32),
        "scalar": np.array(0.5, np.float32),
        "single": np.full((1, 1, 1), -3, np.float32),
    }
    result = rewrite(ffn(rng, text, more=more), "grouped", layout=layout)
    assert result.decisions == [("grouped", 2)]
    check_parity(result, rng)


@BOTH
@pytest.mark.parametrize("hidden", [WIDE, HIDDEN])
def test_gated_layers(hidden: list[int], layout: StackLayout, rng: np.random.Generator) -> None:
    text = """g (float[B, T, 32] x) => (float[B, T, 32] y) {
        g = MatMul(x, w3) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, w1) m = Mul(a, u) y = MatMul(m, w2)
    }"""
    more = {"w3": blocks(rng, MIXED, hidden)}
    result = rewrite(ffn(rng, text, hidden=hidden, more=more), "grouped", layout=layout)
    assert result.decisions == [("grouped", 2)]
    # What both sites read is brought into the layout once.
    gathers = 2 if layout == "columns" else 1 + len(stacks_of(result))
    assert result.ops.count("Gather") == gathers
    check_parity(result, rng)


@BOTH
def test_residual_blocks_and_exits_that_are_read_inside(
    layout: StackLayout, rng: np.random.Generator
) -> None:
    text = """g (float[B, 32] x, float[B, 32] k) => (float[B, 32] y, float[B, 64] r, float[B, 64] n) {
        h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) s = Add(x, o) y = Mul(s, k) n = Neg(h)
        }"""
    text = text.replace("y = Mul(s, k)", "i = Mul(s, k) y = MatMul(i, w3)")
    more = {"w3": blocks(rng, MIXED, MIXED)}
    result = rewrite(ffn(rng, text, columns=MIXED, more=more), "grouped", layout=layout)
    assert result.decisions == [("grouped", 2)]
    # The product is read outside without its bias.
    assert result.ops.count("Add") == 2
    check_parity(result, rng)


@BOTH
@pytest.mark.parametrize("flipped", [0, 1])
@pytest.mark.parametrize("bias", [None, (64,), (1, 64), (1,), (), (1, 1)], ids=str)
def test_gemm(
    bias: tuple[int, ...] | None, flipped: int, layout: StackLayout, rng: np.random.Generator
) -> None:
    weight = blocks(rng, MIXED, WIDE)
    more = {"w": weight.T.copy() if flipped else weight}
    if bias is not None:
        more["c"] = rng.standard_normal(bias).astype(np.float32)
    text = f"""g (float[B, 32] x) => (float[B, 32] y) {{
        h = Gemm <transB = {flipped}> (x, w{", c" if bias is not None else ""})
        t = Tanh(h) y = MatMul(t, w2) }}"""
    result = rewrite(ffn(rng, text, more=more), "grouped", layout=layout)
    assert result.decisions == [("grouped", 2)]
    assert "Gemm" not in result.ops
    check_parity(result, rng)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("h = Gemm <alpha = 0.5> (x, w1)", "'h' has a factor alpha or beta"),
        ("h = Gemm <beta = 3.0> (x, w1, b1)", "'h' has a factor alpha or beta"),
        ("h = Gemm(x, w1, c)", "the bias of 'h' is not one number per unit"),
        ("e = MatMul(x, w1) h = Add(e, v)", "its values have different ranks"),
        ("e = MatMul(x, w1) f = MatMul(x, w4) h = Mul(e, f)", "'f' is broadcast to the units"),
    ],
)
def test_what_cannot_be_stacked(body: str, why: str, rng: np.random.Generator) -> None:
    text = f"""g (float[3, 32] x, float[64] v) => (float[3, 32] y) {{
        {body} r = Relu(h) y = MatMul(r, w2) }}"""
    more = {"c": np.ones((3, 1), np.float32), "w4": blocks(rng, MIXED, [1])}
    result = rewrite(ffn(rng, text, more=more), "grouped")
    assert result.decisions == [("dense", 0)]
    assert why in reason(result) or "nothing to take apart" in reason(result)


def test_a_single_axis_and_an_unknown_rank(rng: np.random.Generator) -> None:
    result = rewrite(ffn(rng, FFN.replace("B, 32", "32")), "grouped")
    assert "; no stacks: its values have a single axis" in reason(result)
    text = """g (float[B, 32] x, int64[R] shape) => (float[B, 32] y) {
        z = Reshape(x, shape) h = MatMul(z, w1) r = Relu(h) o = MatMul(r, w2) y = Reshape(o, shape) }"""
    result = rewrite(ffn(rng, text), "grouped")
    assert "; no stacks: the rank of 'z' is not known" in reason(result)


UNSAFE = {
    "Log": "r = Log(q)",
    "Reciprocal": "r = Reciprocal(q)",
    "Div": "r = Div(a, q)",
    "negative Pow": "r = Pow(q, minus)",
}


@BOTH
@pytest.mark.parametrize("body", UNSAFE.values(), ids=UNSAFE)
def test_nothing_that_is_not_finite_comes_from_padding(
    body: str, layout: StackLayout, rng: np.random.Generator
) -> None:
    """Zero in a padded unit would become infinite, and NaN when it meets a weight of zero."""
    text = f"""g (float[B, 32] x) => (float[B, 32] y) {{
        h = MatMul(x, w1) a = Abs(h) q = Abs(a) {body} y = MatMul(r, w2) }}"""
    more = {"minus": np.array(-1, np.float32)}
    padded = rewrite(ffn(rng, text, hidden=HIDDEN, more=more), "grouped", layout=layout)
    # Each branch then has a stack of its own, where the layout pads nothing.
    assert {s.count for s in stacks_of(padded)} <= {1}
    full = rewrite(ffn(rng, text, more=more), "grouped", layout=layout)
    assert full.decisions == [("grouped", 2)]
    check_parity(full, rng, tolerance=1e-4)


def stacks_of(result: Rewritten) -> tuple[Any, ...]:
    ((_, plan),) = result.plans
    return () if plan.grouping is None else plan.grouping.stacks


@BOTH
def test_harmless_at_padding(layout: StackLayout, rng: np.random.Generator) -> None:
    text = """g (float[B, 32] x) => (float[B, 32] y) {
        h = MatMul(x, w1) a = Div(h, b1) b = Pow(a, cube) c = Div(b, scale) d = Erf(c) e = Exp(d)
        f = Sqrt(e) y = MatMul(f, w2) }"""
    more = {"cube": np.array(3, np.float32), "scale": np.array(1.4, np.float32)}
    model = ffn(rng, text, rows=[0] * 10 + [1] * 22, hidden=HIDDEN, more=more)
    model.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(rng.uniform(8, 9, len(HIDDEN)).astype(np.float32), "b1")
    )
    result = rewrite(model, "grouped", layout=layout)
    assert result.decisions == [("grouped", 2)]
    check_parity(result, rng)


@BOTH
def test_infinities_stay_in_their_branch(layout: StackLayout, rng: np.random.Generator) -> None:
    """Padded slots of an input repeat a unit of the same block, not of another one."""
    model = ffn(rng, rows=[0] * 10 + [1] * 22, hidden=HIDDEN)
    result = rewrite(model, "grouped", layout=layout)
    x = rng.standard_normal((2, 32)).astype(np.float32)
    x[:, 3] = np.inf
    (y,) = run(result.proto, {"x": x}, reference=False)
    outputs = np.array(OUT)
    (expected,) = run(result.proto, {"x": np.where(np.isinf(x), 0, x)}, reference=False)
    np.testing.assert_array_equal(y[:, outputs == 1], expected[:, outputs == 1])


@pytest.mark.parametrize("axes", ["B, 32", "B, T, 32", "2, B, 3, 32"])
def test_no_rows_at_all(axes: str, rng: np.random.Generator) -> None:
    result = rewrite(ffn(rng, FFN.replace("B, 32", axes)), "grouped", layout="rows")
    assert result.decisions == [("grouped", 2)]
    shape = [int(size) if size.isdigit() else 0 for size in axes.split(", ")]
    (y,) = run(result.proto, {"x": np.zeros(shape, np.float32)}, reference=False)
    assert list(y.shape) == shape


@pytest.mark.parametrize(
    "some",
    [
        "x = Compress <axis = 0> (z, found)",
        """one = ReduceMax <keepdims = 0> (z) is = Cast <to = 9> (one) x = If (is) <
            then_branch = t () => (float[M, 32] o) { o = Compress <axis = 0> (z, found) },
            else_branch = e () => (float[M, 32] p) { p = Identity (z) }>""",
    ],
    ids=["plain", "in a branch"],
)
def test_rows_that_the_data_decide_are_not_convolved(
    some: str, rng: np.random.Generator
) -> None:
    """There may be none, and onnxruntime has no convolution of nothing."""
    text = f"""g (float[N, 32] z, bool[N] found) => (float[M, 32] y) {{
        {some} h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }}"""
    model = ffn(rng, text)
    assert rewrite(model, "grouped", layout="columns").decisions == [("dense", 0)]
    result = rewrite(model, "grouped")
    assert result.decisions == [("grouped", 2)]
    feeds = {"z": np.ones((3, 32), np.float32), "found": np.zeros(3, bool)}
    assert run(result.proto, feeds, reference=False)[0].shape == (0, 32)


def test_two_regions_share_a_stacked_weight(rng: np.random.Generator) -> None:
    text = """g (float[B, 32] x) => (float[B, 32] y) {
        a = MatMul(x, w) r = Softmax <axis = 1> (a) b = MatMul(r, w) y = Softmax <axis = 1> (b) }"""
    result = rewrite(parse(text, {"w": blocks(rng, MIXED, OUT)}), "grouped", layout="columns")
    assert result.decisions == [("grouped", 2)] * 2
    assert [name for name in stored(result) if name.startswith("w.")] == ["w.stack0"]
    check_parity(result, rng)


@BOTH
def test_annealing_that_removes_more_than_zeros(
    layout: StackLayout, rng: np.random.Generator
) -> None:
    model = ffn(rng)
    dense = rng.standard_normal((32, 64)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(dense, "w1"))
    mask = blocks(rng, MIXED, WIDE) != 0
    result = rewrite(model, "grouped", {"h": mask}, layout=layout)
    assert result.decisions == [("grouped", 2)]
    check_parity(result, rng, exact=False)
