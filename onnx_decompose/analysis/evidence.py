"""Evidence: one weight put against what its entries would be had training never touched them.

Sources, strongest first: ``snapshot`` (the initial weights), ``optimizer`` (Adam's second
moment), ``recorded`` (the distribution noted at initialization), a declared family, ``zero``. A
source whose data is missing for a weight falls back to ``zero``, which never changes the
function, and says so in ``note``.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.crowd import common_factor
from onnx_decompose.analysis.decay import (
    DecayEstimate,
    displacement_from,
    sorted_magnitudes,
)
from onnx_decompose.analysis.empirical import bulk_null
from onnx_decompose.analysis.null import (
    Normal,
    Null,
    Uniform,
    Zero,
    parse_null,
    stated_decay,
)
from onnx_decompose.analysis.sketch import Sketch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from onnx_decompose.analysis.record import InitRecord, Prior

    FloatArray = NDArray[np.floating[Any]]
    BoolArray = NDArray[np.bool_]

__all__ = ["Evidence", "gather_evidence"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What is to be tested, against what.

    Attributes:
        weight: (K, N) the weight, as a view.
        values: (K, N) the statistic: the weight itself, or the displacement from its initial
            value.
        null: distribution of ``values`` for an untouched entry.
        source: where the null comes from: ``snapshot``, ``optimizer``, ``recorded``, ``zero``,
            or a declared family.
        decay: the common factor by which weight decay shrank every untouched entry, and whether
            ``null`` is shrunk by it (to its interval's upper end); None where none was looked
            for or found.
        error: relative error of the null's scale where that was estimated, three standard
            errors; ``null`` is wider than the estimate by as much.
        untouched: (K, N) True where the source proves that no gradient ever arrived; None where
            it cannot.
        channels: blocks of outputs that the weight stacks side by side, such as the gates of a
            recurrent operator: the entries of unit j are columns j, j + N / channels, ...
        note: what a reader of the report should know, such as why a source was not used.
    """

    weight: FloatArray
    values: FloatArray
    null: Null
    source: str
    decay: DecayEstimate | None = None
    error: float = 0.0
    untouched: BoolArray | None = None
    channels: int = 1
    note: str = ""


def gather_evidence(weight: FloatArray, spec: str, prior: Prior) -> Evidence:
    """Put ``weight`` of shape (K, N) against the null that ``spec`` names.

    Args:
        weight: finite entries (NaN and infinities are refused where the model is read).
        spec: the command line's ``--null``; the files of ``snapshot:F`` and ``optimizer:F`` are
            in ``prior`` already.
        prior: what is known of the weight's initialization.

    Raises:
        OptionError: ``spec`` is not understood.
    """
    source = re.split(r"[:(]", spec, maxsplit=1)[0].strip()
    if source == "auto":
        source = _strongest(prior)
    if source == "recorded":
        return _from_record(weight, prior, None if spec == "auto" else stated_decay(spec))
    gather = _SOURCES.get(source)
    if gather is not None:
        return gather(weight, prior)
    null = parse_null(spec, fan_in=prior.fan_in, fan_out=prior.fan_out)
    return _against(weight, null, spec, stated_decay(spec))


def _strongest(prior: Prior) -> str:
    if prior.snapshot is not None:
        return "snapshot"
    if prior.second_moment is not None:
        return "optimizer"
    return "zero" if prior.record is None else "recorded"


def _from_snapshot(weight: FloatArray, prior: Prior) -> Evidence:
    if prior.snapshot is None:
        return _exact_zeros(weight, "no initial value for this weight")
    moved = displacement_from(weight, prior.snapshot)
    share = np.count_nonzero(moved.untouched) / max(weight.size, 1)
    if moved.decay is None:
        note = "no common decay factor stands out: (nearly) every entry was touched"
    else:
        low, high = moved.decay.interval
        note = (
            f"{share:.1%} untouched within {moved.decay.tolerance:.1g} relative; "
            f"decay factor {moved.decay.factor:.6g} ({low:.6g} to {high:.6g})"
        )
    return Evidence(
        weight,
        moved.values,
        Zero(),
        "snapshot",
        moved.decay,
        untouched=moved.untouched,
        note=note,
    )


def _from_optimizer(weight: FloatArray, prior: Prior) -> Evidence:
    if prior.second_moment is None:
        return _exact_zeros(weight, "no optimizer state for this weight")
    # Adam's exp_avg_sq is a sum of squares: zero if and only if every gradient was zero (or
    # its square underflowed: under 1e-23 in float32, or 1e5 steps ago).
    untouched = prior.second_moment == 0
    return Evidence(weight, prior.second_moment, Zero(), "optimizer", untouched=untouched)


def _from_record(weight: FloatArray, prior: Prior, stated: float | None) -> Evidence:
    record = prior.record
    if record is None:
        return _exact_zeros(weight, "no init record for this weight")
    null = _recorded_null(record)
    if null is None:
        return _exact_zeros(weight, f"a recorded {record.family} without spread")
    return _against(weight, null, "recorded", stated)


def _recorded_null(record: InitRecord) -> Null | None:
    if not record.scale > 0:
        return None
    if record.family == "normal":
        return Normal(record.scale, record.location)
    if record.family == "uniform":
        return Uniform(record.scale, record.location)
    try:
        return Sketch.of_quantiles(record.quantiles, record.location, record.scale)
    except ValueError:
        return None


def _from_bulk(weight: FloatArray, prior: Prior) -> Evidence:
    del prior
    bulk = bulk_null(sorted_magnitudes(weight))
    if bulk.null is None:
        return _exact_zeros(weight, bulk.note)
    return Evidence(weight, weight, bulk.null, "empirical", error=bulk.error, note=bulk.note)


def _from_zeros(weight: FloatArray, prior: Prior) -> Evidence:
    del prior
    return Evidence(weight, weight, Zero(), "zero")


def _against(
    weight: FloatArray, initial: Null, source: str, stated: float | None = None
) -> Evidence:
    """Test against what ``initial`` is now: shrunk by decay as far as that is shown or stated.

    A null that is too wide supports fewer entries and keeps the false discovery rate under its
    level; one that is too narrow breaks it. So the null is shrunk to the upper end of the
    factor's interval, and only where whole lines show a common factor or the user states it. The
    bulk of entries proves none: in real trainings without any decay it looked shrunk too.
    """
    if stated is not None:
        decay = DecayEstimate(stated, (stated, stated), basis="stated")
    else:
        decay = common_factor(weight, initial)
    low, high = decay.interval
    note = f"decay factor {decay.factor:.3g} ({low:.3g} to {high:.3g})"
    if decay.basis == "lines":
        note += f" from {decay.members} lines of one scale"
    elif decay.basis == "bulk":
        note = "" if decay.factor == 1 else f"the bulk looks shrunk, {note}: not used"
    if not decay.used:
        return Evidence(weight, weight, initial, source, decay, note=note)
    error = high / decay.factor - 1
    return Evidence(weight, weight, initial.shrunk(high), source, decay, error, note=note)


def _exact_zeros(weight: FloatArray, why: str) -> Evidence:
    note = f"{why}: only exact zeros are unsupported"
    return Evidence(weight, weight, Zero(), "zero", note=note)


_SOURCES: dict[str, Callable[[FloatArray, Prior], Evidence]] = {
    "snapshot": _from_snapshot,
    "optimizer": _from_optimizer,
    "empirical": _from_bulk,
    "zero": _from_zeros,
}
