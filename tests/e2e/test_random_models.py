"""Random whole models, with everything that trained ones have: whatever the pipeline makes of one, the claims hold."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, get_args

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnx_decompose.options import Options
from onnx_decompose.planning.state_graph import Emit
from tests.e2e.random_models import NOISE, Recipe, quantize_some, random_model
from tests.e2e.whole_rewrite import EXACT, check_rewrite

if TYPE_CHECKING:
    from typing import Literal

    Criterion = Literal["ksigma:3", "ksigma:20", "fdr", "shared"]

SEEDS = st.integers(0, 2**32 - 1)
EMITS = st.sampled_from(get_args(Emit))


@settings(max_examples=40)
@given(seed=SEEDS, emit=EMITS, free=st.booleans())
def test_exact(seed: int, emit: Emit, free: bool) -> None:
    check_rewrite(random_model(Recipe.drawn(seed)), emit, free=free)


def test_integers_that_lie_scattered() -> None:
    """ArrayFeatureExtractor, which takes floats faster than Gather, knows no integers of 8 bits."""
    recipe = Recipe.drawn(603189)
    outcome = check_rewrite(random_model(recipe), "triangular", free=False)
    assert outcome.model is not None


@settings(max_examples=40)
@given(
    seed=SEEDS,
    emit=EMITS,
    free=st.booleans(),
    criterion=st.sampled_from(["ksigma:3", "ksigma:20", "fdr", "shared"]),
)
def test_annealed(seed: int, emit: Emit, free: bool, criterion: Criterion) -> None:
    options = Options(null=f"normal:{NOISE}", criterion=criterion, provider="cpu")
    check_rewrite(random_model(Recipe.drawn(seed, NOISE)), emit, options, free=free)


@settings(max_examples=12)
@given(
    seed=SEEDS,
    emit=EMITS,
    free=st.booleans(),
    criterion=st.sampled_from(["", "ksigma:3", "fdr", "shared"]),
)
def test_weights_of_integers(
    seed: int, emit: Emit, free: bool, criterion: Criterion | Literal[""]
) -> None:
    """Exact, or annealed: what is removed becomes the zero point."""
    recipe = Recipe.drawn(seed, NOISE if criterion else 0.0)
    opset = max(recipe.opset, 13)  # one scale per line came with it
    recipe = dataclasses.replace(recipe, opset=opset, dtype="float32", inside="")
    model = random_model(recipe)
    assume(quantize_some(model, np.random.default_rng([seed, 7])) > 0)
    options = Options(null=f"normal:{NOISE}", criterion=criterion, provider="cpu")
    check_rewrite(model, emit, options if criterion else EXACT, free=free)
