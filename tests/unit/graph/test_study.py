"""What a plan is told of a region: positions of convolutions, where shapes tell and where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.graph.study import state_graph, study_model
from onnx_decompose.model.model_io import Model
from tests.passes.harness import parse

SQUEEZE = """g (float[N, 4, {0}, {0}] x) => (float[N, 4, {1}, {1}] y) {{
    a = Conv <pads = [1, 1, 1, 1]> (x, w1) p = GlobalAveragePool(a) b = Conv(p, w2) s = Sigmoid(b) y = Mul(a, s)
}}"""
"""A channel is scaled by what its mean over all positions asks for."""


@pytest.mark.parametrize(
    ("size", "positions"),
    [("12", {1, 144}), ("H", {1, 256})],
    ids=["known", "what was pooled to one position is not known"],
)
def test_positions_of_a_region(size: str, positions: set[int]) -> None:
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(4, 4, 3, 3)), "w2": rng.normal(size=(4, 4, 1, 1))}
    tensors = {name: array.astype(np.float32) for name, array in weights.items()}
    study = study_model(Model(parse(SQUEEZE.format(size, size), tensors)))
    found = set[int]()
    for region in study.regions:
        masks = {site.name: np.ones(site.shape, dtype=bool) for site in region.sites}
        found.update(state_graph(study, region, masks).positions)
    assert found <= positions
    assert max(positions) in found
