"""A residual network that all groups of inputs share: no unit of it belongs to one group, but directions do."""

from __future__ import annotations

import json
import sys
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

GROUPS, INPUTS, STREAM, HIDDEN, OUTPUTS = 3, 4, 5, 8, 2
TEXT = f"""
<ir_version: 8, opset_import: ["" : 17]>
residual (float[N, {GROUPS * INPUTS}] x) => (float[N, {GROUPS * OUTPUTS}] y)
{{
    s0 = Gemm(x, enter, enter_bias)
    a0 = MatMul(s0, expand0)
    b0 = Add(a0, expand0_bias)
    h0 = Sigmoid(b0)
    c0 = Gemm(h0, contract0, contract0_bias)
    s1 = Add(s0, c0)
    a1 = MatMul(s1, expand1)
    h1 = Tanh(a1)
    c1 = MatMul(h1, contract1)
    s2 = Add(c1, s1)
    y = Gemm(s2, leave, leave_bias)
}}
"""


def blocks(rng: np.random.Generator, rows: int, columns: int, size: float) -> NDArray[Any]:
    """One block per group on the diagonal."""
    mask = np.kron(np.eye(GROUPS), np.ones((rows, columns)))
    return size * mask * rng.normal(size=mask.shape)


def shared_network(rng: np.random.Generator) -> onnx.ModelProto:
    """Independent networks side by side, in a stream that was turned: every unit of it is of all groups."""
    width = 20
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0][: GROUPS * STREAM]
    constants: dict[str, NDArray[Any]] = {
        "enter": blocks(rng, INPUTS, STREAM, 0.7) @ turn,
        "enter_bias": rng.normal(size=width),
        "leave": turn.T @ blocks(rng, STREAM, OUTPUTS, 0.5),
        "leave_bias": rng.normal(size=GROUPS * OUTPUTS),
    }
    for number in range(2):
        order = rng.permutation(GROUPS * HIDDEN)
        constants[f"expand{number}"] = turn.T @ blocks(rng, STREAM, HIDDEN, 0.7)[:, order]
        constants[f"contract{number}"] = blocks(rng, HIDDEN, STREAM, 0.7)[order] @ turn
    constants["expand0_bias"] = rng.normal(size=GROUPS * HIDDEN)
    constants["contract0_bias"] = rng.normal(size=width)
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.extend(
        numpy_helper.from_array(values.astype(np.float32), name)
        for name, values in constants.items()
    )
    return model


def samples(rng: np.random.Generator, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of one group each, and which."""
    task = rng.integers(GROUPS, size=rows)
    x = rng.normal(size=(rows, GROUPS * INPUTS)).astype(np.float32)
    return np.where(np.repeat(np.eye(GROUPS), INPUTS, axis=1)[task] > 0, x, 0), task


class Rewritten:
    def __init__(self, command: Command, model: onnx.ModelProto, folder: Path) -> None:
        self._command, self._folder = command, folder
        self.source, self.output = folder / "in.onnx", folder / "out.onnx"
        save(model, self.source)

    def __call__(self, *options: object, **arrays: NDArray[Any]) -> dict[str, Any]:
        np.savez(self._folder / "data.npz", allow_pickle=False, **arrays)
        result = self._command(
            "rewrite",
            self.source,
            "-o",
            self.output,
            "--report",
            self._folder / "report.json",
            "--calibration",
            self._folder / "data.npz",
            "--annealing",
            "calibrated",
            "--batch",
            "1",
            "--force",
            *options,
        )
        assert result.code == 0, result.last_line
        report: dict[str, Any] = json.loads((self._folder / "report.json").read_text("utf-8"))
        return report


def own_error(before: NDArray[Any], after: NDArray[Any], task: NDArray[Any]) -> float:
    """Relative error of each row's own outputs."""
    own = np.repeat(np.eye(GROUPS), OUTPUTS, axis=1)[task] > 0
    return float(np.linalg.norm((after - before)[own]) / np.linalg.norm(before[own]))


def test_a_turned_stream_is_taken_apart(
    command: Command, rng: np.random.Generator, tmp_path: Path
) -> None:
    rewritten = Rewritten(command, shared_network(rng), tmp_path)
    x, _ = samples(rng, 1200)
    report = rewritten("--proposals", "networks", "--budget", "1e-3", "--emit", "split", x=x)
    assert report["summary"]["substructures"] == GROUPS
    assert report["criterion"].startswith("networks(3 groups")
    assert report["claims"]["structural"]["passed"]
    fresh, task = samples(rng, 500)
    before, after = run(rewritten.source, fresh), run(rewritten.output, fresh)
    assert own_error(before, after, task) < 2e-3


def test_units_dealt_out_do_not_do_that(
    command: Command, rng: np.random.Generator, tmp_path: Path
) -> None:
    rewritten = Rewritten(command, shared_network(rng), tmp_path)
    report = rewritten("--proposals", "support", "--budget", "1e-3", x=samples(rng, 1200)[0])
    assert report["summary"]["substructures"] != GROUPS


METRIC = f"""
import numpy as np

def own_outputs(inputs, outputs):
    own = np.repeat(np.eye({GROUPS}), {OUTPUTS}, axis=1)[inputs["task"]] > 0
    wanted = inputs["wanted"][own]
    return -float(np.linalg.norm(outputs["y"][own] - wanted) / np.linalg.norm(wanted))
"""


def test_outputs_that_vary_more_where_nobody_needs_them_stay_with_their_group(
    command: Command,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shared_network(rng)
    (leave,) = (t for t in model.graph.initializer if t.name == "leave")
    weight = numpy_helper.to_array(leave)
    # The last group moves every output far more than its own one does.
    foreign = np.roll(weight, OUTPUTS, axis=1)
    leave.CopyFrom(numpy_helper.from_array(weight + 5 * foreign, "leave"))
    (tmp_path / "own_metric.py").write_text(METRIC, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    rewritten = Rewritten(command, model, tmp_path)
    x, task = samples(rng, 1200)
    options = ("--metric", "own_metric:own_outputs", "--budget", "0.01", "--emit", "split")
    wanted = run(rewritten.source, x)
    report = rewritten("--proposals", "networks", *options, x=x, task=task, wanted=wanted)
    assert report["summary"]["substructures"] == GROUPS
    assert report["claims"]["structural"]["passed"]
    fresh, task = samples(rng, 500)
    before, after = run(rewritten.source, fresh), run(rewritten.output, fresh)
    assert own_error(before, after, task) < 0.02
