from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from onnx_decompose.analysis.channels import (
    channel_edge_log_p,
    log_chi_square_sf,
    stacked_channels,
)
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence, gather_evidence
from onnx_decompose.analysis.null import Normal, Null, Uniform, Zero
from onnx_decompose.analysis.record import Prior
from onnx_decompose.errors import OptionError

FloatArray = NDArray[np.floating[Any]]


def test_blocks_of_outputs_become_channels() -> None:
    gates = np.arange(24.0).reshape(2, 12)
    stacked = stacked_channels(gates, 3)
    assert stacked.shape == (3, 2, 4)
    np.testing.assert_array_equal(stacked[1], gates[:, 4:8])
    assert np.shares_memory(stacked, gates)


def test_weak_gates_add_up_to_an_edge(rng: np.random.Generator) -> None:
    gates = rng.normal(0, 1, (60, 4 * 50))
    edges = rng.random((60, 50)) < 0.05
    gates += np.tile(edges, 4) * rng.choice([-2.8, 2.8], gates.shape)
    weight = gates.astype(np.float32)
    evidence = Evidence(weight, weight, Normal(1.0), "test")
    together = make_criterion("channel:4", 0.05).select(evidence, rng=rng).mask
    alone = make_criterion("fdr", 0.05).select(evidence, rng=rng).mask
    np.testing.assert_array_equal(together, np.tile(together[:, :50], 4))
    assert together[:, :50][edges].mean() > 0.9
    assert (together[:, :50] & ~edges).sum() <= 0.1 * edges.sum()
    assert np.asarray(stacked_channels(alone, 4).any(axis=0))[edges].mean() < 0.8


@pytest.mark.parametrize("null", [Normal(1.0), Uniform(1.7)], ids=lambda n: n.name)
@pytest.mark.parametrize("to", [np.float32, np.float16])
def test_false_channel_edges_stay_under_the_level(
    null: Null, to: type[np.float32 | np.float16], rng: np.random.Generator
) -> None:
    errors = []
    for _ in range(200):
        draw = (
            rng.normal(0, 1, (16, 48))
            if null == Normal(1.0)
            else rng.uniform(-1.7, 1.7, (16, 48))
        )
        weight: FloatArray = draw.astype(to)
        evidence = Evidence(weight, weight, null, "test")
        errors.append(make_criterion("channel:3", 0.1).select(evidence, rng=rng).mask.any())
    assert np.mean(errors) <= 0.1 + 3 * np.sqrt(0.09 / 200)


def test_an_edge_is_untouched_where_all_its_channels_are(rng: np.random.Generator) -> None:
    weight = np.ones((2, 4), np.float32)
    moment = np.array([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]], np.float32)
    evidence = gather_evidence(weight, "optimizer", Prior(2, 4, second_moment=moment))
    selection = make_criterion("channel:2", 0.01).select(evidence, rng=rng)
    assert selection.mask.tolist() == [[True, False, True, False], [False, True, False, True]]
    assert selection.pi0 == pytest.approx(0.5)


def test_without_a_null_exact_zeros_alone_go(rng: np.random.Generator) -> None:
    weight = np.array([[0.0, 1.0, 2.0, 0.0]], np.float32)
    mask = (
        make_criterion("channel:2", 0.01)
        .select(Evidence(weight, weight, Zero(), "zero"), rng=rng)
        .mask
    )
    np.testing.assert_array_equal(mask, weight != 0)


def test_outputs_that_do_not_divide_are_judged_one_by_one(rng: np.random.Generator) -> None:
    weight = np.array([[9.0, 0.1, 0.2, 0.3, 9.0]], np.float32)
    evidence = Evidence(weight, weight, Normal(1.0), "test")
    mask = make_criterion("channel:2", 0.01).select(evidence, rng=rng).mask
    assert mask.tolist() == [[True, False, False, False, True]]


@pytest.mark.parametrize("name", ["channel:0", "channel:1.5"])
def test_a_number_of_channels_is_whole(name: str) -> None:
    with pytest.raises(OptionError, match="channel:4"):
        make_criterion(name, 0.01)


def test_without_a_number_the_weight_says_how_many_blocks_it_stacks(
    rng: np.random.Generator,
) -> None:
    weight = rng.normal(0, 1, (20, 3 * 30)).astype(np.float32)
    weight += np.tile(rng.random((20, 30)) < 0.1, 3) * np.float32(3)
    evidence = Evidence(weight, weight, Normal(1.0), "test", channels=3)
    for name in ("channel", "channel:3"):
        mask = make_criterion(name, 0.05).select(evidence, rng=rng).mask
        np.testing.assert_array_equal(mask, np.tile(mask[:, :30], 3))
        assert mask.any()
    plain = dataclasses.replace(evidence, channels=1)
    one_by_one = make_criterion("channel", 0.05).select(plain, rng=rng).mask
    fdr = make_criterion("fdr", 0.05).select(plain, rng=rng).mask
    np.testing.assert_array_equal(one_by_one, fdr)
    assert make_criterion("channel", 0.05).name == "channel(0.05)"


def test_looser_levels_keep_the_channels() -> None:
    looser = make_criterion("channel:3", 0.4).looser()
    assert looser is not None
    assert looser.name == "channel:3(0.5)"
    assert looser.looser() is None


def test_channel_edges_by_chi_square_and_by_fisher(rng: np.random.Generator) -> None:
    values = rng.normal(0, 1, (6, 20, 30))
    values[:, 4, 5] = 3.0
    expected = stats.chi2(6).logsf((values**2).sum(axis=0))
    np.testing.assert_allclose(
        channel_edge_log_p(values, [Normal(1.0)] * 6), expected, rtol=1e-9
    )
    mixed = channel_edge_log_p(values, [Normal(1.0)] * 3 + [Uniform(8.0)] * 3)
    p = [Normal(1.0).logsf(np.abs(values[c])) for c in range(3)]
    p += [Uniform(8.0).logsf(np.abs(values[c])) for c in range(3, 6)]
    np.testing.assert_allclose(mixed, stats.chi2(12).logsf(-2 * np.sum(p, axis=0)), rtol=1e-9)
    assert np.argmin(mixed) == 4 * 30 + 5


def test_log_chi_square_past_underflow() -> None:
    # By mpmath: log of the regularized upper incomplete gamma.
    assert log_chi_square_sf(np.array([2000.0]), 2)[0] == pytest.approx(-1000.0)
    assert log_chi_square_sf(np.array([2000.0]), 4)[0] == pytest.approx(
        -1000.0 + np.log(1001.0)
    )
