"""Nulls with a budget: what is removed, how far the schedule goes, and what is refused with which figures."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import pytest

from onnx_decompose.analysis.record import METADATA_KEY, InitRecord
from tests.e2e.planted import (
    SITES,
    Form,
    Planted,
    Recipe,
    array_of,
    decomposition,
    found_partition,
    plant,
    run,
    save,
    units,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Command, Result

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")
NOISY = Recipe(blocks=((8, 16, 8),) * 4, noise=1e-3)
"""Removing the noise makes a relative L2 error of about 0.004."""


class Job:
    """One model, rewritten with different options."""

    def __init__(self, command: Command, model: onnx.ModelProto, folder: Path) -> None:
        self._command = command
        self.source, self.output = folder / "in.onnx", folder / "out.onnx"
        self.report_path = folder / "report.json"
        save(model, self.source)

    def __call__(self, *options: object) -> Result:
        arguments = ("-o", self.output, "--report", self.report_path, *SPLIT, *options)
        return self._command("rewrite", self.source, *arguments)

    @property
    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.report_path.read_text("utf-8"))
        return content

    @property
    def unchanged(self) -> bool:
        return self.output.read_bytes() == self.source.read_bytes()

    @property
    def rewritten(self) -> onnx.ModelProto:
        return onnx.load(self.output)

    def validates(self) -> bool:
        return self._command("validate", self.source, self.output, "--samples", "2").code == 0


@pytest.fixture
def planted(rng: np.random.Generator) -> Planted:
    return plant(NOISY, rng)


@pytest.fixture
def job(command: Command, planted: Planted, tmp_path: Path) -> Job:
    return Job(command, planted.model, tmp_path)


def assert_found(job: Job, planted: Planted) -> None:
    for site in SITES:
        assert found_partition(job.rewritten, site) == planted.partition(site)


class TestInsideTheBudget:
    @pytest.mark.parametrize(
        "options",
        [
            ("--null", "normal:0.001", "--criterion", "fwer"),
            ("--null", "normal:0.001", "--criterion", "fdr", "--alpha", "1e-6"),
            ("--null", "normal:0.001", "--criterion", "ksigma:6"),
        ],
        ids=" ".join,
    )
    def test_noise_is_removed_on_random_inputs(
        self, job: Job, planted: Planted, options: tuple[str, ...]
    ) -> None:
        result = job(*options)
        assert result.code == 0
        assert result.last_line.startswith("rewritten: ")
        assert_found(job, planted)
        claim = job.report["claims"]["annealing"]
        assert claim["passed"] is True
        assert 1e-3 < claim["error"] < 0.01
        assert claim["budget"] == 0.01
        assert "random inputs" in claim["data"]
        assert job.validates()

    @pytest.mark.parametrize("null", ["uniform:0.002", "torch", "keras"])
    def test_uniform_noise(
        self, command: Command, rng: np.random.Generator, tmp_path: Path, null: str
    ) -> None:
        """Also where decay has shrunk it far below the declared range."""
        planted = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=2e-3, family="uniform"), rng)
        job = Job(command, planted.model, tmp_path)
        assert job("--null", null, "--criterion", "fwer").last_line.startswith("rewritten: ")
        assert_found(job, planted)
        assert 1e-3 < job.report["claims"]["annealing"]["error"] < 0.01
        assert job.validates()

    def test_the_error_is_the_one_that_the_two_files_have(
        self, job: Job, rng: np.random.Generator
    ) -> None:
        assert job("--null", "normal:0.001", "--criterion", "fwer").code == 0
        x = rng.normal(size=(4000, 32)).astype(np.float32)
        before, after = run(job.source, x), run(job.output, x)
        error = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert job.report["claims"]["annealing"]["error"] == pytest.approx(error, rel=0.3)

    def test_kept_entries_are_the_original_s_and_the_others_zero(
        self, job: Job, planted: Planted
    ) -> None:
        assert job("--null", "normal:0.001", "--criterion", "fwer").code == 0
        rewritten = job.rewritten
        assert decomposition(rewritten)["budget"] == 0.01
        for name, site in decomposition(rewritten)["sites"].items():
            assert site["annealing"] == "masked"
            weight = array_of(planted.model, f"{name}.weight")
            for block in site["blocks"]:
                part = np.ix_(units(block["rows"]), units(block["columns"]))
                np.testing.assert_array_equal(
                    array_of(rewritten, block["initializer"]), weight[part]
                )
        for site in job.report["sites"]:
            assert site["density"] == pytest.approx(0.25)
            assert site["pi0"] == pytest.approx(0.75, abs=0.05)

    def test_default_null_leaves_noise_alone(self, job: Job) -> None:
        result = job()
        assert result.code == 0
        assert result.last_line.startswith("nothing to do: ")
        assert job.unchanged


class TestOverTheBudget:
    @pytest.mark.parametrize(
        ("criterion", "name"), [("fwer", r"fwer\(0\.\d+\)"), ("ksigma:6", r"ksigma\([\d.]+\)")]
    )
    def test_refused_with_the_figures(self, job: Job, criterion: str, name: str) -> None:
        result = job("--null", "normal:0.001", "--criterion", criterion, "--budget", "0.0001")
        assert result.code == 0
        assert job.unchanged
        told = re.search(
            rf"nothing to do: at {name} the relative L2 error would be ([\d.e-]+) "
            r"against a budget of 0\.0001 on random inputs \(seed 0\)",
            result.last_line,
        )
        assert told is not None, result.last_line
        assert 1e-3 < float(told[1]) < 0.01
        summary = job.report["summary"]
        assert summary["decomposable"] is False
        assert told[0].removeprefix("nothing to do: ") in summary["reason"]
        assert all(site["decision"] == "dense" for site in job.report["sites"])

    def test_a_larger_budget_takes_it(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        noisy = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=1e-2), rng)
        job = Job(command, noisy.model, tmp_path)
        null = ("--null", "normal:0.01", "--criterion", "fwer")
        assert job(*null).last_line.startswith("nothing to do: ")
        assert job.unchanged
        assert job(*null, "--budget", "0.2").last_line.startswith("rewritten: ")
        assert_found(job, noisy)
        assert job.report["claims"]["annealing"]["budget"] == 0.2
        assert job.validates()


class TestExactOnly:
    def test_budget_zero_removes_no_noise(self, job: Job) -> None:
        result = job("--null", "normal:0.001", "--criterion", "fwer", "--budget", "0")
        assert result.code == 0
        assert job.unchanged

    def test_budget_zero_still_takes_exact_zeros_apart(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        clean = plant(Recipe(blocks=((8, 16, 8),) * 4), rng)
        job = Job(command, clean.model, tmp_path)
        assert job("--null", "normal:0.001", "--budget", "0").last_line.startswith("rewritten")
        assert_found(job, clean)
        sites = decomposition(job.rewritten)["sites"]
        assert {site["annealing"] for site in sites.values()} == {"exact"}
        assert job.report["claims"]["annealing"]["error"] < 1e-6
        assert job.validates()

    def test_exact_blocks_are_kept_when_the_budget_forbids_more(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        """Two exact blocks, each of two noisy ones: over budget the four, the two remain."""
        half = plant(Recipe(blocks=((8, 16, 8),) * 2, noise=0.05, shuffle=False), rng)
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in half.model.graph.initializer}
        model = onnx.ModelProto()
        model.CopyFrom(half.model)
        for tensor in model.graph.initializer:
            array = arrays[tensor.name]
            doubled = np.kron(np.eye(2), array) if array.ndim == 2 else np.tile(array, 2)
            doubled = doubled.astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(doubled, tensor.name))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[-1].dim_value *= 2
        job = Job(command, model, tmp_path)
        null = ("--null", "normal:0.05", "--criterion", "fwer")
        assert job(*null, "--budget", "0.9").code == 0
        assert job.report["summary"]["substructures"] == 4
        assert job(*null, "--budget", "0.001").code == 0
        assert job.report["summary"]["substructures"] == 2
        assert job.report["claims"]["annealing"]["error"] < 1e-6


class TestSchedule:
    def test_a_looser_level_is_reached_when_the_strict_one_is_over_budget(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        """Weak entries inside the blocks, 2 sigma: removed at 2.58 sigma, kept at 1.93, where the noise still goes."""
        recipe = Recipe(blocks=((16, 32, 16),) * 2, noise=0.0125, family="clipped", weak=0.025)
        planted = plant(recipe, rng)
        job = Job(command, planted.model, tmp_path)
        null = ("--null", "normal:0.0125", "--criterion", "ksigma")
        assert job(*null, "--budget", "0.055").last_line.startswith("rewritten: ")
        assert job.report["criterion"] == "ksigma(1.932)"
        assert [site["density"] for site in job.report["sites"]] == [0.5, 0.5]
        assert job.report["claims"]["annealing"]["error"] < 0.055
        assert_found(job, planted)
        assert job.validates()
        assert job(*null, "--budget", "0.2").last_line.startswith("rewritten: ")
        assert job.report["criterion"] == "ksigma(2.576)"
        assert [site["density"] for site in job.report["sites"]] == [0.25, 0.25]
        assert job.report["claims"]["annealing"]["error"] > 0.055


class TestRecorded:
    @staticmethod
    def record(
        model: onnx.ModelProto, sites: tuple[str, ...], family: str, scale: float
    ) -> None:
        records = {}
        for site in sites:
            tensor = next(t for t in model.graph.initializer if t.name == f"{site}.weight")
            shape = tuple(tensor.dims)
            made = InitRecord(
                parameter=f"layers.{site}.weight",
                shape=shape,
                family=family,
                location=0.0,
                scale=scale,
                quantiles=tuple(np.linspace(-2 * scale, 2 * scale, 65).tolist()),
                fan_in=shape[0],
                fan_out=shape[1],
            )
            records[tensor.name] = made.to_json()
        model.metadata_props.add(key=METADATA_KEY, value=json.dumps(records))

    @pytest.mark.parametrize("family", ["normal", "uniform"])
    @pytest.mark.parametrize("form", ["matmul", "gemm"])
    @pytest.mark.parametrize("null", ["auto", "recorded"])
    def test_records_in_the_model_are_the_null(
        self,
        command: Command,
        tmp_path: Path,
        family: Literal["normal", "uniform"],
        form: Form,
        null: str,
    ) -> None:
        scale = {"normal": 0.001, "uniform": 0.002}[family]
        recipe = Recipe(blocks=((8, 16, 8),) * 4, noise=scale, family=family, form=form)
        planted = plant(recipe, np.random.default_rng(0))
        self.record(planted.model, SITES, family, scale)
        job = Job(command, planted.model, tmp_path)
        result = job("--null", null, "--criterion", "fwer")
        assert result.last_line.startswith("rewritten: "), result
        assert_found(job, planted)
        assert all(s["null"].startswith(f"recorded {family}") for s in job.report["sites"])
        assert job.validates()

    def test_a_budget_too_small_refuses(
        self, command: Command, planted: Planted, tmp_path: Path
    ) -> None:
        self.record(planted.model, SITES, "normal", 0.001)
        job = Job(command, planted.model, tmp_path)
        result = job("--criterion", "fwer", "--budget", "1e-4")
        assert "the relative L2 error would be" in result.last_line
        assert job.unchanged

    def test_a_weight_without_a_record_keeps_all_but_zeros(
        self, command: Command, planted: Planted, tmp_path: Path
    ) -> None:
        self.record(planted.model, ("up",), "normal", 0.001)
        job = Job(command, planted.model, tmp_path)
        assert job("--criterion", "fwer").code == 0
        up, down = job.report["sites"]
        assert up["null"].startswith("recorded ")
        assert down["null"] == "zero"
        assert down["density"] == 1.0
        assert down["decision"] == "dense"

    def test_broken_records_are_bad_input(
        self, command: Command, planted: Planted, tmp_path: Path
    ) -> None:
        planted.model.metadata_props.add(key=METADATA_KEY, value='{"up.weight": {"scale": 1}}')
        job = Job(command, planted.model, tmp_path)
        result = job()
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert "in.onnx" in result.err
        assert "up.weight" in result.err
        assert not job.output.exists()


class TestNullConfig:
    def config(self, folder: Path, text: str) -> Path:
        path = folder / "nulls.toml"
        path.write_text(text, "utf-8")
        return path

    def test_every_glob_gives_its_null(
        self, job: Job, planted: Planted, tmp_path: Path
    ) -> None:
        text = '[nulls]\n"up.*" = "normal:0.001"\n"*.weight" = "normal:0.002"\n'
        config = self.config(tmp_path, text)
        assert job("--null-config", config, "--criterion", "fwer").code == 0
        assert_found(job, planted)
        up, down = job.report["sites"]
        assert up["null"].startswith("normal:0.001 ")
        assert down["null"].startswith("normal:0.002 ")

    def test_weights_that_match_nothing_get_the_option_s_null(
        self, job: Job, tmp_path: Path
    ) -> None:
        config = self.config(tmp_path, '[nulls]\n"up.*" = "normal:0.001"\n')
        assert job("--null-config", config, "--criterion", "fwer").code == 0
        up, down = job.report["sites"]
        assert (up["decision"], down["decision"]) == ("split", "dense")
        assert down["null"] == "zero"
        assert job.validates()

    @pytest.mark.parametrize(
        "text",
        [
            "nulls = 3",
            "not toml at all [",
            '[nulls]\n"up.*" = 3\n',
            '[nulls]\n"up.*" = "nonsense"\n',
            "",
        ],
    )
    def test_what_is_not_a_table_of_nulls_is_refused(
        self, job: Job, tmp_path: Path, text: str
    ) -> None:
        result = job("--null-config", self.config(tmp_path, text))
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert "nonsense" in result.err or "nulls.toml" in result.err
        assert not job.output.exists()


class TestCalibration:
    def test_claim_b_is_measured_on_the_user_s_inputs(
        self, job: Job, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        data = tmp_path / "data.npz"
        np.savez(data, x=rng.normal(size=(40, 32)).astype(np.float32))
        null = ("--null", "normal:0.001", "--criterion", "fwer")
        assert job(*null, "--calibration", data).last_line.startswith("rewritten: ")
        claim = job.report["claims"]["annealing"]
        assert claim["data"] == f"{data} (40 samples)"
        x = np.load(data)["x"]
        before, after = run(job.source, x), run(job.output, x)
        error = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert claim["error"] == pytest.approx(error, rel=1e-3)

    def test_real_inputs_can_allow_what_random_ones_refuse(
        self, job: Job, planted: Planted, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        """Where the biases make most of the outputs, removing the noise costs less."""
        x = 0.01 * rng.normal(size=(50, 32)).astype(np.float32)
        np.savez(tmp_path / "data.npz", x=x)
        expected = relative_error_of_removal(planted, x)
        assert expected < 0.003
        null = ("--null", "normal:0.001", "--criterion", "fwer", "--budget", "0.003")
        assert job(*null).last_line.startswith("nothing to do: ")
        result = job(*null, "--calibration", tmp_path / "data.npz")
        assert result.last_line.startswith("rewritten: ")
        error = job.report["claims"]["annealing"]["error"]
        assert error == pytest.approx(expected, rel=1e-3)


def relative_error_of_removal(planted: Planted, x: np.ndarray[Any, Any]) -> float:
    """The error that cutting everything outside the planted blocks makes, in float64."""
    up, up_bias, down, down_bias = (
        onnx.numpy_helper.to_array(t).astype(np.float64)
        for t in planted.model.graph.initializer
    )
    inputs, hidden, outputs = planted.labels

    def forward(cut: bool) -> np.ndarray[Any, Any]:
        first = up * (inputs[:, None] == hidden) if cut else up
        second = down * (hidden[:, None] == outputs) if cut else down
        y: np.ndarray[Any, Any] = np.maximum(x @ first + up_bias, 0) @ second + down_bias
        return y

    before, after = forward(cut=False), forward(cut=True)
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


class TestMetric:
    @pytest.fixture
    def labelled(
        self, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Planted, Path]:
        """A noisy model, and inputs with its own answers as labels; the metric is in the current folder."""
        noisy = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=0.03), rng)
        x = rng.normal(size=(300, 32)).astype(np.float32)
        label = run(noisy.model, x).argmax(axis=1)
        np.savez(tmp_path / "data.npz", x=x, label=label)
        (tmp_path / "quality_of_planted.py").write_text(
            "def accuracy(inputs, outputs):\n"
            "    assert len(inputs['x']) == len(inputs['label']) == 300\n"
            "    return (outputs['y'].argmax(axis=1) == inputs['label']).mean()\n"
            "def raises(inputs, outputs):\n"
            "    raise KeyError('mask')\n"
            "def nothing(inputs, outputs):\n"
            "    return None\n",
            "utf-8",
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.delitem(sys.modules, "quality_of_planted", raising=False)
        return noisy, tmp_path / "data.npz"

    def test_the_drop_of_the_metric_is_the_error(
        self, command: Command, labelled: tuple[Planted, Path], tmp_path: Path
    ) -> None:
        noisy, data = labelled
        job = Job(command, noisy.model, tmp_path)
        null = ("--null", "normal:0.03", "--criterion", "fwer")
        metric = ("--calibration", data, "--metric", "quality_of_planted:accuracy")
        result = job(*null, *metric, "--budget", "0.5")
        assert result.last_line.startswith("rewritten: "), result
        assert_found(job, noisy)
        arrays = np.load(data)
        accuracy = (run(job.output, arrays["x"]).argmax(axis=1) == arrays["label"]).mean()
        assert 0.5 < accuracy < 1.0
        claim = job.report["claims"]["annealing"]
        assert claim["error"] == pytest.approx(1.0 - accuracy)
        assert claim["measure"] == "drop of the metric"

    def test_a_drop_over_the_budget_is_refused(
        self, command: Command, labelled: tuple[Planted, Path], tmp_path: Path
    ) -> None:
        noisy, data = labelled
        job = Job(command, noisy.model, tmp_path)
        null = ("--null", "normal:0.03", "--criterion", "fwer")
        metric = ("--calibration", data, "--metric", "quality_of_planted:accuracy")
        result = job(*null, *metric, "--budget", "0.001")
        assert result.code == 0
        assert "the drop of the metric would be" in result.last_line
        assert "against a budget of 0.001" in result.last_line
        assert job.unchanged

    @pytest.mark.parametrize(
        ("metric", "told"),
        [
            ("quality_of_planted:raises", "KeyError"),
            ("quality_of_planted:nothing", "None"),
            ("quality_of_planted:missing", "missing"),
            ("no_such_module_here:f", "no_such_module_here"),
            ("quality_of_planted", "module:function"),
        ],
    )
    def test_a_metric_that_cannot_be_used(
        self,
        command: Command,
        labelled: tuple[Planted, Path],
        tmp_path: Path,
        metric: str,
        told: str,
    ) -> None:
        noisy, data = labelled
        job = Job(command, noisy.model, tmp_path)
        null = ("--null", "normal:0.03", "--criterion", "fwer")
        result = job(*null, "--calibration", data, "--metric", metric)
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert told in result.err
        assert not job.output.exists()

    def test_a_metric_needs_data(self, job: Job) -> None:
        result = job("--metric", "quality_of_planted:accuracy")
        assert result.code == 2
        assert "--calibration" in result.err
