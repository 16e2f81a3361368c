import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import helper

from onnx_decompose.analysis.record import METADATA_KEY, InitRecord
from onnx_decompose.errors import ModelError
from onnx_decompose.records.init_recorder import record_initialization
from onnx_decompose.records.priors import (
    prior_for,
    read_records,
    read_second_moments,
    read_snapshot,
)

K, N = 3, 5


def record(
    parameter: str = "a.weight", shape: tuple[int, ...] = (N, K), transposed: bool = False
) -> InitRecord:
    rng = np.random.default_rng(0)
    made = record_initialization(parameter, rng.standard_normal(shape), 30, 50, rng=rng)
    return InitRecord.from_json({**made.to_json(), "transposed": transposed})


def with_metadata(value: str) -> onnx.ModelProto:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    helper.set_model_props(model, {METADATA_KEY: value})
    return model


# --- records


def test_records_come_back_by_initializer_name() -> None:
    made = record()
    model = with_metadata(json.dumps({"val_0": made.to_json()}))
    assert read_records(model) == {"val_0": made}
    assert read_records(helper.make_model(helper.make_graph([], "g", [], []))) == {}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"family": "cauchy"}, "the family 'cauchy' is unknown"),
        ({"scale": "wide"}, "a value is not a finite number"),
        ({"location": float("nan")}, "a value is not a finite number"),
        ({"quantiles": [1.0, 2.0]}, "it has 2 quantiles, not 65"),
        ({"shape": [3, -1]}, "a size is not a whole number"),
        ({"fan_in": 2.5}, "a size is not a whole number"),
        ({"shape": 3}, "TypeError"),
        ({"colour": "red"}, "TypeError"),
    ],
)
def test_broken_records_are_one_line(change: dict[str, Any], problem: str) -> None:
    model = with_metadata(json.dumps({"val_0": {**record().to_json(), **change}}))
    with pytest.raises(ModelError) as raised:
        read_records(model)
    assert f"the record of 'val_0' is broken ({problem}" in str(raised.value)
    assert str(raised.value).endswith("export the model again")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('{"val_0"', "is not JSON"),
        ("[]", "is not an object"),
        ('{"val_0": 3}', "the record of 'val_0' is broken"),
        ('{"val_0": {}}', "the record of 'val_0' is broken"),
    ],
)
def test_metadata_that_is_no_record_at_all(value: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        read_records(with_metadata(value))


# --- snapshots


def test_snapshot_types(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "init.safetensors"
    values = rng.standard_normal((2, 3))
    arrays = {name: values.astype(name) for name in ("float16", "float32", "float64")}
    half = values.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({**arrays, "bf": half, "ids": np.arange(3)}, path)
    read = read_snapshot(path)
    assert read.keys() == {*arrays, "bf"}
    for name, array in arrays.items():
        assert read[name].dtype == name
        np.testing.assert_array_equal(read[name], array)
    assert read["bf"].dtype == np.float32
    np.testing.assert_array_equal(read["bf"], half.astype(np.float32))


@pytest.mark.parametrize("read", [read_snapshot, read_second_moments])
def test_files_that_are_not_safetensors(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    with pytest.raises(ModelError, match=r"init\.safetensors: no such file; check the path"):
        read(path)
    safetensors.numpy.save_file({"a": np.ones((40, 40))}, path)
    whole = path.read_bytes()
    for content in (b"", b"garbage", b"garbage" * 99, whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(
            ModelError, match="not a safetensors file, or a truncated one"
        ) as error:
            read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="no such file"):
        read(tmp_path)


# --- second moments


def trained_optimizer(name: str, *, named: bool = False) -> tuple[Any, Any]:
    """A module whose first input never was anything but zero, and its optimizer after two steps."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Linear(K, N)
    kinds = {
        "adam": (torch.optim.Adam, {}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9}),
        "plain": (torch.optim.SGD, {}),
    }
    kind, options = kinds[name]
    parameters = module.named_parameters() if named else module.parameters()
    optimizer = kind(list(parameters), lr=0.1, **options)
    x = torch.tensor([0.0, 1.0, 2.0]).repeat(4, 1)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    return module, optimizer


@pytest.mark.torch
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("naming", ["optimizer", "list", "string keys"])
def test_second_moments_have_zeros_where_no_gradient_came(
    name: str, naming: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    module, optimizer = trained_optimizer(name, named=naming == "optimizer")
    content = optimizer.state_dict()
    if naming == "list":
        content = {"optimizer": content, "names": [n for n, _ in module.named_parameters()]}
    if naming == "string keys":
        content = {"state": {"weight": content["state"][0], "bias": content["state"][1]}}
    torch.save(content, tmp_path / "state.pt")
    moments = read_second_moments(tmp_path / "state.pt")
    assert {key: array.shape for key, array in moments.items()} == {
        "weight": (N, K),
        "bias": (N,),
    }
    np.testing.assert_array_equal(moments["weight"] == 0, np.tile([True, False, False], (N, 1)))
    prior = prior_for("weight", (K, N), True, second_moments=moments)
    assert prior.second_moment is not None
    np.testing.assert_array_equal((prior.second_moment == 0).all(axis=1), [True, False, False])


@pytest.mark.torch
def test_names_follow_the_parameters_over_groups_and_skip_those_without_state(
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch")
    moment = {key: torch.full((2,), float(key), dtype=torch.bfloat16) for key in (0, 2)}
    state = {key: {"step": torch.tensor(1.0), "exp_avg_sq": m} for key, m in moment.items()}
    groups = [{"params": [2, 0], "lr": 1}, {"params": [1], "lr": 2}]
    content = {"optimizer": {"state": state, "param_groups": groups}, "names": ["c", "a", "b"]}
    torch.save(content, tmp_path / "state.pt")
    read = read_second_moments(tmp_path / "state.pt")
    assert {name: array.tolist() for name, array in read.items()} == {"c": [2, 2], "a": [0, 0]}


def test_second_moments_from_safetensors_need_no_torch(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a.weight": np.zeros((N, K))}, tmp_path / "v.safetensors")
    assert read_second_moments(tmp_path / "v.safetensors")["a.weight"].shape == (N, K)


@pytest.mark.torch
def test_optimizer_files_that_cannot_be_used(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "state.pt"
    with pytest.raises(ModelError, match=r"state\.pt: no such file"):
        read_second_moments(path)
    _, plain = trained_optimizer("plain")
    _, adam = trained_optimizer("adam")
    numbered = adam.state_dict()
    cases: list[tuple[object, str]] = [
        (plain.state_dict(), "holds no exp_avg_sq or momentum_buffer"),
        (numbered, "knows its parameters by number only; save {'optimizer'"),
        ({"optimizer": numbered, "names": ["weight"]}, "by number only"),
        ([1, 2], "holds no optimizer state"),
        ({"weight": torch.ones(2)}, "holds no optimizer state"),
        ({"optimizer": 3}, "holds no optimizer state"),
        ({"state": {0: {}}}, "not an optimizer's state (KeyError"),
        ({"state": {"a": 3}}, "not an optimizer's state (AttributeError"),
        (Path("x"), "not a torch file of tensors only"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(ModelError) as raised:
            read_second_moments(path)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    torch.save(numbered, path)
    whole = path.read_bytes()
    for raw in (b"", b"garbage" * 99, whole[: len(whole) // 2]):
        path.write_bytes(raw)
        with pytest.raises(ModelError, match="not a torch file of tensors only") as raised:
            read_second_moments(path)
        assert "\n" not in str(raised.value)


# --- one weight's prior


def snapshot_of(prior: Any) -> Any:
    assert prior.snapshot is not None
    return prior.snapshot


def test_nothing_is_known() -> None:
    prior = prior_for("val_0", (K, N), False)
    assert (prior.fan_in, prior.fan_out) == (K, N)
    assert (prior.record, prior.snapshot, prior.second_moment) == (None, None, None)


@pytest.mark.parametrize("stored_transposed", [False, True])
@pytest.mark.parametrize("parameter_transposed", [False, True])
@pytest.mark.parametrize("shape", [(K, N), (4, 4)])
def test_a_record_tells_the_layout_even_of_square_weights(
    shape: tuple[int, int],
    stored_transposed: bool,
    parameter_transposed: bool,
    rng: np.random.Generator,
) -> None:
    """``weight`` is (K, N); the model stores it or its transpose, and so does torch."""
    weight = rng.standard_normal(shape)
    stored = weight.T if stored_transposed else weight
    parameter = stored.T if parameter_transposed else stored
    prior = prior_for(
        "val_0",
        shape,
        stored_transposed,
        records={"val_0": record(shape=parameter.shape, transposed=parameter_transposed)},
        snapshot={"a.weight": parameter, "other": weight},
        second_moments={"a.weight": parameter**2},
    )
    assert (prior.fan_in, prior.fan_out) == (30, 50)
    np.testing.assert_array_equal(snapshot_of(prior), weight)
    assert prior.second_moment is not None
    np.testing.assert_array_equal(prior.second_moment, weight**2)


@pytest.mark.parametrize("stored_transposed", [False, True])
@pytest.mark.parametrize("key", ["a.weight", "module.a.weight", "weight"])
def test_equal_names_and_unique_endings(
    key: str, stored_transposed: bool, rng: np.random.Generator
) -> None:
    square = rng.standard_normal((4, 4))
    stored = square.T if stored_transposed else square
    arrays = {key: stored, "b": rng.standard_normal((4, 4)), "xa.weight": square * 2}
    prior = prior_for("a.weight", (4, 4), stored_transposed, snapshot=arrays)
    np.testing.assert_array_equal(snapshot_of(prior), square)


def test_ambiguous_endings_give_nothing(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_decompose")
    arrays = {"x.a.weight": rng.standard_normal((N, K)), "y.a.weight": np.ones((N, K))}
    assert prior_for("a.weight", (K, N), True, snapshot=arrays).snapshot is None
    assert "a.weight: could be any of x.a.weight, y.a.weight; none taken" in caplog.text
    prior = prior_for(
        "a.weight", (K, N), True, snapshot={**arrays, "a.weight": np.zeros((N, K))}
    )
    assert not snapshot_of(prior).any()


def test_the_only_array_of_its_shape(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_decompose")
    weight = rng.standard_normal((K, N))
    arrays = {"layers.0.weight": weight.T, "layers.1.weight": np.ones((7, K))}
    prior = prior_for("val_0", (K, N), False, snapshot=arrays, second_moments=arrays)
    np.testing.assert_array_equal(snapshot_of(prior), weight)
    assert "val_0: taken to be 'layers.0.weight'" in caplog.text
    # Its zeros remove weights, so a guess is not good enough.
    assert prior.second_moment is None
    kernel = {"conv.weight": weight.T.reshape(N, K, 1, 1)}
    np.testing.assert_array_equal(
        snapshot_of(prior_for("val_0", (K, N), False, snapshot=kernel)), weight
    )
    two = {**arrays, "layers.2.weight": weight}
    assert prior_for("val_0", (K, N), False, snapshot=two).snapshot is None
    assert "val_0: 2 arrays have its shape; none taken" in caplog.text
    # A square array of unknown layout is taken as torch's: outputs first.
    square = rng.standard_normal((4, 4))
    only = prior_for("val_0", (4, 4), False, snapshot={"a.weight": square})
    np.testing.assert_array_equal(snapshot_of(only), square.T)


def test_a_record_rules_guesses_out(rng: np.random.Generator) -> None:
    arrays = {"b.weight": rng.standard_normal((N, K))}
    prior = prior_for("val_0", (K, N), False, records={"val_0": record()}, snapshot=arrays)
    assert prior.record is not None
    assert prior.snapshot is None


def test_arrays_and_records_of_another_shape_are_left_out(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_decompose")
    arrays = {"a.weight": rng.standard_normal((N, K + 1))}
    prior = prior_for(
        "a.weight",
        (K, N),
        True,
        records={"a.weight": record(shape=(N, K + 1))},
        snapshot=arrays,
        second_moments=arrays,
    )
    assert (prior.record, prior.snapshot, prior.second_moment) == (None, None, None)
    assert (prior.fan_in, prior.fan_out) == (K, N)
    assert "a.weight: its record is of shape (5, 4); ignored" in caplog.text
    assert "'a.weight' has shape (5, 4), not (3, 5); not taken" in caplog.text
