"""A stack of residual blocks on one stream: every block takes part in one numbering of the stream's units."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_decompose as od
from tools.bench_planted import is_recovered
from tools.planted_models import Blocks, residual_stack

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e

STREAM, HIDDEN, GROUPS, DEPTH, VOCABULARY = 32, 64, 4, 3, 11
OPTIONS = od.Options(null="zero", emit="split", force=True, batch=(1,), seeds=1, provider="cpu")


@pytest.fixture(scope="module")
def stack() -> onnx.ModelProto:
    """Token ids -> embedding -> x + ffn(norm(x)), three times -> norm -> a dense head."""
    rng = np.random.default_rng(7)
    stream = rng.permutation(np.arange(STREAM) % GROUPS)
    tensors = {"table": rng.normal(size=(VOCABULARY, STREAM))}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x0"], "embed")]
    for depth in range(DEPTH):
        hidden = rng.permutation(np.arange(HIDDEN) % GROUPS)
        inside = stream[:, None] == hidden
        tensors |= {
            f"scale{depth}": rng.normal(1, 0.1, STREAM),
            f"shift{depth}": rng.normal(0, 0.1, STREAM),
            f"up{depth}": rng.normal(0, 0.3, (STREAM, HIDDEN)) * inside,
            f"bias{depth}": rng.normal(0, 0.1, HIDDEN),
            f"down{depth}": rng.normal(0, 0.3, (HIDDEN, STREAM)) * inside.T,
        }
        nodes += [
            helper.make_node(op, inputs, outputs, f"{op}{depth}.{number}")
            for number, (op, inputs, outputs) in enumerate(
                [
                    (
                        "LayerNormalization",
                        [f"x{depth}", f"scale{depth}", f"shift{depth}"],
                        [f"n{depth}"],
                    ),
                    ("MatMul", [f"n{depth}", f"up{depth}"], [f"u{depth}"]),
                    ("Add", [f"u{depth}", f"bias{depth}"], [f"a{depth}"]),
                    ("Relu", [f"a{depth}"], [f"r{depth}"]),
                    ("MatMul", [f"r{depth}", f"down{depth}"], [f"d{depth}"]),
                    ("Add", [f"x{depth}", f"d{depth}"], [f"x{depth + 1}"]),
                ]
            )
        ]
    tensors |= {"scale": np.ones(STREAM), "shift": np.zeros(STREAM)}
    tensors |= {"head": rng.normal(0, 0.3, (STREAM, 5))}
    nodes += [
        helper.make_node("LayerNormalization", [f"x{DEPTH}", "scale", "shift"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "head"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "time"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "time", 5])],
        [
            numpy_helper.from_array(np.asarray(values, np.float32), name)
            for name, values in tensors.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def rewritten(stack: onnx.ModelProto) -> od.Rewrite:
    return od.rewrite(stack, options=OPTIONS)


def test_every_block_falls_apart_and_nothing_is_gathered(rewritten: od.Rewrite) -> None:
    decisions = {
        site.name: (site.decision, len(site.blocks)) for site in rewritten.report.sites
    }
    expected = {
        f"MatMul{depth}.{number}": ("split", GROUPS)
        for depth in range(DEPTH)
        for number in (1, 4)
    }
    assert decisions == {**expected, "head": ("dense", 0)}
    ops = [node.op_type for node in rewritten.model.graph.node]
    assert ops.count("Gather") == 1  # the embedding
    assert ops.count("Split") == ops.count("Concat") == DEPTH


def test_both_claims_hold_from_the_two_files_alone(
    stack: onnx.ModelProto, rewritten: od.Rewrite
) -> None:
    found = od.validate(stack, rewritten.model, seeds=2, budget=0, provider="cpu")
    assert found, found.failure
    assert found.structural is not None
    assert found.structural.sites == 2 * DEPTH + 1  # the head's inputs have new numbers too


@pytest.mark.parametrize("source", ["table", "scale1", "shift2"])
def test_two_units_that_change_places_are_found(
    source: str, stack: onnx.ModelProto, rewritten: od.Rewrite
) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(rewritten.model)
    tensor = next(t for t in broken.graph.initializer if t.name == f"{source}.renumbered")
    values = numpy_helper.to_array(tensor).copy()
    values[..., [0, 1]] = values[..., [1, 0]]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    found = od.validate(stack, broken, seeds=1, budget=0, provider="cpu")
    assert not found
    assert f"constant '{source}': its reordered form" in found.failure


def test_files_round_trip(stack: onnx.ModelProto, tmp_path: Path) -> None:
    original, output = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(stack, original)
    od.rewrite(original, output, OPTIONS)
    assert od.validate(original, output, seeds=1, provider="cpu")


class TestCascade:
    """Strongly connected components that read each other, in one direction."""

    CASCADE = od.Options(
        null="zero", emit="triangular", force=True, batch=(256,), seeds=1, provider="cpu"
    )

    def test_three_in_a_stack_without_norms(self, rng: np.random.Generator) -> None:
        planted = residual_stack((256, 512), Blocks(3, cascade=True), np.float32, rng, depth=2)
        assert is_recovered(planted)
        rewritten = od.rewrite(planted.model, options=self.CASCADE)
        assert {site.decision for site in rewritten.report.sites} == {"triangular"}
        for site in rewritten.report.sites:
            assert "3 strongly connected components of more than one unit" in site.reason
            outputs = sum(columns for _, columns in site.blocks)
            assert outputs == site.shape[1]
            assert sum(rows * columns for rows, columns in site.blocks) < 0.85 * 256 * 512
        found = od.validate(planted.model, rewritten.model, seeds=2, budget=0, provider="cpu")
        assert found, found.failure

    def test_entries_that_the_blocks_have_room_for_stay(self, rng: np.random.Generator) -> None:
        """The null leaves holes in the blocks: the dense blocks keep those entries as they were."""
        planted = residual_stack((96, 192), Blocks(3, cascade=True), np.float32, rng, depth=2)
        options = dataclasses.replace(
            self.CASCADE, null="normal:0.05", criterion="ksigma:1", budget=1.0
        )
        rewritten = od.rewrite(planted.model, options=options)
        assert {site.decision for site in rewritten.report.sites} == {"triangular"}
        before = {t.name: numpy_helper.to_array(t) for t in planted.model.graph.initializer}
        after = {t.name: numpy_helper.to_array(t) for t in rewritten.annealed.graph.initializer}
        for site in rewritten.report.sites:
            assert site.density < 0.66  # of 2/3 that are not zero
        changed = sum(
            int(np.count_nonzero(before[name] != after[name])) for name in before.keys() & after
        )
        assert changed == 0
        found = od.validate(planted.model, rewritten.model, seeds=2, provider="cpu")
        assert found, found.failure

    def test_the_same_weights_shuffled_are_left_alone(self, rng: np.random.Generator) -> None:
        planted = residual_stack((96, 192), Blocks(3, cascade=True), np.float32, rng, depth=2)
        control = onnx.ModelProto()
        control.CopyFrom(planted.model)
        for tensor in control.graph.initializer:
            values = numpy_helper.to_array(tensor)
            mixed = rng.permutation(values.reshape(-1)).reshape(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(mixed, tensor.name))
        options = dataclasses.replace(self.CASCADE, emit="auto")
        report = od.rewrite(control, options=options).report
        assert not report.summary.decomposable
        assert report.sites[0].reason.endswith("nothing to take apart")
