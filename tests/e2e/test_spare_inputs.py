"""Inputs that are constant, hardly ever active, or nearly equal in effect."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from tests.e2e.planted import run, save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

WORDS, OUTPUTS = 320, 12
LINEAR = f"""
<ir_version: 8, opset_import: ["" : 17]>
words (float[N, {WORDS}] x) => (float[N, {OUTPUTS}] y)
{{
    y = Gemm(x, w, b)
}}
"""
LAYERS = f"""
<ir_version: 8, opset_import: ["" : 17]>
words (float[N, {WORDS}] x) => (float[N, {OUTPUTS}] y)
{{
    a = Gemm(x, w, b)
    h = Relu(a)
    y = MatMul(h, v)
}}
"""


def model(text: str, **constants: NDArray[Any]) -> onnx.ModelProto:
    found = onnx.parser.parse_model(text)
    found.graph.initializer.extend(
        numpy_helper.from_array(values.astype(np.float32), name)
        for name, values in constants.items()
    )
    return found


def bags(rng: np.random.Generator, rows: int, often: NDArray[np.float64]) -> NDArray[Any]:
    """(rows, words) how often words occur, each by itself."""
    return rng.poisson(often, size=(rows, often.size)).astype(np.float32)


def rewrite(
    command: Command, folder: Path, proto: onnx.ModelProto, x: NDArray[Any], *options: object
) -> dict[str, Any]:
    save(proto, folder / "in.onnx")
    np.savez(folder / "data.npz", allow_pickle=False, x=x)
    result = command(
        "rewrite",
        folder / "in.onnx",
        *("-o", folder / "out.onnx", "--report", folder / "report.json"),
        *("--calibration", folder / "data.npz", "--annealing", "calibrated"),
        *("--batch", "1", "--force", *options),
    )
    assert result.code == 0, result.last_line
    report: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return report


def error(folder: Path, x: NDArray[Any]) -> float:
    before, after = run(folder / "in.onnx", x), run(folder / "out.onnx", x)
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


@pytest.mark.parametrize("kind", ["decay", "inputs"])
def test_inputs_that_never_vary_go_into_biases(
    command: Command, rng: np.random.Generator, tmp_path: Path, kind: str
) -> None:
    proto = model(
        LAYERS,
        w=rng.normal(size=(WORDS, 64)) / 8,
        b=rng.normal(size=64),
        v=rng.normal(size=(64, OUTPUTS)),
    )
    x = rng.normal(size=(1500, WORDS)).astype(np.float32)
    x[:, 100:300] = rng.normal(size=200).astype(np.float32)  # constant, and not zero
    options = ("--proposals", kind, "--budget", "1e-5", "--emit", "shrink")
    report = rewrite(command, tmp_path, proto, x, *options)
    assert report["sites"][0]["blocks"] == [[WORDS - 200, 64]]
    assert report["claims"]["structural"]["passed"]
    assert error(tmp_path, x) < 2e-6


def test_rare_inputs_are_added_up(
    command: Command, rng: np.random.Generator, tmp_path: Path
) -> None:
    often = np.where(np.arange(WORDS) < 40, 0.5, 0.02)
    common = rng.normal(size=OUTPUTS)
    w = rng.normal(size=(WORDS, OUTPUTS))
    w[40:] = common + 0.05 * w[40:]
    proto = model(LINEAR, w=w, b=np.zeros(OUTPUTS))
    x = bags(rng, 3000, often)
    options = ("--proposals", "inputs", "--budget", "0.05", "--emit", "shared")
    report = rewrite(command, tmp_path, proto, x, *options)
    assert report["criterion"].endswith("added up to 1)")
    ((inputs, outputs),) = report["sites"][0]["blocks"]
    assert inputs < 100
    assert outputs == OUTPUTS
    assert report["claims"]["structural"]["passed"]
    assert error(tmp_path, bags(rng, 2000, often)) < 0.06
