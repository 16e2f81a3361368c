"""DESIGN of the command line: sub-commands, options, last lines, exit codes, the report's keys."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.planning.state_graph import Emit
from tests.e2e.planted import (
    Recipe,
    array_of,
    dense_ffn,
    found_partition,
    plant,
    run,
    save,
    set_array,
)

if TYPE_CHECKING:
    from tests.e2e.conftest import Command
    from tests.e2e.planted import Planted

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

NUMBER = (int, float)
SUMMARY: dict[str, tuple[type, ...]] = {
    "sites": (int,),
    "rewritten": (int,),
    "substructures": (int,),
    "weights_before": (int,),
    "weights_after": (int,),
    "flops_before": (int,),
    "flops_after": (int,),
    "decomposable": (bool,),
    "reason": (str,),
}
SITE: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "op_type": (str,),
    "shape": (list,),
    "null": (str,),
    "pi0": NUMBER,
    "density": NUMBER,
    "components": (int,),
    "sccs": (int, type(None)),
    "layers": (int, type(None)),
    "isolated": (int,),
    "decision": (str,),
    "reason": (str,),
    "blocks": (list,),
    "p_structure": (int, float, type(None)),
}
REPORT: dict[str, tuple[type, ...]] = {
    "version": (str,),
    "model": (str,),
    "null": (str,),
    "criterion": (str,),
    "summary": (dict,),
    "sites": (list,),
    "claims": (dict,),
    "timing": (dict, type(None)),
}
STRUCTURAL: dict[str, tuple[type, ...]] = {"passed": (bool,)}
ANNEALING: dict[str, tuple[type, ...]] = {
    "passed": (bool,),
    "error": NUMBER,
    "budget": NUMBER,
    "data": (str,),
}
TIMING: dict[str, tuple[type, ...]] = {
    "original_ms": NUMBER,
    "rewritten_ms": NUMBER,
    "speedup": NUMBER,
    "provider": (str,),
}
VERBS = ("export", "analyze", "rewrite", "validate", "bench", "demo")
SPLIT = ("--emit", "split", "--force", "--batch", "1")


def assert_schema(content: dict[str, Any], schema: dict[str, tuple[type, ...]]) -> None:
    """Every key is there, with a value of its type; ``True`` is no number."""
    assert schema.keys() <= content.keys(), schema.keys() - content.keys()
    for key, types in schema.items():
        value = content[key]
        assert isinstance(value, types), (key, value)
        assert bool in types or not isinstance(value, bool), (key, value)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(eight: Planted, tmp_path: Path) -> Path:
    return save(eight.model, tmp_path / "model.onnx")


class TestRewrite:
    def test_last_line_says_rewritten_and_names_the_file(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out.onnx"
        result = command("rewrite", model, "-o", output, *SPLIT)
        assert result.code == 0
        assert result.last_line.startswith(f"rewritten: {output}: 8 substructures in 1 region")
        assert result.err == ""

    def test_last_line_says_nothing_to_do_and_why(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        model = save(dense_ffn(rng), tmp_path / "dense.onnx")
        result = command("rewrite", model, "-o", tmp_path / "out.onnx")
        assert result.code == 0
        assert result.last_line.startswith("nothing to do: ")
        assert "largest with 70 (100%)" in result.last_line

    def test_tables_show_sites_claims_and_times(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        result = command("rewrite", model, "-o", tmp_path / "out.onnx", *SPLIT)
        assert "48 x 96" in result.out
        assert "8 of 6 x 12" in result.out
        assert "8,448 -> 1,056 (12.5%)" in result.out
        assert "claim A, structural equivalence: holds" in result.out
        assert "claim B, annealing error: holds" in result.out
        assert "random inputs (seed 0), not real ones" in result.out
        assert "speed-up" in result.out

    def test_dry_run_writes_no_model_but_the_report(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        before = listing(tmp_path)
        arguments = ("-o", tmp_path / "out.onnx", "--save-annealed", tmp_path / "annealed.onnx")
        result = command("rewrite", model, *arguments, "--dry-run", *SPLIT)
        assert result.code == 0
        assert result.last_line.startswith("rewritten: ")
        assert listing(tmp_path) == before
        result = command("rewrite", model, "--dry-run", "--report", tmp_path / "r.json", *SPLIT)
        assert result.code == 0
        assert listing(tmp_path).keys() - before.keys() == {"r.json"}
        assert json.loads((tmp_path / "r.json").read_text())["summary"]["decomposable"] is True

    def test_dry_run_says_that_nothing_was_written(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        result = command("rewrite", model, "-o", tmp_path / "o.onnx", "--dry-run", *SPLIT)
        assert "dry run" in result.last_line
        assert not (tmp_path / "o.onnx").exists()

    def test_save_annealed_is_dense_and_gives_the_rewritten_outputs(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        planted = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=1e-3), rng)
        model = save(planted.model, tmp_path / "model.onnx")
        output, annealed = tmp_path / "out.onnx", tmp_path / "annealed.onnx"
        null = ("--null", "normal:0.001", "--criterion", "fwer")
        result = command(
            "rewrite", model, "-o", output, "--save-annealed", annealed, *null, *SPLIT
        )
        assert result.code == 0
        x = rng.normal(size=(9, 32)).astype(np.float32)
        np.testing.assert_allclose(run(annealed, x), run(output, x), rtol=1e-5, atol=1e-5)
        assert np.abs(run(annealed, x) - run(model, x)).max() > 1e-4
        dense = onnx.load(annealed)
        assert [node.op_type for node in dense.graph.node] == [
            node.op_type for node in planted.model.graph.node
        ]

    @pytest.mark.parametrize("emit", get_args(Emit))
    def test_every_emission_is_accepted_and_validates(
        self, command: Command, model: Path, tmp_path: Path, emit: str
    ) -> None:
        output = tmp_path / "out.onnx"
        result = command("rewrite", model, "-o", output, "--emit", emit, "--batch", "1")
        assert result.code == 0
        assert command("validate", model, output, "--samples", "1").code == 0

    def test_emit_decides_the_number_of_branches(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        planted = plant(Recipe(blocks=((6, 12, 5),) * 3, isolated=(8, 0)), rng)
        model = save(planted.model, tmp_path / "model.onnx")
        branches = {}
        for emit in ("split", "shrink"):
            output = tmp_path / f"{emit}.onnx"
            options = ("--emit", emit, "--force", "--batch", "1")
            assert command("rewrite", model, "-o", output, *options).code == 0
            branches[emit] = len(found_partition(onnx.load(output), "up"))
        assert branches == {"split": 3, "shrink": 1}

    def test_an_existing_output_is_replaced(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out.onnx"
        output.write_text("something older")
        assert command("rewrite", model, "-o", output, *SPLIT).code == 0
        assert len(found_partition(onnx.load(output), "up")) == 8

    def test_the_same_command_gives_the_same_bytes(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        outputs = [tmp_path / name for name in ("first.onnx", "second.onnx")]
        for output in outputs:
            assert command("rewrite", model, "-o", output, *SPLIT).code == 0
        assert outputs[0].read_bytes() == outputs[1].read_bytes()

    def test_html_report(self, command: Command, model: Path, tmp_path: Path) -> None:
        page = tmp_path / "r.html"
        result = command("rewrite", model, "--dry-run", "--html", page, *SPLIT)
        assert result.code == 0
        text = page.read_text("utf-8")
        assert text.lstrip().lower().startswith("<!doctype html")
        assert "48 x 96" in text or "48 × 96" in text  # noqa: RUF001


class TestReportKeys:
    def test_rewrite(self, command: Command, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        assert (
            command("rewrite", model, "-o", tmp_path / "o.onnx", "--report", path, *SPLIT).code
            == 0
        )
        report = json.loads(path.read_text("utf-8"))
        assert_schema(report, REPORT)
        assert_schema(report["summary"], SUMMARY)
        for site in report["sites"]:
            assert_schema(site, SITE)
            assert all(isinstance(size, int) for size in site["shape"])
            assert all(len(block) == 2 for block in site["blocks"])
        assert_schema(report["claims"]["structural"], STRUCTURAL)
        assert_schema(report["claims"]["annealing"], ANNEALING)
        assert_schema(report["timing"], TIMING)

    def test_values_of_a_rewrite(self, command: Command, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        command("rewrite", model, "-o", tmp_path / "o.onnx", "--report", path, *SPLIT)
        report = json.loads(path.read_text("utf-8"))
        assert report["version"] == importlib.metadata.version("onnx-decompose")
        assert report["model"] == str(model)
        assert report["null"] == "auto"
        assert report["criterion"] == "fdr(0.01)"
        reason = report["summary"].pop("reason")
        assert report["summary"] == {
            "sites": 2,
            "rewritten": 2,
            "substructures": 8,
            "weights_before": 48 * 96 + 96 * 40,
            "weights_after": 8 * (6 * 12 + 12 * 5),
            "flops_before": 2 * (48 * 96 + 96 * 40),
            "flops_after": 2 * 8 * (6 * 12 + 12 * 5),
            "decomposable": True,
        }
        assert "8 substructures" in reason
        up, down = report["sites"]
        assert (up["name"], up["op_type"], up["shape"]) == ("up", "MatMul", [48, 96])
        assert (down["name"], down["shape"]) == ("down", [96, 40])
        for site, block in ((up, [6, 12]), (down, [12, 5])):
            assert site["blocks"] == [block] * 8
            assert site["components"] == 8
            assert site["isolated"] == 0
            assert site["decision"] == "split"
            assert site["density"] == pytest.approx(1 / 8)
            assert site["pi0"] == pytest.approx(7 / 8)
            assert site["null"] == "zero"
            assert site["sccs"] is None
            assert site["layers"] is None
        claims = report["claims"]
        assert claims["structural"]["passed"] is True
        assert claims["annealing"]["passed"] is True
        assert claims["annealing"]["budget"] == 0.01
        assert claims["annealing"]["error"] <= 1e-5
        assert "random" in claims["annealing"]["data"]
        assert report["timing"]["provider"] == "cpu"

    def test_a_square_site_has_strong_components_and_layers(
        self, command: Command, tmp_path: Path
    ) -> None:
        # 0 -> 1 -> 2 -> 0 is one strongly connected component; it feeds 3, which feeds nothing.
        weight = np.zeros((4, 4), np.float32)
        for source, target in ((0, 1), (1, 2), (2, 0), (2, 3)):
            weight[source, target] = 1.0
        node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "step")
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [node],
            "square",
            [value("x", onnx.TensorProto.FLOAT, ["n", 4])],
            [value("y", onnx.TensorProto.FLOAT, ["n", 4])],
            [onnx.numpy_helper.from_array(weight, "w")],
        )
        opsets = [onnx.helper.make_opsetid("", 17)]
        model = save(
            onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8),
            tmp_path / "square.onnx",
        )
        path = tmp_path / "r.json"
        assert command("rewrite", model, "--dry-run", "--report", path).code == 0
        (site,) = json.loads(path.read_text("utf-8"))["sites"]
        assert (site["sccs"], site["layers"]) == (2, 2)

    def test_not_decomposable(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        model, path = save(dense_ffn(rng), tmp_path / "dense.onnx"), tmp_path / "r.json"
        command("rewrite", model, "-o", tmp_path / "o.onnx", "--report", path)
        report = json.loads(path.read_text("utf-8"))
        assert_schema(report, REPORT)
        assert_schema(report["summary"], SUMMARY)
        for site in report["sites"]:
            assert_schema(site, SITE)
            assert site["decision"] == "dense"
        assert report["summary"]["decomposable"] is False
        assert report["summary"]["rewritten"] == 0
        assert report["summary"]["substructures"] == 0
        assert report["summary"]["weights_after"] == report["summary"]["weights_before"]
        assert report["timing"] is None
        assert report["claims"].keys() == {"structural", "annealing"}

    def test_analyze(self, command: Command, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        assert command("analyze", model, "--report", path).code == 0
        report = json.loads(path.read_text("utf-8"))
        assert_schema(report, REPORT)
        assert_schema(report["summary"], SUMMARY)
        for site in report["sites"]:
            assert_schema(site, SITE)
            assert site["components"] == 8
        assert report["timing"] is None

    def test_validate(self, command: Command, pair: tuple[Path, Path], tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        assert command("validate", *pair, "--samples", "1", "--report", path).code == 0
        report = json.loads(path.read_text("utf-8"))
        assert_schema(report["claims"]["structural"], STRUCTURAL)
        assert_schema(report["claims"]["annealing"], ANNEALING)
        assert report["claims"]["structural"]["passed"] is True

    def test_bench(self, command: Command, pair: tuple[Path, Path], tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        assert command("bench", *pair, "--batch", "1,3", "--report", path).code == 0
        report = json.loads(path.read_text("utf-8"))
        assert_schema(report["timing"], TIMING)
        assert [entry["batch"] for entry in report["timing"]["batches"]] == [1, 3]


class TestAnalyze:
    def test_shows_the_structure_and_writes_nothing(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        before = listing(tmp_path)
        result = command("analyze", model)
        assert result.code == 0
        assert "48 x 96" in result.out
        assert listing(tmp_path) == before

    def test_shows_what_other_nulls_and_criteria_would_give(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        recipe = Recipe(blocks=((8, 16, 8),) * 4, noise=2e-3, family="uniform")
        model, path = save(plant(recipe, rng).model, tmp_path / "m.onnx"), tmp_path / "r.json"
        result = command("analyze", model, "--criterion", "fwer", "--report", path)
        assert result.code == 0
        assert "what other nulls and criteria would give" in result.out
        report = json.loads(path.read_text("utf-8"))
        assert [site["density"] for site in report["sites"]] == [1.0, 1.0]
        others = {(o["null"], o["criterion"]): o for o in report["alternatives"]}
        assert others["torch", "fwer(0.01)"]["density"] == pytest.approx(0.25)
        # Without evidence of an initialization, criteria that need a null would all give the same.
        assert [c for n, c in others if n == "auto"] == ["shared"]
        command("analyze", model, "--null", "torch", "--report", path)
        report = json.loads(path.read_text("utf-8"))
        criteria = [o["criterion"] for o in report["alternatives"] if o["null"] == "torch"]
        assert criteria == ["fwer(0.01)", "ksigma(2.576)", "group(0.01)", "shared"]

    def test_last_line_says_whether_it_is_decomposable(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        model = save(dense_ffn(rng), tmp_path / "dense.onnx")
        result = command("analyze", model)
        assert result.code == 0
        assert result.last_line.startswith("not decomposable: ")


class TestValidate:
    def test_a_good_pair(self, command: Command, pair: tuple[Path, Path]) -> None:
        result = command("validate", *pair)
        assert result.code == 0
        assert result.last_line == f"valid: {pair[1]}"
        assert "2 weights rebuilt bit for bit" in result.out

    def test_models_that_were_not_rewritten_are_compared_by_claim_b_alone(
        self, command: Command, pair: tuple[Path, Path]
    ) -> None:
        result = command("validate", pair[0], pair[0], "--samples", "1")
        assert result.code == 0
        assert "claim A: not checked" in result.out

    def test_inputs_are_used_and_named(
        self,
        command: Command,
        pair: tuple[Path, Path],
        rng: np.random.Generator,
        tmp_path: Path,
    ) -> None:
        data = tmp_path / "inputs.npz"
        np.savez(data, x=rng.normal(size=(11, 18)).astype(np.float32))
        result = command("validate", *pair, "--samples", "1", "--inputs", data)
        assert result.code == 0
        assert f"{data} (11 samples)" in result.out

    def test_tolerances_are_obeyed(self, command: Command, pair: tuple[Path, Path]) -> None:
        """A rewritten model whose float additions come in another order, against no tolerance at all."""
        assert command("validate", *pair, "--samples", "1", "--rtol", "1e-3").code == 0
        loose = command("validate", *pair, "--samples", "1", "--rtol", "0", "--atol", "1e-3")
        assert loose.code == 0

    def test_budget_option_overrides_the_model_s_own(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        planted = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=1e-3), rng)
        model, output = save(planted.model, tmp_path / "m.onnx"), tmp_path / "o.onnx"
        null = ("--null", "normal:0.001", "--criterion", "fwer")
        assert command("rewrite", model, "-o", output, *null, *SPLIT).code == 0
        assert command("validate", model, output, "--samples", "2").code == 0
        strict = command("validate", model, output, "--samples", "2", "--budget", "1e-4")
        assert strict.code == 1
        assert "claim B does not hold" in strict.err
        assert len(strict.err.splitlines()) == 1

    def test_seed_decides_the_inputs(self, command: Command, pair: tuple[Path, Path]) -> None:
        result = command("validate", *pair, "--samples", "1", "--seed", "5")
        assert "random inputs (seed 5)" in result.out


class TestBench:
    def test_shows_a_row_per_batch_size(
        self, command: Command, pair: tuple[Path, Path]
    ) -> None:
        result = command("bench", *pair, "--batch", "1,4")
        assert result.code == 0
        assert " % interval" in result.out
        assert result.last_line.startswith("speed-up ")

    def test_real_inputs(
        self,
        command: Command,
        pair: tuple[Path, Path],
        rng: np.random.Generator,
        tmp_path: Path,
    ) -> None:
        data = tmp_path / "inputs.npz"
        np.savez(data, x=rng.normal(size=(4, 18)).astype(np.float32))
        assert command("bench", *pair, "--batch", "2", "--inputs", data).code == 0

    @pytest.fixture
    def sequences(self, rng: np.random.Generator, tmp_path: Path) -> Path:
        text = """<ir_version: 8, opset_import: ["" : 17]>
        steps (float[N, T, 8] x) => (float[N, T, 4] y) { y = MatMul(x, w) }"""
        model = onnx.parser.parse_model(text)
        weight = rng.normal(size=(8, 4)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
        return save(model, tmp_path / "steps.onnx")

    def test_at_a_size_of_another_axis(
        self, command: Command, sequences: Path, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        data, report = tmp_path / "inputs.npz", tmp_path / "report.json"
        np.savez(data, x=rng.normal(size=(4, 30, 8)).astype(np.float32))
        options = ("--batch", "2", "--inputs", data, "--report", report)
        for more, size in (((), 30), (("--axis", "T=1"), 1)):
            result = command("bench", sequences, sequences, *options, *more)
            assert result.code == 0, result.err
            assert f"time per run on cpu, T {size}, " in result.out
            assert json.loads(report.read_text())["timing"]["axes"] == {"T": size}

    @pytest.mark.parametrize("axis", ["T", "T=", "=1", "T=0", "T=x", "N=1", "time=1"])
    def test_axes_that_cannot_be_sized(
        self, command: Command, sequences: Path, tmp_path: Path, axis: str
    ) -> None:
        output = tmp_path / "out.onnx"
        for verb, *rest in (("bench", sequences), ("rewrite", "-o", output)):
            result = command(verb, sequences, *rest, "--axis", axis)
            assert result.code == 2
            assert "axis" in result.err
            assert result.err.count("\n") == 1
        assert not output.exists()


class TestEverywhere:
    @pytest.mark.parametrize("verb", VERBS)
    def test_help(self, command: Command, verb: str) -> None:
        result = command(verb, "--help")
        assert result.code == 0
        assert verb in result.out
        for option in ("--quiet", "--verbose", "--version", "--help"):
            assert option in result.out

    @pytest.mark.parametrize(
        ("verb", "options"),
        [
            ("export", ("--output",)),
            (
                "analyze",
                ("--report", "--html", "--null", "--null-config", "--criterion", "--alpha"),
            ),
            (
                "rewrite",
                (
                    "--output",
                    "--report",
                    "--html",
                    "--null",
                    "--null-config",
                    "--criterion",
                    "--alpha",
                    "--calibration",
                    "--budget",
                    "--metric",
                    "--provider",
                    "--emit",
                    "--save-annealed",
                    "--force",
                    "--dry-run",
                ),
            ),
            (
                "validate",
                (
                    "--inputs",
                    "--samples",
                    "--seed",
                    "--rtol",
                    "--atol",
                    "--budget",
                    "--provider",
                    "--report",
                ),
            ),
            ("bench", ("--inputs", "--batch", "--provider", "--report")),
        ],
    )
    def test_help_names_every_option_of_the_contract(
        self, command: Command, verb: str, options: tuple[str, ...]
    ) -> None:
        shown = command(verb, "--help").out.replace(",", " ").split()
        assert set(options) <= set(shown)

    def test_group_help_lists_the_verbs(self, command: Command) -> None:
        result = command("--help")
        assert result.code == 0
        assert all(f"\n  {verb} " in result.out for verb in VERBS)

    @pytest.mark.parametrize("verb", ["", *VERBS])
    def test_version(self, command: Command, verb: str) -> None:
        result = command(*filter(None, (verb, "--version")))
        assert result.code == 0
        assert importlib.metadata.version("onnx-decompose") in result.out

    @pytest.mark.parametrize("flag", ["--quiet", "-q"])
    def test_quiet_leaves_the_last_line(
        self, command: Command, model: Path, pair: tuple[Path, Path], tmp_path: Path, flag: str
    ) -> None:
        commands = {
            "rewritten: ": ("rewrite", model, "-o", tmp_path / "o.onnx", *SPLIT),
            "valid: ": ("validate", *pair, "--samples", "1"),
            "speed-up ": ("bench", *pair, "--batch", "1"),
        }
        for start, arguments in commands.items():
            result = command(*arguments, flag)
            assert result.code == 0
            assert result.out.count("\n") == 1
            assert result.out.startswith(start)
            assert result.err == ""

    def test_verbose_logs_on_stderr(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        result = command("rewrite", model, "-o", tmp_path / "o.onnx", *SPLIT, "--verbose")
        assert result.code == 0
        assert "claim A" in result.err
        assert result.last_line.startswith("rewritten: ")

    def test_no_arguments_is_a_usage_error(self, command: Command) -> None:
        assert command().code == 2

    def test_unknown_verb_and_option(self, command: Command, model: Path) -> None:
        for arguments in (("decompose", model), ("analyze", model, "--frobnicate")):
            result = command(*arguments)
            assert result.code == 2
            assert len(result.err.splitlines()) == 1
            assert result.out == ""


class TestProvider:
    @pytest.fixture(autouse=True)
    def _without_cuda(self) -> None:
        import onnxruntime  # noqa: PLC0415

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has CUDA")

    @pytest.mark.parametrize("verb", ["rewrite", "validate", "bench"])
    def test_cuda_without_a_gpu_is_exit_code_3(
        self, command: Command, pair: tuple[Path, Path], tmp_path: Path, verb: str
    ) -> None:
        output = tmp_path / "out.onnx"
        arguments = (pair[0], "-o", output) if verb == "rewrite" else pair
        result = command(verb, *arguments, "--provider", "cuda")
        assert result.code == 3
        assert len(result.err.splitlines()) == 1
        assert "provider cuda" in result.err
        assert "onnx-decompose[cuda]" in result.err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("choice", ["auto", "cpu"])
    def test_cpu_is_named_in_the_report(
        self, command: Command, pair: tuple[Path, Path], tmp_path: Path, choice: str
    ) -> None:
        path = tmp_path / "r.json"
        arguments = ("--batch", "1", "--provider", choice, "--report", path)
        assert command("bench", *pair, *arguments).code == 0
        assert json.loads(path.read_text("utf-8"))["timing"]["provider"] == "cpu"


class TestProcess:
    """The installed entry point, in a process of its own."""

    @staticmethod
    def start(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("onnx-decompose")
        return subprocess.run(
            [program, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def test_rewrite_with_relative_paths(self, model: Path, tmp_path: Path) -> None:
        done = self.start("rewrite", model.name, "-o", "out.onnx", *SPLIT, "-q", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("rewritten: out.onnx: ")
        assert len(found_partition(onnx.load(tmp_path / "out.onnx"), "up")) == 8

    def test_a_failed_claim(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        broken = onnx.load(pair[1])
        name = next(t.name for t in broken.graph.initializer if ".block0" in t.name)
        values = array_of(broken, name)
        values[0, 0] += np.float32(0.01)
        set_array(broken, name, values)
        path = save(broken, tmp_path / "broken.onnx")
        done = self.start("validate", pair[0], path, "--samples", "1", cwd=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1

    def test_bad_input(self, tmp_path: Path) -> None:
        (tmp_path / "bad.onnx").write_bytes(b"\x00garbage")
        done = self.start("rewrite", "bad.onnx", "-o", "out.onnx", cwd=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "bad.onnx" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["bad.onnx"]
