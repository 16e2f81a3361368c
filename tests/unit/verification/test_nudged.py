"""Quantizers that see slightly other values: a last bit may decide on a whole step, and no more than that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_decompose.model.model_io import Model
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.claims import Inputs
from onnx_decompose.verification.equivalence import measure_structural
from onnx_decompose.verification.nudged import nudged
from tests.passes.harness import run

if TYPE_CHECKING:
    from typing import Any

STORED = "float s = {0.05}, uint8 z = {128}, float[3, 3] w = {0.5, 0.2, 0.1, 0.3, 0.7, 0.2, 0.9, 0.4, 0.6}"
PAIR = "q = QuantizeLinear(m, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)"


def model(body: str, stored: str = STORED) -> Model:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[B, 3] x) => (float[B, 3] y) <{stored}> {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto, full_check=True)
    return Model(proto)


def outputs(found: Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return run(found.proto, {"x": x}, reference=False)[0]


@pytest.mark.parametrize(
    "quantizer",
    [
        PAIR,
        "q, u, v = DynamicQuantizeLinear(m) d = DequantizeLinear(q, u, v) y = MatMul(d, w)",
    ],
)
def test_a_few_values_go_to_the_next_step(quantizer: str, rng: np.random.Generator) -> None:
    before = model(f"m = Identity(x) {quantizer}")
    after = nudged(before)
    assert after is not None
    onnx.checker.check_model(after.proto, full_check=True)
    x = rng.uniform(-3, 3, (400, 3)).astype(np.float32)
    moved = np.abs(outputs(after, x) - outputs(before, x)).max(axis=1)
    share = (moved > 1e-3).mean()
    assert 0.01 < share < 0.5
    # Three values at most, one step each (two where the scale moves too).
    assert moved.max() <= 3 * 2 * 0.05 * 0.9


def test_models_without_quantizers_are_left_alone() -> None:
    assert nudged(model("y = MatMul(x, w)")) is None
    assert (
        nudged(
            model("d = DequantizeLinear(k, s, z) y = Mul(x, d)", f"{STORED}, uint8 k = {{3}}")
        )
        is None
    )


def test_quantizers_in_bodies(rng: np.random.Generator) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 3] x, bool b) => (float[B, 3] y) <{STORED}> {{
            y = If (b) <then_branch = t () => (float[B, 3] o) {{
                m = Identity(x) q = QuantizeLinear(m, s, z) d = DequantizeLinear(q, s, z) o = MatMul(d, w) }},
              else_branch = e () => (float[B, 3] p) {{ p = MatMul(x, w) }}> }}"""
    )
    after = nudged(Model(proto))
    assert after is not None
    x = rng.uniform(-3, 3, (50, 3)).astype(np.float32)
    for flag, differs in ((True, True), (False, False)):
        feeds = {"x": x, "b": np.array(flag)}
        pair = [run(p, feeds, reference=False)[0] for p in (proto, after.proto)]
        assert (np.abs(pair[0] - pair[1]).max() > 1e-3) == differs


def test_claim_a_forgives_a_step_and_nothing_else() -> None:
    """Last bits before a quantizer are rounding; another weight, or values in another place, are not."""
    inputs = Inputs(seeds=3)

    def holds(other: str, stored: str = STORED) -> bool:
        dense = model(f"m = Identity(x) {PAIR}")
        claim = measure_structural(
            dense, model(other, stored), inputs=inputs, provider=Provider.CPU
        )
        return bool(claim)

    last_bits = "t = Mul(x, k) m = Mul(t, l)"
    factors = f"{STORED}, float k = {{1.0001}}, float l = {{0.9999}}"
    assert holds(f"{last_bits} {PAIR}", factors)
    # After the quantizer, or without one, the same is no rounding.
    assert not holds(f"m = Identity(x) {PAIR.replace('y =', 'e =')} y = Mul(e, k)", factors)
    swapped = "i = Constant <value = int64[3] {1, 0, 2}> () m = Gather <axis = 1> (x, i)"
    assert not holds(f"{swapped} {PAIR}")
    assert not holds(f"m = Identity(x) {PAIR}", STORED.replace("0.9", "0.85"))
