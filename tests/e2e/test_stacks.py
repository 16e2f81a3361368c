"""Stacks of blocks through the command line, with constant units folded and scales absorbed into what they store."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.passes.harness import parse

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

WIDTHS = (40, 96, 120, 20)
CHAIN = """g (float[B, 40] x) => (float[B, 20] y) {
    h1 = MatMul(x, w1) a1 = Add(h1, b1) n1 = Mul(a1, s1) z1 = Add(n1, t1) r1 = Tanh(z1)
    h2 = MatMul(r1, w2) a2 = Add(h2, b2) n2 = Mul(a2, s2) z2 = Add(n2, t2) r2 = Sigmoid(z2)
    h3 = MatMul(r2, w3) y = Add(h3, b3)
}"""


def blocks_with_dead_units(
    rng: np.random.Generator, rest: float, dtype: str
) -> onnx.ModelProto:
    """Two blocks of different sizes; half of each hidden layer has no inputs but some of the size ``rest``."""
    tensors: dict[str, NDArray[np.float64]] = {}
    labels = [rng.permutation(np.arange(width) % 5 < 2) for width in WIDTHS]
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(labels), start=1):
        size = rng.uniform(0.5, 1.5, (inputs.size, outputs.size)) / np.sqrt(inputs.size)
        weight = size * rng.choice([-1, 1], size.shape)
        nothing = inputs[:, None] != outputs
        if layer < len(WIDTHS) - 1:
            nothing[:, rng.permutation(outputs.size)[: outputs.size // 2]] = True
        weight[nothing] = rest * rng.standard_normal(int(nothing.sum()))
        tensors[f"w{layer}"] = weight
        tensors[f"b{layer}"], tensors[f"t{layer}"] = rng.standard_normal((2, outputs.size)) / 3
        tensors[f"s{layer}"] = rng.uniform(0.5, 1.5, outputs.size)
    stored = np.float32 if dtype == "float" else np.float64
    given = {n: v.astype(stored) for n, v in tensors.items() if f"{n})" in CHAIN}
    return parse(CHAIN.replace("float[", f"{dtype}["), given)


@pytest.mark.parametrize(
    ("rest", "options"),
    [
        (0.0, ["--budget", "0"]),
        (1e-6, ["--null", "normal:1e-6", "--criterion", "ksigma:6", "--budget", "1e-3"]),
    ],
    ids=["exact", "annealed"],
)
@pytest.mark.parametrize(("dtype", "op"), [("float", "Conv"), ("double", "MatMul")])
def test_what_is_folded_is_proved_in_stacks(
    rest: float, options: list[str], dtype: str, op: str, command: Command, tmp_path: Path
) -> None:
    original, output = tmp_path / "original.onnx", tmp_path / "out.onnx"
    onnx.save(blocks_with_dead_units(np.random.default_rng(3), rest, dtype), original)
    report = tmp_path / "report.json"
    asked = ["--emit", "grouped", *options, "--batch", "1", "--force", "--report", report]
    result = command("rewrite", original, "-o", output, *asked)
    assert result.code == 0, result.err
    rewritten = onnx.load(output)
    assert op in {node.op_type for node in rewritten.graph.node}
    # The report counts what is stored, padding included.
    stored = [t for t in rewritten.graph.initializer if t.name.startswith("w")]
    summary = json.loads(report.read_text("utf-8"))["summary"]
    assert summary["weights_after"] == sum(math.prod(tensor.dims) for tensor in stored)
    result = command("validate", original, output, "--samples", "2")
    assert result.code == 0, result.out + result.err
    assert "3 weights and" in result.out

    # A bias at padding, or another one in its place, is found.
    tensor = next(t for t in rewritten.graph.initializer if t.name.startswith("b3"))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(rewritten, output)
    assert command("validate", original, output, "--samples", "2").code == 1
