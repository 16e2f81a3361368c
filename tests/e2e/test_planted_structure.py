"""Planted structure is found exactly, and nothing is found where nothing is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.e2e.planted import (
    ISOLATED,
    SITES,
    Form,
    Planted,
    Recipe,
    dense_ffn,
    found_partition,
    network,
    plant,
    run,
    save,
)
from tests.e2e.rewriting import SPLIT, rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]


def assert_outputs_agree(
    before: onnx.ModelProto, after: onnx.ModelProto, x: np.ndarray[Any, Any], rtol: float = 1e-5
) -> None:
    expected = run(before, x).astype(np.float64)
    got = run(after, x).astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max())


class TestNothingThere:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_random_dense_network_stays_byte_for_byte(
        self, command: Command, tmp_path: Path, seed: int
    ) -> None:
        model = dense_ffn(np.random.default_rng(seed), (24, 50, 12))
        _, report = rewrite(command, model, tmp_path)
        assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
        summary = report["summary"]
        assert summary["decomposable"] is False
        assert "1 component over 86 nodes, the largest with 86 (100%)" in summary["reason"]

    @pytest.mark.parametrize("options", [(), SPLIT], ids=["auto", "forced"])
    def test_half_of_the_entries_zero_at_random_is_still_one_component(
        self,
        command: Command,
        rng: np.random.Generator,
        tmp_path: Path,
        options: tuple[str, ...],
    ) -> None:
        weights = [rng.normal(size=s) * (rng.random(s) < 0.5) for s in ((24, 50), (50, 12))]
        model = network(weights, [np.zeros(50), np.zeros(12)], Recipe())
        _, report = rewrite(command, model, tmp_path, *options)
        assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
        assert report["summary"]["decomposable"] is False

    def test_a_model_without_sites(self, command: Command, tmp_path: Path) -> None:
        text = """<ir_version: 8, opset_import: ["" : 17]>
            g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }"""
        _, report = rewrite(command, onnx.parser.parse_model(text), tmp_path)
        assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
        assert report["summary"]["sites"] == 0
        assert "no MatMul, Gemm or Conv" in report["summary"]["reason"]


class TestEightHiddenBlocks:
    @pytest.mark.parametrize("form", ["matmul", "gemm"])
    @pytest.mark.parametrize("seed", range(2))
    def test_exactly_the_planted_partition(
        self, command: Command, tmp_path: Path, form: Form, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        planted = plant(Recipe(form=form), rng)
        rewritten, report = rewrite(command, planted.model, tmp_path, *SPLIT)
        for site in report["sites"]:
            assert site["components"] == 8
            assert site["isolated"] == 0
            assert len(site["blocks"]) == 8
            assert found_partition(rewritten, site["name"]) == planted.partition(site["name"])
        x = rng.normal(size=(7, 48)).astype(np.float32)
        assert_outputs_agree(planted.model, rewritten, x)

    def test_without_hiding(self, command: Command, tmp_path: Path) -> None:
        """Contiguous blocks need no Gather at all."""
        planted = plant(Recipe(shuffle=False), np.random.default_rng(1))
        rewritten, _ = rewrite(command, planted.model, tmp_path, *SPLIT)
        for site in SITES:
            assert found_partition(rewritten, site) == planted.partition(site)
        ops = [node.op_type for node in rewritten.graph.node]
        assert "Gather" not in ops
        assert "Split" in ops

    def test_permuted_units_of_a_contiguous_network_give_the_same_blocks(
        self, command: Command, tmp_path: Path
    ) -> None:
        """Renumbering the hidden units alone moves nothing at the borders."""
        rng = np.random.default_rng(2)
        planted = plant(Recipe(shuffle=False), rng)
        order = rng.permutation(96)
        weights = [
            onnx.numpy_helper.to_array(t)
            for t in planted.model.graph.initializer
            if "weight" in t.name
        ]
        moved = network(
            [weights[0][:, order], weights[1][order]],
            [np.zeros(96), np.zeros(40)],
            Recipe(),
        )
        rewritten, report = rewrite(command, moved, tmp_path, *SPLIT)
        assert report["summary"]["substructures"] == 8
        assert "Gather" not in [node.op_type for node in rewritten.graph.node]

    def test_three_axes(self, command: Command, tmp_path: Path) -> None:
        rng = np.random.default_rng(3)
        planted = plant(Recipe(axes=3), rng)
        rewritten, _ = rewrite(command, planted.model, tmp_path, *SPLIT)
        for site in SITES:
            assert found_partition(rewritten, site) == planted.partition(site)
        for shape in ((1, 1, 48), (2, 5, 48)):
            x = rng.normal(size=shape).astype(np.float32)
            assert_outputs_agree(planted.model, rewritten, x)

    @pytest.mark.parametrize("form", ["matmul", "gemm"])
    def test_half_precision(self, command: Command, tmp_path: Path, form: Form) -> None:
        rng = np.random.default_rng(4)
        planted = plant(Recipe(dtype=np.float16, form=form), rng)
        rewritten, report = rewrite(command, planted.model, tmp_path, *SPLIT)
        for site in SITES:
            assert found_partition(rewritten, site) == planted.partition(site)
        assert report["claims"]["structural"]["passed"] is True
        x = rng.normal(size=(4, 48)).astype(np.float16)
        assert_outputs_agree(planted.model, rewritten, x, rtol=4e-3)
        element = onnx.TensorProto.FLOAT16
        blocks = [t for t in rewritten.graph.initializer if ".block" in t.name]
        assert {t.data_type for t in blocks} == {element}

    def test_double_precision(self, command: Command, tmp_path: Path) -> None:
        rng = np.random.default_rng(5)
        planted = plant(Recipe(dtype=np.float64), rng)
        rewritten, report = rewrite(command, planted.model, tmp_path, *SPLIT)
        for site in SITES:
            assert found_partition(rewritten, site) == planted.partition(site)
        assert report["claims"]["structural"]["passed"] is True
        x = rng.normal(size=(4, 48))
        assert_outputs_agree(planted.model, rewritten, x, rtol=1e-13)

    def test_bfloat16(self, command: Command, tmp_path: Path) -> None:
        """Found; but onnxruntime has no such kernels on the CPU, so that nothing could be proved there."""
        bfloat16: Any = ml_dtypes.bfloat16
        planted = plant(Recipe(dtype=bfloat16), np.random.default_rng(5))
        source, output = save(planted.model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
        report = tmp_path / "report.json"
        assert command("analyze", source, "--report", report).code == 0
        sites = json.loads(report.read_text("utf-8"))["sites"]
        assert [site["components"] for site in sites] == [8, 8]
        result = command("rewrite", source, "-o", output, *SPLIT)
        assert result.code == 2
        assert "onnxruntime has no such kernel on this provider" in result.err
        assert not output.exists()

    def test_bfloat16_that_is_cast_before_the_product(
        self, command: Command, tmp_path: Path
    ) -> None:
        """Weights stored in bfloat16 alone: products in float32 have kernels everywhere."""
        planted = plant(Recipe(), np.random.default_rng(5))
        model = planted.model
        for site in SITES:
            weight = next(t for t in model.graph.initializer if t.name == f"{site}.weight")
            values = numpy_helper.to_array(weight).astype(ml_dtypes.bfloat16)
            weight.CopyFrom(numpy_helper.from_array(values, f"{site}.stored"))
            cast = onnx.helper.make_node(
                "Cast", [f"{site}.stored"], [f"{site}.weight"], to=onnx.TensorProto.FLOAT
            )
            model.graph.node.insert(0, cast)
        rewritten, report = rewrite(command, model, tmp_path, *SPLIT)
        for site in SITES:
            assert found_partition(rewritten, site) == planted.partition(site)
        assert report["claims"]["structural"]["passed"] is True
        x = np.random.default_rng(4).normal(size=(4, 48)).astype(np.float32)
        assert_outputs_agree(model, rewritten, x)

    @pytest.mark.parametrize("opset", [9, 11, 13, 21])
    def test_operator_sets(self, command: Command, tmp_path: Path, opset: int) -> None:
        planted = plant(Recipe(opset=opset), np.random.default_rng(6))
        rewritten, _ = rewrite(command, planted.model, tmp_path, *SPLIT)
        assert [entry.version for entry in rewritten.opset_import] == [opset]
        onnx.checker.check_model(rewritten, full_check=True)
        for site in SITES:
            assert found_partition(rewritten, site) == planted.partition(site)

    def test_a_large_network_is_split_unasked_because_it_is_faster(
        self, command: Command, tmp_path: Path
    ) -> None:
        recipe = Recipe(blocks=((64, 256, 64),) * 8, shuffle=False)
        planted = plant(recipe, np.random.default_rng(8))
        source, output, report = (tmp_path / n for n in ("in.onnx", "out.onnx", "r.json"))
        save(planted.model, source)
        arguments = ("-o", output, "--report", report, "--batch", "64")
        assert command("rewrite", source, *arguments).code == 0
        found = json.loads(report.read_text("utf-8"))
        assert found["summary"]["substructures"] > 1
        assert found["summary"]["weights_after"] < 0.6 * found["summary"]["weights_before"]
        assert found["timing"]["speedup"] > 1


class TestUnequalBlocks:
    @pytest.mark.parametrize(
        "blocks",
        [
            ((5, 20, 3), (17, 9, 8)),
            ((4, 30, 11), (13, 7, 2), (6, 12, 9)),
            ((1, 1, 1), (20, 30, 10)),
        ],
        ids=["two", "three", "single-unit"],
    )
    @pytest.mark.parametrize("form", ["matmul", "gemm"])
    def test_partition_sizes_and_outputs(
        self,
        command: Command,
        tmp_path: Path,
        blocks: tuple[tuple[int, int, int], ...],
        form: Form,
    ) -> None:
        rng = np.random.default_rng(9)
        planted = plant(Recipe(blocks=blocks, form=form), rng)
        rewritten, report = rewrite(command, planted.model, tmp_path, *SPLIT)
        up, down = report["sites"]
        assert sorted(up["blocks"]) == sorted([k, n] for k, n, _ in blocks)
        assert sorted(down["blocks"]) == sorted([k, n] for _, k, n in blocks)
        for site in SITES:
            assert found_partition(rewritten, site) == planted.partition(site)
        x = rng.normal(size=(6, sum(block[0] for block in blocks))).astype(np.float32)
        assert_outputs_agree(planted.model, rewritten, x)


class TestIsolatedUnits:
    @pytest.mark.parametrize("isolated", [(5, 0), (0, 4), (5, 4)])
    @pytest.mark.parametrize("form", ["matmul", "gemm"])
    def test_counted_apart_and_harmless(
        self, command: Command, tmp_path: Path, isolated: tuple[int, int], form: Form
    ) -> None:
        rng = np.random.default_rng(10)
        planted = plant(
            Recipe(blocks=((6, 12, 5), (8, 10, 7)), isolated=isolated, form=form), rng
        )
        rewritten, report = rewrite(command, planted.model, tmp_path, *SPLIT)
        up, down = report["sites"]
        assert (up["components"], up["isolated"]) == (2, isolated[0])
        assert (down["components"], down["isolated"]) == (2, isolated[1])
        assert live_partition(planted, rewritten, "up") == planted.partition("up")
        assert live_partition(planted, rewritten, "down") == planted.partition("down")
        x = rng.normal(size=(6, 14 + isolated[0])).astype(np.float32)
        assert_outputs_agree(planted.model, rewritten, x)

    def test_zero_rows_of_scattered_inputs_as_in_digits(
        self, command: Command, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(11)
        planted = plant(Recipe(blocks=((52, 64, 10),), isolated=(12, 0)), rng)
        options = ("--emit", "shrink", "--force", "--batch", "1")
        rewritten, report = rewrite(command, planted.model, tmp_path, *options)
        up, down = report["sites"]
        assert (up["components"], up["isolated"]) == (1, 12)
        assert up["decision"] == "shrink"
        assert up["blocks"] == [[52, 64]]
        assert down["blocks"] == [[64, 10]]
        assert found_partition(rewritten, "up") == planted.partition("up")
        x = rng.normal(size=(6, 64)).astype(np.float32)
        assert_outputs_agree(planted.model, rewritten, x)

    def test_hidden_units_without_inputs_keep_their_constant(
        self, command: Command, tmp_path: Path
    ) -> None:
        """relu(bias) of a unit that reads nothing still reaches the outputs."""
        rng = np.random.default_rng(12)
        planted = plant(Recipe(blocks=((6, 12, 5), (8, 10, 7))), rng)
        up, down = (
            np.array(onnx.numpy_helper.to_array(t))
            for t in planted.model.graph.initializer
            if "weight" in t.name
        )
        up[:, 3] = up[:, 17] = 0
        model = network([up, down], [np.full(22, 2.0), np.zeros(12)], Recipe())
        rewritten, report = rewrite(command, model, tmp_path, *SPLIT)
        assert report["sites"][0]["isolated"] == 2
        assert_outputs_agree(model, rewritten, rng.normal(size=(6, 14)).astype(np.float32))

    def test_hidden_units_that_nothing_reads_are_dropped(
        self, command: Command, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(13)
        planted = plant(Recipe(blocks=((6, 12, 5), (8, 10, 7))), rng)
        up, down = (
            np.array(onnx.numpy_helper.to_array(t))
            for t in planted.model.graph.initializer
            if "weight" in t.name
        )
        down[[3, 17]] = 0
        model = network([up, down], [np.full(22, 2.0), np.zeros(12)], Recipe())
        rewritten, report = rewrite(command, model, tmp_path, *SPLIT)
        hidden = [block[1] for block in report["sites"][0]["blocks"]]
        assert sum(hidden) == 20
        assert_outputs_agree(model, rewritten, rng.normal(size=(6, 14)).astype(np.float32))


def live_partition(
    planted: Planted, rewritten: onnx.ModelProto, site: str
) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The found blocks without the isolated units, which may lie in any of them."""
    axis = SITES.index(site)
    rows, columns = planted.labels[axis], planted.labels[axis + 1]
    return {
        (
            tuple(unit for unit in inputs if rows[unit] != ISOLATED),
            tuple(unit for unit in outputs if columns[unit] != ISOLATED),
        )
        for inputs, outputs in found_partition(rewritten, site)
    }


@pytest.mark.parametrize("second", ["split", "triangular", "shared"])
def test_what_was_rewritten_before_is_left_alone_and_valid(
    command: Command, eight: Planted, tmp_path: Path, second: str
) -> None:
    """Its metadata is of the first rewrite, and would be lost in a second one."""
    model, once, twice = (tmp_path / f"{name}.onnx" for name in ("model", "once", "twice"))
    save(eight.model, model)
    options = ("--emit", "split", "--force", "--batch", "1")
    assert command("rewrite", model, "-o", once, *options).code == 0
    others = ("--emit", second, *options[2:])
    told = "nothing to do: the model was rewritten before; rewrite the original instead"
    assert command("rewrite", once, "-o", twice, *others).last_line == told
    assert command("analyze", once).last_line.endswith("rewrite the original instead")
    assert twice.read_bytes() == once.read_bytes()
    result = command("validate", once, twice, "--samples", "1")
    assert (result.code, result.err) == (0, "")
    assert command("validate", model, twice, "--samples", "1").code == 0
