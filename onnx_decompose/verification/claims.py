"""The two claims as results, what they are measured on, and the tolerance that a user may give."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.errors import OptionError
from onnx_decompose.runtime.cases import OTHER_SIZES, made_up_cases, sample_cases

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.model.tensors import TensorSpec
    from onnx_decompose.runtime.cases import Case
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.verification.metrics import Deviation, Metric

__all__ = [
    "AnnealingClaim",
    "BoundCheck",
    "Inputs",
    "StructuralClaim",
    "Tolerance",
    "Validation",
    "rounding_of",
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


def rounding_of(outputs: Sequence[TensorSpec]) -> float:
    """The relative L2 error that rounding alone can make of a model's outputs."""
    return max(_ROUNDING.get(spec.dtype.name, 0.0) for spec in outputs)


@dataclasses.dataclass(frozen=True, slots=True)
class StructuralClaim:
    """Claim A.

    Attributes:
        passed: whether it holds.
        reason: what was proved, or what failed first.
        sites: rewritten sites whose weights were rebuilt.
        cases: sets of inputs whose outputs were compared.
        error: largest deviation of an output, relative to its largest entry.
        reference: what says how far apart the outputs may be.
        annealed_error: largest error of the annealed model against the float64 reference, relative as ``error``; None
            where there is no reference.
        rewritten_error: the same of the rewritten model.
        repeatable: whether a second run of the rewritten model gave the same bytes; None if nothing was run.
        tf32_error: on CUDA, the largest deviation with TF32 on; the gate itself has it off.
        failed_case: inputs on which it failed first, for a reproducer.
    """

    passed: bool
    reason: str
    sites: int
    cases: int
    error: float
    reference: str = ""
    annealed_error: float | None = None
    rewritten_error: float | None = None
    repeatable: bool | None = None
    tf32_error: float | None = None
    failed_case: Case | None = dataclasses.field(default=None, repr=False)

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


@dataclasses.dataclass(frozen=True, slots=True)
class BoundCheck:
    """One part of the models against the running error bound of ``analysis.rounding_bound``.

    Attributes:
        value: what it makes.
        sites: the sites in it.
        bound: largest error that theory allows, relative to the value's largest entry.
        annealed: largest error of the annealed model as a share of what is allowed of that entry.
        rewritten: the same of the rewritten model.
    """

    value: str
    sites: tuple[str, ...]
    bound: float
    annealed: float
    rewritten: float


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """Both claims; true if both hold.

    Attributes:
        structural: claim A; None for a model that this tool did not rewrite.
        annealing: claim B.
        reproducer: folder with the smallest parts that show why claim A fails, where one was asked for and made.
        bounds: errors of rewritten sites against a bound from theory: for information, where it was asked for.
    """

    structural: StructuralClaim | None
    annealing: AnnealingClaim
    reproducer: Path | None = None
    bounds: tuple[BoundCheck, ...] = ()

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
        if self.reproducer is not None:
            faults.append(f"see {self.reproducer}")
        return "; ".join(faults)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What claims are measured on.

    Attributes:
        samples: the user's inputs, if any.
        seeds: random draws at each size, for claim A always and for claim B without ``samples``.
        seed: of the random draws.
        metric: the user's metric on (inputs, outputs), higher is better; None for the relative L2 error.
        agreement: measure claim B by how often the largest entry of an output's row stays at its place.
        budgets: bounds of claim B by output name, where they are not the common one; without a metric.
        part: what ``samples`` are of the user's inputs, where they are not all of them.
    """

    samples: Samples | None = None
    seeds: int = 3
    seed: int = 0
    metric: Metric | None = None
    agreement: bool = False
    budgets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    part: str = ""

    @property
    def data(self) -> str:
        """How reports call the data of claim B."""
        if self.samples is None:
            return f"random inputs (seed {self.seed}), not real ones"
        return f"{self.samples.source} ({self.part or f'{self.samples.count} samples'})"

    def allowed(self, outputs: Collection[str], budget: float) -> dict[str, float]:
        """The bound of each output's error, ``budget`` where it has none of its own.

        Raises:
            OptionError: a budget is for an output that is not there.
        """
        unknown = self.budgets.keys() - set(outputs)
        if unknown:
            raise OptionError(
                f"output budget for {min(unknown)!r}: the model's outputs are {', '.join(map(repr, outputs))}"
            )
        return {name: self.budgets.get(name, budget) for name in outputs}

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
            yield from sample_cases(model.proto, self.samples)

    def typical_cases(
        self, model: Model, other: tuple[int, ...] = OTHER_SIZES[0]
    ) -> Iterator[Case]:
        """The cases that claim B is measured on: the user's, or the made-up ones that are no extremes."""
        return (case for case in self.cases(model, other) if case.typical)
