"""Emission ``triangular``: groups of a site's outputs that may read the same inputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.passes.harness import FREE, check_parity, parse, rewrite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.planning.state_graph import Emit

    BoolArray = NDArray[np.bool_]

LATENCY = dataclasses.replace(FREE, batches=(1,))
"""One row at a time: the weights are what costs."""

OVERLAPPING = np.array(
    [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ],
    bool,
)
TRIANGULAR = np.triu(np.ones((4, 4), bool)).repeat(8, axis=0).repeat(8, axis=1)


def weight_of(
    mask: BoolArray, rng: np.random.Generator, dtype: Any = np.float32
) -> NDArray[Any]:
    """Entries away from zero, so that a wrong place is never within a tolerance."""
    values = rng.uniform(0.5, 1.0, mask.shape) * rng.choice([-1, 1], mask.shape)
    weight = np.zeros(mask.shape, dtype)
    weight[mask] = values[mask]
    return weight


def site(
    mask: BoolArray,
    rng: np.random.Generator,
    *,
    batch: str = "B",
    form: str = "matmul",
    **options: Any,
) -> Any:
    inputs, outputs = mask.shape
    weight = weight_of(mask, rng)
    body = {
        "matmul": "y = MatMul(x, w)",
        "bias": "h = MatMul(x, w) y = Add(h, b)",
        "gemm": "y = Gemm <alpha = 0.5, transB = 1> (x, w, b)",
    }[form]
    tensors = {"w": weight.T.copy() if form == "gemm" else weight}
    if form != "matmul":
        tensors["b"] = rng.standard_normal((outputs,)).astype(np.float32)
    text = f"g (float[{batch}, {inputs}] x) => (float[{batch}, {outputs}] y) {{ {body} }}"
    return parse(text, tensors, **options)


@pytest.mark.parametrize("emit", ["auto", "triangular"])
def test_overlapping_runs_are_slices(emit: Emit, rng: np.random.Generator) -> None:
    result = rewrite(site(OVERLAPPING, rng, form="bias"), emit, cost=LATENCY)
    assert result.decisions == [("triangular", 3)]
    assert result.ops == ["Slice"] * 3 + ["MatMul"] * 3 + ["Add"] * 3 + ["Concat"]
    blocks = result.record["h"]
    assert [block.rows.tolist() for block in blocks] == [[0, 1, 2], [2, 3], [3, 4]]
    assert [block.columns.tolist() for block in blocks] == [[0, 1], [2, 3], [4, 5]]
    check_parity(result, rng)


def test_a_group_that_reads_everything_is_not_cut(rng: np.random.Generator) -> None:
    mask = OVERLAPPING.copy()
    mask[:, 4:] = True
    result = rewrite(site(mask, rng))
    assert result.decisions == [("dense", 0)]  # split has nothing to take apart
    result = rewrite(site(mask, rng), "triangular", cost=LATENCY)
    assert result.ops == ["Slice"] * 2 + ["MatMul"] * 3 + ["Concat"]
    check_parity(result, rng)


def test_scattered_inputs_are_gathered(rng: np.random.Generator) -> None:
    mask = OVERLAPPING[[0, 3, 4, 1, 2]]
    result = rewrite(site(mask, rng), "triangular", cost=LATENCY)
    assert result.ops == ["Gather", "Gather", "Slice", "MatMul", "MatMul", "MatMul", "Concat"]
    check_parity(result, rng)


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 17, 21])
@pytest.mark.parametrize("form", ["matmul", "bias", "gemm"])
def test_a_hidden_triangular_form_is_gathered_once_and_cut_in_runs(
    form: str, opset: int, rng: np.random.Generator
) -> None:
    first, second = rng.permutation(32), rng.permutation(32)
    mask = TRIANGULAR[np.ix_(first, second)]
    model = site(mask, rng, form=form, opsets=f'"": {opset}')
    result = rewrite(model, "triangular", cost=LATENCY)
    assert result.decisions == [("triangular", 4)]
    once = {"matmul": ["MatMul"], "bias": ["MatMul", "Add"], "gemm": ["Gemm"]}[form]
    products = [op for op in once for _ in range(4)]
    assert result.ops == ["Gather"] + ["Slice"] * 3 + products + ["Concat", "Gather"]
    assert "block triangular: 4 blocks" in result.plans[0][1].reason
    check_parity(result, rng)


@settings(max_examples=80)
@given(
    mask=st.tuples(st.integers(2, 12), st.integers(2, 12)).flatmap(
        lambda shape: hnp.arrays(np.bool_, shape)
    ),
    seed=st.integers(0, 2**32 - 1),
    band=st.booleans(),
    shape=st.sampled_from([("B", "gemm"), ("B", "matmul"), ("B, T", "bias")]),
    opset=st.sampled_from([9, 13, 17]),
    emit=st.sampled_from(["auto", "triangular"]),
)
def test_the_function_stays(
    mask: BoolArray, seed: int, band: bool, shape: tuple[str, str], opset: int, emit: Emit
) -> None:
    rng = np.random.default_rng(seed)
    if band:
        inputs, outputs = mask.shape
        mask = mask & (
            abs(np.arange(inputs)[:, None] / inputs - np.arange(outputs) / outputs) < 0.3
        )
    batch, form = shape
    model = site(mask, rng, batch=batch, form=form, opsets=f'"": {opset}')
    result = rewrite(model, emit, cost=LATENCY)
    check_parity(result, rng)
    again = rewrite(result.proto, emit, cost=LATENCY)
    check_parity(again, rng)
