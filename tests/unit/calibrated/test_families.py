"""Families say what they could remove without any work; their proposals come from strict to loose."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.search import GENERATORS
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from onnx_decompose.calibrated.families import Family
    from onnx_decompose.options import ProposalKind

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
scores (float[N, 24] x) => (float[N, 600] y)
{
    a = MatMul(x, w0)
    b = Relu(a)
    y = MatMul(b, w1)
}
"""
HIDDEN = 64


@pytest.fixture
def context(rng: np.random.Generator) -> CalibrationContext:
    """Two groups of inputs, hidden units of every size, outputs in thirty kinds."""
    proto = onnx.parser.parse_model(TEXT)
    kinds = rng.normal(size=(HIDDEN, 30))[:, rng.integers(0, 30, 600)]
    weights = {
        "w0": rng.normal(size=(24, HIDDEN)),
        "w1": np.geomspace(1, 1e-4, HIDDEN)[:, None]
        * (kinds + 0.01 * rng.normal(size=kinds.shape)),
    }
    for name, weight in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    active = (rng.integers(0, 2, 500)[:, None] == np.repeat([0, 1], 12)).astype(np.float32)
    x = active * rng.normal(size=(500, 24)).astype(np.float32)
    samples = samples_from_arrays({"x": x}, graph_inputs(proto))
    study = study_model(Model(proto))
    return CalibrationContext(study, split_samples(samples, 0), Provider.CPU)


def made(
    context: CalibrationContext, kind: ProposalKind
) -> list[tuple[Family, list[Proposal]]]:
    """The families of a kind that have proposals, with these."""
    found = [(family, list(family)) for family in GENERATORS[kind](context)]
    return [(family, proposals) for family, proposals in found if proposals]


def left(context: CalibrationContext, proposal: Proposal) -> int:
    """Different entries of all sites that stay."""
    total = sum(site.size for site in context.study.sites)
    for site in context.study.sites:
        if site.name in proposal.masks:
            mask, equal = proposal.masks[site.name], proposal.equal.get(site.name)
            total += int((mask if equal is None else mask[:, equal.firsts]).sum()) - site.size
    return total


@pytest.mark.parametrize("kind", GENERATORS)
class TestEveryKind:
    def test_nothing_is_worked_out_before_a_proposal_is_asked_for(
        self,
        context: CalibrationContext,
        kind: ProposalKind,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def needless(*_: object, **__: object) -> None:
            raise AssertionError(kind)

        for name in ("fit", "choose", "fitted", "power", "observe"):
            monkeypatch.setattr(CalibrationContext, name, property(needless))
        assert list(GENERATORS[kind](context))

    def test_from_strict_to_loose_within_the_bound(
        self, context: CalibrationContext, kind: ProposalKind
    ) -> None:
        whole = sum(site.size for site in context.study.sites)
        for family, proposals in made(context, kind):
            sizes = [left(context, proposal) for proposal in proposals]
            assert sizes == sorted(sizes), family.name
            assert whole - sizes[0] <= family.removes, family.name

    def test_the_same_level_is_the_same_proposal(
        self, context: CalibrationContext, kind: ProposalKind
    ) -> None:
        for family in itertools.islice(GENERATORS[kind](context), 3):
            first, again = (family.at(family.size // 2) for _ in range(2))
            assert (first is None) == (again is None)
            if first is not None and again is not None:
                assert (first.name, first.digest) == (again.name, again.digest)

    def test_families_have_names_of_their_own(
        self, context: CalibrationContext, kind: ProposalKind
    ) -> None:
        names = [family.name for family in GENERATORS[kind](context)]
        assert len(set(names)) == len(names)


def test_this_model_has_proposals_of_most_kinds(context: CalibrationContext) -> None:
    for kind in ("decay", "support", "removal", "merging"):
        assert made(context, kind), kind


def test_a_digest_tells_masks_and_equal_outputs_apart(context: CalibrationContext) -> None:
    proposals = [proposal for _, found in made(context, "merging") for proposal in found]
    assert len({proposal.digest for proposal in proposals}) > 10
    mask = np.zeros((3, 4), dtype=bool)
    one = np.broadcast_to(np.array([True, False, True, False]), (3, 4))
    digests = {
        Proposal("", masks).digest
        for masks in ({"a": mask}, {"b": mask}, {"a": one}, {"a": ~one}, {"a": mask, "b": one})
    }
    assert len(digests) == 5
    assert Proposal("", {"a": mask}).keeps_nothing
    assert not Proposal("", {"a": mask, "b": one}).keeps_nothing
