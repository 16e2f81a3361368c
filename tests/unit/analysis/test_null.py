from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from onnx_decompose.analysis.null import (
    Normal,
    Null,
    TruncatedNormal,
    Uniform,
    Zero,
    parse_null,
)
from onnx_decompose.analysis.sketch import Sketch
from onnx_decompose.errors import OptionError

SKETCH = Sketch((0.1, 0.5, 1.0), (-0.1, -1.0, -4.0))
NULLS: list[Null] = [
    Normal(0.02),
    Uniform(0.3, 0.1),
    TruncatedNormal(0.5, cut=3),
    SKETCH,
    Sketch((0.1, 0.5, 1.0), (-0.1, -1.0, -4.0), bounded=True),
]


@pytest.mark.parametrize("null", NULLS, ids=lambda n: n.name)
@pytest.mark.parametrize("log_p", [-1e-3, -0.05, -0.7, -3.0, -20.0, -700.0, -1e5])
def test_isf_is_the_smallest_magnitude_that_unlikely(null: Null, log_p: float) -> None:
    magnitude = null.isf(log_p)
    assert float(null.logsf(np.array(magnitude * (1 + 1e-9)))) <= log_p * (1 - 1e-6)
    inside = float(null.logsf(np.array(magnitude * (1 - 1e-9))))
    # A bounded null jumps at its edge; before it, nothing smaller is as unlikely.
    assert inside > log_p * (1 + 1e-6)


@pytest.mark.parametrize("null", NULLS, ids=lambda n: n.name)
def test_edges_of_the_probability_range(null: Null) -> None:
    assert null.isf(0.0) == 0.0
    assert float(null.logsf(np.array(0.0))) == 0.0
    tail = null.logsf(np.linspace(0, 4 * null.scale, 200))
    assert (np.diff(tail[np.isfinite(tail)]) <= 0).all()


@pytest.mark.parametrize("null", NULLS, ids=lambda n: n.name)
def test_shrinking_scales_everything(null: Null) -> None:
    smaller = null.shrunk(0.25)
    assert smaller.location == pytest.approx(0.25 * null.location)
    assert smaller.std == pytest.approx(0.25 * null.std)
    assert smaller.isf(-3.0) == pytest.approx(0.25 * null.isf(-3.0))


@pytest.mark.parametrize("null", NULLS[:3], ids=lambda n: n.name)
def test_std_is_that_of_the_tail_function(null: Null) -> None:
    # E[m^2] = integral of 2 m P(|W| >= m).
    squares, _ = integrate.quad(
        lambda m: 2 * m * math.exp(float(null.logsf(np.array(m)))), 0, 12 * null.scale
    )
    assert null.std == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_far_tail_of_the_normal_does_not_underflow() -> None:
    # Mills ratio to third order: log sf(z) = -z^2/2 - log(z sqrt(2 pi)) + log(1 - 1/z^2 +
    # 3/z^4).
    z = 1e4
    expected = -z * z / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log(2)
    assert float(Normal(1.0).logsf(np.array(z))) == pytest.approx(expected, abs=1e-6)
    assert Normal(1.0).isf(expected) == pytest.approx(z)


def test_truncated_normal_against_scipy() -> None:
    m = np.linspace(0, 0.999, 50)
    expected = np.log(2 * stats.truncnorm(-2, 2, scale=0.5).sf(m))
    np.testing.assert_allclose(TruncatedNormal(0.5).logsf(m), expected, atol=1e-9)
    assert TruncatedNormal(0.5).std == pytest.approx(stats.truncnorm(-2, 2, scale=0.5).std())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("normal:0.02", Normal(0.02)),
        ("normal(0,0.02)", Normal(0.02)),
        ("normal(0.5, 0.02)", Normal(0.02, 0.5)),
        ("uniform:0.1", Uniform(0.1)),
        ("trunc_normal:0.02", TruncatedNormal(0.02)),
        ("trunc_normal(0, 0.02, 3)", TruncatedNormal(0.02, 0.0, 3.0)),
        ("bert", Normal(0.02)),
        ("zero", Zero()),
    ],
)
def test_grammar(spec: str, expected: Null) -> None:
    assert parse_null(spec, fan_in=3, fan_out=5) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "torch",
        "keras",
        "kaiming_uniform",
        "kaiming_uniform:a=sqrt5",
        "kaiming_normal",
        "xavier_uniform",
        "xavier_normal",
    ],
)
def test_framework_defaults_match_torch(spec: str) -> None:
    torch = pytest.importorskip("torch")
    fan_in, fan_out = 300, 200
    init = {
        "torch": lambda w: torch.nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
        "keras": torch.nn.init.xavier_uniform_,
        "kaiming_uniform": lambda w: torch.nn.init.kaiming_uniform_(w, a=0),
        "kaiming_uniform:a=sqrt5": lambda w: torch.nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
        "kaiming_normal": torch.nn.init.kaiming_normal_,
        "xavier_uniform": torch.nn.init.xavier_uniform_,
        "xavier_normal": torch.nn.init.xavier_normal_,
    }[spec]
    torch.manual_seed(0)
    weight = init(torch.empty(fan_out, fan_in)).numpy()
    null = parse_null(spec, fan_in=fan_in, fan_out=fan_out)
    assert weight.std() == pytest.approx(null.std, rel=0.01)
    if isinstance(null, Uniform):
        assert 0.999 * null.scale < np.abs(weight).max() <= null.scale


@pytest.mark.parametrize(
    "spec",
    [
        "gauss:1",
        "normal",
        "normal:0",
        "normal:x",
        "normal:-1",
        "normal(1,2,3)",
        "bert:2",
        "",
        "uniform:inf",
        "kaiming_uniform:b=1",
        "normal:location=1",
    ],
)
def test_anything_else_is_refused_with_the_grammar(spec: str) -> None:
    with pytest.raises(OptionError, match="null"):
        parse_null(spec, fan_in=3, fan_out=5)


def test_sketch_of_recorded_quantiles_is_close_to_its_source() -> None:
    levels = (2 * np.arange(65) + 1) / 130
    source = stats.logistic(scale=0.01)
    sketch = Sketch.of_quantiles(source.ppf(levels).tolist(), 0.0, source.std())
    m = np.linspace(0.002, 0.03, 20)
    np.testing.assert_allclose(sketch.logsf(m), np.log(2 * source.sf(m)), atol=0.05)
    # Past the sketch its tail must not be lighter than a log-concave source's.
    far = np.linspace(0.06, 0.3, 20)
    assert (sketch.logsf(far) >= np.log(2 * source.sf(far))).all()
