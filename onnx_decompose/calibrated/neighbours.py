"""Inputs made up around the user's, to fit on where these are few: what a model makes of them, the model itself says.

A refit needs no labels, only inputs as they occur, and the original's answers to them. Each copy of a sample moves
every number that is active (not at its unit's most frequent value) by a normal draw of half the spread that the unit
has where it is active. What rests stays at rest, so that groups that are never active together are not in the copies.
Claims are never measured on made-up neighbours.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.support import resting_values
from onnx_decompose.model.tensors import is_float

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.runtime.samples import Samples

logger = logging.getLogger(__name__)

__all__ = ["with_neighbours"]

ROWS = 16384
"""Samples from which on no neighbours are made."""

COPIES = 40
SPREAD = 0.5
_MOST_ENTRIES = 1 << 26


def with_neighbours(samples: Samples, rng: np.random.Generator) -> Samples:
    """Samples and up to ``COPIES`` neighbours of each, ``ROWS`` in all; only theirs where an input is not a float."""
    arrays = samples.rows
    copies = min(COPIES, ROWS // samples.count - 1)
    entries = sum(array.size for array in arrays.values()) * (copies + 1)
    if (
        copies < 1
        or not samples.batchable
        or entries > _MOST_ENTRIES
        or not all(is_float(array.dtype) for array in arrays.values())
    ):
        return samples
    logger.info("%d neighbours of each of %d samples to fit on", copies, samples.count)
    rows = {name: _with_copies(array, copies, rng) for name, array in arrays.items()}
    return dataclasses.replace(
        samples, count=samples.count * (copies + 1), rows=rows, extras={}
    )


def _with_copies(array: NDArray[Any], copies: int, rng: np.random.Generator) -> NDArray[Any]:
    flat = array.reshape(array.shape[0], -1)
    active = flat != resting_values(flat)
    count = np.maximum(active.sum(axis=0), 1)
    wide = np.where(active, flat.astype(np.float64), 0.0)
    mean = wide.sum(axis=0) / count
    spread = np.sqrt((active * (wide - mean) ** 2).sum(axis=0) / count)
    moved = [
        flat + active * spread * SPREAD * rng.standard_normal(flat.shape) for _ in range(copies)
    ]
    return np.concatenate([flat, *moved]).astype(array.dtype).reshape(-1, *array.shape[1:])
