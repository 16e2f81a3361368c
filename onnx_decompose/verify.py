"""The two claims, kept apart.

Claim A, structural equivalence: the rewritten model is the annealed model. First proved on what is
stored (``proof``), then measured on outputs, where only the order of float additions may differ.

Claim B, annealing error: how far the rewritten model is from the original, on stated data, against a budget.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.cases import (
    OTHER_SIZES,
    made_up_cases,
    open_model,
    runnable,
    sample_cases,
)
from onnx_decompose.errors import DataError, ModelError, OptionError
from onnx_decompose.metadata import carry_the_same, read_decomposition
from onnx_decompose.metrics import DeviationAccumulator
from onnx_decompose.proof import annealed_model, prove_structure
from onnx_decompose.tensors import graph_inputs, graph_outputs, is_float

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.cases import Case
    from onnx_decompose.feeds import Feeds
    from onnx_decompose.metrics import Deviation, Metric
    from onnx_decompose.model_io import Model
    from onnx_decompose.samples import Samples
    from onnx_decompose.sessions import Provider, Session


logger = logging.getLogger(__name__)

__all__ = [
    "AnnealingClaim",
    "Inputs",
    "StructuralClaim",
    "Tolerance",
    "Validation",
    "measure_annealing",
    "structural_claim",
    "validate_models",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest deviation between two outputs: ``atol + rtol * max |reference|``.

    Relative to the output's own size, so that neither tiny nor large outputs make a false verdict.
    """

    rtol: float
    atol: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: one is negative or NaN.
        """
        if not (self.rtol >= 0 and self.atol >= 0):
            raise OptionError(
                f"tolerances rtol {self.rtol} and atol {self.atol} must not be negative"
            )

    @classmethod
    def for_dtype(cls, dtype: np.dtype[Any]) -> Tolerance:
        """What onnxruntime's own tests allow, taken relative to the output's size."""
        return _TOLERANCES.get(dtype.name, Tolerance(0.0))


_TOLERANCES = {
    "float64": Tolerance(1e-10),
    "float32": Tolerance(1e-4),
    "float16": Tolerance(1e-2),
    "bfloat16": Tolerance(5e-2),
}

_ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""Relative L2 error that float additions in another order can make: no budget can be held below it."""


_LAST_BITS = 4.0
"""Deviation allowed of an output over its own when the last bits of the inputs move: additions in another order were
measured to make up to 4.0 of that (the models of tools/bench_recurrent.py, 64 steps, inputs of 1e-5, 1 and 1e3)."""

_DRAWS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class StructuralClaim:
    """Claim A.

    Attributes:
        passed: whether it holds.
        reason: what was proved, or what failed first.
        sites: rewritten sites whose weights were rebuilt.
        cases: sets of inputs whose outputs were compared.
        error: largest deviation of an output, relative to its largest entry.
    """

    passed: bool
    reason: str
    sites: int
    cases: int
    error: float

    def __bool__(self) -> bool:
        return self.passed


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AnnealingClaim:
    """Claim B.

    Attributes:
        passed: whether the error is within the budget.
        error: largest relative L2 error of an output, or the metric's drop.
        budget: its bound.
        data: what it was measured on.
        measure: what ``error`` is.
        outputs: deviation of each output.
    """

    passed: bool
    error: float
    budget: float
    data: str
    measure: str
    outputs: Mapping[str, Deviation]

    def __bool__(self) -> bool:
        return self.passed


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """Both claims; true if both hold. ``structural`` is None for a model that this tool did not rewrite."""

    structural: StructuralClaim | None
    annealing: AnnealingClaim

    def __bool__(self) -> bool:
        return (self.structural is None or self.structural.passed) and self.annealing.passed

    @property
    def failure(self) -> str:
        """What does not hold, in one line; empty where both claims hold."""
        faults: list[str] = []
        if self.structural is not None and not self.structural:
            faults.append(f"claim A does not hold: {self.structural.reason}")
        if not self.annealing:
            claim = self.annealing
            faults.append(
                f"claim B does not hold: {claim.measure} {claim.error:.3g} against a budget of {claim.budget:g} "
                f"on {claim.data}"
            )
        return "; ".join(faults)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What claims are measured on.

    Attributes:
        samples: the user's inputs, if any.
        seeds: random draws at each size, for claim A always and for claim B without ``samples``.
        seed: of the random draws.
        metric: the user's metric on (inputs, outputs), higher is better; None for the relative L2 error.
        part: what ``samples`` are of the user's inputs, where they are not all of them.
    """

    samples: Samples | None = None
    seeds: int = 3
    seed: int = 0
    metric: Metric | None = None
    part: str = ""

    @property
    def data(self) -> str:
        """How reports call the data of claim B."""
        if self.samples is None:
            return f"random inputs (seed {self.seed}), not real ones"
        return f"{self.samples.source} ({self.part or f'{self.samples.count} samples'})"

    def cases(self, model: Model, other: tuple[int, ...] = OTHER_SIZES[0]) -> Iterator[Case]:
        """Made-up cases, then the user's; claim B is measured on the user's alone where there are any.

        Args:
            model: the model.
            other: sizes of the dynamic axes that are not the batch, in the made-up cases.
        """
        rng = np.random.default_rng(self.seed)
        made_up = made_up_cases(model.proto, seeds=self.seeds, rng=rng, other=other)
        for case in made_up:
            yield dataclasses.replace(case, typical=case.typical and self.samples is None)
        if self.samples is not None:
            yield from sample_cases(self.samples)


def validate_models(
    original: Model,
    rewritten: Model,
    *,
    inputs: Inputs,
    provider: Provider,
    budget: float | None = None,
    tolerance: Tolerance | None = None,
) -> Validation:
    """Check both claims of a rewritten model, or only claim B where it carries no decomposition but an earlier one.

    Args:
        original: the model before the rewrite.
        rewritten: the model to check.
        inputs: what to measure on.
        provider: where to run.
        budget: bound of claim B; by default the one in the rewritten model's metadata, else 0.01.
        tolerance: for claim A's outputs; by default each output's type decides.

    Raises:
        ModelError: the two models have different inputs or outputs, or one does not run.
    """
    _check_interface(original, rewritten)
    decomposition = read_decomposition(rewritten.proto, rewritten.label)
    structural = None
    # What was rewritten before and then left alone says nothing of these two.
    if decomposition is not None and not carry_the_same(original.proto, rewritten.proto):
        structural = structural_claim(
            original, rewritten, inputs=inputs, provider=provider, tolerance=tolerance
        )
    if decomposition is not None:
        budget = decomposition.budget if budget is None else budget
    annealing = measure_annealing(
        original,
        rewritten,
        inputs=inputs,
        provider=provider,
        budget=0.01 if budget is None else budget,
    )
    return Validation(structural, annealing)


def structural_claim(
    original: Model,
    rewritten: Model,
    *,
    inputs: Inputs,
    provider: Provider,
    tolerance: Tolerance | None = None,
) -> StructuralClaim:
    """Claim A: weights rebuilt bit for bit, then outputs compared with the annealed model that they make.

    Raises:
        ModelError: ``rewritten`` carries no decomposition, or one of another model.
    """
    decomposition = read_decomposition(rewritten.proto, rewritten.label)
    if decomposition is None:
        raise ModelError(
            f"{rewritten.label}: was not rewritten by onnx-decompose; only claim B can be checked"
        )
    fault, weights, biases = prove_structure(original, rewritten, decomposition)
    if fault is not None:
        return StructuralClaim(False, fault, 0, 0, float("nan"))
    annealed = annealed_model(original, decomposition, weights, biases)
    measured = _measure_structural(
        annealed, rewritten, inputs=inputs, provider=provider, tolerance=tolerance
    )
    count = len(decomposition.sites)
    what = f"{count} weights"
    if biases:
        what += f" and {len(biases)} bias{'es' if len(biases) > 1 else ''}"
    proved = f"{what} rebuilt bit for bit; " if count else ""
    return dataclasses.replace(measured, reason=proved + measured.reason, sites=count)


def measure_annealing(
    original: Model, rewritten: Model, *, inputs: Inputs, provider: Provider, budget: float
) -> AnnealingClaim:
    """Claim B: the rewritten (or annealed) model against the original on the typical cases."""
    reference = open_model(original, provider)
    candidate = open_model(rewritten, provider)
    deviations = {spec.name: DeviationAccumulator() for spec in reference.outputs}
    scores: list[tuple[Feeds, Feeds, Feeds]] = []
    for case, expected in runnable(functools.partial(inputs.cases, original), reference):
        if not case.typical:
            continue
        got = candidate.run(case.feeds)
        for name, accumulator in deviations.items():
            accumulator.update(expected[name], got[name])
        if inputs.metric is not None:
            scores.append(({**case.feeds, **case.extras}, expected, got))
    outputs = {name: accumulator.result() for name, accumulator in deviations.items()}
    if inputs.metric is None:
        error = max(deviation.relative_l2 for deviation in outputs.values())
        measure = "relative L2 error"
    else:
        error = _metric_drop(inputs.metric, scores)
        measure = "drop of the metric"
    # Two graphs that are equal in exact arithmetic still differ by the order of their additions.
    rounding = (
        0.0
        if inputs.metric
        else max(_ROUNDING.get(s.dtype.name, 0.0) for s in reference.outputs)
    )
    passed = bool(error <= max(budget, rounding))
    return AnnealingClaim(passed, float(error), budget, inputs.data, measure, outputs)


def _measure_structural(
    annealed: Model,
    rewritten: Model,
    *,
    inputs: Inputs,
    provider: Provider,
    tolerance: Tolerance | None = None,
) -> StructuralClaim:
    """Compare the outputs of the annealed and the rewritten model on every case."""
    reference = open_model(annealed, provider)
    candidate = open_model(rewritten, provider)
    worst, cases, failure = 0.0, 0, None
    sizes: dict[str, float] = {}
    for case, expected in runnable(functools.partial(inputs.cases, annealed), reference):
        cases += 1
        got = candidate.run(case.feeds)
        for name, value in expected.items():
            error, allowed = _deviation(value, got[name], tolerance)
            if case.typical:
                sizes[name] = max(sizes.get(name, 0.0), _largest(value))
            if not error <= allowed and tolerance is None:
                least = max(
                    _sensitivity(reference, case, name, value),
                    _last_bit(value, sizes.get(name, 0.0)),
                )
                allowed = max(allowed, _LAST_BITS * least)
            if not error <= allowed and failure is None:
                failure = f"output '{name}' deviates by {error:.3g} (allowed {allowed:.3g}) on {case.label}"
            worst = max(worst, error) if np.isfinite(error) else float("inf")
    reason = failure or f"outputs agree to {worst:.2g} of their size on {cases} sets of inputs"
    return StructuralClaim(failure is None, reason, 0, cases, worst)


def _sensitivity(session: Session, case: Case, name: str, expected: NDArray[Any]) -> float:
    """How far an output moves, relative to its largest entry, when the last bits of the inputs do; 0 if that is NaN.

    A recurrent operator carries what it rounds from step to step, and a saturated activation is of size 1 however large
    the sums are that it is given: no order of additions is better than this.
    """
    rng = np.random.default_rng(0)
    moved = 0.0
    for _ in range(_DRAWS):
        feeds = {
            key: np.nextafter(
                values, rng.choice([-np.inf, np.inf], values.shape).astype(values.dtype)
            )
            if is_float(values.dtype)
            else values
            for key, values in case.feeds.items()
        }
        error, _ = _deviation(expected, session.run(feeds)[name], None)
        moved = max(moved, error) if np.isfinite(error) else moved
    return moved


def _last_bit(value: NDArray[Any], size: float) -> float:
    """The last bit of numbers of this ``size``, relative to the largest entry of ``value``, or as it is if that is 0.

    Terms that cancel, as in what is left of equal units without their mean, leave the rounding of the terms.
    """
    if not is_float(value.dtype):
        return 0.0
    one = np.ones((), value.dtype)
    last_bit = float(np.nextafter(one, one + one) - one) * size
    return last_bit / (_largest(value) or 1.0)


def _largest(value: NDArray[Any]) -> float:
    """The largest finite magnitude."""
    sizes = np.abs(value.astype(np.float64))
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))


def _deviation(
    reference: NDArray[Any], other: NDArray[Any], tolerance: Tolerance | None
) -> tuple[float, float]:
    """Largest deviation relative to the reference's largest entry, and what is allowed of it."""
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf"), 0.0
    if not is_float(reference.dtype):
        return (0.0 if np.array_equal(reference, other) else float("inf")), 0.0
    allowed = tolerance or Tolerance.for_dtype(reference.dtype)
    first, second = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(first)
    if not np.array_equal(first[~finite], second[~finite], equal_nan=True):
        return float("inf"), 0.0
    if not finite.any():
        return 0.0, 0.0
    size = float(np.abs(first[finite]).max())
    error = float(np.abs(first[finite] - second[finite]).max())
    if not size:
        return error, allowed.atol
    return error / size, allowed.rtol + allowed.atol / size


def _metric_drop(metric: Metric, scores: list[tuple[Feeds, Feeds, Feeds]]) -> float:
    """How much lower the metric is for the second set of outputs, the one that drops most of several.

    Metrics see all samples at once.
    """
    inputs = _joined([inputs for inputs, _, _ in scores])
    before = metric.values(inputs, _joined([outputs for _, outputs, _ in scores]))
    after = metric.values(inputs, _joined([outputs for _, _, outputs in scores]))
    if before.keys() != after.keys():
        raise DataError(
            f"metric {metric.name}: gave {sorted(before)} and then {sorted(after)} on the same inputs; "
            "give the same names"
        )
    return max(before[name] - after[name] for name in before)


def _joined(parts: list[Feeds]) -> Feeds:
    if len(parts) == 1:
        return parts[0]
    return {
        name: np.concatenate([part[name] for part in parts])
        if parts[0][name].ndim
        else parts[0][name]
        for name in parts[0]
    }


def _check_interface(original: Model, rewritten: Model) -> None:
    for what, specs in (("inputs", graph_inputs), ("outputs", graph_outputs)):
        before = [(spec.name, spec.dtype) for spec in specs(original.proto)]
        after = [(spec.name, spec.dtype) for spec in specs(rewritten.proto)]
        if before != after:
            raise ModelError(
                f"{rewritten.label}: its {what} are not those of {original.label}; give two versions of one model"
            )
