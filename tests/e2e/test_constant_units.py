"""Dead units leave a network in cascade, through the command line: exact, within a budget, and proved."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

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

WIDTHS = (40, 300, 300, 300, 20)
LIVE = 60
CHAIN = """g (float[B, 40] x) => (float[B, 20] y) {
    h1 = MatMul(x, w1) a1 = Add(h1, b1) n1 = Mul(a1, s1) z1 = Add(n1, t1) g1 = Sigmoid(z1) r1 = Mul(z1, g1)
    h2 = MatMul(r1, w2) a2 = Add(h2, b2) n2 = Mul(a2, s2) z2 = Add(n2, t2) g2 = Sigmoid(z2) r2 = Mul(z2, g2)
    h3 = MatMul(r2, w3) a3 = Add(h3, b3) n3 = Mul(a3, s3) z3 = Add(n3, t3) g3 = Sigmoid(z3) r3 = Mul(z3, g3)
    h4 = MatMul(r3, w4) y = Add(h4, b4)
}"""
"""Linear layers, batch normalization as Mul and Add, SiLU."""


def decayed(rng: np.random.Generator, rest: float) -> onnx.ModelProto:
    """``LIVE`` units of each hidden layer have inputs; those of the others are of the size ``rest``."""
    tensors: dict[str, NDArray[Any]] = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS), start=1):
        # Away from zero, so that a criterion has nothing to choose.
        size = rng.uniform(0.5, 1.5, (inputs, outputs)) / np.sqrt(LIVE)
        weight = size * rng.choice([-1, 1], size.shape)
        if layer < len(WIDTHS) - 1:
            live = rng.permutation(outputs)[:LIVE]
            dead = np.setdiff1d(np.arange(outputs), live)
            weight[:, dead] = rest * rng.standard_normal((inputs, dead.size))
        tensors[f"w{layer}"] = weight
        tensors[f"b{layer}"], tensors[f"t{layer}"] = rng.standard_normal((2, outputs)) / 3
        tensors[f"s{layer}"] = rng.uniform(0.5, 1.5, outputs)
    given = {n: v.astype(np.float32) for n, v in tensors.items() if f"{n})" in CHAIN}
    return parse(CHAIN, given)


@pytest.mark.parametrize(
    ("rest", "options", "muls"),
    [
        (0.0, ["--budget", "0"], 6),
        (1e-6, ["--null", "normal:1e-6", "--criterion", "ksigma:6", "--budget", "1e-3"], 3),
    ],
    ids=["exact", "annealed"],
)
def test_a_chain_gets_narrower(
    rest: float, options: list[str], muls: int, command: Command, tmp_path: Path
) -> None:
    original, output = tmp_path / "original.onnx", tmp_path / "out.onnx"
    onnx.save(decayed(np.random.default_rng(3), rest), original)
    result = command("rewrite", original, "-o", output, *options, "--batch", "1", "--force")
    assert result.code == 0, result.err
    rewritten = onnx.load(output)
    shapes = {tuple(t.dims) for t in rewritten.graph.initializer if len(t.dims) == 2}
    assert shapes == {(40, LIVE), (LIVE, LIVE), (LIVE, 20)}
    # Normalization is absorbed where entries are removed, and stays as it was where the rewrite is exact.
    assert [node.op_type for node in rewritten.graph.node].count("Mul") == muls
    result = command("validate", original, output, "--samples", "2")
    assert result.code == 0, result.out + result.err
    assert "4 weights and" in result.out

    tensor = next(t for t in rewritten.graph.initializer if t.name.startswith("b4"))
    values = numpy_helper.to_array(tensor).copy()
    values[7] += np.float32(1e-6)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(rewritten, output)
    result = command("validate", original, output, "--samples", "2")
    assert result.code == 1
    assert "site 'h4': the bias rebuilt from its blocks is not the annealed bias" in result.err
