"""Calibrated annealing of a convolutional network through the command line: channels go, the rest is refitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from tests.e2e.planted import run
from tests.e2e.test_calibrated import Job
from tests.passes.harness import parse

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

    Array = NDArray[np.float32]

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

NETWORK = """g (float[N, 1, 8, 8] x) => (float[N, 10] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) n = BatchNormalization(a, s, t, m, v) r = Relu(n)
    c = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (r, w2) d = Relu(c)
    e = Conv <pads = [1, 1, 1, 1]> (d, w3, b3) h = Sigmoid(e)
    i = Conv(h, w4) j = Add(i, d) k = Relu(j)
    p = GlobalAveragePool(k) f = Flatten(p) y = Gemm <transB = 1> (f, w5, b5)
}"""
"""A strided convolution, a residual block of a 3x3 and a 1x1 convolution, pooling, a linear layer."""


def repeated(rng: np.random.Generator) -> onnx.ModelProto:
    """Both sets of hidden channels hold each channel twice or three times, but for 1e-4."""

    def alike(count: int, *shape: int) -> NDArray[np.float64]:
        values: NDArray[np.float64] = rng.normal(size=(count, *shape))
        values /= np.sqrt(np.prod(shape))
        values[count // 3 :] = values[np.arange(count // 3, count) % (count // 3)]
        values += 1e-4 * rng.normal(size=values.shape)
        return values

    tensors = {
        "w1": alike(24, 1, 3, 3),
        **{name: alike(24) for name in ("b1", "t", "m")},
        **{name: 1 + alike(24) / 8 for name in "sv"},
        "w2": rng.normal(size=(16, 24, 3, 3)) / 12,
        "w3": alike(48, 16, 3, 3),
        "b3": alike(48),
        "w4": rng.normal(size=(16, 48, 1, 1)) / 6,
        "w5": rng.normal(size=(10, 16)),
        "b5": rng.normal(size=10),
    }
    return parse(NETWORK, {name: array.astype(np.float32) for name, array in tensors.items()})


@pytest.fixture
def job(command: Command, rng: np.random.Generator, tmp_path: Path) -> Job:
    return Job(command, repeated(rng), tmp_path)


def pictures(rng: np.random.Generator, count: int) -> Array:
    x = rng.normal(size=(count, 1, 8, 8))
    return (x + np.roll(x, 1, 2) + np.roll(x, 1, 3)).astype(np.float32)


def test_channels_go_and_the_rest_is_refitted(
    job: Job, command: Command, rng: np.random.Generator
) -> None:
    result = job(pictures(rng, 400), "--budget", "0.01", "--annealing", "calibrated")
    assert result.last_line.startswith("rewritten: "), result.err
    report = job.report
    assert report["criterion"].startswith("remove(48 of 72 hidden units)")
    shapes = {site["name"]: site["blocks"] for site in report["sites"]}
    assert shapes["a"] == [[1, 8]]
    assert shapes["c"] == [[8, 16]]
    assert shapes["e"] == [[16, 16]]
    assert shapes["i"] == [[16, 16]]
    assert report["claims"]["structural"]["passed"]
    claim = report["claims"]["annealing"]
    assert claim["passed"]
    kernels = {t.name: list(t.dims) for t in onnx.load(job.output).graph.initializer}
    assert [8, 1, 3, 3] in kernels.values()
    fresh = pictures(rng, 300)
    assert job.error(fresh) < 0.01
    # Claim A from the files alone: the rewritten model is the annealed one.
    np.testing.assert_allclose(
        run(job.output, fresh), run(job.annealed, fresh), rtol=1e-4, atol=1e-5
    )
    checked = command("validate", job.source, job.output, "--budget", "0.01")
    assert checked.code in {0, 1}  # random inputs are no pictures
    assert "claim A, structural equivalence: holds" in checked.out


def test_without_a_refit_as_much_is_lost_as_channels_say(
    job: Job, rng: np.random.Generator
) -> None:
    x, fresh = pictures(rng, 400), pictures(rng, 300)
    errors = []
    for compensation in ("ridge", "none"):
        result = job(
            x, "--budget", "0.9", "--proposals", "removal", "--compensation", compensation
        )
        assert result.code == 0
        errors.append(job.error(fresh) if job.report["summary"]["decomposable"] else 1.0)
    assert errors[0] < errors[1]


def test_too_few_pictures_are_refused_with_the_number_that_would_do(
    job: Job, rng: np.random.Generator
) -> None:
    result = job(pictures(rng, 40), "--budget", "0.01", "--annealing", "calibrated")
    assert "calibrated annealing needs 54 samples, and there are 40" in result.out


def test_the_same_seed_gives_the_same_bytes(job: Job, rng: np.random.Generator) -> None:
    x = pictures(rng, 200)
    found = []
    for _ in range(2):
        assert job(x, "--budget", "0.01", "--annealing", "calibrated").code == 0
        found.append(job.output.read_bytes())
    assert found[0] == found[1]
