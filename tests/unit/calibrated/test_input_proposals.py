"""Which inputs proposals leave out or add up."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.input_proposals import spare_inputs
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.refitting import refitted
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

WORDS, HIDDEN, COMMON = 300, 24, 20
TEXT = f"""
<ir_version: 8, opset_import: ["" : 17]>
words (float[N, {WORDS}] x) => (float[N, 4] y)
{{
    a = MatMul(x, w)
    h = Relu(a)
    y = MatMul(h, v)
}}
"""


@pytest.fixture
def context(rng: np.random.Generator) -> CalibrationContext:
    """Words of which 20 are often there, the others hardly ever; half of the hidden units repeat the others."""
    model = onnx.parser.parse_model(TEXT)
    w = rng.normal(size=(WORDS, HIDDEN))
    w[:, HIDDEN // 2 :] = w[:, : HIDDEN // 2]
    for name, values in (("w", w), ("v", rng.normal(size=(HIDDEN, 4)))):
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    often = np.where(np.arange(WORDS) < COMMON, 1.0, 2e-3)
    x = rng.poisson(often, size=(1200, WORDS)).astype(np.float32)
    samples = samples_from_arrays({"x": x}, graph_inputs(model))
    return CalibrationContext(
        study_model(Model(model)), split_samples(samples, 0), Provider.CPU, neighbours=False
    )


def test_inputs_and_hidden_units_go_at_one_level(context: CalibrationContext) -> None:
    fewer, *_ = spare_inputs(context)
    kept = []
    for proposal in fewer:
        mask = proposal.masks[context.sites[0].name]
        rows, columns = np.asarray(mask.any(axis=1)), np.asarray(mask.any(axis=0))
        assert proposal.name == (
            f"remove({WORDS - rows.sum()} of {WORDS} inputs, "
            f"{HIDDEN - columns.sum()} of {HIDDEN} hidden units)"
        )
        kept.append(int(rows.sum()))
        if kept[-1] == COMMON:
            assert rows[:COMMON].all()
            assert columns.sum() <= HIDDEN // 2
    assert kept == sorted(kept)
    assert kept[0] < COMMON < kept[-1] < WORDS


def test_inputs_are_added_up_and_refitted_as_one(context: CalibrationContext) -> None:
    site = context.sites[0]
    _, one, eight = spare_inputs(context)
    for family, most in ((one, 1), (eight, 8)):
        proposal = next(p for p in family if p.pools[site.name].rows < WORDS / 2)
        pools = proposal.pools[site.name]
        assert 0 < np.count_nonzero(np.bincount(pools.labels) > 1) <= most
        weight = context.study.weight(site)
        for made in (
            proposal.start(site, weight),
            refitted(context, proposal)[site.name].stored,
        ):
            assert made.shape == site.shape
            assert len(np.unique(made, axis=0)) == pools.rows


def test_other_turns_have_every_level(context: CalibrationContext) -> None:
    site = context.sites[0]
    for family in spare_inputs(dataclasses.replace(context, turn=1)):
        for number in range(family.size):
            proposal = family.at(number)
            assert proposal is not None
            assert site.name in refitted(context, proposal) or not proposal.masks


def test_values_that_the_model_makes_are_no_inputs(rng: np.random.Generator) -> None:
    model = onnx.parser.parse_model(
        TEXT.replace("MatMul(x, w)", "MatMul(s, w)").replace(
            "    a =", "    s = Softmax(x)\n    a ="
        )
    )
    for name, shape in (("w", (WORDS, HIDDEN)), ("v", (HIDDEN, 4))):
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    x = rng.normal(size=(90, WORDS)).astype(np.float32)
    samples = samples_from_arrays({"x": x}, graph_inputs(model))
    context = CalibrationContext(
        study_model(Model(model)), split_samples(samples, 0), Provider.CPU
    )
    assert list(spare_inputs(context)) == []
