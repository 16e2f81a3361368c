"""Regions taken out of a model run alone, and give what they give inside it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from onnx_decompose.decomposition.decompose_recurrent import RecurrentAttempt, attempt_recurrent
from onnx_decompose.errors import ModelError
from onnx_decompose.graph.study import Study, state_graph, study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.planning.cost import CPU
from onnx_decompose.planning.plan import RegionPlan, candidate_plans
from onnx_decompose.runtime.sessions import Provider, Session, open_session
from onnx_decompose.timing import region_bench
from onnx_decompose.timing.bench import BenchSettings, Timing
from onnx_decompose.timing.region_bench import RegionBench
from onnx_decompose.timing.region_model import RegionModels
from tests.passes import recurrent_models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.graph.regions import Region

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 6] x, float[batch, 1] scale) => (float[batch, 6] y) {
    one = Constant <value = float {1.5}> ()
    a = MatMul(x, up)
    scaled = Mul(a, scale)
    shifted = Add(scaled, one)
    h = Relu(shifted)
    b = MatMul(h, down)
    s = Softmax (b)
    c = Gemm <transB = 1> (s, last, bias)
    d = Add(c, s)
    e = MatMul(d, end)
    y = Tanh(e)
}"""
QUICK = BenchSettings(seconds=0.002, max_seconds=0.004, precision=1.0, warmup=1)


def blocks(rows: int, columns: int, count: int = 2) -> NDArray[np.float32]:
    mask = np.kron(np.eye(count), np.ones((rows // count, columns // count)))
    return np.asarray(
        mask * np.random.default_rng(rows + columns).normal(size=mask.shape), np.float32
    )


def model() -> onnx.ModelProto:
    parsed: onnx.ModelProto = onnx.parser.parse_model(TEXT)
    weights = {
        "up": blocks(6, 8),
        "down": blocks(8, 6),
        "last": blocks(6, 6),
        "bias": np.ones(6, np.float32),
        "end": blocks(6, 6),
    }
    parsed.graph.initializer.extend(
        numpy_helper.from_array(values, name) for name, values in weights.items()
    )
    return parsed


def masks(study: Study) -> Mapping[str, NDArray[np.bool_]]:
    return {site.name: study.weight(site) != 0 for site in study.sites}


def plans(study: Study, region: Region) -> tuple[RegionPlan, ...]:
    return candidate_plans(state_graph(study, region, masks(study)), CPU)


def every_value(proto: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """What every node of the model makes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for node in proto.graph.node
        if node.op_type != "Constant"
        for name in node.output
    )
    return feeds | open_session(copy.SerializeToString(), Provider.CPU).run(feeds)


def test_a_region_alone_gives_what_it_gives_in_the_model(rng: np.random.Generator) -> None:
    proto = model()
    study = study_model(load_model(proto))
    feeds = {
        "x": rng.normal(size=(3, 6)).astype(np.float32),
        "scale": rng.normal(size=(3, 1)).astype(np.float32),
    }
    values = every_value(proto, feeds)
    assert len(study.regions) == 2
    for region in study.regions:
        small, inner = RegionModels(study).extract(region)
        onnx.checker.check_model(small.proto, full_check=True)
        assert len(small.proto.graph.node) == len(region.nodes)
        outside = {value.name for value in small.proto.graph.input}
        assert outside >= set(region.entries)
        assert [value.name for value in small.proto.graph.output] == list(region.exits)
        assert [inner.sites[n].node for n in range(len(inner.sites))] == [
            region.nodes.index(site.node) for site in region.sites
        ]
        session = open_session(small.proto.SerializeToString(), Provider.CPU)
        made = session.run({name: values[name] for name in outside})
        for name in region.exits:
            np.testing.assert_array_equal(made[name], values[name])


def test_a_value_broadcast_to_every_unit_is_an_input_and_a_constant_is_none() -> None:
    study = study_model(load_model(model()))
    small, _ = RegionModels(study).extract(study.regions[0])
    assert [value.name for value in small.proto.graph.input] == ["x", "scale"]
    assert {tensor.name for tensor in small.proto.graph.initializer} == {"up", "down", "one"}


def test_a_value_of_unknown_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_model(load_model(model()))
    monkeypatch.setattr("onnx_decompose.timing.region_model.infer_values", lambda _: {})
    with pytest.raises(ModelError, match="region 'a': the type of 'x' is not known"):
        RegionModels(study).extract(study.regions[0])


def test_a_value_of_unknown_rank_is_taken_for_a_batch_of_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = study_model(load_model(model()))
    unknown = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("s", "x", "e", "scale", "b")
    }
    monkeypatch.setattr("onnx_decompose.timing.region_model.infer_values", lambda _: unknown)
    small, _ = RegionModels(study).extract(study.regions[1])
    shape = small.proto.graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", 6]
    with pytest.raises(ModelError, match="the shape of 'scale' is not known"):
        RegionModels(study).extract(study.regions[0])


def test_plans_are_timed_on_the_region_with_their_own_weights(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """The sessions that are timed give the same outputs: the original's, and each plan's."""
    study = study_model(load_model(model()))
    region = study.regions[0]
    seen: list[dict[str, Session]] = []

    def bench_candidates(
        original: Session, made: Mapping[str, Session], **given: Any
    ) -> dict[str, Timing]:
        assert list(given["feeds_by_batch"]) == [2, 5]
        seen.append({"original": original, **made})
        feeds = given["feeds_by_batch"][5]
        expected = original.run(feeds)["b"]
        for session in made.values():
            np.testing.assert_allclose(session.run(feeds)["b"], expected, rtol=1e-5, atol=1e-6)
        return {name: Timing(Provider.CPU, ()) for name in made}

    monkeypatch.setattr(region_bench, "bench_candidates", bench_candidates)
    found = RegionBench(study, (2, 5), Provider.CPU, rng).time(region, plans(study, region))
    assert found is not None
    assert len(found) == len(plans(study, region)) == len(seen[0]) - 1 >= 1


def test_a_region_is_really_timed(rng: np.random.Generator) -> None:
    study = study_model(load_model(model()))
    region = study.regions[0]
    bench = RegionBench(study, (1,), Provider.CPU, rng, QUICK)
    timings = bench.time(region, plans(study, region))
    assert timings is not None
    assert all(timing.batches[0].original_ms > 0 for timing in timings)


def test_a_region_that_does_not_run_alone_has_no_timing(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_model(load_model(model()))
    region = dataclasses.replace(study.regions[0], exits=("nothing",))
    with caplog.at_level("INFO", "onnx_decompose"):
        found = RegionBench(study, (1,), Provider.CPU, rng).time(region, ())
    assert found is None
    assert (
        "region a is not timed alone: model: region 'a': the type of 'nothing'" in caplog.text
    )


class TestRecurrent:
    @staticmethod
    def attempts(
        study: Study, emit: Literal["split", "shrink"] = "split"
    ) -> list[RecurrentAttempt]:
        found = {w.name: w.array != 0 for site in study.recurrent for w in site.all_weights}
        return [attempt_recurrent(study, found, CPU, emit)]

    @pytest.mark.parametrize(
        "recipe",
        [
            recurrent_models.Recipe(),
            recurrent_models.Recipe("GRU", direction="bidirectional", initial=True),
            recurrent_models.Recipe("RNN", opset=14),
        ],
        ids=lambda recipe: recipe.cell,
    )
    def test_an_operator_is_timed_alone(
        self, recipe: recurrent_models.Recipe, rng: np.random.Generator
    ) -> None:
        study = study_model(load_model(recurrent_models.plant(recipe, rng).model))
        bench = RegionBench(study, (1, 2), Provider.CPU, rng, QUICK)
        timings = bench.time_recurrent(study.recurrent[0], self.attempts(study))
        assert timings is not None
        assert [entry.batch for entry in timings[0].batches] == [1, 2]

    def test_the_operator_alone_is_the_one_in_the_model(self, rng: np.random.Generator) -> None:
        recipe = recurrent_models.Recipe()
        planted = recurrent_models.plant(recipe, rng).model
        planted.graph.node[0].output[0] = "made"
        planted.graph.node.append(helper.make_node("Neg", ["made"], ["Y"], "after"))
        study = study_model(load_model(planted))
        small, inner = RegionModels(study).extract_operator(study.recurrent[0])
        onnx.checker.check_model(small.proto, full_check=True)
        assert [node.name for node in small.proto.graph.node] == ["rnn"]
        feeds = recurrent_models.feeds(recipe, rng, 3, 2)
        inside = open_session(planted.SerializeToString(), Provider.CPU).run(feeds)
        alone = open_session(small.proto.SerializeToString(), Provider.CPU).run(feeds)
        np.testing.assert_array_equal(-alone["made"], inside["Y"])
        assert inner.name == study.recurrent[0].name

    def test_made_up_lengths_are_no_lengths(self, rng: np.random.Generator) -> None:
        recipe = recurrent_models.Recipe(lengths=True)
        study = study_model(load_model(recurrent_models.plant(recipe, rng).model))
        with pytest.raises(
            ModelError, match="operator 'rnn': its sequence lengths are not known"
        ):
            RegionModels(study).extract_operator(study.recurrent[0])
        bench = RegionBench(study, (1,), Provider.CPU, rng, QUICK)
        assert bench.time_recurrent(study.recurrent[0], self.attempts(study)) is None
