from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnx_decompose.analysis import scan
from onnx_decompose.analysis.criteria import (
    Criterion,
    Selection,
    criterion_names,
    make_criterion,
)
from onnx_decompose.analysis.evidence import Evidence
from onnx_decompose.analysis.null import Normal, Null, TruncatedNormal, Uniform, Zero
from onnx_decompose.errors import OptionError

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
Reference = Callable[[FloatArray, float], BoolArray]

NULLS: list[Null] = [
    Normal(0.02),
    Normal(0.02, 0.001),
    Uniform(0.05),
    Uniform(0.05, -0.003),
    TruncatedNormal(0.02),
]


def select(criterion: tuple[str, float], weight: FloatArray, null: Null) -> Selection:
    evidence = Evidence(weight, weight, null, "test")
    return make_criterion(*criterion).select(evidence, rng=np.random.default_rng(0))


def log_p_values(weight: FloatArray, null: Null) -> FloatArray:
    """Brute force: P(|W - location| >= the near edge of the entry's rounding cell)."""
    wide = weight.astype(np.float64)
    half = scan.resolution_of(weight).half_cell(weight)
    return null.logsf(np.maximum(np.abs(wide - null.location) - half, 0.0))


def benjamini_hochberg(log_p: FloatArray, alpha: float) -> BoolArray:
    order = np.sort(log_p)
    ranks = np.arange(1, order.size + 1)
    passing = np.flatnonzero(order <= math.log(alpha) + np.log(ranks / order.size))
    return log_p <= order[passing[-1]] if passing.size else np.zeros(log_p.shape, bool)


def holm(log_p: FloatArray, alpha: float) -> BoolArray:
    order = np.sort(log_p)
    failing = np.flatnonzero(
        order > math.log(alpha) - np.log(order.size - np.arange(order.size))
    )
    return log_p < order[failing[0]] if failing.size else np.ones(log_p.shape, bool)


def draw(null: Null, size: int, rng: np.random.Generator) -> FloatArray:
    if isinstance(null, Uniform):
        return rng.uniform(-null.scale, null.scale, size) + null.location
    z = rng.normal(0, null.scale, size)
    if isinstance(null, TruncatedNormal):
        z = np.where(np.abs(z) > 2 * null.scale, 0.3 * null.scale, z)
    return z + null.location


@pytest.mark.parametrize("null", NULLS, ids=lambda n: n.name)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("planted", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize(("name", "reference"), [("fdr", benjamini_hochberg), ("fwer", holm)])
def test_stepwise_decision_equals_brute_force(
    null: Null, dtype: type[np.floating[Any]], planted: float, name: str, reference: Reference
) -> None:
    rng = np.random.default_rng(7)
    for size in (1, 2, 50, 3000):
        weight = draw(null, size, rng)
        weight[rng.random(size) < planted] *= 3.5
        weight = weight.astype(dtype).reshape(1, size)
        for alpha in (0.01, 0.2, 0.7):
            mask = select((name, alpha), weight, null).mask
            np.testing.assert_array_equal(
                mask, reference(log_p_values(weight, null).ravel(), alpha)[None]
            )


@given(st.integers(0, 2**32 - 1), st.sampled_from(["fdr", "fwer"]), st.floats(1e-4, 0.9))
@settings(max_examples=150, deadline=None)
def test_stepwise_on_tied_values(seed: int, name: str, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.choice([0.0, 0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 4.5, 6.0], size=(7, 9))
    weight = (levels * rng.choice([-1, 1], size=levels.shape)).astype(np.float32)
    reference = benjamini_hochberg if name == "fdr" else holm
    expected = reference(log_p_values(weight, Normal(1.0)).ravel(), alpha).reshape(weight.shape)
    np.testing.assert_array_equal(
        select((name, alpha), weight, Normal(1.0)).mask, expected & (weight != 0)
    )


def test_memory_order_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 2, (40, 30)).astype(np.float32)
    expected = select(("fdr", 0.1), weight, Normal(1.0)).mask
    assert 0 < expected.sum() < expected.size
    big = np.zeros((80, 60), np.float32)
    big[::2, ::2] = weight
    for view in (np.asfortranarray(weight), big[::2, ::2], big.T.copy().T[::2, ::2]):
        np.testing.assert_array_equal(select(("fdr", 0.1), view, Normal(1.0)).mask, expected)


@pytest.mark.parametrize("name", ["fdr", "fwer", "ksigma"])
def test_zero_null_removes_exact_zeros_and_nothing_else(name: str) -> None:
    weight = np.array([[0.0, -0.0, 1e-45], [1.0, 0.0, -2.0]], np.float32)
    selection = select((name, 0.01), weight, Zero())
    np.testing.assert_array_equal(selection.mask, weight != 0)
    assert selection.pi0 == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["fdr", "fwer", "ksigma"])
def test_proven_untouched_entries_decide_whatever_the_level(name: str) -> None:
    weight = np.array([[3.0, 0.0, 1.0], [1.0, 0.5, -2.0]], np.float32)
    untouched = np.array([[True, False, False], [False, True, False]])
    evidence = Evidence(weight, weight, Zero(), "optimizer", untouched=untouched)
    mask = make_criterion(name, 0.01).select(evidence, rng=np.random.default_rng(0)).mask
    np.testing.assert_array_equal(mask, ~untouched & (weight != 0))


@pytest.mark.parametrize("name", ["fdr", "fwer", "ksigma"])
def test_an_exact_zero_is_no_edge_even_far_from_the_location(name: str) -> None:
    weight = np.array([[0.0, 1.0, 1.0, 5.0]], np.float32)
    mask = select((name, 0.01), weight, Normal(0.01, location=1.0)).mask
    assert mask.tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("to", [np.float16, "bf16"])
def test_rounding_an_edge_outwards_makes_no_false_edge(to: object) -> None:
    rng = np.random.default_rng(3)
    edge = 0.05 if to == "bf16" else 0.0504  # rounds outwards
    weight = rng.uniform(-edge, edge, (64, 64)).astype(np.float32)
    weight[0, 0] = edge
    if to == "bf16":
        weight = ((weight.view(np.uint32) + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)
    else:
        weight = weight.astype(np.float16)
    assert float(weight.max()) > edge
    assert not select(("fdr", 0.01), weight, Uniform(edge)).mask.any()


def test_a_value_past_a_bounded_null_is_supported() -> None:
    weight = np.full((8, 8), 0.01, np.float32)
    weight[2, 3] = 0.0502
    mask = select(("fwer", 0.01), weight, Uniform(0.05)).mask
    assert mask.sum() == 1
    assert mask[2, 3]


@pytest.mark.parametrize(("value", "supported"), [(1.0, False), (9.0, True)])
def test_all_equal_is_all_or_nothing(value: float, supported: bool) -> None:
    weight = np.full((5, 4), value, np.float32)
    for name in ("fdr", "fwer", "ksigma"):
        assert select((name, 0.01), weight, Normal(1.0)).mask.all() == supported
        assert select((name, 0.01), weight, Normal(1.0)).mask.any() == supported


def test_ksigma_threshold() -> None:
    weight = np.array([[-3.1, -2.9, 2.9, 3.1]], np.float32)
    selection = select(("ksigma:3", 0.01), weight, Normal(1.0))
    assert selection.mask.tolist() == [[True, False, False, True]]
    assert select(("ksigma", 0.0027), weight, Normal(1.0)).threshold == pytest.approx(
        3.0, abs=1e-3
    )


def test_pi0_counts_the_null_share() -> None:
    rng = np.random.default_rng(5)
    weight = rng.normal(0, 1, (300, 400)).astype(np.float32)
    weight[:60] = 8.0
    selection: Selection = select(("fdr", 0.01), weight, Normal(1.0))
    low, high = selection.pi0_interval
    assert low < 0.8 < high
    assert high - low < 0.02


@pytest.mark.parametrize("name", ["fdr", "fwer", "ksigma"])
def test_looser_levels_remove_less_and_end(name: str) -> None:
    rng = np.random.default_rng(6)
    weight = rng.normal(0, 2, (60, 60)).astype(np.float32)
    criterion: Criterion | None = make_criterion(name, 0.001)
    kept = []
    while criterion is not None:
        evidence = Evidence(weight, weight, Normal(1.0), "test")
        kept.append(int(criterion.select(evidence, rng=rng).mask.sum()))
        criterion = criterion.looser()
    assert 3 < len(kept) < 20
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


@pytest.mark.parametrize("name", ["nonsense", "fdr:x", "ksigma:-1", "fdr:2"])
def test_bad_criteria_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="criterion"):
        make_criterion(name, 0.01)


def test_bad_level_is_refused() -> None:
    with pytest.raises(OptionError, match="level"):
        make_criterion("fdr", 0.0)


def test_magnitude_removes_the_asked_share() -> None:
    weight = np.arange(1, 101, dtype=np.float32).reshape(10, 10)
    mask = select(("magnitude:0.3", 0.01), weight, Normal(1.0)).mask
    np.testing.assert_array_equal(mask, weight > 30)
    assert select(("magnitude:0.3", 0.01), weight, Zero()).mask.all()


EVERY_CRITERION = (
    "fdr",
    "fwer",
    "ksigma",
    "displacement",
    "group",
    "channel:2",
    "shared",
    "magnitude",
)


@pytest.mark.parametrize("name", EVERY_CRITERION)
@pytest.mark.parametrize("null", [Normal(1.0), Uniform(1.0), TruncatedNormal(1.0), Zero()])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (6, 8)])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45, 3e38])
def test_degenerate_weights(
    name: str, null: Null, shape: tuple[int, int], value: float
) -> None:
    selection = select((name, 0.05), np.full(shape, value, np.float32), null)
    assert selection.mask.shape == shape
    # Groups spread entries over their rounding cells at random, past a bounded null's edge too.
    if name != "group":
        assert selection.mask.all() or not selection.mask.any()
    assert 0 <= selection.pi0_interval[0] <= selection.pi0 <= selection.pi0_interval[1] <= 1
    if value == 0:
        assert not selection.mask.any()


def documented_plug_in() -> str:
    """The example of docs/architecture.md, as a module."""
    text = Path("docs/architecture.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(@dataclasses.*?class Largest.*?)```", text, re.DOTALL)
    imports = "import dataclasses\nfrom onnx_decompose.analysis.criteria import Selection\n"
    return f"{imports}{example}"


def test_an_installed_package_adds_a_criterion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "largest_criterion.py").write_text(documented_plug_in(), "utf-8")
    metadata = tmp_path / "largest_criterion-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1\n", "utf-8")
    (metadata / "entry_points.txt").write_text(
        "[onnx_decompose.criteria]\nlargest = largest_criterion:Largest\n", "utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "largest" in criterion_names()
    weight = np.arange(100, dtype=np.float32).reshape(10, 10)
    selection = select(("largest", 0.1), weight, Normal(1.0))
    np.testing.assert_array_equal(selection.mask, weight > 9.9)
    assert select(("largest:0.5", 0.1), weight, Normal(1.0)).mask.sum() == 50
    looser = make_criterion("largest", 0.1).looser()
    assert looser is not None
    assert looser.name == "largest(0.025)"
    with pytest.raises(OptionError, match="largest"):
        make_criterion("unheard_of", 0.1)
