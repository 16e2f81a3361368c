"""Regions in a given number of groups, with and without a seam."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.partition_proposals import (
    _own_covariance,
    cut_region,
    partitioned_regions,
)
from onnx_decompose.calibrated.search import Calibrated, calibrate_within_budget, context_for
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.verify import Inputs

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[N, 128] x) => (float[N, 128] y, float[N, 128] z)
{
    a = MatMul(x, w0)
    b = Relu(a)
    y = MatMul(b, w1)
    c = Softmax(y)
    d = MatMul(c, w2)
    e = Relu(d)
    z = MatMul(e, w3)
}
"""
SHAPES = {"w0": (128, 256), "w1": (256, 128), "w2": (128, 256), "w3": (256, 128)}


class Two:
    """Two regions; the first has four hidden groups, the second has none."""

    def __init__(self, rng: np.random.Generator, noise: float = 1e-4) -> None:
        proto = onnx.parser.parse_model(TEXT)
        sides = {size: rng.permutation(np.arange(size) % 4) for size in (128, 256)}
        self.groups = sides[128], sides[256], sides[128]
        for name, (units, outputs) in SHAPES.items():
            weight = rng.normal(size=(units, outputs))
            if name in {"w0", "w1"}:
                weight[sides[units][:, None] != sides[outputs]] *= noise
            tensor = numpy_helper.from_array(weight.astype(np.float32), name)
            proto.graph.initializer.append(tensor)
        self.study = study_model(Model(proto))
        inputs = {"x": rng.normal(size=(1200, 128)).astype(np.float32)}
        self.samples = samples_from_arrays(inputs, graph_inputs(proto))
        self.options = Options(
            budget=0.01, batch=(256,), calibration=Path("x.npz"), proposals=("partition",)
        )
        self.context = context_for(self.study, self.options, self.samples, Provider.CPU)

    def best(self) -> Calibrated | str:
        given = Inputs(samples=self.samples)
        return calibrate_within_budget(
            self.study, self.options, given, Provider.CPU, to_beat=np.inf
        )


@pytest.fixture
def two(rng: np.random.Generator) -> Two:
    return Two(rng)


def test_a_region_is_cut_where_its_groups_are(two: Two) -> None:
    cut = cut_region(two.context, two.study.regions[0], 4)
    for labels, truth in zip(cut.labels, two.groups, strict=True):
        assert len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 4
    assert cut.loss < 1e-5
    assert cut.kept > 1 - 1e-6
    assert cut_region(two.context, two.study.regions[1], 4).loss > 0.1


def test_the_predicted_loss_is_what_a_refit_misses(rng: np.random.Generator) -> None:
    two = Two(rng, noise=0.5)
    region = two.study.regions[0]
    cut = cut_region(two.context, region, 2)
    losses = []
    for site in region.sites:
        weight = two.study.weight(site).astype(np.float64)
        moments = two.context.read(site).through(weight)
        missing = []
        for output, mask in enumerate(cut.masks[site.name].T):
            kept = np.flatnonzero(mask)
            gram, wanted = moments.xx[np.ix_(kept, kept)], moments.xy[kept, output]
            told = wanted @ np.linalg.solve(gram, wanted)
            missing.append(1 - told / moments.yy[output])
        losses.append(np.mean(missing))
    assert cut.loss == pytest.approx(max(losses), rel=1e-4)


def test_what_other_inputs_tell_holds_no_group_together(rng: np.random.Generator) -> None:
    samples = rng.normal(size=(4000, 6)) * [1, 1, 1, 1, 2, 0]
    samples[:, 1] = samples[:, 0]
    own = _own_covariance(np.cov(samples.T, bias=True))[:, 0, 0]
    assert own[:2] == pytest.approx(0.1, abs=0.03)  # as much as the ridge doubts it
    assert own[2:4] == pytest.approx(1, abs=0.1)
    assert own[4] == pytest.approx(4, abs=0.3)
    assert own[5] == pytest.approx(0, abs=1e-15)


def test_only_what_has_a_seam_is_cut(two: Two) -> None:
    found = two.best()
    assert isinstance(found, Calibrated), found
    assert found.tried.criterion.name == "partition(4 groups in 1 of 2 regions)"
    assert found.tried.substructures == 4


def test_without_a_seam_the_nearest_is_told(rng: np.random.Generator) -> None:
    told = Two(rng, noise=1.0).best()
    assert isinstance(told, str)
    assert re.search(
        r"at partition\(2 groups\) \(\d+ substructures, 0\.\d\d of the time predicted\) "
        r"the relative L2 error of output '\w+' would be 0\.\d+, 0\.\d+ at most, against a budget of 0\.01",
        told,
    )


def test_the_same_seed_cuts_alike(two: Two) -> None:
    first, second = (cut_region(two.context, two.study.regions[1], 2) for _ in range(2))
    for one, other in zip(first.labels, second.labels, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_of_one_region_has_no_levels_of_its_own(two: Two) -> None:
    (family,) = partitioned_regions(two.context)
    first = dataclasses.replace(two.study, regions=two.study.regions[:1])
    (alone,) = partitioned_regions(dataclasses.replace(two.context, study=first))
    assert alone.size == 3
    assert family.size > 3


def test_no_more_goes_than_the_family_says(two: Two) -> None:
    (family,) = partitioned_regions(two.context)
    strictest = family.at(0)
    assert strictest is not None
    gone = sum(int((~mask).sum()) for mask in strictest.masks.values())
    assert gone == family.removes == 4 * 128 * 256 * 7 // 8
