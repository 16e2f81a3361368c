from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from onnx_decompose.analysis.record import InitRecord
from onnx_decompose.errors import ModelError, OptionError, OutputError
from onnx_decompose.records.init_recorder import InitRecorder, record_initialization


def record(values: np.ndarray, rng: np.random.Generator) -> InitRecord:
    return record_initialization("w", values, 3, 4, rng=rng)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(8, 16), (64, 128), (1100, 1000)])
def test_normal_is_told_from_uniform(
    shape: tuple[int, ...], dtype: str, rng: np.random.Generator
) -> None:
    size = shape[0] * shape[1]
    normal = record((0.1 + 0.02 * rng.standard_normal(shape)).astype(dtype), rng)
    uniform = record(rng.uniform(-0.3, 0.3, shape).astype(dtype), rng)
    assert (normal.family, uniform.family) == ("normal", "uniform")
    # Five standard errors of a mean and of a standard deviation; of the range, five spacings.
    assert normal.location == pytest.approx(0.1, abs=5 * 0.02 / size**0.5 + 1e-4)
    assert normal.scale == pytest.approx(0.02, rel=5 / (2 * min(size, 2**20)) ** 0.5 + 1e-3)
    assert uniform.location == pytest.approx(0, abs=5 * 0.6 / size + 1e-4)
    assert uniform.scale == pytest.approx(0.3, abs=5 * 0.6 / size + 1e-4)
    assert (normal.parameter, normal.shape, normal.fan_in, normal.fan_out) == ("w", shape, 3, 4)


def test_a_family_is_rejected_less_often_than_the_level(rng: np.random.Generator) -> None:
    """1e-3 of 400 draws is 0.4: more than 4 has probability 1e-4."""
    families = [record(rng.standard_normal((20, 50)), rng).family for _ in range(200)]
    families += [record(rng.uniform(-1, 1, (20, 50)), rng).family for _ in range(200)]
    assert families[:200].count("normal") >= 196
    assert families[200:].count("uniform") >= 196


def test_other_families_keep_their_moments_and_quantiles(rng: np.random.Generator) -> None:
    values = rng.laplace(1, 0.5, (100, 200))
    found = record(values, rng)
    assert found.family == "other"
    assert found.location == pytest.approx(values.mean(), rel=1e-8)
    assert found.scale == pytest.approx(values.std(), rel=1e-8)
    assert found.quantiles[32] == pytest.approx(np.median(values), rel=1e-8)
    assert (
        np.searchsorted(np.sort(values.ravel()), found.quantiles[0]) == 154
    )  # of 20,000 / 130
    narrow = rng.standard_normal(30_000)
    narrow = narrow[np.abs(narrow) < 1]
    assert record(narrow, rng).family == "other"


def test_constants_scalars_and_one_odd_entry(rng: np.random.Generator) -> None:
    ones = record(np.ones((3, 4), np.float32), rng)
    assert (ones.family, ones.location, ones.scale, ones.quantiles[0]) == ("constant", 1, 0, 1)
    assert record(np.array(2.5), rng).family == "constant"
    odd = np.zeros((2000, 1000), np.float32)
    odd[7, 7] = 1
    assert record(odd, rng).family == "other"
    two = record(np.array([0.0, 1.0]), rng)
    assert two.location == 0.5


def test_values_that_are_not_finite_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ModelError, match="parameter 'w' holds NaN or infinite values; make"):
        record(np.array([1.0, np.nan]), rng)


def test_a_record_survives_json(rng: np.random.Generator) -> None:
    found = record(rng.standard_normal((8, 8)).astype(np.float32), rng)
    assert InitRecord.from_json(found.to_json()) == found


@pytest.mark.torch
def test_recorder_covers_every_parameter_once() -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    module = nn.Sequential(
        nn.Embedding(50, 6),
        nn.Linear(6, 8),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm1d(8),
        nn.LSTM(5, 7),
        nn.Linear(6, 50),
    )
    module[5].weight = module[0].weight
    module.register_parameter("counts", nn.Parameter(torch.zeros(2).int(), requires_grad=False))
    module.register_parameter("nothing", nn.Parameter(torch.zeros(0, 4)))
    records = InitRecorder(module).records
    fans = {name: (r.fan_in, r.fan_out) for name, r in records.items()}
    assert fans == {
        "0.weight": (6, 50),
        "1.weight": (6, 8),
        "1.bias": (6, 8),
        "2.weight": (18, 54),
        "2.bias": (18, 54),
        "3.weight": (1, 1),
        "3.bias": (1, 1),
        "4.weight_ih_l0": (5, 28),
        "4.weight_hh_l0": (7, 28),
        "4.bias_ih_l0": (5, 28),
        "4.bias_hh_l0": (7, 28),
        "5.bias": (6, 50),
    }
    assert records["0.weight"].family == "normal"
    assert records["1.weight"].family == "uniform"
    assert records["1.weight"].scale == pytest.approx(6**-0.5, rel=0.2)
    assert (records["3.weight"].family, records["3.weight"].location) == ("constant", 1)


@pytest.mark.torch
def test_snapshot_is_of_the_moment_of_construction(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    module.bias.data = module.bias.data.to(torch.bfloat16)
    initial = module.weight.detach().numpy().copy()
    recorder = InitRecorder(module, snapshot=True)
    with torch.no_grad():
        module.weight += 1
        module.bias += 1
    recorder.save_snapshot(tmp_path / "init.safetensors")
    (tmp_path / "any").touch()
    assert (tmp_path / "init.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    (tmp_path / "any").unlink()
    stored = safetensors.numpy.load_file(tmp_path / "init.safetensors")
    np.testing.assert_array_equal(stored["weight"], initial)
    assert stored["bias"].dtype.name == "bfloat16"
    assert (stored["bias"].astype(np.float32) < 1 / 3**0.5 + 0.01).all()
    assert [path.name for path in tmp_path.iterdir()] == ["init.safetensors"]
    with pytest.raises(OutputError, match="cannot be written"):
        recorder.save_snapshot(tmp_path / "missing" / "init.safetensors")
    with pytest.raises(OptionError, match="snapshot=True"):
        InitRecorder(module).save_snapshot(tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["init.safetensors"]


@pytest.mark.torch
def test_parameters_without_values_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ModelError, match="parameter 'weight' has no values yet"):
        InitRecorder(torch.nn.LazyLinear(3))
    with pytest.raises(ModelError, match="parameter 'weight' has no values yet"):
        InitRecorder(torch.nn.Linear(2, 3, device="meta"))
