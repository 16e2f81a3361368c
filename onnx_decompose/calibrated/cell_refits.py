"""The refit of a recurrent operator that lost hidden units: what its gates add up, from the inputs and the states left.

    W x + R h   of every gate, by the original's entries on the original's x and h
    W'x'+ R'h'  of the gates of the units that are left, on what the model as annealed so far reads

Least squares towards the original's entries, as of any product (``analysis.refit``), about zero: no constant follows,
as the operator's biases stay. The candidate of a GRU that resets after R adds up W x and R h apart; of one that resets
before, R reads the reset state, and its entries stay as they are.

Entries decide on the states that they read, step after step: a fit on other states may go astray. So they are fitted to
the states that came of the entries before, a few times, and those are taken whose states are nearest to the original's
on the part to choose on; the original's entries, where none are nearer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.gram import MomentAccumulator, Moments
from onnx_decompose.analysis.refit import refit_weight
from onnx_decompose.calibrated.views import comparable
from onnx_decompose.decomposition.refits import Refit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.cells import Cell
    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.proposals import Proposal
    from onnx_decompose.graph.flat import Flat
    from onnx_decompose.runtime.samples import Samples

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["refit_cell"]

logger = logging.getLogger(__name__)

_CANDIDATE = 2

_ROUNDS, _FEWEST = 4, 2
"""Fits, each on the states of the one before: at most, and before one that gains little ends it."""

_CLEARLY = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class _Sum:
    """What some gates add up of some rows of W and R, one above the other."""

    rows: slice
    columns: slice


def refit_cell(
    context: CalibrationContext,
    proposal: Proposal,
    cell: Cell,
    annealed: Callable[[Mapping[str, Refit]], Flat],
) -> dict[str, Refit]:
    """New entries of W and R of a recurrent operator that ``proposal`` names.

    Args:
        context: the original.
        proposal: which entries stay.
        cell: the operator.
        annealed: gives the model as annealed before it, with these entries of its own.
    """
    pair = cell.weights
    mask = np.vstack([proposal.masks[weight.name] for weight in pair])
    start = np.vstack([weight.array for weight in pair]).astype(np.float64)
    best = _stored(context, cell, np.where(mask, start, 0.0))
    if context.compensation != "ridge":
        return best
    live = np.asarray(mask.any(axis=0).reshape(cell.site.gates, -1).any(axis=0))
    current = annealed({})
    missed = _missed(context, cell, annealed(best), live)
    told = [missed]
    for _ in range(_ROUNDS):
        found = _stored(context, cell, _fitted(context, cell, start, mask, current))
        current = annealed(found)
        told.append(_missed(context, cell, current, live))
        gained = told[-1] < _CLEARLY * missed
        if told[-1] < missed:
            best, missed = found, told[-1]
        if not gained and len(told) > _FEWEST:
            break
    logger.debug(
        "%s: %s: states miss %.2g as they are, %s refitted",
        proposal.name,
        cell.site.name,
        told[0],
        ", ".join(f"{each:.2g}" for each in told[1:]),
    )
    return best


def _fitted(
    context: CalibrationContext, cell: Cell, start: FloatArray, mask: BoolArray, current: Flat
) -> FloatArray:
    """(I + H, gates * H) entries that fit what ``current`` reads."""
    new = np.where(mask, start, 0.0)
    fit, choose = (
        _moments(context, cell, current, samples)
        for samples in (context.fitting, context.parts.choose)
    )
    for each in _sums(cell):
        block = each.rows, each.columns
        own, other = (_part(moments, each, start[block]) for moments in (fit, choose))
        new[block] = refit_weight(start[block], mask[block], own, other).weight
    return new


def _stored(context: CalibrationContext, cell: Cell, entries: FloatArray) -> dict[str, Refit]:
    """W and R, one above the other, as they are stored."""
    inputs = cell.weights[0].shape[0]
    return {
        weight.name: Refit(context.study.stored_as(weight, part), np.zeros(weight.shape[1]))
        for weight, part in zip(cell.weights, (entries[:inputs], entries[inputs:]), strict=True)
    }


def _missed(context: CalibrationContext, cell: Cell, model: Flat, live: BoolArray) -> float:
    """What the units that are left make differs by from the original's, over all of it, on the part to choose on."""
    choose = context.parts.choose
    now = context.observe_cell(cell, choose, model)
    before = context.observe_cell(cell, choose)
    lost = power = 0.0
    for after, first in zip(now, before, strict=True):
        if not comparable(after, first, cell.values):
            return math.inf
        wanted = cell.made(first)[:, live].astype(np.float64)
        lost += float(np.square(cell.made(after)[:, live] - wanted).sum())
        power += float(np.square(wanted).sum())
    return float(np.sqrt(lost / max(power, 1e-300)))


def _sums(cell: Cell) -> Iterator[_Sum]:
    """The sums whose entries are fitted together."""
    inputs, columns = cell.weights[0].shape
    if cell.site.cell != "GRU":
        yield _Sum(slice(None), slice(None))
        return
    split = _CANDIDATE * columns // 3
    yield _Sum(slice(None), slice(0, split))
    yield _Sum(slice(0, inputs), slice(split, None))
    if cell.applies_reset_after:
        yield _Sum(slice(inputs, None), slice(split, None))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Both:
    """Moments of what an operator reads now with what it read in the original, and of the latter alone."""

    now: Moments
    before: Moments


def _moments(context: CalibrationContext, cell: Cell, current: Flat, samples: Samples) -> _Both:
    both, alone = MomentAccumulator(), MomentAccumulator()
    now = context.observe_cell(cell, samples, current)
    before = context.observe_cell(cell, samples)
    for after, first in zip(now, before, strict=True):
        z = cell.rows(first)
        both.update(cell.rows(after) if comparable(after, first, cell.values) else z, z)
        alone.update(z)
    return _Both(both.result(), alone.result())


def _part(moments: _Both, each: _Sum, weight: NDArray[Any]) -> Moments:
    """Moments of one sum: of the rows that it reads now, with what it was, about zero."""
    now, before, rows = moments.now, moments.before, each.rows
    wanted = Moments(
        before.count,
        before.mean_x[rows],
        before.mean_y,
        before.xx[rows, rows],
        before.xy[rows],
        before.yy,
    ).through(weight)
    found = Moments(
        now.count,
        now.mean_x[rows],
        wanted.mean_y,
        now.xx[rows, rows],
        now.xy[rows, rows] @ weight,
        wanted.yy,
    )
    return found.around(np.zeros(weight.shape[1]))
