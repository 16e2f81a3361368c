"""Gates with a slope: where it goes into the weights around them, where it stays, and that it computes the same."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.model.model_io import Model
from onnx_decompose.verification.proof import prove_structure
from tests.passes.harness import blocks, check_parity, parse, rewrite
from tests.passes.test_folding import ALL, Folded, Over, fold, tensors, used

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from onnx_decompose.model.metadata import Decomposition, SiteBlocks
    from onnx_decompose.planning.state_graph import Emit

    Array = NDArray[Any]

GATE = "t = Mul(z, b) q = Sigmoid(t) r = Mul(z, q)"
LIVE = [0, 1, 2, 4]


@pytest.fixture
def given(rng: np.random.Generator) -> dict[str, Array]:
    """4 -> 6 -> 4; hidden units 3 and 5 have next to no input, and one entry between live units is next to nothing."""
    slope = rng.uniform(0.5, 3, 6) * rng.choice([-1, 1], 6)
    made = tensors(rng, b=slope, s=rng.uniform(0.5, 2, 6), t2=rng.standard_normal(6))
    made["w1"][:, [3, 5]] = 1e-6
    made["w1"][2, 1] = 1e-6
    return made


def folded(text: str, given: dict[str, Array], emit: Emit = "shrink") -> Folded:
    return fold(parse(text, used(text, given)), emit, criterion=Over(1e-3))


def chain(tail: str, after: str = "o = MatMul(r, w2) y = Add(o, b2)") -> str:
    return f"g (float[B, 4] x) => (float[B, 4] y) {{ h = MatMul(x, w1) {tail} {after} }}"


def slopes(found: Folded) -> list[str]:
    return [name for name, site in found.decomposition.sites.items() if site.slope]


class TestAbsorbed:
    @pytest.mark.parametrize(
        ("tail", "ops"),
        [
            ("a = Add(h, b1) m = Mul(a, s) z = Add(m, t2)", ["MatMul", "Add"]),
            ("z = Add(h, b1)", ["MatMul", "Add"]),
            ("z = Mul(h, s)", ["MatMul"]),
            ("z = Identity(h)", None),
            ("", ["MatMul"]),
        ],
    )
    def test_whatever_is_before_the_gate(
        self,
        tail: str,
        ops: list[str] | None,
        given: dict[str, Array],
        rng: np.random.Generator,
    ) -> None:
        gate = GATE if tail else GATE.replace("z", "h")
        found = folded(chain(f"{tail} {gate}"), given)
        if ops is None:  # an Identity is not the site's own value
            assert slopes(found) == []
            return
        assert found.result.ops == [*ops, "Sigmoid", "Mul", "MatMul", "Add"]
        assert found.widths == [[4, 4, 4]]
        assert slopes(found) == ["h"]
        assert found.claim
        check_parity(found.result, rng, exact=False)
        check_parity(found.result, rng, tolerance=1e-4)

    @pytest.mark.parametrize(
        "gate",
        [
            "t = Mul(b, z) q = Sigmoid(t) r = Mul(q, z)",
            "t = Mul(z, c) q = Sigmoid(t) r = Mul(z, q)",
            "t = Mul(z, d) q = Sigmoid(t) r = Mul(z, q)",
        ],
    )
    def test_one_slope_for_all_and_either_order(
        self, gate: str, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        given |= {"c": np.array(1.7, np.float32), "d": np.array([-0.3], np.float32)}
        found = folded(chain(f"z = Add(h, b1) {gate}"), given)
        assert found.result.ops == ["MatMul", "Add", "Sigmoid", "Mul", "MatMul", "Add"]
        assert found.claim
        check_parity(found.result, rng, tolerance=1e-4)

    def test_the_weights_by_hand(self, given: dict[str, Array]) -> None:
        found = folded(chain(f"a = Add(h, b1) z = Mul(a, s) {GATE}"), given)
        wide = {name: values.astype(np.float64) for name, values in given.items()}
        scale = wide["s"] * wide["b"]
        first = (wide["w1"] * scale).astype(np.float32)[:, LIVE]
        bias = (wide["b1"] * wide["s"] * wide["b"]).astype(np.float32)[LIVE]
        second = (wide["w2"] * (1 / wide["b"])[:, None]).astype(np.float32)[LIVE]
        np.testing.assert_array_equal(found.tensor("w1.block0"), first)
        np.testing.assert_array_equal(found.tensor("b1.folded.branch0"), bias)
        np.testing.assert_array_equal(found.tensor("w2.block0"), second)
        sites = found.decomposition.sites
        assert [(s.slope, s.absorbed) for s in sites.values()] == [(True, 2), (False, None)]

    def test_a_gate_for_each_layer(
        self, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        given |= {"w3": blocks(rng, ALL, ALL), "c": rng.uniform(0.5, 2, 4).astype(np.float32)}
        after = """o = MatMul(r, w2) p = Add(o, b2) u = Mul(p, c) v = Sigmoid(u) w = Mul(p, v)
            y = MatMul(w, w3)"""
        found = folded(chain(f"z = Add(h, b1) {GATE}", after), given)
        assert slopes(found) == ["h", "o"]
        assert found.result.ops.count("Mul") == 2
        assert found.claim
        check_parity(found.result, rng, tolerance=1e-4)

    def test_several_readers(self, given: dict[str, Array], rng: np.random.Generator) -> None:
        given["w3"] = blocks(rng, [0] * 6, ALL)
        after = "o = MatMul(r, w2) i = Gemm(r, w3, b2) y = Add(o, i)"
        found = folded(chain(f"z = Add(h, b1) {GATE}", after), given)
        assert slopes(found) == ["h"]
        assert found.result.ops.count("Mul") == 1
        check_parity(found.result, rng, tolerance=1e-4)

    @pytest.mark.parametrize(
        "through",
        ["p = Mul(r, s)", "p = Div(r, s)", "n = Neg(r) p = Identity(n)", "p = Mul(r, k)"],
    )
    def test_through_what_a_factor_passes(
        self, through: str, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        given["w3"] = given["w1"][::-1].copy()
        after = f"k = MatMul(x, w3) {through} o = MatMul(p, w2) y = Add(o, b2)"
        after = after if "k)" in through else after.replace("k = MatMul(x, w3) ", "")
        found = folded(chain(f"z = Add(h, b1) {GATE}", after), given)
        assert slopes(found) == ["h"]
        assert found.claim
        check_parity(found.result, rng, tolerance=1e-4)

    def test_two_gates_that_multiply(
        self, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        given |= {
            "w3": given["w1"][::-1].copy(),
            "c": rng.uniform(0.5, 2, 6).astype(np.float32),
        }
        after = """k = MatMul(x, w3) l = Mul(k, c) m = Sigmoid(l) n = Mul(k, m)
            p = Mul(r, n) o = MatMul(p, w2) y = Add(o, b2)"""
        found = folded(chain(f"z = Add(h, b1) {GATE}", after), given)
        assert slopes(found) == ["h", "k"]
        assert found.result.ops.count("Mul") == 3
        check_parity(found.result, rng, tolerance=1e-4)

    def test_after_a_gemm(self, given: dict[str, Array], rng: np.random.Generator) -> None:
        text = f"""g (float[B, 4] x) => (float[B, 4] y) {{
            z = Gemm <alpha = 2.0, beta = 0.5> (x, w1, b1) {GATE} y = Gemm <transB = 1> (r, w3, b2)
        }}"""
        given["w3"] = given["w2"].T.copy()
        given["b"] = given["b"].reshape(1, 6)
        found = folded(text, given)
        assert found.result.ops == ["Gemm", "Sigmoid", "Mul", "Gemm"]
        assert slopes(found) == ["z"]
        assert found.claim
        check_parity(found.result, rng, tolerance=1e-4)

    def test_between_convolutions(
        self, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        text = f"""g (float[B, 4, 5, 5] x) => (float[B, 4, 5, 5] y) {{
            z = Conv <pads = [1, 1, 1, 1]> (x, k1, b1) {GATE} y = Conv <pads = [1, 1, 1, 1]> (r, k2, b2)
        }}"""
        labels, hidden = [0, 1, 0, 1], [0, 1, 1, 0, 1, 0]
        given |= {"w1": blocks(rng, labels, hidden), "w2": blocks(rng, hidden, labels)}
        given["w1"][0, 1] = 1e-6  # of another group, and not supported
        given["b"] = given["b"].reshape(1, 6, 1, 1)
        first = given["w1"].T[:, :, None, None] * rng.uniform(0.5, 1, (6, 4, 3, 3))
        second = given["w2"].T[:, :, None, None] * rng.uniform(0.5, 1, (4, 6, 3, 3))
        given |= {"k1": first.astype(np.float32), "k2": second.astype(np.float32)}
        found = folded(text, given, "split")
        assert slopes(found) == ["z"]
        assert found.result.ops.count("Mul") == found.result.ops.count("Sigmoid") == 2
        assert found.claim
        check_parity(found.result, rng, tolerance=1e-4)

    @pytest.mark.parametrize("dtype", ["float16", "double"])
    def test_in_every_type(
        self, dtype: str, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        kind = {"float16": np.float16, "double": np.float64}[dtype]
        given["w1"][given["w1"] == np.float32(1e-6)] = 1e-4
        made = {name: values.astype(kind) for name, values in given.items()}
        text = chain(f"z = Add(h, b1) {GATE}").replace("float[", f"{dtype}[")
        found = folded(text, made)
        assert slopes(found) == ["h"]
        check_parity(found.result, rng, tolerance=1e-2 if dtype == "float16" else 1e-4)

    @pytest.mark.parametrize("emit", ["split", "grouped"])
    def test_in_branches_and_stacks(
        self, emit: Emit, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        labels, hidden = [0, 1, 0, 1], [0, 1, 1, 0, 1, 0]
        given |= {"w1": blocks(rng, labels, hidden), "w2": blocks(rng, hidden, labels)}
        given["w1"][0, 1] = 1e-6  # of another group, and not supported
        found = folded(chain(f"z = Add(h, b1) {GATE}"), given, emit)
        assert slopes(found) == ["h"]
        assert found.claim
        check_parity(found.result, rng, tolerance=1e-4)


class TestStays:
    """Where the factor has to stay, the model is what it is without it."""

    @pytest.mark.parametrize(
        ("tail", "after"),
        [
            (GATE.replace("z, b", "h, p").replace("z", "h"), None),
            (f"z = Add(h, b1) {GATE.replace('Sigmoid', 'Tanh')}", None),
            (f"z = Add(h, b1) {GATE.replace('Mul(z, q)', 'Add(z, q)')}", None),
            (f"z = Add(h, b1) {GATE}", "e = Relu(r) o = MatMul(e, w2) y = Add(o, b2)"),
            (f"z = Add(h, b1) {GATE}", "e = Div(s, r) o = MatMul(e, w2) y = Add(o, b2)"),
            (f"z = Add(h, b1) {GATE}", "e = Mul(r, r) o = MatMul(e, w2) y = Add(o, b2)"),
            (
                f"z = Add(h, b1) {GATE}",
                "e = Mul(r, s) f = Mul(r, e) o = MatMul(f, w2) y = Add(o, b2)",
            ),
            (
                f"z = Add(h, b1) {GATE} n = Neg(z)",
                "m = Add(r, n) o = MatMul(m, w2) y = Add(o, b2)",
            ),
        ],
    )
    def test_in_other_patterns(
        self, tail: str, after: str | None, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        given["p"] = rng.uniform(0.5, 2, (3, 6)).astype(np.float32)
        after = after or "o = MatMul(r, w2) y = Add(o, b2)"
        text = chain(tail, after).replace("[B, 4]", "[B, 3, 4]")
        found = folded(text, given)
        assert found.tried.rewrites
        assert slopes(found) == []
        assert found.claim
        check_parity(found.result, rng, tolerance=1e-4)

    @pytest.mark.parametrize("seen", ["z", "r", "t", "q"])
    def test_where_a_value_goes_out(
        self, seen: str, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        text = chain(f"z = Add(h, b1) {GATE}").replace(
            "(float[B, 4] y)", f"(float[B, 4] y, float[B, 6] {seen})"
        )
        found = folded(text, given, "auto")
        assert slopes(found) == []
        check_parity(found.result, rng, tolerance=1e-4)

    @pytest.mark.parametrize("small", [0.0, 1e-5, 1e5, -1e-5])
    def test_where_a_slope_is_far_from_one(self, small: float, given: dict[str, Array]) -> None:
        given["b"][2] = small
        assert slopes(folded(chain(f"z = Add(h, b1) {GATE}"), given)) == []

    def test_a_slope_that_float32_has_room_for_is_too_much_for_float16(
        self, given: dict[str, Array]
    ) -> None:
        given["b"][2] = 0.25
        text = chain(f"z = Add(h, b1) {GATE}")
        assert slopes(folded(text, given)) == ["h"]
        given["w1"][given["w1"] == np.float32(1e-6)] = 1e-4
        narrow = {name: values.astype(np.float16) for name, values in given.items()}
        assert slopes(folded(text.replace("float[", "float16["), narrow)) == []

    def test_where_a_reader_stays_dense(
        self, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        """The other side of a softmax is a region of its own, with nothing to take apart; so it reads what it read."""
        given["w3"] = rng.uniform(1, 2, (6, 4)).astype(np.float32)
        text = """g (float[B, 4] x) => (float[B, 4] y, float[B, 4] n) {
            h = MatMul(x, w1) z = Add(h, b1) t = Mul(z, b) q = Sigmoid(t) r = Mul(z, q)
            o = MatMul(r, w2) y = Add(o, b2) e = Transpose <perm = [0, 1]> (r) n = MatMul(e, w3)
        }"""
        found = folded(text, given)
        assert slopes(found) == []
        check_parity(found.result, rng, tolerance=1e-4)

    def test_where_no_entry_is_removed(
        self, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        given["w1"] = blocks(rng, ALL, [0, 0, 0, -1, 0, -1])
        found = folded(chain(f"z = Add(h, b1) {GATE}"), given)
        assert found.tried.is_exact
        assert slopes(found) == []
        assert found.result.ops.count("Mul") == 2

    def test_where_the_scaled_weight_would_overflow(self, given: dict[str, Array]) -> None:
        given["w1"][0, 0] = 3e38
        given["b"][0] = 2.0
        assert slopes(folded(chain(f"z = Add(h, b1) {GATE}"), given)) == []


class TestProof:
    """What is said of a slope is checked against the original."""

    @pytest.fixture
    def found(self, given: dict[str, Array]) -> Folded:
        return folded(chain(f"z = Add(h, b1) {GATE}"), given)

    def fault(
        self, found: Folded, change: Callable[[dict[str, SiteBlocks]], None]
    ) -> str | None:
        sites = dict(found.decomposition.sites)
        change(sites)
        decomposition: Decomposition = dataclasses.replace(found.decomposition, sites=sites)
        original, rewritten = Model(found.result.original), Model(found.result.proto)
        return prove_structure(original, rewritten, decomposition)[0]

    def test_another_slope(self, found: Folded, given: dict[str, Array]) -> None:
        text = chain(f"z = Add(h, b1) {GATE}")
        other = used(text, given) | {"b": given["b"] * np.float32(1.0001)}
        fault = prove_structure(
            Model(parse(text, other)), Model(found.result.proto), found.decomposition
        )[0]
        assert fault == "site 'h': entry (0, 0) is neither the original's nor zero"

    def test_nothing_is_said(self, found: Folded) -> None:
        def change(sites: dict[str, SiteBlocks]) -> None:
            sites["h"] = dataclasses.replace(sites["h"], slope=False)

        assert (
            self.fault(found, change)
            == "site 'h': entry (0, 0) is neither the original's nor zero"
        )

    def test_there_is_no_gate(self, found: Folded) -> None:
        def change(sites: dict[str, SiteBlocks]) -> None:
            sites["o"] = dataclasses.replace(sites["o"], slope=True)

        fault = self.fault(found, change)
        assert fault is not None
        assert fault.startswith("site 'o': no gate")

    def test_a_reader_was_not_rewritten(self, found: Folded) -> None:
        fault = self.fault(found, lambda sites: sites.__delitem__("o"))
        assert fault == "site 'h': the gate after it is read by more than rewritten sites"

    def test_the_bias_is_missing(self, found: Folded) -> None:
        def change(sites: dict[str, SiteBlocks]) -> None:
            sites["h"] = dataclasses.replace(sites["h"], bias=None)

        assert self.fault(found, change) == "site 'h': the bias that it absorbed is missing"


class TestFactorsOfOne:
    """Of a rewritten region, a factor that is one where a branch has units is not written."""

    @pytest.mark.parametrize(
        ("scaling", "count"),
        [
            ("m = Mul(a, ones)", 0),
            ("m = Mul(one, a)", 0),
            ("m = Div(a, ones)", 0),
            ("m = Div(ones, a)", 1),
            ("m = Mul(a, s)", 1),
            ("m = Mul(a, wide)", 1),  # three positions of one
            ("m = Add(a, ones)", 1),
        ],
    )
    @pytest.mark.parametrize("emit", ["shrink", "split", "grouped"])
    def test_it_goes(
        self,
        scaling: str,
        count: int,
        emit: Emit,
        given: dict[str, Array],
        rng: np.random.Generator,
    ) -> None:
        hidden = [0, 0, 0, -1, 0, -1] if emit == "shrink" else [0, 1, 1, 0, 1, 0]
        labels = ALL if emit == "shrink" else [0, 1, 0, 1]
        given |= {
            "w1": blocks(rng, labels, hidden),
            "w2": blocks(rng, hidden, labels),
            "ones": np.ones(6, np.float32),
            "one": np.array(1, np.float32),
            "wide": np.ones((3, 6), np.float32),
        }
        text = f"""g (float[B, 1, 4] x) => (float[B, 1, 4] y) {{
            h = MatMul(x, w1) a = Sigmoid(h) {scaling} e = Relu(m) o = MatMul(e, w2) y = Add(o, b2)
        }}"""
        if "wide" in scaling:
            text = text.replace("[B, 1, 4] y", "[B, 3, 4] y")
        result = rewrite(parse(text, used(text, given)), emit)
        assert result.plans[0][1].decision == emit
        branches = len(result.plans[0][1].branches) if emit == "split" else 1
        found = sum(op in {"Mul", "Div"} for op in result.ops)
        added = scaling.startswith("m = Add")
        assert found == (0 if added else count * branches)
        check_parity(result, rng)

    def test_in_the_branches_where_it_is_one(
        self, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        labels, hidden = [0, 1, 0, 1], [0, 1, 1, 0, 1, 0]
        given |= {"w1": blocks(rng, labels, hidden), "w2": blocks(rng, hidden, labels)}
        given["s"][np.equal(hidden, 0)] = 1.0
        text = chain("a = Relu(h) m = Mul(a, s) r = Sigmoid(m)")
        result = rewrite(parse(text, used(text, given)), "split")
        assert result.ops.count("Mul") == 1
        check_parity(result, rng)

    def test_a_value_that_is_read_outside_is_made(
        self, given: dict[str, Array], rng: np.random.Generator
    ) -> None:
        given["w1"] = blocks(rng, ALL, [0, 0, 0, -1, 0, -1])
        given["ones"] = np.ones(6, np.float32)
        text = chain("a = Relu(h) r = Mul(a, ones)").replace("4] y)", "4] y, float[B, 6] r)")
        result = rewrite(parse(text, used(text, given)), "split")
        check_parity(result, rng)
