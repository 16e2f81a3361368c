"""A rewritten model that is not faster is not written, unless forced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from onnx_decompose.bench import BatchTiming, Timing
from onnx_decompose.sessions import Provider
from tests.e2e.planted import Planted, Recipe, dense_ffn, found_partition, plant, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split")


def timing(*speedups: float) -> Timing:
    """Measured to within 1 % at batch sizes 1, 2, ..."""
    return Timing(
        Provider.CPU,
        tuple(
            BatchTiming(
                batch=number,
                original_ms=1.0,
                rewritten_ms=1.0 / speedup,
                speedup=speedup,
                low=0.99 * speedup,
                high=1.01 * speedup,
                openings=9,
            )
            for number, speedup in enumerate(speedups, start=1)
        ),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Timing], list[int]]:
    """Makes every comparison measure what the test says; the list grows with each one."""

    def install(measured: Timing) -> list[int]:
        calls: list[int] = []

        def bench_models(*_: object, **__: object) -> Timing:
            calls.append(1)
            return measured

        monkeypatch.setattr("onnx_decompose.pipeline.bench_models", bench_models)
        return calls

    return install


@pytest.fixture
def model(eight: Planted, tmp_path: Path) -> Path:
    return save(eight.model, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("speedups", "told"),
    [
        ((0.5,), "slower at batch 1: 0.50x"),
        ((2.0, 0.8), "slower at batch 2: 0.80x"),
        ((1.0,), "not faster: 1.00x"),
    ],
)
def test_a_slower_model_is_refused(
    command: Command,
    model: Path,
    clock: Callable[[Timing], list[int]],
    speedups: tuple[float, ...],
    told: str,
) -> None:
    clock(timing(*speedups))
    output, report = model.with_name("out.onnx"), model.with_name("r.json")
    result = command("rewrite", model, "-o", output, "--report", report, *SPLIT)
    assert result.code == 0
    assert result.last_line.startswith("nothing to do: ")
    assert told in result.last_line
    assert output.read_bytes() == model.read_bytes()
    content = json.loads(report.read_text("utf-8"))
    assert content["summary"]["decomposable"] is False
    assert told in content["summary"]["reason"]
    assert content["summary"]["weights_after"] == content["summary"]["weights_before"]
    assert content["timing"]["speedup"] <= np.sqrt(2 * 0.8) + 1e-9
    for site in content["sites"]:
        assert site["decision"] == "dense"
        assert site["components"] == 8
        assert told in site["reason"]


def test_forced_it_is_written(
    command: Command, model: Path, clock: Callable[[Timing], list[int]]
) -> None:
    clock(timing(0.5))
    output = model.with_name("out.onnx")
    result = command("rewrite", model, "-o", output, *SPLIT, "--force")
    assert result.code == 0
    assert result.last_line.startswith("rewritten: ")
    assert len(found_partition(onnx.load(output), "up")) == 8
    assert "0.50x" in result.out


def test_a_faster_model_is_written(
    command: Command, model: Path, clock: Callable[[Timing], list[int]]
) -> None:
    calls = clock(timing(2.0, 3.0))
    output = model.with_name("out.onnx")
    result = command("rewrite", model, "-o", output, *SPLIT)
    assert result.last_line.startswith("rewritten: ")
    assert len(found_partition(onnx.load(output), "up")) == 8
    assert calls


def test_the_annealed_model_of_a_refused_rewrite_is_the_original(
    command: Command, clock: Callable[[Timing], list[int]], tmp_path: Path
) -> None:
    """What is saved must be what the output was compared with."""
    clock(timing(0.5))
    planted = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=1e-3), np.random.default_rng(0))
    model = save(planted.model, tmp_path / "model.onnx")
    output, annealed = tmp_path / "out.onnx", tmp_path / "annealed.onnx"
    options = ("--null", "normal:0.001", "--criterion", "fwer", "--save-annealed", annealed)
    assert command("rewrite", model, "-o", output, *options, *SPLIT).code == 0
    assert output.read_bytes() == model.read_bytes()
    assert onnx.load(annealed) == planted.model


def test_nothing_is_timed_where_nothing_is_to_do(
    command: Command, clock: Callable[[Timing], list[int]], tmp_path: Path
) -> None:
    calls = clock(timing(2.0))
    model = save(dense_ffn(np.random.default_rng(0)), tmp_path / "dense.onnx")
    assert command("rewrite", model, "-o", tmp_path / "out.onnx").code == 0
    assert calls == []


def test_a_real_slowdown_is_noticed(command: Command, model: Path) -> None:
    """Eight tiny branches instead of one small product: measured, nothing is faked."""
    output = model.with_name("out.onnx")
    result = command("rewrite", model, "-o", output, *SPLIT, "--batch", "1")
    assert result.last_line.startswith("nothing to do: the rewritten model is ")
    assert output.read_bytes() == model.read_bytes()
