"""Constant units go into the biases of the sites that read them: what is left, and that it computes the same."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_decompose.analysis.criteria import Selection, make_criterion
from onnx_decompose.decomposition.decompose import (
    Attempt,
    annealed_model,
    attempt,
    rewritten_model,
)
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.metadata import read_decomposition, write_decomposition
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.options import Options
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.proof import prove_structure
from onnx_decompose.verification.verify import Inputs, StructuralClaim, structural_claim
from tests.passes.harness import FREE, Rewritten, blocks, check_parity, check_rest, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Criterion
    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.model.metadata import Decomposition
    from onnx_decompose.planning.state_graph import Emit

    Array = NDArray[Any]

HIDDEN = [0, 0, 0, -1, 0, -1]
"""Hidden units 3 and 5 of 6 have no input."""

ALL = [0] * 4


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A model before and after, taken through the whole attempt."""

    tried: Attempt
    result: Rewritten
    decomposition: Decomposition
    claim: StructuralClaim

    @property
    def widths(self) -> list[list[int]]:
        """Units on each axis, per branch of the first region."""
        return [
            [units.size for units in branch.units] for branch in self.tried.plans[0][1].branches
        ]

    def tensor(self, name: str) -> Array:
        return next(
            numpy_helper.to_array(tensor)
            for tensor in self.result.proto.graph.initializer
            if tensor.name == name
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Over:
    """Entries over a threshold are supported."""

    threshold: float
    name: str = "over"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:  # noqa: ARG002
        mask = np.abs(evidence.weight) > self.threshold
        share = float(1 - mask.mean())
        return Selection(mask, self.name, None, share, (share, share))

    def looser(self) -> None:
        return None


def fold(
    source: onnx.ModelProto, emit: Emit = "shrink", criterion: Criterion | None = None
) -> Folded:
    study = study_model(load_model(source))
    tried = attempt(
        study,
        gather_all(study, Options(), "zero"),
        criterion or make_criterion("fdr", 0.01),
        cost=FREE,
        emit=emit,
        rng=np.random.default_rng(0),
    )
    annealed = annealed_model(tried).proto
    rewritten, decomposition = rewritten_model(tried, 0.0)
    result = Rewritten(source, annealed, rewritten.proto, list(tried.plans), {}, {})
    touched = {index for region, _ in tried.rewrites for index in region.nodes}
    check_rest(source, annealed, touched)
    check_rest(source, rewritten.proto, touched)
    # Read back, as validate does: the annealed model that the two files make is the one that was annealed.
    write_decomposition(rewritten.proto, decomposition, "0")
    read = read_decomposition(rewritten.proto, "folded")
    assert read is not None
    claim = structural_claim(
        study.model, rewritten, inputs=Inputs(seeds=1), provider=Provider.CPU
    )
    fault, _, biases = prove_structure(study.model, rewritten, read)
    assert fault is None
    assert biases.keys() == tried.biases().keys()
    for site, values in tried.biases().items():
        np.testing.assert_array_equal(biases[site], values, strict=True)
    return Folded(tried, result, read, claim)


def tensors(
    rng: np.random.Generator, dtype: Any = np.float32, **more: Array
) -> dict[str, Array]:
    """4 -> 6 -> 4, two hidden units without input."""
    made = {
        "w1": blocks(rng, ALL, HIDDEN),
        "b1": np.abs(rng.standard_normal(6)) + 0.5,
        "w2": blocks(rng, [0] * 6, ALL),
        "b2": rng.standard_normal(4),
    }
    return {name: values.astype(dtype) for name, values in (made | more).items()}


def used(text: str, given: dict[str, Array]) -> dict[str, Array]:
    """The tensors that a graph reads."""
    return {name: t for name, t in given.items() if re.search(rf"\b{name}\b", text)}


def chain(
    activation: str, *, opsets: str = '"": 17', given: dict[str, Array]
) -> onnx.ModelProto:
    text = f"""g (float[B, 4] x) => (float[B, 4] y) {{
        h = MatMul(x, w1) a = Add(h, b1) {activation} o = MatMul(r, w2) y = Add(o, b2)
    }}"""
    return parse(text, given, opsets=opsets, ir_version=10)


@pytest.mark.parametrize(
    "activation",
    [
        "r = Relu(a)",
        "r = Sigmoid(a)",
        "s = Sigmoid(a) r = Mul(a, s)",
        "r = Gelu(a)",
        "r = Elu <alpha = 0.5> (a)",
        "r = PRelu(a, slope)",
        "r = Clip(a, low, high)",
        "m = Mul(a, scale) r = Add(m, shift)",
        "r = Pow(a, two)",
        "e = Exp(a) d = Add(e, one) r = Div(a, d)",
        "r = HardSwish(a)",
    ],
)
def test_a_constant_unit_goes_through_any_activation(
    activation: str, rng: np.random.Generator
) -> None:
    more = {
        "slope": -rng.uniform(0.1, 1, 6),
        "low": np.array(-0.2),
        "high": np.array(0.9),
        "scale": rng.standard_normal(6),
        "shift": rng.standard_normal((1, 6)),
        "one": np.array(1.0),
    }
    given = tensors(rng, **{name: v for name, v in more.items() if name in activation})
    given["b1"][3] *= -1
    if "two" in activation:
        given["two"] = np.array(2, np.int64)
    folded = fold(chain(activation, opsets='"": 20', given=given))
    assert folded.widths == [[4, 4, 4]]
    assert folded.claim
    assert "2 rows of constant units folded" in folded.tried.plans[0][1].reason
    check_parity(folded.result, rng)


def test_the_bias_by_hand(rng: np.random.Generator) -> None:
    """Units 3 and 5 are relu(b1); what they add is summed in float64 and rounded once."""
    given = tensors(rng)
    given["b1"][5] = -1.0
    folded = fold(chain("r = Relu(a)", given=given))
    expected = given["b2"] + given["b1"][3].astype(np.float64) * given["w2"][3]
    np.testing.assert_array_equal(folded.tensor("b2.folded"), expected.astype(np.float32))
    assert folded.decomposition.sites["o"].annealing == "masked"
    assert folded.decomposition.sites["h"].bias is None


def test_two_layers_in_cascade(rng: np.random.Generator) -> None:
    """Hidden unit 1 of the second layer reads constant units alone, and becomes one."""
    second = blocks(rng, [0] * 6, [0, -1, 0])
    second[[3, 5], 1] = [0.75, -0.5]
    given = tensors(rng, w3=second, b3=rng.standard_normal(3), w4=blocks(rng, [0] * 3, ALL))
    text = """g (float[B, 4] x) => (float[B, 4] y) {
        h = MatMul(x, w1) a = Add(h, b1) r = Tanh(a) i = MatMul(r, w3) c = Add(i, b3) s = Sigmoid(c)
        o = MatMul(s, w4) y = Add(o, b2)
    }"""
    del given["w2"]
    folded = fold(parse(text, given))
    assert folded.widths == [[4, 4, 2, 4]]
    assert folded.claim
    check_parity(folded.result, rng)


def test_a_unit_times_zero_is_a_constant(rng: np.random.Generator) -> None:
    """Whatever comes in; what fed it is needed no more."""
    given = tensors(rng, scale=np.array([1, 1, 0, 1, 1, 1]), shift=rng.standard_normal(6))
    folded = fold(chain("m = Mul(a, scale) r = Add(m, shift)", given=given))
    assert folded.widths == [[4, 3, 4]]
    check_parity(folded.result, rng)


def test_a_gate_is_constant_only_if_both_sides_are(rng: np.random.Generator) -> None:
    text = """g (float[B, T, 4] x) => (float[B, T, 4] y) {
        g = MatMul(x, w1) a = Add(g, b1) s = Sigmoid(a) u = MatMul(x, wu) v = Add(u, bu) m = Mul(s, v)
        o = MatMul(m, w2) y = Add(o, b2)
    }"""
    other = blocks(rng, ALL, [0, 0, -1, -1, 0, 0])
    folded = fold(parse(text, tensors(rng, wu=other, bu=rng.standard_normal(6))))
    # 3 is constant on both sides; 2 and 5 vary on the other side.
    assert folded.widths == [[4, 5, 4]]
    assert folded.claim
    check_parity(folded.result, rng)


def test_a_gate_that_is_zero_closes(rng: np.random.Generator) -> None:
    """silu(0) = 0, and zero times anything is nothing: no bias is needed."""
    text = """g (float[B, 4] x) => (float[B, 4] y) {
        g = MatMul(x, w1) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, wu) m = Mul(a, u)
        y = MatMul(m, w2)
    }"""
    given = tensors(rng, wu=blocks(rng, ALL, [0] * 6))
    folded = fold(parse(text, {n: t for n, t in given.items() if n[0] == "w"}))
    assert folded.widths == [[4, 4, 4]]
    assert not folded.tried.biases()
    check_parity(folded.result, rng)


@pytest.mark.parametrize("bias", [None, (4,), (1, 4), (1,), (), (1, 1)], ids=str)
def test_gemm_takes_the_bias_in_its_third_input(
    bias: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    given = tensors(rng)
    del given["b2"]
    if bias is not None:
        given["c"] = rng.standard_normal(bias).astype(np.float32)
    inputs = "r, w2" if bias is None else "r, w2, c"
    text = f"""g (float[B, 4] x) => (float[B, 4] y) {{
        h = Gemm(x, w1, b1) r = Sigmoid(h) y = Gemm <alpha = 0.5, beta = -3.0> ({inputs})
    }}"""
    folded = fold(parse(text, given))
    assert folded.result.ops == ["Gemm", "Sigmoid", "Gemm"]
    assert folded.widths == [[4, 4, 4]]
    assert folded.claim
    check_parity(folded.result, rng)


@pytest.mark.parametrize(("bias", "beta"), [((3, 4), 2.0), ((3, 1), 2.0), ((4,), 0.0)], ids=str)
def test_a_gemm_whose_bias_is_not_of_its_units_gets_an_add(
    bias: tuple[int, ...], beta: float, rng: np.random.Generator
) -> None:
    given = tensors(rng, c=rng.standard_normal(bias), w3=blocks(rng, ALL, ALL))
    del given["b2"]
    text = f"""g (float[3, 4] x) => (float[3, 4] y) {{
        h = Gemm(x, w1, b1) r = Sigmoid(h) z = Gemm <alpha = 0.5, beta = {beta}> (r, w2, c)
        q = Tanh(z) y = MatMul(q, w3)
    }}"""
    folded = fold(parse(text, given))
    assert folded.result.ops == ["Gemm", "Sigmoid", "Gemm", "Add", "Tanh", "MatMul"]
    assert folded.claim
    check_parity(folded.result, rng)


@pytest.mark.parametrize("emit", ["shrink", "split"])
def test_a_matmul_without_a_bias_gets_one(emit: Emit, rng: np.random.Generator) -> None:
    """Twice, on a value that stays inside and on the model's output, named and unnamed."""
    labels = [0, 1, 0, 1]
    text = """g (float[B, 4] x) => (float[B, 4] y) {
        h = MatMul(x, w1) s = Sigmoid(h) i = MatMul(s, w2) t = Tanh(i) y = MatMul(t, w3)
    }"""
    given = {
        "w1": blocks(rng, labels, [0, 1, -1, 0, 1]),
        "w2": blocks(rng, [0, 1, 0, 0, 1], [0, 1, 0, 1, -1]),
        "w3": blocks(rng, [0, 1, 0, 1, 1], labels),
    }
    given["w2"][2, 4] = 0.5
    model = parse(text, given)
    model.graph.node[2].name = "middle"
    folded = fold(model, emit)
    assert folded.widths == ([[4, 4, 4, 4]] if emit == "shrink" else [[2, 2, 2, 2]] * 2)
    assert folded.result.ops.count("Add") == 2 * len(folded.widths)
    assert {name for name, site in folded.decomposition.sites.items() if site.bias} == {
        "middle",
        "y",
    }
    assert folded.claim
    check_parity(folded.result, rng)


@pytest.mark.parametrize(
    ("last", "emit"),
    [("MatMul(r, w2)", "shrink"), ("Gemm(r, w2, b2)", "shrink"), ("Gemm(r, w2, b2)", "auto")],
)
def test_a_single_unit_has_a_bias_too(last: str, emit: Emit, rng: np.random.Generator) -> None:
    """Its branch has the whole of it, which the proof must find."""
    text = f"""g (float[B, 4] x) => (float[B, 1] y) {{
        h = Gemm(x, w1, b1) r = Relu(h) y = {last}
    }}"""
    more = {"w2": blocks(rng, [0] * 6, [0]), "b2": rng.standard_normal(1)}
    folded = fold(parse(text, used(text, tensors(rng, **more))), emit)
    assert folded.widths == [[4, 4, 1]]
    assert [name for name, site in folded.decomposition.sites.items() if site.bias] == ["y"]
    assert folded.claim
    check_parity(folded.result, rng)


def test_a_product_that_others_read_gets_an_add_of_its_own(rng: np.random.Generator) -> None:
    text = """g (float[B, 4] x) => (float[B, 4] y, float[B, 4] o) {
        h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
    }"""
    folded = fold(parse(text, tensors(rng)))
    assert folded.result.ops == ["MatMul", "Add", "Relu", "MatMul", "Add", "Add"]
    assert folded.claim
    check_parity(folded.result, rng)


def test_two_sites_with_one_bias_have_one_each(rng: np.random.Generator) -> None:
    """Two inputs through the same layers: equal biases are not stored once, for each is proved by its name."""
    text = """g (float[B, 4] x, float[B, 4] z) => (float[B, 4] y, float[B, 4] v) {
        h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
        i = MatMul(z, w1) c = Add(i, b1) s = Relu(c) p = MatMul(s, w2) v = Add(p, b2)
    }"""
    folded = fold(parse(text, tensors(rng)))
    assert folded.claim
    np.testing.assert_array_equal(folded.tensor("b2.folded"), folded.tensor("b2.folded_1"))
    check_parity(folded.result, rng)


def test_other_readers_of_the_bias_keep_it(rng: np.random.Generator) -> None:
    text = """g (float[B, 4] x) => (float[B, 4] y, float[B, 4] z) {
        h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2) z = Mul(x, b2)
    }"""
    folded = fold(parse(text, tensors(rng)))
    assert folded.widths == [[4, 4, 4]]
    check_parity(folded.result, rng)


@pytest.mark.parametrize(
    ("dtype", "onnx_type", "reference"),
    [
        (np.float64, "double", False),
        (np.float16, "float16", False),
        (ml_dtypes.bfloat16, "bfloat16", True),
    ],
)
def test_other_floats(
    dtype: Any, onnx_type: str, reference: bool, rng: np.random.Generator
) -> None:
    given = tensors(rng, dtype)
    text = f"""g ({onnx_type}[B, 4] x) => ({onnx_type}[B, 4] y) {{
        h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
    }}"""
    study = study_model(load_model(parse(text, given)))
    tried = attempt(
        study,
        gather_all(study, Options(), "zero"),
        make_criterion("fdr", 0.01),
        cost=FREE,
        emit="shrink",
        rng=rng,
    )
    rewritten, decomposition = rewritten_model(tried, 0.0)
    assert decomposition.sites["o"].bias is not None
    fault, _, biases = prove_structure(study.model, rewritten, decomposition)
    assert fault is None
    assert [values.dtype for values in biases.values()] == [np.dtype(dtype)]
    result = Rewritten(
        study.model.proto,
        annealed_model(tried).proto,
        rewritten.proto,
        list(tried.plans),
        {},
        {},
    )
    check_parity(result, rng, reference=reference)


@pytest.mark.parametrize("form", ["Constant", "Identity"])
def test_a_bias_in_a_node_of_its_own(form: str, rng: np.random.Generator) -> None:
    """The node goes when nothing reads it any more, and what follows it moves up."""
    given = tensors(rng)
    text = """g (float[B, 4] x) => (float[B, 4] y) {
        c = Identity(b2) h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(c, o)
    }"""
    model = parse(text, given)
    if form == "Constant":
        value = numpy_helper.from_array(given["b2"])
        model.graph.node[0].CopyFrom(onnx.helper.make_node(form, [], ["c"], value=value))
        del model.graph.initializer[-1]
    folded = fold(model)
    assert folded.result.ops == ["MatMul", "Add", "Relu", "MatMul", "Add"]
    assert folded.claim
    check_parity(folded.result, rng)


class TestAbsorbing:
    """Scales and shifts after a site, where entries are removed in any case."""

    @staticmethod
    def given(rng: np.random.Generator, **more: Array) -> dict[str, Array]:
        """Units 3 and 5 have next to no input; one entry between live units is next to nothing too."""
        made = tensors(rng, s=rng.uniform(0.5, 2, 6), t=rng.standard_normal(6), **more)
        made["w1"][:, [3, 5]] = 1e-6
        made["w1"][2, 1] = 1e-6
        return made

    @pytest.mark.parametrize(
        ("tail", "ops"),
        [
            ("a = Add(h, b1) m = Mul(a, s) z = Add(m, t)", ["MatMul", "Add"]),
            ("m = Mul(s, h) z = Add(t, m)", ["MatMul", "Add"]),
            ("z = Mul(h, s)", ["MatMul"]),
            ("a = Add(h, b1) z = Add(a, t)", ["MatMul", "Add"]),
            ("a = Add(h, b1) z = Mul(a, s)", ["MatMul", "Add"]),
            ("z = Add(h, b1)", ["MatMul", "Add"]),
        ],
    )
    def test_after_a_matmul(self, tail: str, ops: list[str], rng: np.random.Generator) -> None:
        text = f"""g (float[B, 4] x) => (float[B, 4] y) {{
            h = MatMul(x, w1) {tail} q = Sigmoid(z) r = Mul(z, q) o = MatMul(r, w2) y = Add(o, b2)
        }}"""
        folded = fold(parse(text, used(text, self.given(rng))), criterion=Over(1e-3))
        assert folded.result.ops == [*ops, "Sigmoid", "Mul", "MatMul", "Add"]
        assert folded.widths == [[4, 4, 4]]
        assert folded.claim
        check_parity(folded.result, rng, exact=False)
        check_parity(folded.result, rng, tolerance=1e-4)

    def test_the_weight_by_hand(self, rng: np.random.Generator) -> None:
        given = self.given(rng)
        text = """g (float[B, 4] x) => (float[B, 4] y) {
            h = MatMul(x, w1) a = Add(h, b1) m = Mul(a, s) z = Add(m, t) r = Relu(z)
            o = MatMul(r, w2) y = Add(o, b2)
        }"""
        folded = fold(parse(text, given), criterion=Over(1e-3))
        live = [0, 1, 2, 4]
        wide = {name: values.astype(np.float64) for name, values in given.items()}
        weight = (wide["w1"] * wide["s"]).astype(np.float32)[:, live]
        bias = (wide["b1"] * wide["s"] + wide["t"]).astype(np.float32)[live]
        np.testing.assert_array_equal(folded.tensor("w1.block0"), weight)
        np.testing.assert_array_equal(folded.tensor("t.folded.branch0"), bias)
        site = folded.decomposition.sites["h"]
        assert (site.absorbed, site.annealing) == (3, "masked")
        assert folded.decomposition.sites["o"].absorbed is None

    @pytest.mark.parametrize("bias", [None, (6,), (1, 6), ()], ids=str)
    def test_after_a_gemm(self, bias: tuple[int, ...] | None, rng: np.random.Generator) -> None:
        given = self.given(rng)
        del given["b1"]
        if bias is not None:
            given["c"] = rng.standard_normal(bias).astype(np.float32)
        inputs = "x, w1" if bias is None else "x, w1, c"
        text = f"""g (float[B, 4] x) => (float[B, 4] y) {{
            h = Gemm <alpha = 2.0, beta = 0.5> ({inputs}) m = Mul(h, s) z = Add(m, t) r = Tanh(z)
            o = MatMul(r, w2) y = Add(o, b2)
        }}"""
        folded = fold(parse(text, given), criterion=Over(1e-3))
        assert folded.result.ops == ["Gemm", "Tanh", "MatMul", "Add"]
        assert folded.claim
        check_parity(folded.result, rng, tolerance=1e-4)

    def test_the_last_value_may_be_read_outside(self, rng: np.random.Generator) -> None:
        text = """g (float[B, T, 4] x) => (float[B, T, 4] y, float[B, T, 4] z) {
            h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) m = Mul(o, s) z = Add(m, b2)
            q = Tanh(z) y = MatMul(q, w3)
        }"""
        given = self.given(rng, w3=blocks(rng, ALL, ALL))
        given["s"] = given["s"][:4].reshape(1, 1, 4)
        folded = fold(parse(text, given), criterion=Over(1e-3))
        assert folded.result.ops == ["MatMul", "Add", "Relu", "MatMul", "Add", "Tanh", "MatMul"]
        assert folded.claim
        check_parity(folded.result, rng, tolerance=1e-4)

    @pytest.mark.parametrize(
        "tail",
        [
            "m = Mul(h, s) z = Add(m, h)",  # the product is read twice
            "m = Mul(h, p) z = Add(m, t)",  # a scale per position
            "m = Mul(h, h) z = Add(m, t)",
        ],
    )
    def test_what_is_no_scale_stays(self, tail: str, rng: np.random.Generator) -> None:
        text = f"""g (float[B, 3, 4] x) => (float[B, 3, 4] y) {{
            h = MatMul(x, w1) {tail} r = Relu(z) o = MatMul(r, w2) y = Add(o, b2)
        }}"""
        given = self.given(rng, p=rng.standard_normal((3, 6)))
        given = used(text, given)
        folded = fold(parse(text, given), criterion=Over(1e-3))
        assert folded.tried.rewrites
        assert [n for n in folded.result.ops if n == "Mul"] == ["Mul"]
        assert folded.claim

    def test_where_no_entry_is_removed_nothing_is_rounded_anew(
        self, rng: np.random.Generator
    ) -> None:
        given = tensors(rng, s=rng.uniform(0.5, 2, 6), t=rng.standard_normal(6))
        folded = fold(chain("m = Mul(a, s) z = Add(m, t) r = Relu(z)", given=given))
        assert folded.widths == [[4, 4, 4]]
        assert folded.result.ops.count("Mul") == 1
        assert folded.decomposition.sites["h"].absorbed is None

    def test_a_scale_that_is_not_the_original_s_fails_the_proof(
        self, rng: np.random.Generator
    ) -> None:
        text = """g (float[B, 4] x) => (float[B, 4] y) {
            h = MatMul(x, w1) z = Mul(h, s) r = Relu(z) o = MatMul(r, w2) y = Add(o, b2)
        }"""
        given = used(text, self.given(rng))
        folded = fold(parse(text, given), criterion=Over(1e-3))
        other = parse(text, given | {"s": given["s"] * np.float32(1.0001)})
        fault = prove_structure(Model(other), Model(folded.result.proto), folded.decomposition)[
            0
        ]
        assert fault == "site 'h': entry (0, 0) is neither the original's nor zero"


class TestRefusals:
    """What is not folded, because it is no constant or cannot be written down."""

    def test_a_constant_that_differs_between_positions(self, rng: np.random.Generator) -> None:
        given = tensors(rng, p=rng.standard_normal((3, 6)))
        text = """g (float[B, 3, 4] x) => (float[B, 3, 4] y) {
            h = MatMul(x, w1) a = Add(h, p) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
        }"""
        del given["b1"]
        folded = fold(parse(text, given))
        assert not folded.tried.rewrites
        given["p"][:, 3] = 0.5  # now unit 3 does not
        folded = fold(parse(text, given))
        assert folded.widths == [[4, 5, 4]]
        check_parity(folded.result, rng)

    def test_a_value_from_outside_that_all_units_share(self, rng: np.random.Generator) -> None:
        given = tensors(rng)
        text = """g (float[B, 4] x, float[B, 1] t) => (float[B, 4] y) {
            h = MatMul(x, w1) a = Add(h, b1) s = Div(a, t) o = MatMul(s, w2) y = Add(o, b2)
        }"""
        assert not fold(parse(text, given)).tried.rewrites

    @pytest.mark.parametrize("unit", [-1.0, 0.0])
    def test_a_constant_that_is_not_finite(self, unit: float, rng: np.random.Generator) -> None:
        given = tensors(rng)
        given["b1"][3] = unit
        folded = fold(chain("r = Log(a)", given=given))
        assert folded.widths == [[4, 5, 4]]  # unit 5 is

    def test_a_constant_that_the_type_cannot_hold(self, rng: np.random.Generator) -> None:
        given = tensors(rng)
        given["b1"][3] = 100.0
        assert fold(chain("r = Exp(a)", given=given)).widths == [[4, 5, 4]]

    def test_integers(self, rng: np.random.Generator) -> None:
        text = "i = Cast <to = 6> (a) d = Div(i, two) r = Cast <to = 1> (d)"
        given = {**tensors(rng), "two": np.array(2, np.int32)}
        assert not fold(chain(text, given=given)).tried.rewrites

    def test_units_of_the_border_stay(self, rng: np.random.Generator) -> None:
        """A constant output has to be made; folding drops nothing, so nothing is folded."""
        text = """g (float[B, 4] x) => (float[B, 4] y, float[B, 6] r) {
            h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
        }"""
        folded = fold(parse(text, tensors(rng)))
        assert not folded.tried.rewrites
        assert not folded.tried.added

    def test_nothing_constant(self, rng: np.random.Generator) -> None:
        given = tensors(rng, w1=blocks(rng, ALL, [0] * 6))
        folded = fold(chain("r = Relu(a)", given=given))
        assert folded.result.proto is folded.result.annealed


class TestCorruption:
    @pytest.fixture
    def folded(self, rng: np.random.Generator) -> Folded:
        return fold(chain("r = Relu(a)", given=tensors(rng)))

    @pytest.mark.parametrize("change", [1e-6, 0.1])
    def test_a_changed_bias_fails_the_proof(self, folded: Folded, change: float) -> None:
        tensor = next(t for t in folded.result.proto.graph.initializer if t.name == "b2.folded")
        values = numpy_helper.to_array(tensor).copy()
        values[1] += np.float32(change) * abs(values[1])
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        before, after = Model(folded.result.original), Model(folded.result.proto)
        fault = prove_structure(before, after, folded.decomposition)[0]
        assert fault == "site 'o': the bias rebuilt from its blocks is not the annealed bias"

    def test_a_bias_that_was_not_written_down(self, folded: Folded) -> None:
        site = folded.decomposition.sites["o"]
        assert site.bias is not None
        bare = dataclasses.replace(site, bias=dataclasses.replace(site.bias, blocks=()))
        sites = dict(folded.decomposition.sites) | {"o": bare}
        fault = prove_structure(
            Model(folded.result.original),
            Model(folded.result.proto),
            dataclasses.replace(folded.decomposition, sites=sites),
        )[0]
        assert "is not the annealed bias" in str(fault)

    def test_a_bias_of_another_size(self, folded: Folded) -> None:
        tensor = next(t for t in folded.result.proto.graph.initializer if t.name == "b2.folded")
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(3, np.float32), tensor.name))
        before, after = Model(folded.result.original), Model(folded.result.proto)
        fault = prove_structure(before, after, folded.decomposition)[0]
        assert fault == "site 'o': block 'b2.folded' has another shape"
