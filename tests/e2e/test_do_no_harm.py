"""A rewritten model that is not faster is not written, unless forced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.compose
import pytest

from onnx_decompose import acceptance
from onnx_decompose.decomposition.decompose import Attempt, attempt
from onnx_decompose.errors import AnnealingError
from onnx_decompose.planning.cost import CPU
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BatchTiming, Timing
from tests.e2e.planted import (
    HEADS,
    Planted,
    Recipe,
    dense_ffn,
    found_partition,
    plant,
    save,
    with_heads,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.planning.plan import RegionPlan
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

        monkeypatch.setattr("onnx_decompose.acceptance.bench_models", bench_models)
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


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two regions, "up" and "second.up", with a Softmax between them."""
    rng = np.random.default_rng(3)
    recipe = Recipe(blocks=((6, 12, 6),) * 3)
    first, second = plant(recipe, rng).model, plant(recipe, rng).model
    second = onnx.compose.add_prefix(second, "second.")
    softmax = onnx.helper.make_node("Softmax", ["y"], ["between"], "softmax")
    first.graph.node.append(softmax)
    del first.graph.output[:]
    first.graph.output.append(
        onnx.helper.make_tensor_value_info("between", onnx.TensorProto.FLOAT, ["batch", 18])
    )
    joined = onnx.compose.merge_models(first, second, io_map=[("between", "second.x")])
    return save(joined, tmp_path / "two.onnx")


class TestSeveralRegions:
    """Times of regions alone and of finished models are made up."""

    @pytest.fixture
    def times(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
        def install(regions: dict[str, float], models: list[float]) -> list[str]:
            log: list[str] = []

            def alone(_: object, region: Region, plans: tuple[RegionPlan, ...]) -> object:
                log.append(region.name)
                return tuple(timing(regions[region.name]) for _ in plans)

            def finished(*_: object, **__: object) -> Timing:
                log.append("model")
                return timing(models[log.count("model") - 1])

            monkeypatch.setattr("onnx_decompose.timing.region_bench.RegionBench.time", alone)
            monkeypatch.setattr("onnx_decompose.acceptance.bench_models", finished)
            return log

        return install

    def test_the_region_that_does_harm_stays_dense(
        self, command: Command, two: Path, times: Callable[..., list[str]]
    ) -> None:
        log = times({"up": 0.8, "second.up": 2.0}, [0.9, 1.5])
        output, report = two.with_name("out.onnx"), two.with_name("r.json")
        result = command("rewrite", two, "-o", output, "--report", report, *SPLIT)
        assert result.last_line.startswith("rewritten: ")
        assert log == ["model", "up", "second.up", "model"]
        content = json.loads(report.read_text("utf-8"))
        sites = {site["name"]: site for site in content["sites"]}
        for name in ("up", "down"):
            assert sites[name]["decision"] == "dense"
            assert sites[name]["components"] == 3
            assert (
                "left dense: timed alone it is slower at batch 1: 0.80x"
                in sites[name]["reason"]
            )
            assert sites[f"second.{name}"]["decision"] == "split"
            assert "left dense" not in sites[f"second.{name}"]["reason"]
        assert content["summary"]["rewritten"] == 2
        assert content["summary"]["substructures"] == 3
        assert content["timing"]["speedup"] == pytest.approx(1.5)
        written = onnx.load(output)
        nodes = [node.name for node in written.graph.node]
        assert "up" in nodes
        assert "second.up" not in nodes
        assert command("validate", two, output).code == 0

    def test_the_original_is_kept_where_nothing_helps(
        self, command: Command, two: Path, times: Callable[..., list[str]]
    ) -> None:
        log = times({"up": 1.5, "second.up": 1.2}, [0.9, 0.95, 9.9])
        output, report = two.with_name("out.onnx"), two.with_name("r.json")
        result = command("rewrite", two, "-o", output, "--report", report, *SPLIT)
        assert result.last_line == (
            "nothing to do: the rewritten model is slower at batch 1: 0.95x "
            "(99 % interval 0.94 to 0.96); the original was kept"
        )
        assert log == ["model", "up", "second.up", "model"]
        assert output.read_bytes() == two.read_bytes()
        content = json.loads(report.read_text("utf-8"))
        assert content["summary"]["decomposable"] is False
        reasons = {site["name"]: site["reason"] for site in content["sites"]}
        assert "this region gains little (1.20x timed alone)" in reasons["second.up"]
        assert reasons["up"].endswith("the original was kept")

    def test_where_every_region_does_harm_no_other_model_is_made(
        self, command: Command, two: Path, times: Callable[..., list[str]]
    ) -> None:
        log = times({"up": 0.8, "second.up": 0.7}, [0.9, 9.9])
        output = two.with_name("out.onnx")
        result = command("rewrite", two, "-o", output, *SPLIT)
        assert result.last_line.startswith("nothing to do: the rewritten model is slower")
        assert log == ["model", "up", "second.up"]
        assert output.read_bytes() == two.read_bytes()

    def test_a_smaller_model_outside_the_budget_is_no_error(
        self,
        command: Command,
        two: Path,
        times: Callable[..., list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        log = times({"up": 0.8, "second.up": 2.0}, [0.9, 9.9])
        measure = acceptance._measure

        def first_only(*arguments: Any) -> Any:
            if "model" in log:
                raise AnnealingError("outside the budget")
            return measure(*arguments)

        monkeypatch.setattr(acceptance, "_measure", first_only)
        output = two.with_name("out.onnx")
        result = command("rewrite", two, "-o", output, *SPLIT)
        assert result.code == 0
        assert result.last_line.startswith("nothing to do: the rewritten model is slower")
        assert output.read_bytes() == two.read_bytes()

    def test_a_faster_model_is_taken_as_it_is(
        self, command: Command, two: Path, times: Callable[..., list[str]]
    ) -> None:
        log = times({"up": 0.1, "second.up": 0.1}, [1.5])
        command("rewrite", two, "-o", two.with_name("out.onnx"), *SPLIT)
        assert log == ["model"]

    def test_forced_nothing_is_dropped(
        self, command: Command, two: Path, times: Callable[..., list[str]]
    ) -> None:
        log = times({"up": 0.1, "second.up": 2.0}, [0.9])
        output = two.with_name("out.onnx")
        result = command("rewrite", two, "-o", output, *SPLIT, "--force")
        assert result.last_line.startswith("rewritten: ")
        assert log == ["model"]
        assert len(found_partition(onnx.load(output), "up")) == 3

    def test_autotune_asks_the_clock_before_the_model_is_made(
        self, command: Command, two: Path, times: Callable[..., list[str]]
    ) -> None:
        log = times({"up": 0.8, "second.up": 2.0}, [1.5])
        output, report = two.with_name("out.onnx"), two.with_name("r.json")
        command("rewrite", two, "-o", output, "--report", report, "--autotune")
        assert log == ["up", "second.up", "model"]
        sites = {s["name"]: s for s in json.loads(report.read_text("utf-8"))["sites"]}
        assert sites["up"]["decision"] == "dense"
        assert sites["second.up"]["decision"] != "dense"
        assert "timed alone, is slower at batch 1: 0.80x" in sites["up"]["reason"]
        assert "2.00x timed alone" in sites["second.up"]["reason"]


@pytest.mark.parametrize(("budget", "branches"), [("0.01", 8), ("0.003", 1)])
def test_the_fastest_plan_counts_only_within_the_budget(
    budget: str,
    branches: int,
    command: Command,
    clock: Callable[[Timing], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Eight branches have no room for what is between the blocks, which makes an error of 0.007."""
    clock(timing(2.0))

    def apart(tried: Attempt, *_: object) -> Attempt:
        rng = np.random.default_rng(0)
        return attempt(
            tried.study, tried.evidence, tried.criterion, cost=CPU, emit="split", rng=rng
        )

    monkeypatch.setattr("onnx_decompose.pipeline.autotuned", apart)
    planted = plant(Recipe(isolated=(2, 0), noise=1e-3), np.random.default_rng(0))
    model, output = save(planted.model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    options = ("--null", "normal:0.001", "--criterion", "ksigma:5", "--budget", budget)
    asked = (*options, "--emit", "shrink", "--autotune")
    result = command("rewrite", model, "-o", output, *asked)
    assert (result.code, result.err) == (0, "")
    assert len(found_partition(onnx.load(output), "up")) == branches


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


class TestJoinedProducts:
    @pytest.fixture
    def headed(self, tmp_path: Path) -> Path:
        """A network that falls apart, and three dense products behind it."""
        return save(with_heads(np.random.default_rng(5)), tmp_path / "headed.onnx")

    @pytest.mark.parametrize(("second", "kept"), [(1.5, True), (0.8, False)])
    def test_a_slower_model_is_made_without_them(
        self,
        command: Command,
        headed: Path,
        monkeypatch: pytest.MonkeyPatch,
        second: float,
        kept: bool,
    ) -> None:
        models = iter([0.9, second])
        monkeypatch.setattr(
            "onnx_decompose.acceptance.bench_models", lambda *_, **__: timing(next(models))
        )
        output, report = headed.with_name("out.onnx"), headed.with_name("r.json")
        result = command("rewrite", headed, "-o", output, "--report", report, "--batch", 1)
        assert result.code == 0
        assert next(models, None) is None
        assert json.loads(report.read_text("utf-8"))["joined"] == []
        assert result.last_line.startswith("rewritten: " if kept else "nothing to do: ")
        if kept:
            made = {name: node for node in onnx.load(output).graph.node for name in node.output}
            assert {made[name].op_type for name in HEADS} == {"Add"}
            assert command("validate", headed, output, "--samples", 1).code == 0
