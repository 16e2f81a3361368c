"""Outputs side by side: what rounding explains and what it does not."""

from __future__ import annotations

import numpy as np

from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.claims import Inputs
from onnx_decompose.verification.equivalence import measure_structural
from tests.passes.harness import parse

IN_ORDER = "s = Add(a, b) t = Add(s, c) z = Add(t, d)"
OTHERWISE = "s = Add(a, c) t = Add(s, d) z = Add(t, b)"
WRONG = "s = Add(a, b) t = Add(s, c) q = Add(t, d) z = Mul(q, factor)"


def model(terms: str) -> Model:
    """A sum of four inputs through a sigmoid."""
    text = f"""g (float[B] a, float[B] b, float[B] c, float[B] d) => (float[B] y) {{
        {terms} y = Sigmoid(z)
    }}"""
    given = {"factor": np.asarray(1 + 1e-3, np.float32)} if "factor" in terms else {}
    return Model(parse(text, given))


def inputs(**values: float) -> Inputs:
    arrays = {name: np.array([value], np.float32) for name, value in values.items()}
    return Inputs(samples_from_arrays(arrays, graph_inputs(model(IN_ORDER).proto)))


def test_a_single_entry_that_is_right_by_luck_convicts_nobody() -> None:
    """Large terms that nearly cancel: in one order every sum is exact, in the other one is half a last bit off."""
    bit = 2.0**-13  # of numbers from 1024 to 2048
    lucky = inputs(a=1700.25 + bit, b=900.25 + bit, c=2500.5 + 2 * bit, d=-5101)
    found = measure_structural(
        model(IN_ORDER), model(OTHERWISE), inputs=lucky, provider=Provider.CPU
    )
    assert found, found.reason
    assert found.rewritten_error is not None
    other = measure_structural(
        model(OTHERWISE), model(IN_ORDER), inputs=lucky, provider=Provider.CPU
    )
    assert other, other.reason


def test_a_fault_gains_nothing_by_it() -> None:
    mild = inputs(a=0.5, b=0.25, c=-0.125, d=1.0)
    found = measure_structural(
        model(IN_ORDER), model(WRONG), inputs=mild, provider=Provider.CPU
    )
    assert not found
    assert "deviates" in found.reason
