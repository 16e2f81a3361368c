"""The simulation behind the error rates of docs/evidence.md."""

from __future__ import annotations

import numpy as np
import pytest

from tools.simulate_evidence import (
    CRITERIA,
    DECAYS,
    DTYPES,
    INITIALIZATIONS,
    NULLS,
    POWER,
    Cell,
    Tally,
    error_of,
    one_draw,
    plant,
    table,
)


def test_one_weight_serves_every_cell_once() -> None:
    cells = [cell for cell, _, _ in one_draw("normal", 32, 0, CRITERIA)]
    assert len(cells) == len(set(cells))
    planted = {"nothing": 4, "entries": 3, "rows": 1}
    each = len(NULLS["normal"]) * sum(planted.values()) + 1  # and displacement
    assert len(cells) == each * len(DECAYS) * len(DTYPES)
    assert {cell.null for cell in cells} == set(NULLS["normal"])


@pytest.mark.parametrize("initialization", list(INITIALIZATIONS))
def test_draws_are_repeatable_and_proper_rates(initialization: str) -> None:
    first, second = (
        [(cell, error) for cell, error, _ in one_draw(initialization, 32, 7, ("fdr", "group"))]
        for _ in range(2)
    )
    assert first == second
    assert all(0 <= error <= 1 for _, error in first)


def test_what_is_planted(rng: np.random.Generator) -> None:
    step, touched, _ = plant((200, 50), "rows", rng)
    assert step is not None
    np.testing.assert_array_equal(touched, step != 0)
    assert set(touched.mean(axis=1)) == {0.0, 1.0}
    _, touched, edges = plant((200, 50), "walk", rng)
    assert 0.01 < edges.mean() < 0.04
    assert touched.mean() > 0.25
    assert not (edges & ~touched).any()


def test_errors_by_criterion() -> None:
    mask = np.array([[True, True], [False, True]])
    edges = np.array([[True, True], [False, False]])
    assert error_of("fdr", mask, edges) == pytest.approx(1 / 3)
    assert error_of("ksigma", mask, edges) == pytest.approx(1 / 2)
    assert error_of("fwer", mask, edges) == 1
    assert error_of("group", mask, edges) == pytest.approx(1 / 2)


def test_the_table_tells_chance_from_a_broken_level() -> None:
    honest, broken = (
        Cell("normal:0.02", name, 64, "float32", 1.0, "nothing") for name in ("fdr", "fwer")
    )
    tallies = {honest: Tally(), broken: Tally()}
    for draw in range(1000):
        tallies[honest].add(float(draw % 20 == 0), claims=True)
        tallies[broken].add(float(draw % 10 == 0), claims=True)
    text, rejected = table(tallies, full=True)
    assert rejected == 1
    assert "1 of 2 cells above nominal" in text
    assert "| 0.05000 | 0.00690 |" in text


def test_power_grows_with_the_effect(rng: np.random.Generator) -> None:
    for measure, effects in POWER.values():
        weak, strong = (measure(effect, rng) for effect in (effects[0], effects[-1]))
        assert len(weak) == len(strong)
        assert max(weak) < max(strong)
        assert max(strong) > 0.9
