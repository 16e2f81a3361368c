"""The planted suite on tiny models: what it plants is true, and it tells a failure from a success."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.errors import ModelError
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.runtime.sessions import Provider, open_session
from onnx_decompose.timing.bench import BatchTiming, Timing
from tools import bench_planted
from tools.bench_planted import (
    Result,
    Setup,
    cases,
    is_recovered,
    median_realized,
    peers,
    run_case,
    same_partition,
    table,
)
from tools.planted_models import (
    TIME,
    Blocks,
    PlantedModel,
    banded,
    block_triangular,
    control,
    ffn,
    gated_ffn,
    matmul,
    recurrent,
    residual_stack,
    square,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEED = 5
BUILDERS: dict[str, Callable[[type[Any], np.random.Generator], PlantedModel]] = {
    "matmul": lambda dtype, rng: matmul((12, 24), Blocks(4), dtype, rng),
    "ffn": lambda dtype, rng: ffn((12, 24, 16), Blocks(4), dtype, rng),
    "unequal": lambda dtype, rng: ffn((40, 80, 40), Blocks(4, equal=False), dtype, rng),
    "gated": lambda dtype, rng: gated_ffn((12, 24), Blocks(3), dtype, rng),
    "residual": lambda dtype, rng: residual_stack((12, 24), Blocks(3), dtype, rng),
    "residual cascade": lambda dtype, rng: residual_stack(
        (12, 24), Blocks(3, cascade=True), dtype, rng
    ),
    "ffn cascade": lambda dtype, rng: ffn((12, 24, 15), Blocks(3, cascade=True), dtype, rng),
    "square cascade": lambda dtype, rng: square(12, Blocks(3, cascade=True), dtype, rng),
    "lstm": lambda dtype, rng: recurrent("LSTM", (5, 9), Blocks(3), dtype, rng),
    "gru": lambda dtype, rng: recurrent("GRU", (5, 9), Blocks(3), dtype, rng),
    "banded": lambda dtype, rng: banded(16, 2, dtype, rng),
    "triangular": lambda dtype, rng: block_triangular(16, Blocks(4), dtype, rng),
    "control": lambda dtype, rng: control((12, 24, 16), 0.5, dtype, rng),
}


def built(name: str, dtype: type[Any] = np.float32) -> PlantedModel:
    return BUILDERS[name](dtype, np.random.default_rng(SEED))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_models_are_valid_and_run_at_any_batch_size(name: str, dtype: type[Any]) -> None:
    model = built(name, dtype).model
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString(), Provider.CPU)
    shape = session.inputs[0].shape
    assert shape is not None
    for batch in (1, 3):
        x = np.ones([batch if size == "batch" else int(str(size)) for size in shape], dtype)
        output = session.run({"x": x})["y"]
        assert output.dtype == dtype
        assert np.isfinite(output).all()


@pytest.mark.parametrize("name", BUILDERS)
def test_entries_are_counted_and_those_planted_are_not_zero(name: str) -> None:
    planted = built(name, np.float16)
    weights = [
        numpy_helper.to_array(tensor)
        for tensor in planted.model.graph.initializer
        if tensor.name.endswith("weight") or tensor.name in {"W", "R"}
    ]
    assert planted.weights == sum(weight.size for weight in weights)
    assert planted.planted == sum(np.count_nonzero(weight) for weight in weights)
    assert planted.ideal == planted.weights / planted.planted


@pytest.mark.parametrize("name", BUILDERS)
def test_the_truth_is_what_the_weights_say(name: str) -> None:
    """Only recurrent operators have no site, so nothing that the analysis could show."""
    assert is_recovered(built(name)) is (None if name in {"lstm", "gru"} else True)


def test_a_wrong_truth_is_noticed() -> None:
    planted = built("ffn")
    swapped = planted.truth["hidden"].copy()
    first, second = 0, int(np.flatnonzero(swapped != swapped[0])[0])
    swapped[[first, second]] = swapped[[second, first]]
    wrong = dataclasses.replace(planted, truth={**planted.truth, "hidden": swapped})
    assert is_recovered(wrong) is False
    coarser = dataclasses.replace(
        planted, truth={name: labels // 2 for name, labels in planted.truth.items()}
    )
    assert is_recovered(coarser) is False
    elsewhere = dataclasses.replace(planted, truth={**planted.truth, "nowhere": swapped})
    assert is_recovered(elsewhere) is False


@pytest.mark.parametrize("name", ["residual cascade", "ffn cascade", "square cascade"])
def test_a_wrong_cascade_is_noticed(name: str) -> None:
    planted = built(name)
    assert planted.structure == "cascade"
    value = next(value for value in planted.truth if value != "x")
    swapped = planted.truth[value].copy()
    swapped[[0, int(np.flatnonzero(swapped != swapped[0])[0])]] += 1
    wrong = dataclasses.replace(planted, truth={**planted.truth, value: swapped})
    assert is_recovered(wrong) is False


def test_an_axis_cannot_be_right_alone() -> None:
    """Each axis is divided as planted, but hidden units go with other inputs than their own."""
    planted = built("ffn")
    turned = dataclasses.replace(
        planted, truth={**planted.truth, "hidden": (planted.truth["hidden"] + 1) % 4}
    )
    assert is_recovered(turned) is False


@pytest.mark.parametrize(
    ("some", "others", "same"),
    [
        ([0, 0, 1], [5, 5, 2], True),
        ([0, 1, 1], [0, 0, 1], False),
        ([0, 1, 2], [0, 0, 1], False),
        ([0, 0, 0], [0, 0, 1], False),
    ],
)
def test_partitions_are_compared_whatever_their_labels(
    some: list[int], others: list[int], same: bool
) -> None:
    assert same_partition(np.array(some), np.array(others)) is same


def test_blocks_are_as_asked(rng: np.random.Generator) -> None:
    assert np.bincount(Blocks(4).labels(20, rng)).tolist() == [5, 5, 5, 5]
    sizes = np.bincount(Blocks(4, equal=False).labels(160, rng))
    assert sizes.tolist() == [10, 30, 50, 70]
    assert Blocks(4, shuffle=False).labels(4, rng).tolist() == [0, 1, 2, 3]
    assert Blocks(4).labels(64, rng).tolist() != sorted(Blocks(4).labels(64, rng).tolist())


def test_the_recurrent_state_is_a_cascade() -> None:
    planted = built("lstm")
    tensors = {t.name: numpy_helper.to_array(t) for t in planted.model.graph.initializer}
    reads = (tensors["R"][0].reshape(4, 9, 9) != 0).any(axis=0)  # [unit, what it reads]
    assert planted.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == TIME
    from scipy.sparse import csgraph  # noqa: PLC0415

    count, labels = csgraph.connected_components(reads.T, connection="strong")
    assert np.bincount(labels).tolist() == [3, 3, 3]
    assert count == 3
    assert csgraph.connected_components(reads, connection="weak")[0] == 1


def test_the_suite_has_every_kind_of_structure() -> None:
    full, quick = cases(quick=False), cases(quick=True)
    assert set(quick) < set(full)
    assert {f"ffn-{count}" for count in (2, 4, 8, 16, 32, 64)} <= set(full)
    kinds = (
        *(
            "bottleneck",
            "gated",
            "residual",
            "residual-cascade",
            "ffn-cascade",
            "square-cascade",
        ),
        *("lstm", "gru", "banded", "triangular", "control", "matmul"),
    )
    for kind in kinds:
        assert any(name.startswith(kind) for name in quick)
    assert any("unequal" in name for name in quick)


SETUP = Setup(Provider.CPU, "fp32", False, (1, 2), bench_planted.SETTINGS, 0)


def timing(*speedups: float) -> Timing:
    return Timing(
        Provider.CPU,
        tuple(BatchTiming(n, 1.0, 1 / s, s, s, s, 8) for n, s in enumerate(speedups, 1)),
    )


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every comparison of models finds 2x and 8x; the list says which models were compared."""
    log: list[list[str]] = []

    def bench_candidates(_: object, made: dict[str, object], **__: object) -> dict[str, Timing]:
        log.append(list(made))
        return {name: timing(2.0, 8.0) for name in made}

    monkeypatch.setattr(bench_planted, "bench_candidates", bench_candidates)
    monkeypatch.setattr(
        "onnx_decompose.acceptance.bench_models", lambda *_, **__: timing(2.0, 2.0)
    )
    monkeypatch.setattr("onnx_decompose.reporting.summarize._SHUFFLED_ENTRIES", 0)
    monkeypatch.setattr(bench_planted, "PEERS", {"copier": lambda model: model, "none": absent})
    return log


def absent(_: onnx.ModelProto) -> onnx.ModelProto:
    raise ModuleNotFoundError("No module named 'none'", name="none")


def large_ffn(dtype: type[Any], rng: np.random.Generator) -> PlantedModel:
    return ffn((512, 2048, 512), Blocks(4, shuffle=False), dtype, rng)


@pytest.mark.e2e
def test_a_rewritten_case_is_proved_and_timed_with_the_others(timed: list[list[str]]) -> None:
    result = run_case("ffn", large_ffn, SETUP)
    assert timed == [["ours", "copier"]]
    assert (result.recovered, result.valid, result.failure) == (True, True, None)
    assert result.ideal == 4.0
    assert result.realized == pytest.approx(1.0)  # the geometric mean of 2x and 8x
    assert result.weights_after < 1
    assert result.notes == {"none": "not installed (No module named 'none')"}
    row = table([result], (1, 2)).splitlines()[2]
    assert "| ffn | exactly | hold | " in row
    assert "| 4.00 | 2.00 | 8.00 | 1.00 | 4.00 |" in row
    content = json.loads(json.dumps(result.to_json()))
    assert content["timings"]["ours"]["speedup"] == pytest.approx(4.0)
    assert content["realized"] == pytest.approx(1.0)


@pytest.mark.e2e
def test_a_case_that_is_left_dense_says_so(timed: list[list[str]]) -> None:
    """As every recurrent operator is until one can be rewritten."""

    def without_sites(*_: object) -> PlantedModel:
        model = onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17]>
            g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }"""
        )
        return PlantedModel(model, "cascade", {}, weights=8, planted=4)

    result = run_case("case", without_sites, SETUP)
    assert (result.recovered, result.failure) == (None, None)
    assert timed == [["copier"]]
    assert result.realized == 0.5
    row = "| case | - | hold | left dense | 100.0% | 2.00 | kept | kept | 0.50 | 4.00 |"
    assert row in table([result], (1, 2))


@pytest.mark.e2e
@pytest.mark.usefixtures("timed")
def test_a_model_that_does_not_run_here_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("model: no kernel for GRU")

    monkeypatch.setattr(bench_planted, "time_models", refuse)
    result = run_case("gru", BUILDERS["gru"], SETUP)
    assert result.timings == {}
    assert result.notes["gru, not timed"] == "model: no kernel for GRU"
    assert "| kept | kept |" in table([result], (1, 2))


def result_of(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "name": "case",
        "structure": "blocks",
        "ideal": 4.0,
        "weights_after": 0.25,
        "recovered": True,
        "valid": True,
        "decision": "split",
        "reason": "",
        "timings": {"ours": timing(2.0, 2.0)},
        "notes": {},
        "failure": None,
    }
    return Result(**(fields | changes))


@pytest.mark.e2e
@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize(
    ("target", "value", "told"),
    [
        ("is_recovered", False, "the components found are not those planted"),
        ("onnx_decompose.validate", False, "a claim does not hold"),
    ],
)
def test_failures_are_told(
    monkeypatch: pytest.MonkeyPatch, target: str, value: bool, told: str
) -> None:
    owner = onnx_decompose_module() if "." in target else bench_planted
    monkeypatch.setattr(owner, target.rpartition(".")[2], lambda *_, **__: value)
    assert run_case("ffn", large_ffn, SETUP).failure == told


def onnx_decompose_module() -> Any:
    return importlib.import_module("onnx_decompose")


@pytest.mark.e2e
@pytest.mark.usefixtures("timed")
def test_a_touched_control_is_a_failure() -> None:
    def disguised(dtype: type[Any], rng: np.random.Generator) -> PlantedModel:
        return dataclasses.replace(large_ffn(dtype, rng), structure="none")

    assert run_case("control", disguised, SETUP).failure == "a control was rewritten"


def test_the_median_leaves_controls_out() -> None:
    results = [
        result_of(),
        result_of(timings={}),
        result_of(timings={"ours": timing(4.0, 4.0)}),
        result_of(structure="none"),
    ]
    assert [result.realized for result in results] == pytest.approx([0.5, 0.25, 1.0, None])
    assert median_realized(results) == pytest.approx(0.5)
    assert median_realized(results[3:]) is None


def test_what_another_tool_raises_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: onnx.ModelProto) -> onnx.ModelProto:
        del model.graph.node[:]
        raise ValueError("cannot")

    monkeypatch.setattr(bench_planted, "PEERS", {"broken": broken, "absent": absent})
    model = built("ffn").model
    made, notes = peers(model)
    assert made == {}
    assert notes["broken"] == "failed: ValueError: cannot"
    assert notes["absent"].startswith("not installed")
    assert len(model.graph.node) == 5  # what it was given was a copy


@pytest.mark.e2e
@pytest.mark.usefixtures("timed")
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        bench_planted,
        "cases",
        lambda **_: {"ffn-4": large_ffn, "lstm-3": BUILDERS["lstm"], "other": None},
    )
    paths = {name: tmp_path / name for name in ("json", "markdown")}
    given = [f"--{name}={path}" for name, path in paths.items()]
    monkeypatch.setattr(
        sys, "argv", ["bench_planted", "--cases", "ffn*,lstm*", "--provider", "cpu", *given]
    )
    assert bench_planted.main() == 0
    out = capsys.readouterr().out
    assert "median realized/ideal: " in out
    assert "none: not installed" in out
    content = json.loads(paths["json"].read_text("utf-8"))
    assert [case["name"] for case in content["cases"]] == ["ffn-4", "lstm-3"]
    assert content["dtype"] == "fp32"
    assert paths["markdown"].read_text("utf-8") in out
    monkeypatch.setattr(bench_planted, "is_recovered", lambda _: False)
    assert bench_planted.main() == 1
    assert "FAILED ffn-4: the components found are not those planted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cases", "nothing"], "no case is called nothing"),
        (["--provider", "cpu", "--cuda-graph"], "--cuda-graph needs the CUDA provider"),
    ],
)
def test_usage(monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_planted", *arguments])
    with pytest.raises(SystemExit, match=told):
        bench_planted.main()


def test_the_residual_stack_is_one_region_with_one_state() -> None:
    study = study_model(load_model(built("residual").model))
    (region,) = study.regions
    assert len(region.sites) == 8
    assert region.axis_of["layer0.change"] == region.axis_of["x"]
