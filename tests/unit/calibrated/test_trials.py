from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.trials import Trials
from onnx_decompose.errors import OptionError
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import Samples, samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.metrics import Metric
from onnx_decompose.verification.verify import Inputs, measure_annealing

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
one (float[N, 6] x) => (float[N, 4] y)
{
    y = MatMul(x, w)
}
"""


def model(weight: NDArray[Any]) -> Model:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    return Model(proto)


class Case:
    """A model, one beside it, and samples in folds."""

    def __init__(self, rng: np.random.Generator, rows: int = 300) -> None:
        self.weight = rng.normal(size=(6, 4))
        self.original = model(self.weight)
        self.near = model(self.weight + 0.01 * rng.normal(size=(6, 4)))
        self.far = model(self.weight + 0.1 * rng.normal(size=(6, 4)))
        self.task = np.repeat([0, 1, 2], rows // 3)
        x = rng.normal(size=(rows, 6)).astype(np.float32)
        self.samples = samples_from_arrays(
            {"x": x, "task": self.task}, graph_inputs(self.original.proto)
        )

    def folds(self, count: int) -> list[Samples]:
        order = np.random.default_rng(0).permutation(self.samples.count)
        return [self.samples.take(np.sort(part)) for part in np.array_split(order, count)]

    def trials(self, folds: int, inputs: Inputs | None = None) -> Trials:
        return Trials(
            self.original, self.folds(folds), inputs or Inputs(), Provider.CPU, budget=0.05
        )


@pytest.fixture
def case(rng: np.random.Generator) -> Case:
    return Case(rng)


def per_task(inputs: Any, outputs: Any) -> dict[str, float]:
    return {
        f"task {task}": -float(np.abs(outputs["y"][inputs["task"] == task]).mean())
        for task in np.unique(inputs["task"])
    }


METRIC = Metric("tests:per_task", per_task)


class TestError:
    def test_is_that_of_claim_b_on_the_same_samples(self, case: Case) -> None:
        trials = case.trials(1)
        trial = trials.judge(trials.compare(0, case.near), 0.05)
        claim = measure_annealing(
            case.original,
            case.near,
            inputs=Inputs(case.samples),
            provider=Provider.CPU,
            budget=0.05,
        )
        assert trial.error == pytest.approx(claim.error, rel=1e-6)
        assert trial.measure == "relative L2 error"
        assert trial.error < trial.upper < 1.5 * trial.error

    def test_of_several_folds_is_that_of_all_samples(self, case: Case) -> None:
        one, four = case.trials(1), case.trials(4)
        blocks = [block for fold in range(4) for block in four.compare(fold, case.near)]
        whole = one.judge(one.compare(0, case.near), 0.05)
        assert four.judge(blocks, 0.05).error == pytest.approx(whole.error, rel=1e-6)

    def test_each_fold_counts_with_its_own_model(self, case: Case) -> None:
        trials = case.trials(2)
        mixed = trials.compare(0, case.near) + trials.compare(1, case.far)
        near = trials.compare(0, case.near) + trials.compare(1, case.near)
        far = trials.compare(0, case.far) + trials.compare(1, case.far)
        low, middle, high = (trials.judge(blocks, 0.05).error for blocks in (near, mixed, far))
        assert low < middle < high

    def test_the_one_with_the_least_room_decides(self, case: Case) -> None:
        broken = case.weight.copy()
        broken[:, 0] = 0
        trials = case.trials(1, Inputs(metric=METRIC))
        rng = np.random.default_rng(0)
        samples = case.samples
        # One task alone has inputs that the lost output answers to.
        rows = {"x": np.where(case.task[:, None] == 1, samples.rows["x"], 0).astype(np.float32)}
        rows["x"] += 1e-3 * rng.normal(size=rows["x"].shape).astype(np.float32)
        given = samples_from_arrays(
            {**rows, "task": case.task}, graph_inputs(case.original.proto)
        )
        trials = Trials(
            model(broken), [given], Inputs(metric=METRIC), Provider.CPU, budget=0.05
        )
        trial = trials.judge(trials.compare(0, case.original), 0.05)
        assert trial.measure == "drop of the metric of task 1"
        assert trial.hopeless
        assert trial.used > 1


class TestBounds:
    def test_one_fold_of_few_samples_is_wider_than_all_of_them(self, case: Case) -> None:
        trials = case.trials(10)
        blocks = [trials.compare(fold, case.near) for fold in range(10)]
        alone = trials.judge(blocks[0], 0.05)
        pooled = trials.judge([block for fold in blocks for block in fold], 0.05)
        assert alone.upper - alone.error > 2 * (pooled.upper - pooled.error)

    def test_a_task_of_a_single_sample_has_no_bound(self, case: Case) -> None:
        one = samples_from_arrays(
            {"x": case.samples.rows["x"][:40], "task": np.eye(1, 40, dtype=int)[0]},
            graph_inputs(case.original.proto),
        )
        trials = Trials(case.original, [one], Inputs(metric=METRIC), Provider.CPU, budget=10.0)
        trial = trials.judge(trials.compare(0, case.far), 0.05)
        assert trial.measure == "drop of the metric of task 1"
        assert trial.upper == np.inf

    def test_nothing_that_is_equal_fails(self, case: Case) -> None:
        trials = case.trials(1)
        trial = trials.judge(trials.compare(0, case.original), 0.05)
        assert (trial.error, trial.upper, trial.hopeless) == (0, 0, False)


def test_a_budget_for_an_output_that_is_not_there_is_refused(case: Case) -> None:
    trials = case.trials(1, Inputs(budgets={"z": 0.1}))
    with pytest.raises(OptionError, match="'z': the model's outputs are 'y'"):
        trials.judge(trials.compare(0, case.near), 0.05)
