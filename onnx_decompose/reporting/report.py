"""The report: what was found, decided, claimed and measured, as frozen dataclasses and as JSON with stable keys."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from onnx_decompose.model.model_io import writing

if TYPE_CHECKING:
    from pathlib import Path

    from onnx_decompose.passes.join_siblings import Joined
    from onnx_decompose.timing.bench import Timing
    from onnx_decompose.verification.verify import AnnealingClaim, StructuralClaim, Validation

__all__ = [
    "Alternative",
    "RefusedNode",
    "Report",
    "SiteReport",
    "Summary",
    "claims_json",
    "write_json",
]


@dataclasses.dataclass(frozen=True, slots=True)
class SiteReport:
    """One site.

    Attributes:
        name: the site.
        op_type: of its node.
        shape: (inputs, outputs).
        region: name of the region it belongs to.
        null: the null its entries were tested against, and where it came from.
        pi0: estimated share of entries that follow the null.
        pi0_interval: its confidence interval.
        density: share of supported entries.
        components: with at least one edge, of this site alone.
        isolated: inputs and outputs without any edge.
        sccs: strongly connected components of a square site, else None.
        layers: topological layers of their condensation, else None.
        decision: ``dense``, ``shrink``, ``split``, ``grouped``, ``triangular`` or ``shared``.
        reason: why.
        blocks: (inputs, outputs) of each block as it is stored: in a stack, with its padding.
        p_structure: how often the same entries shuffled give as much structure; None where it was not tested.
        kernel: sizes of a convolution's kernel, of which every input and output have one; none for a product.
    """

    name: str
    op_type: str
    shape: tuple[int, int]
    region: str
    null: str
    pi0: float
    pi0_interval: tuple[float, float]
    density: float
    components: int
    isolated: int
    sccs: int | None
    layers: int | None
    decision: str
    reason: str
    blocks: tuple[tuple[int, int], ...]
    p_structure: float | None
    kernel: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """Entries of the site's weight."""
        return math.prod((*self.shape, *self.kernel))

    @property
    def weights_after(self) -> int:
        """Entries that the rewritten site stores."""
        if self.decision == "dense":
            return self.weights
        blocks = sum(inputs * outputs for inputs, outputs in self.blocks)
        return blocks * math.prod(self.kernel)


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """The whole model in a few numbers; flops are those of one row, or one position, through every site."""

    sites: int
    rewritten: int
    substructures: int
    weights_before: int
    weights_after: int
    flops_before: int
    flops_after: int
    decomposable: bool
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Alternative:
    """What another null would give at the same criterion: predicted, not verified."""

    null: str
    criterion: str
    density: float
    substructures: int
    flops_after: int


@dataclasses.dataclass(frozen=True, slots=True)
class RefusedNode:
    """A node that looks like a site and was left alone."""

    node: str
    op_type: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Everything that ``analyze`` or ``rewrite`` found."""

    version: str
    model: str
    null: str
    criterion: str
    summary: Summary
    sites: tuple[SiteReport, ...]
    refused: tuple[RefusedNode, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    structural: StructuralClaim | None = None
    annealing: AnnealingClaim | None = None
    timing: Timing | None = None
    joined: tuple[Joined, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the keys that scripts rely on."""
        return {
            "version": self.version,
            "model": self.model,
            "null": self.null,
            "criterion": self.criterion,
            "summary": dataclasses.asdict(self.summary),
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "refused": [dataclasses.asdict(node) for node in self.refused],
            "alternatives": [dataclasses.asdict(other) for other in self.alternatives],
            "joined": [dataclasses.asdict(one) for one in self.joined],
            "claims": claims_json(self.structural, self.annealing),
            "timing": None if self.timing is None else self.timing.to_json(),
        }


def claims_json(
    structural: StructuralClaim | None, annealing: AnnealingClaim | None
) -> dict[str, Any]:
    """The ``claims`` part of a report; a claim that was not measured is None."""
    return {
        "structural": None
        if structural is None
        else {
            field.name: getattr(structural, field.name)
            for field in dataclasses.fields(structural)
            if field.name != "failed_case"  # arrays
        },
        "annealing": None
        if annealing is None
        else {
            "passed": annealing.passed,
            "error": annealing.error,
            "budget": annealing.budget,
            "data": annealing.data,
            "measure": annealing.measure,
            "outputs": {name: dataclasses.asdict(d) for name, d in annealing.outputs.items()},
        },
    }


def validation_json(version: str, model: str, validation: Validation) -> dict[str, Any]:
    """The report of ``validate``."""
    return {
        "version": version,
        "model": model,
        "passed": bool(validation),
        "bounds": [dataclasses.asdict(check) for check in validation.bounds],
        "reproducer": None if validation.reproducer is None else str(validation.reproducer),
        "claims": claims_json(validation.structural, validation.annealing),
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a report; JSON has no NaN or infinity, so they become null.

    Raises:
        OutputError: the path cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(
            json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", "utf-8"
        )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
