"""Random whole models with nodes inside and products in other forms: whatever comes of one, the claims hold."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from onnx_decompose.decomposition.decompose import annealed_model
from onnx_decompose.errors import ModelError
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.options import Options
from onnx_decompose.planning.state_graph import Emit
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.sessions import Provider
from tests.e2e.random_models import NOISE, Recipe, random_model
from tests.e2e.whole_rewrite import (
    EXACT,
    check_again,
    check_claim_a,
    check_claim_b,
    rewrite_once,
)
from tests.e2e.wrapped import Wrapping, reformed, wrapped
from tools.untouched import untouched_faults

SEEDS = st.integers(0, 2**32 - 1)
EMITS = st.sampled_from(get_args(Emit))


@settings(max_examples=25)
@given(seed=SEEDS, emit=EMITS, how=st.sampled_from(get_args(Wrapping)), noise=st.booleans())
def test_nodes_inside(seed: int, emit: Emit, how: Wrapping, noise: bool) -> None:
    rng = np.random.default_rng(seed)
    model = random_model(Recipe.drawn(seed, NOISE if noise else 0.0))
    try:
        proto = wrapped(reformed(model, rng), how, rng)
    except onnx.checker.ValidationError:
        assume(False)
    check(proto, emit, noise=noise)


@settings(max_examples=25)
@given(seed=SEEDS, emit=EMITS, noise=st.booleans())
@example(seed=125, emit="auto", noise=True)  # a scale goes into a product without a name
@example(seed=1228, emit="auto", noise=False)  # float16 that overflows
def test_products_in_other_forms(seed: int, emit: Emit, noise: bool) -> None:
    model = random_model(Recipe.drawn(seed, NOISE if noise else 0.0))
    check(reformed(model, np.random.default_rng(seed)), emit, noise=noise)


def check(proto: onnx.ModelProto, emit: Emit, *, noise: bool) -> None:
    """Rewrite a model and check the result from the two files alone."""
    try:
        open_model(Model(proto), Provider.CPU)
    except ModelError:  # a fusion of onnxruntime 1.32 misses quantized weights of outer graphs
        assume(False)
    annealing = Options(null=f"normal:{NOISE}", criterion="ksigma:3", provider="cpu")
    before = proto.SerializeToString(deterministic=True)
    outcome = rewrite_once(proto, emit, annealing if noise else EXACT)
    annealed = annealed_model(outcome.tried).proto
    assert proto.SerializeToString(deterministic=True) == before
    if outcome.model is None:
        assert annealed.SerializeToString(deterministic=True) == before
        return
    onnx.checker.check_model(annealed, full_check=True)
    onnx.checker.check_model(outcome.model, full_check=True)
    stored = outcome.model.SerializeToString()
    original, rewritten = Model(proto), load_model(onnx.ModelProto.FromString(stored))
    if check_claim_a(original, rewritten):
        check_claim_b(outcome, original, rewritten)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        source.write_bytes(before)
        output.write_bytes(stored)
        faults = untouched_faults(source, output)
    # A new operator may bring its domain.
    assert set(faults) <= {"model field opset_import changed"}
    check_again(original, rewritten, emit, free=True)
