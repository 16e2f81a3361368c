"""Rounding to what integers can stand for: never off the grid, and in turn with less error than plainly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_decompose.analysis.gram import MomentAccumulator
from onnx_decompose.analysis.grid import Grid, round_refit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments

    Array = NDArray[Any]

INPUTS, OUTPUTS = 12, 5


def grid_of(
    rng: np.random.Generator, lines: int | None, dtype: type[np.integer[Any]], step: float
) -> Grid:
    shape = {None: (1, 1), 0: (INPUTS, 1), 1: (1, OUTPUTS)}[lines]
    limits = np.iinfo(dtype)
    zero = rng.integers(limits.min, limits.max + 1, shape).astype(np.float64)
    return Grid(rng.uniform(0.5 * step, 2 * step, shape), zero, np.dtype(dtype))


def moments(x: Array, y: Array) -> Moments:
    adding = MomentAccumulator()
    adding.update(x, y)
    return adding.result()


def reads(rng: np.random.Generator, rows: int, mixing: Array) -> Array:
    return rng.normal(size=(rows, mixing.shape[0])) @ mixing + 0.2 * rng.normal(
        size=(rows, INPUTS)
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    lines=st.sampled_from([None, 0, 1]),
    dtype=st.sampled_from([np.int8, np.uint8, np.int16]),
    step=st.sampled_from([1e-4, 0.01, 0.3]),
)
def test_what_is_rounded_is_on_the_grid_and_nothing_where_it_was_removed(
    seed: int, lines: int | None, dtype: type[np.integer[Any]], step: float
) -> None:
    rng = np.random.default_rng(seed)
    grid = grid_of(rng, lines, dtype, step)
    weight, mask = (
        rng.normal(size=(INPUTS, OUTPUTS)),
        rng.random((INPUTS, OUTPUTS)) < 0.7,
    )
    weight[~mask] = 0
    mixing = rng.normal(size=(4, INPUTS))
    fit, held = (moments(x, x @ weight) for x in (reads(rng, 60, mixing) for _ in range(2)))
    rounded = round_refit(weight, mask, grid, fit, held)
    codes = grid.codes(rounded)
    assert codes.dtype == dtype
    np.testing.assert_array_equal(grid.values(codes), rounded)
    assert (rounded[~mask] == 0).all()
    nothing = np.broadcast_to(grid.zero, mask.shape)
    assert (codes[~mask] == nothing[~mask]).all()


def test_the_rest_makes_up_for_what_rounding_misses(rng: np.random.Generator) -> None:
    mixing = rng.normal(size=(4, INPUTS))
    weight, mask = rng.normal(size=(INPUTS, OUTPUTS)), np.ones((INPUTS, OUTPUTS), dtype=bool)
    grid = Grid(np.full((1, 1), 0.3), np.zeros((1, 1)), np.dtype(np.int8))
    fit, held, new = (reads(rng, rows, mixing) for rows in (400, 200, 400))
    rounded = round_refit(
        weight, mask, grid, moments(fit, fit @ weight), moments(held, held @ weight)
    )
    wanted = new @ weight
    in_turn, plain = (np.linalg.norm(new @ w - wanted) for w in (rounded, grid.nearest(weight)))
    assert in_turn < 0.6 * plain


def test_plain_rounding_stays_where_it_is_nearer_on_other_rows(
    rng: np.random.Generator,
) -> None:
    weight, mask = rng.normal(size=(INPUTS, 1)), np.ones((INPUTS, 1), dtype=bool)
    grid = Grid(np.full((1, 1), 0.3), np.zeros((1, 1)), np.dtype(np.int8))
    mixing = rng.normal(size=(4, INPUTS))
    fit, held = reads(rng, 400, mixing), rng.normal(size=(5000, INPUTS))
    rounded = round_refit(
        weight, mask, grid, moments(fit, fit @ weight), moments(held, held @ weight)
    )
    missed = [np.linalg.norm(held @ (w - weight)) for w in (rounded, grid.nearest(weight))]
    assert missed[0] <= missed[1] * (1 + 1e-9)


@pytest.mark.parametrize("lines", [None, 0, 1])
def test_what_is_on_the_grid_stays_as_it_is(
    rng: np.random.Generator, lines: int | None
) -> None:
    grid = grid_of(rng, lines, np.int8, 0.1)
    weight = grid.values(rng.integers(-128, 128, (INPUTS, OUTPUTS)))
    x = rng.normal(size=(50, INPUTS))
    seen = moments(x, x @ weight)
    mask = np.ones(weight.shape, dtype=bool)
    np.testing.assert_array_equal(round_refit(weight, mask, grid, seen, seen), weight)


def test_lines_without_a_step_hold_nothing() -> None:
    grid = Grid(np.array([[0.0, 0.5]]), np.array([[3.0, 4.0]]), np.dtype(np.uint8))
    np.testing.assert_array_equal(grid.codes(np.ones((2, 2))), [[3, 6], [3, 6]])
