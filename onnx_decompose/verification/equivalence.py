"""Claim A on outputs: the annealed and the rewritten model side by side, against float64 where that can be had."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from onnx_decompose.errors import ModelError
from onnx_decompose.model.tensors import is_float
from onnx_decompose.runtime.cases import is_large, open_model, runnable
from onnx_decompose.runtime.sessions import Provider, SessionSettings
from onnx_decompose.verification.claims import StructuralClaim
from onnx_decompose.verification.nudged import nudged
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.rounding import DRAWS, Compared, compare, first_miss
from onnx_decompose.verification.widened import nodes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.cases import Case
    from onnx_decompose.runtime.feeds import Feeds
    from onnx_decompose.runtime.sessions import Session
    from onnx_decompose.verification.claims import Inputs, Tolerance

__all__ = ["measure_structural"]

logger = logging.getLogger(__name__)

_GATE = SessionSettings(deterministic=True)
_DRAWS = 3
_LARGEST_MOVES = 0.5
"""The power of a type's last bit by which inputs are moved right beside: that far every rounding is another, while
those of inputs a last bit apart were found to be alike behind a few layers."""
_NEXT_TO_NOTHING = {"zeros", "tiny", "denormal"}
"""Kinds of made-up inputs that are small against any bias."""
_SLOW_RUNS = 3
"""Runs, of each kind of inputs, of a reference that goes node by node."""
_MOST_SECONDS = 5.0
"""Of processor time for one run of such a reference, so that other work on the machine decides nothing."""


def measure_structural(
    annealed: Model,
    rewritten: Model,
    *,
    inputs: Inputs,
    provider: Provider,
    tolerance: Tolerance | None = None,
) -> StructuralClaim:
    """Compare the outputs of the annealed and the rewritten model on every case."""
    large = is_large(annealed)
    dense = open_model(annealed, provider, large=large, settings=_GATE)
    candidate = open_model(rewritten, provider, large=large, settings=_GATE)
    with_tf32 = None
    if provider is Provider.CUDA:
        tf32_settings = SessionSettings(tf32=True)
        with_tf32 = open_model(rewritten, provider, large=large, settings=tf32_settings)
    exact, quantizers = _Exact(annealed), _Quantizers(annealed, provider)
    beside = _Beside(dense, candidate, exact)
    # It takes one scale from all samples: what one of them is shows in every other.
    one_scale = any(
        node.op_type == "DynamicQuantizeLinear" for node in nodes_of(annealed.proto)
    )
    compared: list[Compared] = []
    cases: dict[str, Case] = {}
    repeatable: bool | None = None
    tf32: list[float] = []
    for case, expected in runnable(functools.partial(inputs.cases, annealed), dense):
        cases[case.label] = case
        try:
            got = candidate.run(case.feeds)
        except ModelError as refusal:
            return _stopped(f"does not run on {case.label}: {refusal}", case)
        if case.poison:
            fault = None if one_scale else _spread(case, dense, expected, got)
            if fault is not None:
                return _stopped(f"{fault} on {case.label}", case)
            continue
        if repeatable is None:
            repeatable = _same_bytes(got, candidate.run(case.feeds))
        compared += _compared(case, expected, got, exact, (dense, beside, quantizers))
        if with_tf32 is not None:
            rounded = with_tf32.run(case.feeds)
            tf32 += [_relative(expected[name], rounded[name]) for name in expected]
    found = first_miss(compared, tolerance)
    reason = (
        f"outputs agree to {_worst(compared):.2g} of their size on {len(cases)} sets of inputs"
    )
    if found is not None:
        one, error, allowed = found
        reason = f"output '{one.output}' deviates by {error:.3g} (allowed {allowed:.3g}) on {one.label}"
    measured = [one for one in compared if one.annealed is not None and one.size]
    return StructuralClaim(
        found is None,
        reason,
        0,
        len(cases),
        _worst(compared),
        reference=exact.how if tolerance is None else "the tolerance that was given",
        annealed_error=max(((o.annealed or 0.0) / o.size for o in measured), default=None),
        rewritten_error=max(((o.rewritten or 0.0) / o.size for o in measured), default=None),
        repeatable=repeatable,
        tf32_error=max(tf32) if tf32 else None,
        failed_case=None if found is None else cases[found[0].label],
    )


class _Exact:
    """The annealed model in float64, as far as that can be had at a bearable price."""

    def __init__(self, annealed: Model) -> None:
        opened = open_reference(annealed)
        self._reference: Reference | None = None
        self._too_slow = False
        self._runs: dict[str, int] = {}
        if isinstance(opened, Reference):
            self._reference = opened
            self.how = opened.how
        else:
            self._give_up(opened)

    def outputs(self, case: Case) -> Feeds:
        """The exact outputs; empty where there is no reference on this case."""
        if self._reference is None or self._too_slow:
            return {}
        if self._reference.slow and self._runs.get(case.kind, 0) >= _SLOW_RUNS:
            return {}
        self._runs[case.kind] = self._runs.get(case.kind, 0) + 1
        start = time.process_time()
        try:
            found = self._reference.run(case.feeds)
        except ModelError as error:
            self._reference = None
            self._give_up(str(error))
            return {}
        spent = time.process_time() - start
        if self._reference.slow and spent > _MOST_SECONDS:
            self._too_slow = True
            self._give_up(f"{spent:.0f} s a run")
        return found

    def beside(self, feeds: Feeds) -> Feeds:
        """The exact outputs on inputs that no case has, at any price; empty where there is no reference."""
        return {} if self._reference is None else self._reference.run(feeds)

    def _give_up(self, reason: str) -> None:
        logger.info("claim A goes by the types' tolerances, without float64: %s", reason)
        self.how = f"the types' tolerances; no float64 reference: {reason}"


class _Beside:
    """Errors of both models on fresh inputs right beside a case; run when asked for."""

    def __init__(self, annealed: Session, rewritten: Session, exact: _Exact) -> None:
        self._annealed = annealed
        self._rewritten = rewritten
        self._exact = exact
        self._errors: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}

    def errors(self, case: Case, name: str) -> Iterator[tuple[float, float]]:
        """Pairs of errors of an output, the annealed model's first; the second is infinite where it has no error."""
        for number, feeds in enumerate(_moved(case, DRAWS)):
            key = case.label, number
            if key not in self._errors:
                self._errors[key] = self._measured(feeds)
            if name not in self._errors[key]:
                return
            yield self._errors[key][name]

    def _measured(self, feeds: Feeds) -> dict[str, tuple[float, float]]:
        """By output; empty where there is no reference, or where a model does not run."""
        found = {}
        try:
            truth = self._exact.beside(feeds)
            runs = [model.run(feeds) for model in (self._annealed, self._rewritten) if truth]
        except ModelError as error:
            logger.info("nothing is measured beside: %s", error)
            return {}
        for name in truth:
            _, _, *errors = compare(runs[0][name], runs[1][name], truth[name])
            first, second = (float("inf") if error is None else error for error in errors)
            found[name] = first, second
        return found


class _Quantizers:
    """The annealed model with what it quantizes moved a little; opened when it is asked for."""

    def __init__(self, annealed: Model, provider: Provider) -> None:
        self._annealed = annealed
        self._provider = provider

    @functools.cached_property
    def _session(self) -> Session | None:
        model = nudged(self._annealed)
        try:
            return None if model is None else open_model(model, self._provider, settings=_GATE)
        except ModelError as error:
            logger.info("quantizers are not moved: %s", error)
            return None

    def movement(self, case: Case, name: str, expected: NDArray[Any]) -> float:
        """How far an output moves when some values are rounded to the next step; 0 if that is not known."""
        if self._session is None:
            return 0.0
        moved = compare(expected, self._session.run(case.feeds)[name], None)[1]
        return moved if np.isfinite(moved) else 0.0


def _compared(
    case: Case,
    expected: Feeds,
    got: Feeds,
    exact: _Exact,
    annealed: tuple[Session, _Beside, _Quantizers],
) -> list[Compared]:
    truth = exact.outputs(case)
    session, beside, quantizers = annealed
    return [
        Compared(
            name,
            case.label,
            case.kind,
            value.dtype,
            *compare(value, got[name], truth.get(name)),
            moves=functools.partial(_movement, session, case, name, value),
            beside=functools.partial(beside.errors, case, name),
            steps=functools.partial(quantizers.movement, case, name, value),
        )
        for name, value in expected.items()
    ]


def _movement(session: Session, case: Case, name: str, expected: NDArray[Any]) -> float:
    """How far an output moves when the last bits of the inputs do; 0 if that is NaN.

    Args:
        session: the model.
        case: what it was run on.
        name: of the output.
        expected: the output there.
    """
    moved = 0.0
    for feeds in _last_bits_moved(case.feeds, _DRAWS):
        error = compare(expected, session.run(feeds)[name], None)[1]
        moved = max(moved, error) if np.isfinite(error) else moved
    return moved


def _last_bits_moved(feeds: Feeds, draws: int) -> Iterator[Feeds]:
    """Inputs with every float one place up or down at random; nothing where there is no float."""
    rng = np.random.default_rng(0)
    if not any(is_float(array.dtype) for array in feeds.values()):
        return
    for _ in range(draws):
        yield {
            key: np.nextafter(
                array, rng.choice([-np.inf, np.inf], array.shape).astype(array.dtype)
            )
            if is_float(array.dtype)
            else array
            for key, array in feeds.items()
        }


def _moved(case: Case, draws: int) -> Iterator[Feeds]:
    """Inputs with every float moved at random, by up to the root of its type's last bit; nothing where none can be.

    By that share of itself; by that much where the inputs are made up to be nothing, as a share of which moves no
    rounding behind a bias. Elsewhere, whole numbers stay as they are where an input holds nothing else: they may be
    numbers of things, or a mask.
    """
    rng = np.random.default_rng(0)
    nothing = case.kind in _NEXT_TO_NOTHING
    movable = {
        name: (array, float(ml_dtypes.finfo(array.dtype).eps) ** _LARGEST_MOVES)  # type: ignore[no-untyped-call]
        for name, array in case.feeds.items()
        if is_float(array.dtype) and (nothing or not np.array_equal(array, np.rint(array)))
    }
    if not movable:
        return
    for _ in range(draws):
        moved = {}
        for name, (array, most) in movable.items():
            by = most * rng.uniform(-1, 1, array.shape)
            moved[name] = (array + (by if nothing else array * by)).astype(array.dtype)
        yield {**case.feeds, **moved}


def _spread(case: Case, session: Session, expected: Feeds, got: Feeds) -> str | None:
    """Which output has NaN or infinities in samples that those of the first do not reach in the annealed model, if any.

    Within the first sample the models may differ: a zero weight times an infinity is NaN, and the rewritten model has
    no such product. So they may in other samples that hang on the first, as where one scale is read off a whole batch.
    """
    for spec in session.outputs:
        value, other = expected[spec.name], got[spec.name]
        if not spec.shape or spec.axis_symbol(0) not in case.poison or not is_float(spec.dtype):
            continue
        if value.shape != other.shape:
            return f"output '{spec.name}' has another shape"
        rest = tuple(range(1, value.ndim))
        rows = [np.isfinite(a[1:].astype(np.float64)).all(axis=rest) for a in (value, other)]
        if not (rows[0] & ~rows[1]).any():
            continue
        if (rows[0] & ~rows[1] & _apart(case, session, spec.name)).any():
            return (
                f"output '{spec.name}' is not finite in a sample where the annealed model's is"
            )
    return None


def _apart(case: Case, session: Session, name: str) -> NDArray[Any]:
    """Whether each sample but the first of an output stays as it is, whatever the first one is."""
    runs = [
        session.run({key: _other_first(array, factor) for key, array in case.feeds.items()})
        for factor in (1.0, -1.0, 3.0, 1e3)
    ]
    rest = [made[name][1:] for made in runs]
    same = np.all([one == rest[0] for one in rest], axis=(0, *range(2, rest[0].ndim + 1)))
    found: NDArray[Any] = same
    return found


def _other_first(array: NDArray[Any], factor: float) -> NDArray[Any]:
    """The same with the first sample times ``factor``, and finite: 1 stands for NaN and infinities."""
    if not is_float(array.dtype):
        return array
    first = array[:1].astype(np.float64)
    made = array.copy()
    made[:1] = np.where(np.isfinite(first), first, 1.0) * factor
    return made


def _same_bytes(first: Feeds, second: Feeds) -> bool:
    return all(first[name].tobytes() == second[name].tobytes() for name in first)


def _relative(annealed: NDArray[Any], other: NDArray[Any]) -> float:
    size, deviation, _, _ = compare(annealed, other, None)
    return deviation / (size or 1.0)


def _worst(compared: list[Compared]) -> float:
    return max((one.relative for one in compared), default=0.0)


def _stopped(reason: str, case: Case) -> StructuralClaim:
    return StructuralClaim(False, reason, 0, 1, float("inf"), failed_case=case)
