"""The two claims, kept apart.

Claim A, structural equivalence: the rewritten model is the annealed model. First proved on what is
stored (``proof``), then measured on outputs, where only the order of float additions may differ.

Claim B, annealing error: how far the rewritten model is from the original, on stated data, against a budget.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING

from onnx_decompose.errors import ModelError
from onnx_decompose.model.metadata import carry_the_same, read_decomposition
from onnx_decompose.model.tensors import graph_inputs, graph_outputs
from onnx_decompose.runtime.cases import is_large, open_model, runnable
from onnx_decompose.verification.claims import (
    AnnealingClaim,
    Inputs,
    StructuralClaim,
    Tolerance,
    Validation,
    rounding_of,
)
from onnx_decompose.verification.equivalence import measure_structural
from onnx_decompose.verification.metrics import DeviationAccumulator, MetricDrops, disagreements
from onnx_decompose.verification.proof import annealed_model, prove_structure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.metrics import Deviation


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
        if budget is None:
            inputs = dataclasses.replace(inputs, budgets=decomposition.budgets)
            budget = decomposition.budget
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
    measured = measure_structural(
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
    large = is_large(original)
    reference = open_model(original, provider, large=large)
    candidate = open_model(rewritten, provider, large=large)
    deviations = {spec.name: DeviationAccumulator() for spec in reference.outputs}
    drops = None if inputs.metric is None else MetricDrops(inputs.metric)
    typical = functools.partial(inputs.typical_cases, original)
    for case, expected in runnable(typical, reference):
        got = candidate.run(case.feeds)
        for name, accumulator in deviations.items():
            accumulator.update(expected[name], got[name])
        if drops is not None:
            drops.update({**case.feeds, **case.extras}, expected, got)
    outputs = {name: accumulator.result() for name, accumulator in deviations.items()}
    if drops is not None:
        error, measure, rounding = max(drops.result().values()), "drop of the metric", 0.0
    elif inputs.agreement:
        error = max(disagreements(outputs).values())
        measure, rounding = "share of other top-1 answers", 0.0
    else:
        # Two graphs that are equal in exact arithmetic still differ by the order of their additions.
        rounding = rounding_of(reference.outputs)
        error, measure, budget = _worst_output(outputs, inputs, budget, rounding)
    passed = bool(error <= max(budget, rounding))
    return AnnealingClaim(passed, float(error), budget, inputs.data, measure, outputs)


def _worst_output(
    outputs: Mapping[str, Deviation], inputs: Inputs, budget: float, rounding: float
) -> tuple[float, str, float]:
    """The error of the output that is nearest to its budget or farthest beyond it, what it is, and that budget."""
    allowed = inputs.allowed(outputs, budget)
    if not inputs.budgets:
        worst = max(deviation.relative_l2 for deviation in outputs.values())
        return worst, "relative L2 error", budget
    name = max(
        outputs,
        key=lambda name: outputs[name].relative_l2 / max(allowed[name], rounding, 1e-300),
    )
    return outputs[name].relative_l2, f"relative L2 error of output '{name}'", allowed[name]


def _check_interface(original: Model, rewritten: Model) -> None:
    for what, specs in (("inputs", graph_inputs), ("outputs", graph_outputs)):
        before = [(spec.name, spec.dtype) for spec in specs(original.proto)]
        after = [(spec.name, spec.dtype) for spec in specs(rewritten.proto)]
        if before != after:
            raise ModelError(
                f"{rewritten.label}: its {what} are not those of {original.label}; give two versions of one model"
            )
