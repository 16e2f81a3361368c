"""Claim A on outputs: the annealed and the rewritten model side by side, against float64 where that can be had."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.cases import open_model, runnable
from onnx_decompose.claims import StructuralClaim
from onnx_decompose.errors import ModelError
from onnx_decompose.nudged import nudged
from onnx_decompose.reference import Reference, open_reference
from onnx_decompose.rounding import Compared, compare, misses
from onnx_decompose.sessions import Provider, SessionSettings
from onnx_decompose.tensors import is_float

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.cases import Case
    from onnx_decompose.claims import Inputs, Tolerance
    from onnx_decompose.feeds import Feeds
    from onnx_decompose.model_io import Model
    from onnx_decompose.sessions import Session

__all__ = ["measure_structural"]

logger = logging.getLogger(__name__)

_GATE = SessionSettings(deterministic=True)
_DRAWS = 3
_SLOW_RUNS = 3
"""Runs, of each kind of inputs, of a reference that goes node by node."""
_MOST_SECONDS = 5.0
"""Of one run of such a reference."""


def measure_structural(
    annealed: Model,
    rewritten: Model,
    *,
    inputs: Inputs,
    provider: Provider,
    tolerance: Tolerance | None = None,
) -> StructuralClaim:
    """Compare the outputs of the annealed and the rewritten model on every case."""
    dense = open_model(annealed, provider, settings=_GATE)
    candidate = open_model(rewritten, provider, settings=_GATE)
    with_tf32 = None
    if provider is Provider.CUDA:
        with_tf32 = open_model(rewritten, provider, settings=SessionSettings(tf32=True))
    exact, quantizers = _Exact(annealed), _Quantizers(annealed, provider)
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
            fault = _spread(case, dense, expected, got)
            if fault is not None:
                return _stopped(f"{fault} on {case.label}", case)
            continue
        if repeatable is None:
            repeatable = _same_bytes(got, candidate.run(case.feeds))
        compared += _compared(case, expected, got, exact, (dense, quantizers))
        if with_tf32 is not None:
            rounded = with_tf32.run(case.feeds)
            tf32 += [_relative(expected[name], rounded[name]) for name in expected]
    found = misses(compared, tolerance)
    reason = (
        f"outputs agree to {_worst(compared):.2g} of their size on {len(cases)} sets of inputs"
    )
    if found:
        one, error, allowed = found[0]
        reason = f"output '{one.output}' deviates by {error:.3g} (allowed {allowed:.3g}) on {one.label}"
    measured = [one for one in compared if one.annealed is not None and one.size]
    return StructuralClaim(
        not found,
        reason,
        0,
        len(cases),
        _worst(compared),
        reference=exact.how if tolerance is None else "the tolerance that was given",
        annealed_error=max(((o.annealed or 0.0) / o.size for o in measured), default=None),
        rewritten_error=max(((o.rewritten or 0.0) / o.size for o in measured), default=None),
        repeatable=repeatable,
        tf32_error=max(tf32) if tf32 else None,
        failed_case=cases[found[0][0].label] if found else None,
    )


class _Exact:
    """The annealed model in float64, as far as that can be had at a bearable price."""

    def __init__(self, annealed: Model) -> None:
        opened = open_reference(annealed)
        self._reference: Reference | None = None
        self._runs: dict[str, int] = {}
        if isinstance(opened, Reference):
            self._reference = opened
            self.how = opened.how
        else:
            self._give_up(opened)

    def outputs(self, case: Case) -> Feeds:
        """The exact outputs; empty where there is no reference on this case."""
        if self._reference is None:
            return {}
        if self._reference.slow and self._runs.get(case.kind, 0) >= _SLOW_RUNS:
            return {}
        self._runs[case.kind] = self._runs.get(case.kind, 0) + 1
        start = time.perf_counter()
        try:
            found = self._reference.run(case.feeds)
        except ModelError as error:
            self._give_up(str(error))
            return {}
        spent = time.perf_counter() - start
        if self._reference.slow and spent > _MOST_SECONDS:
            self._give_up(f"{spent:.0f} s a run")
        return found

    def _give_up(self, reason: str) -> None:
        logger.info("claim A goes by the types' tolerances, without float64: %s", reason)
        self._reference = None
        self.how = f"the types' tolerances; no float64 reference: {reason}"


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
    annealed: tuple[Session, _Quantizers],
) -> list[Compared]:
    truth = exact.outputs(case)
    session, quantizers = annealed
    return [
        Compared(
            name,
            case.label,
            case.kind,
            value.dtype,
            *compare(value, got[name], truth.get(name)),
            moves=functools.partial(_movement, session, case, name, value),
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
    rng = np.random.default_rng(0)
    moved = 0.0
    for _ in range(_DRAWS):
        feeds = {
            key: np.nextafter(
                array, rng.choice([-np.inf, np.inf], array.shape).astype(array.dtype)
            )
            if is_float(array.dtype)
            else array
            for key, array in case.feeds.items()
        }
        error = compare(expected, session.run(feeds)[name], None)[1]
        moved = max(moved, error) if np.isfinite(error) else moved
    return moved


def _spread(case: Case, session: Session, expected: Feeds, got: Feeds) -> str | None:
    """Which output has NaN or infinities in samples but the first, where the annealed model has none, if any.

    Within the first sample the models may differ: a zero weight times an infinity is NaN, and the rewritten model has
    no such product.
    """
    for spec in session.outputs:
        value, other = expected[spec.name], got[spec.name]
        if not spec.shape or spec.axis_symbol(0) not in case.poison or not is_float(spec.dtype):
            continue
        if value.shape != other.shape:
            return f"output '{spec.name}' has another shape"
        rest = tuple(range(1, value.ndim))
        rows = [np.isfinite(a[1:].astype(np.float64)).all(axis=rest) for a in (value, other)]
        if (rows[0] & ~rows[1]).any():
            return (
                f"output '{spec.name}' is not finite in a sample where the annealed model's is"
            )
    return None


def _same_bytes(first: Feeds, second: Feeds) -> bool:
    return all(first[name].tobytes() == second[name].tobytes() for name in first)


def _relative(annealed: NDArray[Any], other: NDArray[Any]) -> float:
    size, deviation, _, _ = compare(annealed, other, None)
    return deviation / (size or 1.0)


def _worst(compared: list[Compared]) -> float:
    return max((one.relative for one in compared), default=0.0)


def _stopped(reason: str, case: Case) -> StructuralClaim:
    return StructuralClaim(False, reason, 0, 1, float("inf"), failed_case=case)
