"""Random models, damaged at random: every one is read, or refused in a line; nothing else is raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.errors import InputError
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.validity import blaming
from onnx_decompose.options import Options
from onnx_decompose.schedule import attempt_with
from tests.e2e.damage import damage
from tests.e2e.random_models import Recipe, random_model
from tests.passes.harness import FREE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "model.onnx"


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 6), times=st.integers(1, 4))
def test_fields(path: Path, seed: int, steps: int, times: int) -> None:
    rng = np.random.default_rng(seed)
    model = random_model(Recipe(seed, steps=steps, opset=17))
    damage(model, rng, times)
    path.write_bytes(model.SerializeToString())
    told = refusal(path)
    assert "\n" not in told
    assert not told or path.name in told


def refusal(path: Path) -> str:
    """Read a model as ``rewrite`` does before anything is run; what is said against it."""
    options = Options(null="zero", provider="cpu")
    try:
        model = load_model(path)
        with blaming(model):
            study = study_model(model)
            criterion = make_criterion(options.criterion, options.alpha)
            attempt_with(study, gather_all(study, options), criterion, options, FREE)
    except InputError as error:
        return str(error)
    return ""
