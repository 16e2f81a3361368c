"""Trainable SiLU through the command line: its slopes go into the weights around it, and that is proved."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.passes.harness import parse

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

WIDTHS = (24, 160, 160, 8)
LIVE = 24
BODY = """
    h1 = MatMul(x, w1) z1 = Add(h1, b1) t1 = Mul(z1, c1) g1 = Sigmoid(t1) r1 = Mul(z1, g1)
    h2 = MatMul(r1, w2) z2 = Add(h2, b2) t2 = Mul(z2, c2) g2 = Sigmoid(t2) r2 = Mul(z2, g2)
    h3 = MatMul(r2, w3) y = Add(h3, b3)
"""
ANNEALED = ["--null", "normal:1e-5", "--criterion", "ksigma:6", "--budget", "1e-2"]


def network(
    rng: np.random.Generator, *, each: bool = True, dtype: str = "float", seen: str = ""
) -> onnx.ModelProto:
    """``LIVE`` units of each hidden layer have inputs; those of the others are next to nothing.

    Args:
        rng: source of randomness.
        each: every unit has a slope of its own.
        dtype: of everything.
        seen: a value that is an output too.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS), start=1):
        size = rng.uniform(0.5, 1.5, (inputs, outputs)) / np.sqrt(LIVE)
        weight = size * rng.choice([-1, 1], size.shape)
        if layer < len(WIDTHS) - 1:
            dead = rng.permutation(outputs)[LIVE:]
            weight[:, dead] = 1e-5 * rng.uniform(-1, 1, (inputs, dead.size))
            slopes = rng.uniform(0.5, 2, outputs) * rng.choice([-1, 1], outputs)
            tensors[f"c{layer}"] = slopes if each else np.array(1.7)
        tensors[f"w{layer}"] = weight
        tensors[f"b{layer}"] = rng.standard_normal(outputs) / 3
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    more = f", {dtype}[B, 160] {seen}" if seen else ""
    head = f"g ({dtype}[B, 24] x) => ({dtype}[B, 8] y{more})"
    return parse(f"{head} {{{BODY}}}", {n: v.astype(kind) for n, v in tensors.items()})


def operators(model: onnx.ModelProto, folder: Path) -> list[str]:
    """What onnxruntime makes of it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("each", [True, False])
def test_they_go(
    each: bool, dtype: str, command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    original, output = tmp_path / "original.onnx", tmp_path / "out.onnx"
    annealed, report = tmp_path / "annealed.onnx", tmp_path / "report.json"
    onnx.save(network(rng, each=each, dtype=dtype), original)
    where = ("-o", output, "--save-annealed", annealed, "--report", report)
    result = command("rewrite", original, *where, *ANNEALED, "--batch", "1", "--force")
    assert result.code == 0, result.err
    assert json.loads(report.read_text("utf-8"))["claims"]["structural"]["passed"]
    rewritten = onnx.load(output)
    for model in (rewritten, onnx.load(annealed)):
        assert [node.op_type for node in model.graph.node].count("Mul") == 2
    if dtype == "float":
        assert operators(rewritten, tmp_path).count("QuickGelu") == 2
    result = command("validate", original, output, "--samples", "2")
    assert result.code == 0, result.out + result.err

    # The row of a reader that does not make up for the slope is not the original's.
    tensor = next(t for t in rewritten.graph.initializer if t.name.startswith("w3"))
    values = numpy_helper.to_array(tensor).copy()
    values[0] *= 2
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(rewritten, output)
    result = command("validate", original, output, "--samples", "2")
    assert result.code == 1
    assert "claim A does not hold: site 'h3'" in result.err


def test_they_stay_around_a_value_that_goes_out(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    original, output = tmp_path / "original.onnx", tmp_path / "out.onnx"
    onnx.save(network(rng, seen="z2"), original)
    options = (*ANNEALED, "--batch", "1", "--force")
    result = command("rewrite", original, "-o", output, *options)
    assert result.code == 0, result.err
    assert [node.op_type for node in onnx.load(output).graph.node].count("Mul") == 3
    assert command("validate", original, output, "--samples", "2").code == 0


def test_after_a_refit(command: Command, tmp_path: Path, rng: np.random.Generator) -> None:
    original, output = tmp_path / "original.onnx", tmp_path / "out.onnx"
    onnx.save(network(rng), original)
    data = tmp_path / "data.npz"
    np.savez(data, x=rng.standard_normal((700, 24)).astype(np.float32))
    options = ("--calibration", data, "--budget", "1e-2", "--batch", "1", "--force")
    result = command("rewrite", original, "-o", output, *options)
    assert result.code == 0, result.err
    assert [node.op_type for node in onnx.load(output).graph.node].count("Mul") == 2
    assert command("validate", original, output, "--inputs", data).code == 0
