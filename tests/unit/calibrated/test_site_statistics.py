"""Values of a model while it runs: the same whether some are held or not, and within the bytes allowed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated import site_statistics
from onnx_decompose.calibrated.site_statistics import (
    Held,
    InputMoments,
    input_moments,
    moment_bytes,
    observe,
)
from onnx_decompose.calibrated.views import View
from onnx_decompose.graph.flat import flatten
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import Samples, samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from onnx_decompose.analysis.gram import Moments

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
skipping (float[N, 5] x) => (float[N, 5] y)
{
    a = MatMul(x, w0)
    b = Relu(a)
    c = MatMul(b, w1)
    y = Add(c, a)
}
"""


@pytest.fixture
def model(rng: np.random.Generator) -> Model:
    proto = onnx.parser.parse_model(TEXT)
    for name in ("w0", "w1"):
        weight = rng.normal(size=(5, 5)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    return Model(proto)


@pytest.fixture
def samples(model: Model, rng: np.random.Generator) -> Samples:
    x = rng.normal(size=(700, 5)).astype(np.float32)
    return samples_from_arrays({"x": x}, graph_inputs(model.proto))


def seen(model: Model, name: str, samples: Samples, held: Held | None = None) -> bytes:
    batches = [
        found[name] for found in observe(flatten(model), [name], samples, Provider.CPU, held)
    ]
    return np.concatenate(batches).tobytes()


def test_what_is_held_is_where_the_next_run_starts(model: Model, samples: Samples) -> None:
    held = Held()
    first = seen(model, "b", samples, held)
    assert set(held.names) == {"b"}
    changed = onnx.ModelProto()
    changed.CopyFrom(model.proto)
    changed.graph.node[1].op_type = "Neg"  # before what is held: not run again
    assert seen(Model(changed), "c", samples, held) == seen(model, "c", samples)
    assert seen(Model(changed), "b", samples, held) == first


def test_what_is_held_holds_nothing_else(model: Model, samples: Samples) -> None:
    """An output of onnxruntime keeps its session's memory, whatever else was allocated there."""
    held = Held()
    seen(model, "b", samples, held)
    assert held.batch("b", 0).base is None


def test_a_value_that_skips_what_is_held_is_computed_from_the_inputs(
    model: Model, samples: Samples
) -> None:
    held = Held()
    seen(model, "b", samples, held)
    assert seen(model, "y", samples, held) == seen(model, "y", samples)


def test_no_more_is_held_than_there_is_room_for(model: Model, samples: Samples) -> None:
    held = Held(700 * 5 * 4 + 100)
    seen(model, "b", samples, held)
    assert seen(model, "c", samples, held) == seen(model, "c", samples)
    assert set(held.names) == {"b"}
    assert held.room == 100


def test_a_second_look_runs_nothing(
    model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held()
    first = seen(model, "c", samples, held)
    monkeypatch.setattr(site_statistics, "open_model", None)
    assert seen(model, "c", samples, held) == first


def test_moments_of_more_views_than_there_is_room_for_take_more_runs(
    model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = {View(name): 5 for name in ("x", "b", "c")}
    look = functools.partial(observe, flatten(model), provider=Provider.CPU)
    whole = input_moments(look, list(views), samples, 0)
    asked: list[list[str]] = []

    def counting(look: Any, views: list[View], *rest: Any) -> dict[View, Moments]:
        asked.append([view.value for view in views])
        return input_moments(look, views, *rest)

    monkeypatch.setattr(site_statistics, "input_moments", counting)
    found = InputMoments(look, views, samples, 0, most=2 * moment_bytes(5))
    for view, moments in found.items():
        assert moments.count == 700
        assert moments.xx.tobytes() == whole[view].xx.tobytes()
    assert asked == [["x", "b"], ["c"]]
    assert found[View("b")].xx.tobytes() == whole[View("b")].xx.tobytes()
    assert asked[2:] == [["b", "c"]]
    tight = InputMoments(look, views, samples, 0, most=1)
    assert tight[View("c")].xx.tobytes() == whole[View("c")].xx.tobytes()
    with pytest.raises(KeyError):
        found[View("nothing")]


def test_a_stored_tensor_that_is_an_input_too_is_what_is_stored(
    model: Model, samples: Samples
) -> None:
    plain = seen(model, "c", samples)
    given = onnx.ModelProto()
    given.CopyFrom(model.proto)
    given.graph.input.append(
        onnx.helper.make_tensor_value_info("w0", onnx.TensorProto.FLOAT, [5, 5])
    )
    assert seen(Model(given), "c", samples) == plain
    stored = numpy_helper.to_array(given.graph.initializer[0])
    assert seen(Model(given), "w0", samples)[: stored.nbytes] == stored.tobytes()
