"""Calibrated annealing end to end: what is removed and refitted, on which samples it is judged, and what is refused."""

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

    from tests.e2e.conftest import Command, Result

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[N, 24] x) => (float[N, 6] y)
{
    a = MatMul(x, w0)
    ab = Add(a, b0)
    ar = Relu(ab)
    c = Gemm(ar, w1, b1)
    cr = Gelu_of(c)
    y = MatMul(cr, w2)
}
""".replace("Gelu_of(c)", "Sigmoid(c)")
"""Three products, with a bias as an Add, one inside a Gemm, and none."""


def faded(rng: np.random.Generator, kept: int = 12, hidden: int = 96) -> onnx.ModelProto:
    """A chain whose hidden units, but for ``kept`` of each layer, hardly do anything: the rest repeat the others."""
    model = onnx.parser.parse_model(TEXT)

    def narrow(inputs: int, outputs: int) -> NDArray[np.float32]:
        sizes = np.full((inputs, outputs), 1e-4)
        sizes[: min(inputs, kept) if inputs == hidden else inputs, :kept] = 1.0
        return (sizes * rng.normal(size=(inputs, outputs)) / 4).astype(np.float32)

    tensors = {
        "w0": narrow(24, hidden),
        "b0": rng.normal(size=hidden).astype(np.float32),
        "w1": narrow(hidden, hidden),
        "b1": rng.normal(size=hidden).astype(np.float32),
        "w2": np.vstack(
            [rng.normal(size=(kept, 6)), 1e-3 * rng.normal(size=(hidden - kept, 6))]
        ).astype(np.float32),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in tensors.items()
    )
    return model


class Job:
    def __init__(self, command: Command, model: onnx.ModelProto, folder: Path) -> None:
        self._command = command
        self.folder = folder
        self.source, self.output = folder / "in.onnx", folder / "out.onnx"
        self.report_path, self.annealed = folder / "report.json", folder / "annealed.onnx"
        save(model, self.source)

    def data(self, x: NDArray[np.float32]) -> Path:
        np.savez(self.folder / "data.npz", x=x)
        return self.folder / "data.npz"

    def __call__(self, x: NDArray[np.float32], *options: object) -> Result:
        where = (
            "-o",
            self.output,
            "--report",
            self.report_path,
            "--save-annealed",
            self.annealed,
        )
        fixed = ("--force", "--batch", "1", "--calibration", self.data(x))
        return self._command("rewrite", self.source, *where, *fixed, *options)

    @property
    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.report_path.read_text("utf-8"))
        return content

    def error(self, x: NDArray[np.float32]) -> float:
        before, after = run(self.source, x), run(self.output, x)
        return float(np.linalg.norm(after - before) / np.linalg.norm(before))


@pytest.fixture
def job(command: Command, rng: np.random.Generator, tmp_path: Path) -> Job:
    return Job(command, faded(rng), tmp_path)


def normal(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    return rng.normal(size=(rows, 24)).astype(np.float32)


class TestFadedUnits:
    def test_they_go_and_the_rest_is_refitted(self, job: Job, rng: np.random.Generator) -> None:
        assert job(normal(rng, 1000), "--budget", "1e-3").last_line.startswith("rewritten: ")
        report = job.report
        assert [site["blocks"] for site in report["sites"]] == [
            [[24, 12]],
            [[12, 12]],
            [[12, 6]],
        ]
        assert {site["null"] for site in report["sites"]} == {"calibration zero"}
        assert report["criterion"].startswith("decay(")
        claim = report["claims"]["annealing"]
        assert claim["passed"] is True
        assert "200 samples held out of 1000, 600 to fit and 200 to choose" in claim["data"]
        assert job.error(normal(rng, 2000)) == pytest.approx(claim["error"], rel=0.2)

    def test_refitting_makes_the_error_smaller(
        self, job: Job, rng: np.random.Generator
    ) -> None:
        x, new = normal(rng, 1000), normal(rng, 2000)
        errors = []
        for compensation in ("ridge", "mean", "none"):
            assert job(x, "--budget", "0.5", "--compensation", compensation).code == 0
            assert job.report["summary"]["decomposable"]
            errors.append(job.error(new))
        assert errors[0] < errors[1] < errors[2]

    def test_the_claims_hold_from_the_files_alone(
        self, job: Job, command: Command, rng: np.random.Generator
    ) -> None:
        assert job(normal(rng, 1000), "--budget", "1e-3").code == 0
        checked = command(
            "validate", job.source, job.output, "--inputs", job.data(normal(rng, 300))
        )
        assert checked.code == 0, checked.err
        x = normal(rng, 50)
        np.testing.assert_allclose(
            run(job.annealed, x), run(job.output, x), rtol=1e-4, atol=1e-5
        )

    def test_the_same_seed_gives_the_same_bytes(
        self, job: Job, rng: np.random.Generator
    ) -> None:
        x = normal(rng, 1000)
        assert job(x, "--budget", "1e-3").code == 0
        first = job.output.read_bytes()
        assert job(x, "--budget", "1e-3").code == 0
        assert job.output.read_bytes() == first


class TestRefusals:
    def test_too_few_samples_and_how_many_would_do(
        self, job: Job, rng: np.random.Generator
    ) -> None:
        result = job(normal(rng, 30))
        assert result.code == 0
        assert "calibrated annealing needs 80 samples, and there are 30" in result.last_line
        assert job.output.read_bytes() == job.source.read_bytes()
        assert "needs" not in job(normal(rng, 80)).last_line

    def test_outside_the_budget_with_the_figures(
        self, command: Command, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        model = faded(rng, kept=96)
        result = Job(command, model, tmp_path)(normal(rng, 1000))
        assert result.last_line.startswith("nothing to do: ")
        assert "the relative L2 error would be" in result.last_line
        assert "against a budget of 0.01" in result.last_line

    def test_a_named_null_is_what_is_tested(self, job: Job, rng: np.random.Generator) -> None:
        result = job(normal(rng, 1000), "--null", "zero")
        assert result.last_line.startswith("nothing to do: ")
        assert job.output.read_bytes() == job.source.read_bytes()

    def test_tested_annealing_only_judges_on_the_data(
        self, job: Job, rng: np.random.Generator
    ) -> None:
        result = job(normal(rng, 1000), "--annealing", "tested")
        assert result.last_line.startswith("nothing to do: ")
        assert "calibrated" not in result.last_line

    def test_nothing_is_fitted_at_budget_zero(self, job: Job, rng: np.random.Generator) -> None:
        result = job(normal(rng, 1000), "--budget", "0")
        assert result.last_line.startswith("nothing to do: ")

    def test_calibrated_needs_data(self, command: Command, job: Job) -> None:
        result = command("rewrite", job.source, "-o", job.output, "--annealing", "calibrated")
        assert result.code == 2
        assert "--calibration" in result.err
