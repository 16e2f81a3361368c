"""The whole job on the bundled models: analyze, rewrite, validate, bench, and what the tasks' accuracy says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onnx_decompose.console import show_claims, show_report, show_timing
from onnx_decompose.errors import ClaimError, InputError
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.pipeline import analyze, bench, rewrite, validate
from onnx_decompose.reporting.report import write_json
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import resolve_provider
from onnx_decompose.verification.metrics import load_metric

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

__all__ = ["run_demo"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One bundled model, what fits it, and what its claim B measures: relative L2 errors without a metric.

    Attributes:
        model: its name.
        null: of the weights; ``auto`` leaves it to the calibration samples.
        told: what it is.
        metric: of ``metrics.py`` beside the models, for the rewrite.
        budget: of the rewrite.
        batch: the sizes that it is to be fast at.
    """

    model: str
    null: str
    told: str
    metric: str | None = None
    budget: float = 0.01
    batch: tuple[int, ...] = (1, 16, 256)


_JOBS = (
    _Job(
        "multitask_sparse",
        "zero",
        "one MLP for four data sets, trained until the tasks fell apart",
    ),
    _Job(
        "digits_mlp",
        "recorded",
        "handwritten digits, tested against the recorded initialization",
    ),
    _Job(
        "multitask_dense",
        "auto",
        "one MLP for four data sets, trained as usual: taken apart by what is active together",
        "task_likelihood",
        0.02,
        (256,),
    ),
)


def run_demo(models: Path, output: Path, console: Console) -> None:
    """Analyze, rewrite, validate and time each bundled model.

    Args:
        models: the folder with the bundled models and their test inputs.
        output: where models and reports go.
        console: where to show them.

    Raises:
        InputError: the models are not there.
        ClaimError: a rewritten model does not pass ``validate``.
    """
    if not (models / f"{_JOBS[0].model}.onnx").is_file():
        raise InputError(
            f"{models}: does not hold the bundled models; run in a checkout, or give --models FOLDER"
        )
    output.mkdir(parents=True, exist_ok=True)
    for job in _JOBS:
        _run(job, models, output, console)


def _run(job: _Job, models: Path, output: Path, console: Console) -> None:
    original, inputs = models / f"{job.model}.onnx", models / f"{job.model}_inputs.npz"
    rewritten = output / f"{job.model}.onnx"
    metrics = f"{models.name}.metrics"
    options = Options(
        null=job.null,
        calibration=models / f"{job.model}_calibration.npz",
        metric=None if job.metric is None else f"{metrics}:{job.metric}",
        budget=job.budget,
        batch=job.batch,
    )
    console.rule(f"{job.model}: {job.told}")
    found = analyze(original, options)
    console.print(f"analyze: {found.summary.reason}", soft_wrap=True)
    result = rewrite(original, rewritten, options)
    write_json(result.report.to_json(), output / f"{job.model}.json")
    show_report(result.report, console)
    if not result.report.summary.decomposable:
        console.print(
            f"rewrite: kept as it was: {result.report.summary.reason}", soft_wrap=True
        )
        return
    console.print("validate, from the two files alone:")
    validation = validate(
        original,
        rewritten,
        inputs=inputs,
        metric=f"{metrics}:accuracy" if job.metric else None,
        budget=0.01 if job.metric else None,
    )
    show_claims(validation.structural, validation.annealing, console)
    if not validation:
        raise ClaimError(f"{rewritten}: {validation.failure}")
    console.print("bench:")
    show_timing(bench(original, rewritten, inputs=inputs), console)
    before, after = (_accuracies(path, inputs, models) for path in (original, rewritten))
    for task, accuracy in before.items():
        console.print(
            f"accuracy on the test split, {task}: {accuracy:.4f} -> {after[task]:.4f}"
        )


def _accuracies(model: Path, inputs: Path, models: Path) -> dict[str, float]:
    """Accuracy of each of the model's tasks, by the metric that comes with the models."""
    metric = load_metric(f"{models.name}.metrics:task_accuracy")
    loaded = load_model(model)
    samples = load_inputs(inputs, graph_inputs(loaded.proto))
    session = open_model(loaded, resolve_provider("auto"))
    feeds, extras = next(samples.batches(samples.count))
    return metric.values({**feeds, **extras}, session.run(feeds))
