"""Calibrated annealing end to end: what is removed and refitted, on which samples it is judged, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from tests.e2e.planted import decomposition, run, save

if TYPE_CHECKING:
    from collections.abc import Callable
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

    def data(self, x: NDArray[np.float32], **more: Any) -> Path:
        np.savez(self.folder / "data.npz", x=x, **more)
        return self.folder / "data.npz"

    def __call__(self, x: NDArray[np.float32], *options: object, **more: Any) -> Result:
        where = (
            "-o",
            self.output,
            "--report",
            self.report_path,
            "--save-annealed",
            self.annealed,
        )
        fixed = ("--force", "--batch", "1", "--calibration", self.data(x, **more))
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
        assert report["criterion"].startswith(("decay(", "remove("))
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


class TestResumed:
    @pytest.fixture
    def journal(self, tmp_path: Path) -> Path:
        return tmp_path / "search.jsonl"

    def test_from_wherever_it_was_interrupted_to_the_same_bytes(
        self, job: Job, journal: Path, rng: np.random.Generator
    ) -> None:
        x = normal(rng, 1000)
        assert job(x, "--budget", "1e-3").code == 0
        whole = job.output.read_bytes()
        assert job(x, "--budget", "1e-3", "--resume", journal).code == 0
        assert job.output.read_bytes() == whole
        content = journal.read_bytes()
        lines = content.splitlines(keepends=True)
        for kept in (b"".join(lines[: len(lines) // 2]) + lines[-1][:20], b""):
            journal.write_bytes(kept)
            assert job(x, "--budget", "1e-3", "--resume", journal).code == 0
            assert job.output.read_bytes() == whole
            assert journal.read_bytes() == content

    @pytest.mark.parametrize("what", ["model", "seed", "budget", "file"])
    def test_the_journal_of_another_search_is_refused(
        self, job: Job, journal: Path, rng: np.random.Generator, what: str
    ) -> None:
        x, budget, seed = normal(rng, 400), "1e-3", "0"
        if what == "file":
            journal.write_text("my notes\n", "utf-8")
        else:
            assert job(x, "--budget", budget, "--resume", journal).code == 0
        before = journal.read_bytes()
        if what == "model":
            save(faded(rng), job.source)
        job.output.unlink(missing_ok=True)
        budget, seed = "2e-3" if what == "budget" else budget, "1" if what == "seed" else seed
        result = job(x, "--budget", budget, "--seed", seed, "--resume", journal)
        assert result.code == 2
        told = "is no journal" if what == "file" else "is of another search"
        assert f"search.jsonl: {told}" in result.err
        assert result.err.count("\n") == 1
        assert journal.read_bytes() == before
        assert not job.output.exists()

    def test_there_has_to_be_a_search(
        self, job: Job, journal: Path, rng: np.random.Generator
    ) -> None:
        result = job(normal(rng, 100), "--budget", "0", "--resume", journal)
        assert result.code == 2
        assert "no calibrated search to resume" in result.err
        assert not journal.exists()


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
        job = Job(command, faded(rng), tmp_path)
        result = job(normal(rng, 1000), "--budget", "1e-5", "--compensation", "none")
        assert result.last_line.startswith("nothing to do: ")
        told = re.search(
            r"calibrated: at \w+\([^()]+\) \(1 substructure, [\d.]+ of the time predicted\) the relative L2 error "
            r"would be [\d.e-]+, [\d.e-]+ at most, against a budget of 1e-05 on \d+ samples to choose on",
            result.last_line,
        )
        assert told is not None, result.last_line
        assert told[0] in job.report["summary"]["reason"]

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


METRIC = """
import numpy as np

def own(inputs, outputs):
    rows, group = np.arange(len(inputs["group"])), inputs["group"]
    error = outputs["y"].reshape(len(rows), 3, 2)[rows, group] - inputs["wanted"]
    return {f"group {g}": -float(np.abs(error[group == g]).mean()) for g in range(3)}
"""

SIZES = (6, 12, 18)
"""Inputs of each group: unequal ones."""


class Groups:
    """A dense model whose inputs are active in groups, and whose outputs read what answers to one of them.

    Every hidden unit reads all inputs, so that there is one component; of a group's outputs nothing is wanted but where
    the group is active.
    """

    TEXT = """
    <ir_version: 8, opset_import: ["" : 17]>
    groups (float[N, 36] x) => (float[N, 6] y)
    {
        a = Gemm(x, w0, b0)
        g = Sigmoid(a)
        s = Mul(a, g)
        c = MatMul(s, w1)
        d = Add(c, s)
        e = Relu(d)
        m = MatMul(e, w2)
        y = Add(m, b2)
    }
    """

    def __init__(
        self, rng: np.random.Generator, *, shuffled: bool = False, cross: float = 1e-3
    ) -> None:
        self.inputs = rng.permutation(np.repeat(np.arange(3), SIZES))
        hidden = rng.permutation(np.repeat(np.arange(3), 20))
        weights = [
            rng.normal(size=(36, 60)) * np.where(self.inputs[:, None] == hidden, 0.5, 0.15),
            rng.normal(size=(60, 60)) / 4 * (hidden[:, None] == hidden),
            rng.normal(size=(60, 6)) / 4 * (hidden[:, None] == np.repeat(np.arange(3), 2)),
        ]
        weights[1] += cross * rng.normal(size=(60, 60))
        weights[2] += cross * rng.normal(size=(60, 6))
        if shuffled:
            weights = [rng.permuted(weight.ravel()).reshape(weight.shape) for weight in weights]
        self.model = onnx.parser.parse_model(self.TEXT)
        arrays = {f"w{number}": weight for number, weight in enumerate(weights)}
        arrays |= {"b0": rng.normal(size=60) / 4, "b2": rng.normal(size=6)}
        self.model.graph.initializer.extend(
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in arrays.items()
        )
        self._rng = rng

    def data(self, source: Path, rows: int, *, shuffled: bool = False) -> dict[str, Any]:
        """Inputs, the group that is active in each, and what the model makes of them for that group."""
        group = self._rng.integers(0, 3, rows)
        x = self._rng.normal(size=(rows, 36)) * (group[:, None] == self.inputs)
        if shuffled:
            x = self._rng.permuted(x, axis=0)
        x = x.astype(np.float32)
        wanted = run(source, x).reshape(rows, 3, 2)[np.arange(rows), group]
        return {"x": x, "group": group, "wanted": wanted}


class TestGroupedSupport:
    @pytest.fixture
    def rewrite(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., tuple[Result, Job]]:
        (tmp_path / "quality_of_groups.py").write_text(METRIC, "utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.delitem(sys.modules, "quality_of_groups", raising=False)

        def run_it(
            groups: Groups, *options: str, rows: int = 500, shuffled: bool = False
        ) -> tuple[Result, Job]:
            job = Job(command, groups.model, tmp_path)
            data = groups.data(job.source, rows, shuffled=shuffled)
            metric = (
                "--metric",
                "quality_of_groups:own",
                "--budget",
                "0.02",
                "--emit",
                "split",
            )
            return job(data.pop("x"), *metric, *options, **data), job

        return run_it

    def test_each_group_gets_units_of_its_own(
        self, rewrite: Callable[..., tuple[Result, Job]], rng: np.random.Generator
    ) -> None:
        groups = Groups(rng)
        result, job = rewrite(groups)
        assert result.last_line.startswith("rewritten: "), result
        report = job.report
        assert report["criterion"].startswith("support(3 groups")
        assert report["summary"]["substructures"] == 3
        first, _, last = report["sites"]
        assert sorted(inputs for inputs, _ in first["blocks"]) == list(SIZES)
        assert [outputs for _, outputs in last["blocks"]] == [2, 2, 2]
        assert report["claims"]["structural"]["passed"]
        claim = report["claims"]["annealing"]
        assert claim["measure"] == "drop of the metric"
        new = groups.data(job.source, 2000)
        rows = np.arange(2000)
        after = run(job.output, new["x"]).reshape(2000, 3, 2)[rows, new["group"]]
        assert np.abs(after - new["wanted"]).mean() < 0.02

    @pytest.mark.parametrize("compensation", ["ridge", "none"])
    def test_what_crosses_is_made_up_for_by_the_refit_alone(
        self,
        rewrite: Callable[..., tuple[Result, Job]],
        rng: np.random.Generator,
        compensation: str,
    ) -> None:
        result, job = rewrite(Groups(rng, cross=0.009), "--compensation", compensation)
        count = job.report["summary"]["substructures"]
        assert (count == 3) == (compensation == "ridge"), result.last_line

    @pytest.mark.parametrize("what", ["weights", "data"])
    def test_chance_gives_nothing(
        self,
        rewrite: Callable[..., tuple[Result, Job]],
        rng: np.random.Generator,
        what: str,
    ) -> None:
        """The same weights in another order, or inputs that are active each for itself."""
        result, job = rewrite(Groups(rng, shuffled=what == "weights"), shuffled=what == "data")
        assert result.code == 0
        assert job.report["summary"]["substructures"] <= 1


class TestBudgets:
    TWO = TEXT.replace("(float[N, 6] y)", "(float[N, 6] y, float[N, 6] z)").replace(
        "y = MatMul(cr, w2)", "y = MatMul(cr, w2)\n    z = Mul(y, y)"
    )

    @pytest.fixture
    def two(self, command: Command, rng: np.random.Generator, tmp_path: Path) -> Job:
        """A second output whose relative error is about twice the first one's."""
        model = onnx.parser.parse_model(self.TWO)
        model.graph.initializer.extend(faded(rng).graph.initializer)
        return Job(command, model, tmp_path)

    def test_each_output_has_its_own(
        self, two: Job, command: Command, rng: np.random.Generator
    ) -> None:
        x = normal(rng, 1000)
        assert two(x, "--budget", "0.5", "--output-budget", "y=1e-3").code == 0
        claim = two.report["claims"]["annealing"]
        assert claim["measure"] == "relative L2 error of output 'y'"
        assert claim["budget"] == 1e-3
        assert claim["outputs"]["z"]["relative_l2"] > claim["error"]
        stored = decomposition(onnx.load(two.output))
        assert stored["budgets"] == {"y": 1e-3}
        assert (
            command(
                "validate", two.source, two.output, "--inputs", two.data(normal(rng, 500))
            ).code
            == 0
        )

    def test_the_tightest_one_decides(self, two: Job, rng: np.random.Generator) -> None:
        result = two(normal(rng, 1000), "--output-budget", "z=1e-9", "--compensation", "none")
        assert "the relative L2 error of output 'z' would be" in result.last_line

    def test_of_an_output_that_is_not_there(self, two: Job, rng: np.random.Generator) -> None:
        result = two(normal(rng, 1000), "--output-budget", "w=1e-3")
        assert result.code == 2
        assert "'w': the model's outputs are 'y', 'z'" in result.err

    @pytest.mark.parametrize("value", ["y", "=1", "y=much", "y=-1"])
    def test_that_is_none(self, two: Job, rng: np.random.Generator, value: str) -> None:
        assert two(normal(rng, 100), "--output-budget", value).code == 2

    def test_top1_counts_answers(self, job: Job, rng: np.random.Generator) -> None:
        x = normal(rng, 1000)
        assert job(x, "--metric", "top1", "--budget", "0.02").last_line.startswith(
            "rewritten: "
        )
        claim = job.report["claims"]["annealing"]
        assert claim["measure"] == "share of other top-1 answers"
        assert 0 <= claim["error"] <= 0.02
        new = normal(rng, 2000)
        same = run(job.source, new).argmax(axis=1) == run(job.output, new).argmax(axis=1)
        assert same.mean() > 0.95


def test_validate_needs_the_metric_that_the_budget_is_of(
    job: Job, command: Command, rng: np.random.Generator
) -> None:
    assert job(normal(rng, 1000), "--metric", "top1", "--budget", "0.02").code == 0
    both = ("validate", job.source, job.output, "--inputs", job.data(normal(rng, 500)))
    checked = command(*both, "--metric", "top1", "--budget", "0.1")
    assert checked.code == 0, checked.err
    assert "share of other top-1 answers" in checked.out
    missing = command("validate", job.source, job.output, "--metric", "top1")
    assert missing.code == 2
    assert "--inputs" in missing.err


ROWS_BY_VALUE = """
<ir_version: 8, opset_import: ["" : 17]>
chosen (float[N, 16] x) => (float[N, 4] y)
{
    a = MatMul(x, w1)
    h = Relu(a)
    c = MatMul(h, w2)
    first = Slice(c, zero, one, last)
    flat = Reshape(first, long)
    some = Greater(flat, nothing)
    rows = Compress <axis = 0> (c, some)
    e = MatMul(rows, w3)
    f = Relu(e)
    g = MatMul(f, w4)
    mean = ReduceMean <axes = [0], keepdims = 1> (g)
    d = MatMul(c, w5)
    y = Add(d, mean)
}
"""
"""As many rows go on as have a first entry over nothing, which annealing may change."""

LOGARITHM = """
<ir_version: 8, opset_import: ["" : 17]>
logarithm (float[N, 16] x) => (float[N, 24] y)
{
    a = MatMul(x, w1)
    b = Add(a, b1)
    h = Relu(b)
    c = MatMul(h, w2)
    cc = Add(c, b2)
    l = Log(cc)
    e = MatMul(l, w3)
    f = Relu(e)
    y = MatMul(f, w4)
}
"""
"""The original's logarithms are of positive numbers; those of a model that lost units need not be."""


def with_tensors(text: str, **tensors: NDArray[Any]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(
        numpy_helper.from_array(
            array if array.dtype == np.int64 else array.astype(np.float32), name
        )
        for name, array in tensors.items()
    )
    return model


@pytest.mark.parametrize("form", ["rows", "logarithm"])
def test_a_proposal_that_changes_what_can_be_compared_costs_the_search_nothing(
    command: Command, rng: np.random.Generator, tmp_path: Path, form: str
) -> None:
    kinds = rng.normal(size=(16, 12)) / 4
    copies = kinds[:, rng.permutation(np.arange(96) % 12)] + 0.02 * rng.normal(size=(16, 96))
    if form == "rows":
        model = with_tensors(
            ROWS_BY_VALUE,
            w1=copies,
            w2=rng.normal(size=(96, 24)) / 10,
            w3=rng.normal(size=(24, 48)) / 5,
            w4=rng.normal(size=(48, 4)) / 7,
            w5=rng.normal(size=(24, 4)) / 5,
            zero=np.array([0]),
            one=np.array([1]),
            last=np.array([1]),
            long=np.array([-1]),
            nothing=np.array(0.0),
        )
    else:
        model = with_tensors(
            LOGARITHM,
            w1=copies,
            b1=rng.normal(size=96) / 4 - 1.2,
            w2=np.abs(rng.normal(size=(96, 24))) / 10,
            b2=np.full(24, 1e-3),
            w3=rng.normal(size=(24, 96)) / 5,
            w4=rng.normal(size=(96, 24)) / 10,
        )
    job = Job(command, model, tmp_path)
    told = job(
        rng.normal(size=(600, 16)).astype(np.float32),
        *("--budget", 0.3, "--proposals", "removal", "--annealing", "calibrated"),
    )
    assert told.code == 0, told.err
    assert re.search("remove", told.out)
