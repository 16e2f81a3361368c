"""The two claims, kept apart.

Claim A, structural equivalence: the rewritten model is the annealed model. First proved on the weights (rebuilt from
blocks and permutations they equal the annealed ones bit for bit), then measured on outputs, where only the order
of float additions may differ.

Claim B, annealing error: how far the rewritten model is from the original, on stated data, against a budget.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.recurrence import CELLS
from onnx_decompose.biases import find_biases
from onnx_decompose.cases import (
    OTHER_SIZES,
    made_up_cases,
    open_model,
    runnable,
    sample_cases,
)
from onnx_decompose.constants import Constants
from onnx_decompose.errors import ModelError, OptionError
from onnx_decompose.metadata import Decomposition, digest, read_decomposition
from onnx_decompose.metrics import DeviationAccumulator
from onnx_decompose.model_io import Model, read_tensor
from onnx_decompose.passes.recurrent import ReplaceRecurrentWeights
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.splice import ORIGIN_KEY
from onnx_decompose.rearranged import Rearranged
from onnx_decompose.recurrent import RecurrentWeight, find_recurrent
from onnx_decompose.sites import Site, find_sites, site_weight
from onnx_decompose.tensors import graph_inputs, graph_outputs, is_float

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.cases import Case
    from onnx_decompose.feeds import Feeds
    from onnx_decompose.metadata import Block, SiteBlocks
    from onnx_decompose.metrics import Deviation, Metric
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
    "prove_structure",
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
    """

    samples: Samples | None = None
    seeds: int = 3
    seed: int = 0
    metric: Metric | None = None

    @property
    def data(self) -> str:
        """How reports call the data of claim B."""
        if self.samples is None:
            return f"random inputs (seed {self.seed}), not real ones"
        return f"{self.samples.source} ({self.samples.count} samples)"

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
    """Check both claims of a rewritten model, or only claim B where it carries no decomposition.

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
    if decomposition is not None:
        structural = structural_claim(
            original, rewritten, inputs=inputs, provider=provider, tolerance=tolerance
        )
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
    annealed = _annealed(original, decomposition, weights, biases)
    measured = _measure_structural(
        annealed, rewritten, inputs=inputs, provider=provider, tolerance=tolerance
    )
    count = len(decomposition.sites)
    what = f"{count} weights"
    if biases:
        what += f" and {len(biases)} bias{'es' if len(biases) > 1 else ''}"
    proved = f"{what} rebuilt bit for bit; " if count else ""
    return dataclasses.replace(measured, reason=proved + measured.reason, sites=count)


def prove_structure(
    original: Model, rewritten: Model, decomposition: Decomposition
) -> tuple[str | None, dict[Site | RecurrentWeight, NDArray[Any]], dict[Site, NDArray[Any]]]:
    """Rebuild every rewritten weight and folded bias from its blocks and compare bit for bit, before anything runs.

    Returns:
        What is wrong first, or None; and by site of the original the annealed weights, (K, N) each, and the biases,
        (N,) each, that are not the original's.
    """
    constants = Constants(original)
    sites = {site.name: site for site in find_sites(original, constants)[0]}
    cells, _ = find_recurrent(original, constants)
    recurrent = {weight.name: weight for cell in cells for weight in cell.all_weights}
    stored = {tensor.name: tensor for tensor in rewritten.proto.graph.initializer}
    fault: str | None = None
    weights: dict[Site | RecurrentWeight, NDArray[Any]] = {}
    used: dict[str, NDArray[np.bool_]] = {}
    biases: dict[Site, NDArray[Any]] = {}
    places = find_biases(
        original.proto.graph, sites.values(), constants, _absorbed(decomposition)
    )
    for name, blocks in decomposition.sites.items():
        site = sites.get(name) or recurrent.get(name)
        if site is None or site.shape != blocks.shape:
            raise ModelError(
                f"{rewritten.label}: was not made from {original.label}: it has no site '{name}' of shape "
                f"{list(blocks.shape)}; give the model that was rewritten"
            )
        weight = (
            site.array if isinstance(site, RecurrentWeight) else site_weight(site, constants)
        )
        before = places[name].scaled(weight) if isinstance(site, Site) else weight
        rest = np.zeros_like(before)
        reason, rebuilt = _rebuild(rewritten, stored, blocks.blocks, rest, used)
        if rebuilt is None:
            return f"site '{name}': {reason}", weights, biases
        fault = fault or reason or _compare_weights(blocks, before, rebuilt)
        if blocks.absorbed is not None or not np.array_equal(rebuilt, weight):
            weights[site] = rebuilt
        if blocks.bias is None or isinstance(site, RecurrentWeight):
            continue
        held = places[name].stored(0.0, before.dtype)
        reason, row = _rebuild(rewritten, stored, blocks.bias.blocks, held[None, :])
        if row is None:
            return f"site '{name}': {reason}", weights, biases
        if digest(row[0]) != blocks.bias.sha256:
            reason = f"site '{name}': the bias rebuilt from its blocks is not the annealed bias"
        fault = fault or reason
        biases[site] = row[0]
    fault = fault or _foreign_entries(rewritten, stored, used)
    fault = fault or _compare_reordered(rewritten, stored, decomposition, constants)
    fault = fault or _compare_constants(
        rewritten, stored, decomposition, Rearranged(original, constants)
    )
    changed = _changed_tensor(original, rewritten)
    if fault is None and changed is not None:
        fault = f"tensor '{changed}', which was not rewritten, is not the original's"
    return fault or _changed_node(original, rewritten), weights, biases


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


def _compare_reordered(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    decomposition: Decomposition,
    constants: Constants,
) -> str | None:
    """Constants whose units are in another order must hold the original's entries, bit for bit."""
    for name, constant in decomposition.reordered.items():
        if name not in stored or constant.source not in constants:
            return f"constant '{constant.source}' or its reordered form '{name}' is missing"
        found = read_tensor(model, stored[name])
        try:
            wanted = constant.apply(constants.array(constant.source))
        except ValueError as error:
            return f"constant {error}"
        if found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
            return f"constant '{constant.source}': its reordered form '{name}' is not the original's"
    return None


def _compare_constants(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    decomposition: Decomposition,
    constants: Rearranged,
) -> str | None:
    """Constants that rewritten operators read in parts must hold the original's entries, bit for bit."""
    for name, constant in decomposition.constants.items():
        if name not in constants:
            return f"constant '{name}' is missing from the original"
        array = np.atleast_1d(constants.array(name))
        rows = math.prod(array.shape[:-1])
        if rows != constant.shape[0] or array.shape[-1] not in {1, constant.shape[1]}:
            return f"constant '{name}' has another shape"
        wanted = np.broadcast_to(array.reshape(rows, -1), constant.shape)
        for block in constant.blocks:
            tensor = stored.get(block.initializer)
            if tensor is None:
                return f"constant '{name}': its part '{block.initializer}' is missing"
            try:
                found = block.read(_as_rows(read_tensor(model, tensor), block))
            except ValueError as error:
                return f"constant '{name}': part {error}"
            expected = wanted[np.ix_(block.rows, block.columns)]
            if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
                return (
                    f"constant '{name}': its part '{block.initializer}' is not the original's"
                )
    return None


def _rebuild(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    blocks: Sequence[Block],
    rest: NDArray[Any],
    used: dict[str, NDArray[np.bool_]] | None = None,
) -> tuple[str | None, NDArray[Any] | None]:
    """A dense weight or bias from its blocks, and what is wrong with them; no array where it cannot be made.

    Args:
        model: the rewritten model.
        stored: its initializers by name.
        blocks: the parts.
        rest: (K, N), or (1, N) for a bias: what stands where no block is.
        used: of a weight: collects which entries of each stored tensor belong to one. Without it the stored tensors
            are rows of units, whatever axes of size 1 they have, and hold nothing else.
    """
    rebuilt = rest.copy()
    covered = np.zeros(rest.shape, bool)
    is_bias = used is None
    named = {} if used is None else used
    for block in blocks:
        tensor = stored.get(block.initializer)
        if tensor is None:
            return f"block '{block.initializer}' is missing", None
        values = read_tensor(model, tensor)
        if values.dtype != rest.dtype:
            return f"block '{block.initializer}' has another type", None
        if is_bias:
            values = _as_rows(values, block)
        units = np.ix_(block.rows, block.columns)
        try:
            rebuilt[units] = block.read(values)
        except ValueError as error:
            return f"block {error}", None
        if covered[units].any():
            return (
                f"block '{block.initializer}' holds entries that another block holds too",
                None,
            )
        covered[units] = True
        places = named.setdefault(block.initializer, np.zeros(values.shape, bool))
        block.view(places)[np.ix_(*block.places)] = True
    return (_foreign_entries(model, stored, named) if is_bias else None), rebuilt


def _foreign_entries(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    used: Mapping[str, NDArray[np.bool_]],
) -> str | None:
    """The first stored tensor that holds more than parts of weights.

    A stack of unequal blocks is padded, and an operator that several weights are written into may have room that none
    of them fills; whatever stands there takes part in the product.
    """
    for name, places in used.items():
        values = read_tensor(model, stored[name])
        if (values.reshape(places.shape)[~places] != 0).any():
            return f"block '{name}' holds entries that are no part of the weight"
    return None


def _annealed(
    original: Model,
    decomposition: Decomposition,
    weights: Mapping[Site | RecurrentWeight, NDArray[Any]],
    biases: Mapping[Site, NDArray[Any]],
) -> Model:
    """``original`` with the rebuilt weights and biases."""
    counts = _absorbed(decomposition)
    plain = {site: array for site, array in weights.items() if isinstance(site, Site)}
    absorbed = {site: counts[site.name] for site in plain if site.name in counts}
    others = {site.name: array for site, array in weights.items() if site not in plain}
    cells = find_recurrent(original, Constants(original))[0] if others else ()
    model = ReplaceWeights(plain, biases, absorbed)(original).model
    return ReplaceRecurrentWeights(cells, others)(model).model


def _absorbed(decomposition: Decomposition) -> dict[str, int]:
    """How many nodes after each site its weight and bias hold, by site name."""
    return {
        name: site.absorbed
        for name, site in decomposition.sites.items()
        if site.absorbed is not None
    }


def _as_rows(values: NDArray[Any], block: Block) -> NDArray[Any]:
    """Rows of units, or a stack of such, as the matrices that ``block`` reads.

    Raises:
        ValueError: there are not as many entries.
    """
    stack, rows = (() if block.part is None else values.shape[:1]), block.rows.size
    return values.reshape(*stack, *((-1, rows) if block.transposed else (rows, -1)))


def _compare_weights(
    blocks: SiteBlocks, before: NDArray[Any], rebuilt: NDArray[Any]
) -> str | None:
    if digest(rebuilt) != blocks.sha256:
        return f"site '{blocks.site}': the weight rebuilt from its blocks is not the annealed weight"
    if blocks.annealing == "refitted":
        return None
    foreign = (rebuilt != before) & (rebuilt != 0)
    if foreign.any():
        return (
            f"site '{blocks.site}': entry {_first(foreign)} is neither the original's nor zero"
        )
    removed = rebuilt != before
    if blocks.annealing == "exact" and removed.any():
        return (
            f"site '{blocks.site}': entry {_first(removed)} was removed, and the metadata says that only exact "
            "zeros were"
        )
    return None


def _first(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """Row and column of the first True of ``flags``, (K, N)."""
    row, column = np.argwhere(flags)[0].tolist()
    return row, column


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
    """How much lower the metric is for the second set of outputs; metrics see all samples at once."""
    inputs = _joined([inputs for inputs, _, _ in scores])
    before = metric(inputs, _joined([outputs for _, outputs, _ in scores]))
    after = metric(inputs, _joined([outputs for _, _, outputs in scores]))
    return before - after


def _joined(parts: list[Feeds]) -> Feeds:
    if len(parts) == 1:
        return parts[0]
    return {
        name: np.concatenate([part[name] for part in parts])
        if parts[0][name].ndim
        else parts[0][name]
        for name in parts[0]
    }


def _changed_tensor(original: Model, rewritten: Model) -> str | None:
    """The first tensor that both models store under one name with other bytes."""
    before = {tensor.name: tensor for tensor in original.proto.graph.initializer}
    for tensor in rewritten.proto.graph.initializer:
        if tensor.name not in before or tensor == before[tensor.name]:
            continue
        first, second = (
            read_tensor(original, before[tensor.name]),
            read_tensor(rewritten, tensor),
        )
        if (
            first.dtype != second.dtype
            or first.shape != second.shape
            or first.tobytes() != second.tobytes()
        ):
            return str(tensor.name)
    return None


def _changed_node(original: Model, rewritten: Model) -> str | None:
    """What is wrong with the first node that is not what it was, or not what the node was that it stands for.

    Nodes are compared by operator and attributes: inputs are others where something was rewritten. A site may become
    another product, and a recurrent operator has its size and activations among its attributes.
    """
    nodes = original.proto.graph.node
    maker = {name: node for node in nodes for name in node.output if name}
    names = collections.Counter(_name(node) for node in nodes)
    named = {_name(node): node for node in nodes if names[_name(node)] == 1}
    for node in rewritten.proto.graph.node:
        origin = next((p.value for p in node.metadata_props if p.key == ORIGIN_KEY), None)
        if origin is None:
            source = maker.get(next(iter(node.output), ""))
        else:
            source = named.get(origin)
        if source is None or source.op_type in CELLS:
            continue
        if node.op_type == source.op_type:
            if _attributes(node) != _attributes(source):
                return f"node '{_name(node)}' has other attributes than '{_name(source)}' in the original"
        elif not _may_stand_for(node, source, origin):
            return f"node '{_name(node)}' is {node.op_type}, and '{_name(source)}' of the original {source.op_type}"
    return None


_PRODUCTS = {"Conv", "Gemm", "MatMul"}
_JOINTS = {
    *("Add", "ArrayFeatureExtractor", "Concat", "Gather", "Pad", "Reshape", "Squeeze"),
    *("Transpose", "Unsqueeze"),
}
"""Operators that put together what a region makes."""


def _may_stand_for(node: onnx.NodeProto, source: onnx.NodeProto, origin: str | None) -> bool:
    """Whether a rewrite can put ``node`` in the place of ``source``, which has another operator."""
    if origin is None:
        return node.op_type in _JOINTS
    if source.op_type in _PRODUCTS:
        return node.op_type in _PRODUCTS
    if node.op_type in _PRODUCTS:  # it absorbed what followed it, and makes the value of that
        return not source.name
    return (source.op_type, node.op_type) == ("Mul", "Add")  # the bias that a scale left


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or next(iter(node.output), ""))


def _attributes(node: onnx.NodeProto) -> dict[str, bytes]:
    return {a.name: a.SerializeToString(deterministic=True) for a in node.attribute}


def _check_interface(original: Model, rewritten: Model) -> None:
    for what, specs in (("inputs", graph_inputs), ("outputs", graph_outputs)):
        before = [(spec.name, spec.dtype) for spec in specs(original.proto)]
        after = [(spec.name, spec.dtype) for spec in specs(rewritten.proto)]
        if before != after:
            raise ModelError(
                f"{rewritten.label}: its {what} are not those of {original.label}; give two versions of one model"
            )
