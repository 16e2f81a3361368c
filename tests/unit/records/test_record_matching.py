import json
import logging
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_decompose.analysis.record import METADATA_KEY, InitRecord
from onnx_decompose.records.init_recorder import record_initialization
from onnx_decompose.records.record_matching import attach_records, match_records

Array = np.ndarray[Any, np.dtype[Any]]


def model_of(**initializers: Array) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(a, name) for name, a in initializers.items()]
    return helper.make_model(helper.make_graph([], "g", [], [], initializer=tensors))


def records_of(initial: dict[str, Array]) -> dict[str, InitRecord]:
    rng = np.random.default_rng(1)
    return {
        name: record_initialization(name, values, *values.shape[:2], rng=rng)
        if values.ndim > 1
        else record_initialization(name, values, 1, 1, rng=rng)
        for name, values in initial.items()
    }


def found(matched: dict[str, InitRecord]) -> dict[str, tuple[str, bool]]:
    return {name: (record.parameter, record.transposed) for name, record in matched.items()}


def test_renamed_and_transposed_weights_are_found_by_value(rng: np.random.Generator) -> None:
    a: Array = rng.standard_normal((4, 4))
    b: Array = rng.standard_normal((3, 4)).astype(np.float32)
    parameters = {"a.weight": a, "b.weight": b}
    model = model_of(
        val_1=a.T,
        val_2=b,
        tied=a,
        ids=np.arange(3),
        half=b.astype(np.float16),
        text=np.array(["x"]),
    )
    assert found(match_records(model, parameters, records_of(parameters))) == {
        "val_1": ("a.weight", True),
        "val_2": ("b.weight", False),
        "tied": ("a.weight", False),
    }


def test_values_decide_not_the_name(rng: np.random.Generator) -> None:
    parameters = {
        "a.weight": rng.standard_normal((4, 4)),
        "b.weight": rng.standard_normal((4, 4)),
    }
    swapped = model_of(**{"a.weight": parameters["b.weight"], "c": parameters["a.weight"] * 2})
    assert found(match_records(swapped, parameters, records_of(parameters))) == {
        "a.weight": ("b.weight", False)
    }


def test_equal_valued_parameters(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_decompose")
    zeros: Array = np.zeros(64, np.float32)
    initial: dict[str, Array] = {
        "a.bias": zeros,
        "b.bias": zeros,
        "c.bias": rng.standard_normal(64),
    }
    records = records_of(initial)
    two: dict[str, Array] = dict.fromkeys(("a.bias", "b.bias"), zeros)
    # The name decides; without it, equal records may stand for each other.
    assert found(
        match_records(model_of(**{"b.bias": zeros, "val_3": zeros}), two, records)
    ) == {
        "b.bias": ("b.bias", False),
        "val_3": ("a.bias", False),
    }
    assert not caplog.records
    three = {**two, "c.bias": zeros}  # trained to zero from elsewhere: not the same history
    model = model_of(**{"c.bias": zeros, "val_3": zeros})
    assert found(match_records(model, three, records)) == {"c.bias": ("c.bias", False)}
    assert (
        "initializer 'val_3' equals several parameters (a.bias, b.bias, c.bias)" in caplog.text
    )


def test_a_symmetric_weight_counts_as_stored_like_the_parameter() -> None:
    parameters = {"w": np.eye(3)}
    matched = match_records(model_of(val_0=np.eye(3)), parameters, records_of(parameters))
    assert found(matched) == {"val_0": ("w", False)}


def test_wrapped_modules_and_changed_shapes(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_decompose")
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    records = records_of({"a.weight": a, "b.weight": np.zeros((9, 9))})
    model = model_of(x=a, y=b)
    wrapped = {"module.a.weight": a, "module.b.weight": b, "module.new.weight": b}
    assert found(match_records(model, wrapped, records)) == {"x": ("a.weight", False)}
    assert "'module.b.weight' was not recorded" in caplog.text
    assert "'module.new.weight' was not recorded" in caplog.text


def test_a_folded_parameter_is_reported(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_decompose")
    parameters = {"a.weight": rng.standard_normal((2, 3))}
    assert not match_records(model_of(val=np.ones((2, 3))), parameters, records_of(parameters))
    assert "parameter 'a.weight' is no weight of the exported model" in caplog.text


def test_attaching_replaces_only_the_records(rng: np.random.Generator) -> None:
    parameters = {"a.weight": rng.standard_normal((2, 3))}
    model = model_of(val=parameters["a.weight"].T)
    helper.set_model_props(model, {"author": "me", METADATA_KEY: "old"})
    graph = model.graph.SerializeToString()
    matched = attach_records(model, parameters, records_of(parameters))
    stored = {entry.key: entry.value for entry in model.metadata_props}
    assert stored.keys() == {"author", METADATA_KEY}
    assert stored["author"] == "me"
    assert InitRecord.from_json(json.loads(stored[METADATA_KEY])["val"]) == matched["val"]
    assert matched["val"].transposed
    assert model.graph.SerializeToString() == graph
