from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from onnx_decompose.errors import OptionError
from onnx_decompose.options import Options


def test_defaults_change_nothing_but_exact_zeros() -> None:
    """The defaults are part of the contract."""
    options = Options()
    assert (options.null, options.criterion, options.alpha) == ("auto", "fdr", 0.01)
    assert (options.budget, options.provider, options.emit) == (0.01, "auto", "auto")
    assert (options.batch, options.seeds, options.seed) == ((1, 16, 256), 3, 0)
    assert (options.force, options.autotune) == (False, False)
    assert (options.calibration, options.metric, options.null_config) == (None, None, None)


def test_frozen_and_comparable() -> None:
    options = Options(alpha=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.alpha = 0.2  # type: ignore[misc]
    assert options == Options(alpha=0.1)
    assert options != Options()
    assert len({options, Options(alpha=0.1), Options()}) == 2


def test_round_trip_through_plain_values() -> None:
    options = Options(
        null="normal:0.02",
        null_config=Path("n.toml"),
        criterion="fwer",
        alpha=0.05,
        calibration=Path("x.npz"),
        budget=0.0,
        metric="a:b",
        provider="cpu",
        emit="split",
        autotune=True,
        batch=(3,),
        seeds=2,
        seed=7,
        force=True,
    )
    assert Options(**dataclasses.asdict(options)) == options
    assert dataclasses.replace(options, seed=8).seed == 8


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"alpha": 1.0}, "alpha 1.0"),
        ({"alpha": -0.5}, "alpha -0.5"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"budget": -1e-9}, "budget"),
        ({"budget": float("nan")}, "budget nan"),
        ({"emit": "magic"}, "'magic'.*auto, "),
        ({"batch": ()}, "batch"),
        ({"batch": (1, 0)}, "batch"),
        ({"batch": (-4,)}, "batch"),
        ({"seeds": 0}, "seeds 0"),
        ({"seed": -1}, "seed -1"),
        ({"metric": "a:b"}, "--calibration"),
        ({"provider": "tpu"}, "tpu"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_where_they_are_given(
    fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(OptionError, match=told):
        Options(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"alpha": 1e-12}, {"alpha": 0.999}, {"budget": 0.0}, {"budget": 5.0}, {"batch": (1,)}],
    ids=str,
)
def test_values_at_the_edge_are_accepted(fields: dict[str, Any]) -> None:
    assert Options(**fields) == dataclasses.replace(Options(), **fields)
