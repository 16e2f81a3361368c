"""What calibrated annealing gives, what each part of it is worth, and on how few samples it breaks.

python -m tools.bench_calibrated deephme MODEL.onnx    budgets 1e-3 and 1e-5, judged on other inputs and distributions
python -m tools.bench_calibrated multitask             multitask_dense: every task's accuracy before and after, by seed
python -m tools.bench_calibrated ablate MODEL.onnx     removal at one price on a model with one input, parts left out
python -m tools.bench_calibrated ablate-multitask      the groups of multitask_dense, parts left out
python -m tools.bench_calibrated ablate-pictures MODEL.onnx --calibration A.npz --test B.npz [--level 0.03]
                                                       removal at one level on any classifier, parts left out
python -m tools.bench_calibrated control               multitask_dense with its weights, or its inputs, shuffled

MODEL.onnx: DeepHME/models/predict_quantiles3D_DL_v8/predict_quantiles3D_DL_v8_even.onnx of deephme==1.2.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from models.metrics import OUTPUT_SLOTS, task_accuracy, task_likelihood
from onnx_decompose.analysis.removal import removal_order
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.decay_proposals import decayed_units
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.removal_proposals import (
    PRICES,
    hidden_axes,
    readers_of,
    removed_units,
    without_units,
)
from onnx_decompose.calibrated.support_proposals import supported_groups
from onnx_decompose.errors import StructuralError
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.pipeline import rewrite
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import load_inputs, samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from onnx_decompose.runtime.samples import Samples

    Array = NDArray[np.float32]

MODELS = Path(__file__).parents[1] / "models"
CALIBRATION, TEST = 6000, 4000
PRICE = 10.0**-4.25
"""Of all weights, in shares of the variance that may be lost."""
GROUPS = "support(4 groups, 0.001 lost)"
SIZES = (3000, 1500, 1000, 800, 600, 500, 400, 300)


def report_deephme(path: Path, seeds: int) -> None:
    """Calibrated on normal inputs, judged on others and on other distributions."""
    (spec,) = graph_inputs(load_model(path).proto)
    width = int((spec.shape or (0, 0))[-1] or 0)
    print(
        "| seed | budget | chosen | weights left | claim B | speed-up at batch 256 | on other inputs |"
    )
    print("|---|---|---|---|---|---|---|")
    for seed in range(seeds):
        rng = np.random.default_rng(seed + 1)
        given = rng.standard_normal((CALIBRATION, width)).astype(np.float32)
        for budget in (1e-3, 1e-5):
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "normal.npz"
                np.savez(data, allow_pickle=False, **{spec.name: given})
                options = Options(calibration=data, budget=budget, batch=(256,), seed=seed)
                try:
                    made = rewrite(path, None, options)
                except StructuralError as error:
                    print(f"| {seed} | {budget:g} | {error} | | | | |", flush=True)
                    continue
            found = made.report
            left = found.summary.weights_after / found.summary.weights_before
            held = "-" if found.annealing is None else f"{found.annealing.error:.1e}"
            speed = "-" if found.timing is None else f"{found.timing.speedup:.1f}x"
            others = ", ".join(
                f"{name} {_relative_error(load_model(path), Model(made.model), spec.name, x):.1e}"
                for name, x in _others(rng, width)
            )
            print(
                f"| {seed} | {budget:g} | {found.criterion} | {left:.3f} | {held} | {speed} | {others} |",
                flush=True,
            )


def _others(rng: np.random.Generator, width: int) -> Iterator[tuple[str, Array]]:
    """Fresh inputs: the calibration's distribution first."""
    x = rng.standard_normal((TEST, width))
    mixing = rng.standard_normal((width, width)) / np.sqrt(width)
    for name, values in {
        "normal": x,
        "half as large": x / 2,
        "twice as large": 2 * x,
        "shifted by 1": x + 1,
        "uniform": rng.uniform(-(3**0.5), 3**0.5, x.shape),
        "heavy tails (t, 3 degrees)": rng.standard_t(3, x.shape) / 3**0.5,
        "correlated": x @ mixing,
    }.items():
        yield name, values.astype(np.float32)


def _relative_error(before: Model, after: Model, name: str, x: Array) -> float:
    """Largest relative L2 error of an output."""
    first, second = (open_model(m, Provider.CPU).run({name: x}) for m in (before, after))
    return max(
        float(np.linalg.norm(second[k] - first[k]) / np.linalg.norm(first[k])) for k in first
    )


def report_multitask(seeds: int, budget: float) -> None:
    """Every task's test accuracy by the seed of the split; the test samples are no calibration samples."""
    path = MODELS / "multitask_dense.onnx"
    print(
        "| seed | chosen | substructures | weights left | claim B | speed-up at batch 256 | test accuracy |"
    )
    print("|---|---|---|---|---|---|---|")
    print(f"| original | | | 1 | | | {_accuracies(load_model(path))} |")
    for seed in range(seeds):
        options = Options(
            calibration=MODELS / "multitask_dense_calibration.npz",
            metric="models.metrics:task_likelihood",
            budget=budget,
            batch=(256,),
            seed=seed,
        )
        made = rewrite(path, None, options)
        found = made.report
        held = "-" if found.annealing is None else f"{found.annealing.error:.4f}"
        speed = "-" if found.timing is None else f"{found.timing.speedup:.1f}x"
        left = found.summary.weights_after / found.summary.weights_before
        print(
            f"| {seed} | {found.criterion} | {found.summary.substructures} | {left:.3f} | {held} | {speed} "
            f"| {_accuracies(Model(made.model))} |",
            flush=True,
        )


def _accuracies(
    model: Model, metric: Callable[[Any, Any], dict[str, float]] = task_accuracy
) -> str:
    with np.load(MODELS / "multitask_dense_inputs.npz") as arrays:
        inputs = dict(arrays)
    outputs = open_model(model, Provider.CPU).run({"input": inputs["input"]})
    return " / ".join(f"{value:.4f}" for value in metric(inputs, outputs).values())


def report_ablation(path: Path) -> None:
    """Parts left out at one level, and fewer samples; errors on fresh normal inputs."""
    model = load_model(path)
    (spec,) = graph_inputs(model.proto)
    width = int((spec.shape or (0, 0))[-1] or 0)
    rng = np.random.default_rng(1)
    given, fresh = (
        rng.standard_normal((rows, width)).astype(np.float32) for rows in (CALIBRATION, TEST)
    )
    samples = samples_from_arrays({spec.name: given}, graph_inputs(model.proto))
    context = _context(model, samples)
    (family,) = removed_units(context)
    level = PRICES[::-1].index(PRICE)
    proposal = family.at(level)
    assert proposal is not None
    print(
        f"{proposal.name}\n\n| what | weights left | error on {TEST} fresh inputs |\n|---|---|---|"
    )

    def tell(name: str, context: CalibrationContext, proposal: Proposal) -> None:
        after = annealed_by(context.study, refitted(context, proposal))
        error = _relative_error(model, after, spec.name, fresh)
        print(f"| {name} | {_share_left(proposal):.3f} | {error:.1e} |", flush=True)

    for name, changed in _variants(context):
        tell(name, changed, proposal)
    tell("as many units of each layer, at random", context, _random_units(context, proposal))
    for decayed in (p for family in decayed_units(context) for p in family):
        if _share_left(decayed) > _share_left(proposal):
            tell(f"{decayed.name} in its place", context, decayed)
            break
    for rows in SIZES:
        fewer = _context(model, samples.take(np.arange(rows)))
        (family,) = removed_units(fewer)
        own = family.at(level)
        assert own is not None
        refusal = "; refused" if fewer.too_few() else ""
        tell(f"{rows} samples in all{refusal}", fewer, own)


def _share_left(proposal: Proposal) -> float:
    kept = sum(int(mask.sum()) for mask in proposal.masks.values())
    return kept / sum(mask.size for mask in proposal.masks.values())


def _random_units(context: CalibrationContext, proposal: Proposal) -> Proposal:
    """As many hidden units of each layer as ``proposal`` takes, others."""
    rng = context.rng
    axes = [axis for region in context.study.regions for axis in hidden_axes(context, region)]
    gone = {}
    for axis in axes:
        count = np.count_nonzero(~proposal.masks[axis.makers[0].name].any(axis=0))
        gone[axis] = rng.permutation(axis.size)[:count]
    return Proposal("random", without_units(gone))


def report_multitask_ablation() -> None:
    """Parts left out at one level of four groups; accuracy on the test samples."""
    model = load_model(MODELS / "multitask_dense.onnx")
    samples = load_inputs(MODELS / "multitask_dense_calibration.npz", graph_inputs(model.proto))
    context = _context(model, samples)
    proposal = _groups(context)
    print("| what | test accuracy | log-likelihood |\n|---|---|---|")
    print(f"| original | {_accuracies(model)} | {_accuracies(model, task_likelihood)} |")
    alike = dataclasses.replace(proposal, focus=None)
    dealt = {
        "hidden units to groups at random": _random_groups(alike, np.random.default_rng(0)),
        "inputs to groups at random too": _random_groups(
            alike, np.random.default_rng(0), inputs=True
        ),
    }
    for name, changed in _variants(context):
        print(f"| {name} | {_refitted_accuracies(changed, proposal)} |", flush=True)
    print(f"| all rows alike | {_refitted_accuracies(context, alike)} |", flush=True)
    plain = dataclasses.replace(context, neighbours=False)
    print(f"| without neighbours | {_refitted_accuracies(plain, proposal)} |", flush=True)
    for name, random in dealt.items():
        print(
            f"| all rows alike, {name} | {_refitted_accuracies(context, random)} |", flush=True
        )
    for rows in (400, 300, 200, 150, 100, 70):
        chosen = np.sort(np.random.default_rng(0).permutation(samples.count)[:rows])
        fewer = _context(model, samples.take(chosen))
        told = _refitted_accuracies(fewer, proposal)
        refusal = "; refused" if fewer.too_few() else ""
        try:
            found = _groups(fewer).focus
            groups = 0 if found is None else found.count
        except StopIteration:
            groups = 0
        print(
            f"| {rows} samples in all, {groups or 'not 4'} groups found in them{refusal} | {told} |",
            flush=True,
        )


def report_pictures_ablation(path: Path, calibration: Path, test: Path, level: float) -> None:
    """Parts left out at one level of removal; accuracy, likelihood and error of the first output on test samples."""
    model = load_model(path)
    samples = load_inputs(calibration, graph_inputs(model.proto))
    with np.load(test) as arrays:
        held = dict(arrays)
    feeds = {spec.name: held[spec.name] for spec in graph_inputs(model.proto)}
    before = _first_output(model, feeds)
    context = _context(model, samples)
    proposal = _removal(context, level)
    print(
        f"{proposal.name}\n\n| what | weights left | error | accuracy | log-likelihood |\n|---|---|---|---|---|"
    )

    def tell(name: str, after: Model, left: float) -> None:
        found = _first_output(after, feeds)
        error = np.linalg.norm(found - before) / np.linalg.norm(before)
        outputs = {"logits": found}
        accuracy, likelihood = (
            f(held, outputs)["all"] for f in (task_accuracy, task_likelihood)
        )
        print(
            f"| {name} | {left:.3f} | {error:.4f} | {accuracy:.4f} | {likelihood:.4f} |",
            flush=True,
        )

    def refit(name: str, context: CalibrationContext, proposal: Proposal) -> None:
        tell(
            name, annealed_by(context.study, refitted(context, proposal)), _share_left(proposal)
        )

    tell("original", model, 1.0)
    for name, changed in _variants(context):
        refit(name, changed, proposal)
    refit(
        "as many channels of each layer, at random", context, _random_units(context, proposal)
    )
    for rows in (200, 100, 60, 40):
        if rows < samples.count:
            fewer = _context(model, samples.take(np.arange(rows)))
            refusal = "; refused" if fewer.too_few() else ""
            refit(f"{rows} samples in all{refusal}", fewer, _removal(fewer, level))


def _removal(context: CalibrationContext, level: float) -> Proposal:
    """Without the units that go if the readers of each layer may lose ``level`` of their variance."""
    axes = [axis for region in context.study.regions for axis in hidden_axes(context, region)]
    gone = {axis: axis.within(removal_order(readers_of(context, axis)), level) for axis in axes}
    count, total = sum(units.size for units in gone.values()), sum(axis.size for axis in axes)
    return Proposal(f"remove({count} of {total} hidden units)", without_units(gone))


def _first_output(model: Model, feeds: dict[str, Array]) -> Array:
    found = open_model(model, Provider.CPU).run(feeds)
    return next(iter(found.values()))


def report_control() -> None:
    """What chance gives: every weight's entries in another order, or every input's samples.

    The budget is 0.2 of each task's own outputs, relative L2 against what the same model made of the same inputs.
    """
    rng = np.random.default_rng(0)
    model = load_model(MODELS / "multitask_dense.onnx")
    with np.load(MODELS / "multitask_dense_calibration.npz") as arrays:
        given = dict(arrays)
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(model.proto)
    for tensor in shuffled.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        mixed = rng.permutation(values.ravel()).reshape(values.shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array(mixed, tensor.name))
    columns = {**given, "input": rng.permuted(given["input"], axis=0)}
    print("| what | substructures | weights left | reason |\n|---|---|---|---|")
    for name, proto, data in (
        ("as it is", model.proto, given),
        ("shuffled weights", shuffled, given),
        ("shuffled inputs", model.proto, columns),
    ):
        run = open_model(Model(proto), Provider.CPU).run({"input": data["input"]})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "calibration.npz"
            np.savez(path, allow_pickle=False, **data, wanted=run["logits"])
            options = Options(
                annealing="calibrated",
                calibration=path,
                metric="tools.bench_calibrated:own_outputs",
                budget=0.2,
                batch=(256,),
                force=True,
            )
            summary = rewrite(proto, None, options).report.summary
        left = summary.weights_after / summary.weights_before
        reason = summary.reason.replace(folder, "...")
        print(f"| {name} | {summary.substructures} | {left:.3f} | {reason} |", flush=True)


def own_outputs(inputs: Any, outputs: Any) -> dict[str, float]:
    """Per task how far its outputs are from the model's own, relative L2, negative: needs no label."""
    found = {}
    for number, (name, slot) in enumerate(OUTPUT_SLOTS.items()):
        rows = inputs["task"] == number
        wanted = inputs["wanted"][rows, slot]
        error = np.linalg.norm(outputs["logits"][rows, slot] - wanted)
        found[name] = -float(error / (np.linalg.norm(wanted) or 1.0))
    return found


def _groups(context: CalibrationContext) -> Proposal:
    return next(p for family in supported_groups(context) for p in family if p.name == GROUPS)


def _random_groups(
    proposal: Proposal, rng: np.random.Generator, *, inputs: bool = False
) -> Proposal:
    """The same numbers of units in each group, other ones: hidden units are dealt anew, and the inputs where asked."""
    masks: dict[str, Any] = {}
    first, *_, last = proposal.masks
    order = np.arange(proposal.masks[first].shape[0])
    order = rng.permutation(order) if inputs else order
    for name, mask in proposal.masks.items():
        units = np.arange(mask.shape[1])
        columns = units if name == last else rng.permutation(units)
        masks[name], order = mask[np.ix_(order, columns)], columns
    return dataclasses.replace(proposal, masks=masks, focus=None)


def _refitted_accuracies(context: CalibrationContext, proposal: Proposal) -> str:
    after = annealed_by(context.study, refitted(context, proposal))
    return f"{_accuracies(after)} | {_accuracies(after, task_likelihood)}"


def _variants(context: CalibrationContext) -> Iterator[tuple[str, CalibrationContext]]:
    yield "all of it", context
    yield "without sequential update", dataclasses.replace(context, sequential=False)
    yield "means alone", dataclasses.replace(context, compensation="mean")
    yield "without refit", dataclasses.replace(context, compensation="none")


def _context(model: Model, samples: Samples) -> CalibrationContext:
    return CalibrationContext(study_model(model), split_samples(samples, 0), Provider.CPU)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "question",
        choices=[
            "deephme",
            "multitask",
            "ablate",
            "ablate-multitask",
            "ablate-pictures",
            "control",
        ],
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.02, help="of multitask")
    parser.add_argument("--calibration", type=Path, help="of ablate-pictures")
    parser.add_argument("--test", type=Path, help="of ablate-pictures")
    parser.add_argument("--level", type=float, default=0.03, help="of ablate-pictures")
    options = parser.parse_args()
    if options.question == "deephme":
        report_deephme(options.model, options.seeds)
    elif options.question == "multitask":
        report_multitask(options.seeds, options.budget)
    elif options.question == "ablate":
        report_ablation(options.model)
    elif options.question == "ablate-multitask":
        report_multitask_ablation()
    elif options.question == "ablate-pictures":
        report_pictures_ablation(
            options.model, options.calibration, options.test, options.level
        )
    else:
        report_control()


if __name__ == "__main__":
    _main()
