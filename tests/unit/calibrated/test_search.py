"""The calibrated search looks at few proposals of a family, and finds the strictest inside the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated import search as calibrated_search
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.refitting import CalibrationContext, Proposal, refitted
from onnx_decompose.calibrated.search import Calibrated, calibrate_within_budget
from onnx_decompose.decomposition.decompose import Attempt, attempt
from onnx_decompose.graph.study import Study, study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.verify import Inputs

if TYPE_CHECKING:
    from onnx_decompose.decomposition.refits import Refit

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[N, 64] x) => (float[N, 4] y)
{
    a = MatMul(x, w0)
    b = Relu(a)
    y = MatMul(b, w1)
}
"""
HIDDEN, NEEDED = 256, 70


@pytest.fixture
def found(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> tuple[Calibrated | str, list[str], list[str]]:
    """What the search finds among 64 nested proposals, and what it planned and refitted on the way."""
    proto = onnx.parser.parse_model(TEXT)
    sizes = np.where(np.arange(HIDDEN) < NEEDED, 1.0, 1e-6)
    for name, weight in (
        ("w0", rng.normal(size=(64, HIDDEN))),
        ("w1", sizes[:, None] * rng.normal(size=(HIDDEN, 4))),
    ):
        tensor = numpy_helper.from_array(weight.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    study = study_model(Model(proto))
    samples = samples_from_arrays(
        {"x": rng.normal(size=(600, 64)).astype(np.float32)}, graph_inputs(proto)
    )

    def nested(context: CalibrationContext) -> list[Family]:
        first, second = context.sites

        def at(number: int) -> Proposal:
            kept = 4 * number + 4
            live = np.arange(HIDDEN) < kept
            masks = {
                first.name: np.broadcast_to(live, first.shape),
                second.name: np.broadcast_to(live[:, None], second.shape),
            }
            return Proposal(f"keep({kept})", masks)

        return [Family("keep", HIDDEN // 4 - 1, at, entries_of(context.sites))]

    planned: list[str] = []
    refits: list[str] = []

    def noted(study: Study, evidence: Any, criterion: Any, **rest: Any) -> Attempt:
        planned.append(criterion.name)
        return attempt(study, evidence, criterion, **rest)

    def noted_refit(context: CalibrationContext, proposal: Proposal) -> dict[str, Refit]:
        refits.append(proposal.name)
        return refitted(context, proposal)

    monkeypatch.setattr(calibrated_search, "GENERATORS", {"decay": nested})
    monkeypatch.setattr(calibrated_search, "attempt", noted)
    monkeypatch.setattr(calibrated_search, "refitted", noted_refit)
    options = Options(budget=1e-3, batch=(64,))
    given = Inputs(samples=samples)
    result = calibrate_within_budget(study, options, given, Provider.CPU, to_beat=np.inf)
    return result, planned, refits


def test_the_strictest_inside_the_budget_is_found_with_few_plans_and_refits(
    found: tuple[Calibrated | str, list[str], list[str]],
) -> None:
    result, planned, refits = found
    assert isinstance(result, Calibrated)
    assert result.tried.criterion.name == "keep(72)"
    assert len(refits) <= 7
    assert len(planned) <= 2 * len(refits) + 2
