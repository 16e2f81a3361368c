"""Views of values: the same for sites that read the same rows; positions are drawn alike for all models."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.analysis.windows import Window
from onnx_decompose.calibrated import views
from onnx_decompose.calibrated.views import Rows, View, view_of
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model


def test_sites_that_read_alike_have_one_view(rng: np.random.Generator) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        views (float[N, 4, 8, 8] x) => (float[N, 6, 8, 8] a, float[N, 6, 8, 8] b, float[N, 6, 4, 4] c)
        {
            a = Conv<pads = [1, 1, 1, 1]>(x, w0)
            b = Conv<pads = [1, 1, 1, 1], strides = [1, 1], kernel_shape = [3, 3]>(x, w1)
            c = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w2)
        }
    """)
    for name in ("w0", "w1", "w2"):
        weight = rng.normal(size=(6, 4, 3, 3)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    study = study_model(Model(proto))
    found = [
        view_of(site, proto.graph.node[site.node], None, study.constants)
        for site in study.sites
    ]
    assert found[0] == found[1] == View("x", Window((3, 3), pads=(1, 1, 1, 1)))
    assert found[2] == View("x", Window((3, 3), (2, 2), auto_pad="SAME_UPPER"))


def test_rows_of_a_product_are_the_values_own(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 5, 7))
    ((rows,),) = Rows(View("x"), 3, 0).each({"x": x})
    np.testing.assert_array_equal(rows, x.reshape(15, 7))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "ROWS", 6 * 10)


def test_all_positions_where_they_are_few(rng: np.random.Generator) -> None:
    view = View("x", Window((3, 3), pads=(1, 1, 1, 1)))
    x = rng.normal(size=(5, 2, 4, 4))
    (found,) = zip(*Rows(view, 5, 0).each({"x": x}), strict=True)
    assert view.window is not None
    np.testing.assert_array_equal(np.concatenate(found), view.window.patches(x))


@pytest.mark.usefixtures("few")
def test_as_many_positions_of_each_sample_and_the_same_for_every_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "_ENTRIES_AT_A_TIME", 2 * 6)  # two samples at a time
    view = View("x", Window((1,)))
    # What is read tells where: sample and position.
    x = (np.arange(5)[:, None] * 100 + np.arange(50)).reshape(5, 1, 50).astype(np.float64)
    both = list(Rows(view, 10, 3).each({"x": x}, {"x": -x}))
    assert [len(rows) for rows, _ in both] == [12, 12, 6]
    first, second = (np.concatenate(part)[:, 0] for part in zip(*both, strict=True))
    np.testing.assert_array_equal(first, -second)
    assert np.bincount(first.astype(int) // 100).tolist() == [6] * 5
    assert len(set(first)) == first.size
    again = Rows(view, 10, 3)
    found = [np.concatenate([rows for (rows,) in again.each({"x": x})])[:, 0] for _ in range(2)]
    np.testing.assert_array_equal(found[0], first)
    assert not np.array_equal(found[1], first)  # another batch, other positions


def test_integers_are_what_they_stand_for(rng: np.random.Generator) -> None:
    """A scale that comes with each run, and a zero point of the graph."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        quantized (float[N, 5] x) => (int32[N, 3] y)
        {
            q, s, z = DynamicQuantizeLinear(x)
            y = MatMulInteger(q, w, z)
        }
    """)
    weight = rng.integers(-9, 9, (5, 3)).astype(np.int8)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    study = study_model(Model(proto))
    (site,) = study.sites
    nodes = proto.graph.node
    view = View("q", codes=("s", "z"))
    assert view_of(site, nodes[1], nodes[0], study.constants) == view
    assert view.values == ("q", "s", "z")
    codes = rng.integers(0, 256, (4, 5)).astype(np.uint8)
    found = {"q": codes, "s": np.float32(0.25), "z": np.uint8(7)}
    arrays = {name: np.asarray(value) for name, value in found.items()}
    ((rows,),) = Rows(view, 4, 0).each(arrays)
    np.testing.assert_array_equal(rows, (codes.astype(float) - 7) * 0.25)
