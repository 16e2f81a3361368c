"""The Python functions do what the commands do, on models in memory and on paths."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import onnx_decompose
from onnx_decompose import Options
from tests.e2e.planted import (
    Planted,
    Recipe,
    array_of,
    dense_ffn,
    found_partition,
    plant,
    run,
    save,
    set_array,
)

if TYPE_CHECKING:
    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = Options(emit="split", force=True, batch=(1,))


class TestModelsInMemory:
    def test_rewrite(self, eight: Planted, rng: np.random.Generator) -> None:
        before = eight.model.SerializeToString()
        result = onnx_decompose.rewrite(eight.model, options=SPLIT)
        assert eight.model.SerializeToString() == before
        assert isinstance(result.model, onnx.ModelProto)
        assert found_partition(result.model, "up") == eight.partition("up")
        assert result.report.summary.substructures == 8
        x = rng.normal(size=(3, 48)).astype(np.float32)
        np.testing.assert_allclose(
            run(result.model, x), run(eight.model, x), rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            run(result.annealed, x), run(eight.model, x), rtol=1e-5, atol=1e-5
        )

    def test_nothing_to_do_gives_the_model_back(self, rng: np.random.Generator) -> None:
        model = dense_ffn(rng)
        result = onnx_decompose.rewrite(model)
        assert result.model.SerializeToString() == model.SerializeToString()
        assert result.report.summary.decomposable is False

    def test_validate_and_bench(self, eight: Planted) -> None:
        rewritten = onnx_decompose.rewrite(eight.model, options=SPLIT).model
        validation = onnx_decompose.validate(eight.model, rewritten, seeds=1)
        assert validation
        assert validation.structural is not None
        assert validation.structural.sites == 2
        assert validation.annealing.error < 1e-6
        assert validation.failure == ""
        timing = onnx_decompose.bench(eight.model, rewritten, batch=(1, 2))
        assert [entry.batch for entry in timing.batches] == [1, 2]
        assert timing.speedup > 0

    def test_a_failed_validation_is_falsy_and_says_why(self, eight: Planted) -> None:
        rewritten = onnx_decompose.rewrite(eight.model, options=SPLIT).model
        values = array_of(rewritten, "up.weight.block0")
        values[0, 0] += np.float32(0.01)
        set_array(rewritten, "up.weight.block0", values)
        validation = onnx_decompose.validate(eight.model, rewritten, seeds=1)
        assert not validation
        assert "claim A does not hold: site 'up'" in validation.failure

    def test_analyze(self, eight: Planted) -> None:
        report = onnx_decompose.analyze(eight.model)
        assert [site.components for site in report.sites] == [8, 8]
        assert report.structural is None
        assert report.timing is None

    def test_external_data_without_a_file_is_refused(
        self, eight: Planted, tmp_path: Path
    ) -> None:
        path = save(eight.model, tmp_path / "m.onnx", external=True)
        model = onnx.load(path, load_external_data=False)
        with pytest.raises(onnx_decompose.ModelError, match="has no file"):
            onnx_decompose.rewrite(model)

    def test_written_from_memory(self, eight: Planted, tmp_path: Path) -> None:
        output = tmp_path / "out.onnx"
        result = onnx_decompose.rewrite(eight.model, output, SPLIT)
        assert onnx.load(output) == result.model

    def test_dense_written_from_memory(self, rng: np.random.Generator, tmp_path: Path) -> None:
        model, output = dense_ffn(rng), tmp_path / "out.onnx"
        onnx_decompose.rewrite(model, output)
        assert onnx.load(output) == model


class TestPaths:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_strings_and_paths(
        self, eight: Planted, tmp_path: Path, kind: type[str | Path]
    ) -> None:
        source, output = save(eight.model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
        result = onnx_decompose.rewrite(kind(source), kind(output), SPLIT)
        assert onnx.load(output) == result.model
        assert result.report.model == str(source)
        assert onnx_decompose.validate(kind(source), kind(output), seeds=1)
        assert onnx_decompose.bench(kind(source), kind(output), batch=(1,)).batches
        assert onnx_decompose.analyze(kind(source)).summary.sites == 2

    @pytest.mark.parametrize("kind", [str, Path])
    def test_inputs(
        self,
        pair: tuple[Path, Path],
        tmp_path: Path,
        rng: np.random.Generator,
        kind: type[str | Path],
    ) -> None:
        data = tmp_path / "data.npz"
        np.savez(data, x=rng.normal(size=(6, 18)).astype(np.float32))
        inputs = kind(data)
        validation = onnx_decompose.validate(*pair, inputs=inputs, seeds=1)
        assert validation.annealing.data == f"{data} (6 samples)"
        assert onnx_decompose.bench(*pair, inputs=inputs, batch=(2,)).batches

    def test_path_and_memory_mix(self, pair: tuple[Path, Path]) -> None:
        assert onnx_decompose.validate(pair[0], onnx.load(pair[1]), seeds=1)

    def test_path_and_memory_give_the_same(self, eight: Planted, tmp_path: Path) -> None:
        source = save(eight.model, tmp_path / "in.onnx")
        from_path = onnx_decompose.rewrite(source, options=SPLIT).model
        from_memory = onnx_decompose.rewrite(eight.model, options=SPLIT).model
        assert from_path == from_memory

    def test_command_and_function_write_the_same(
        self, command: Command, eight: Planted, tmp_path: Path
    ) -> None:
        source = save(eight.model, tmp_path / "in.onnx")
        outputs = tmp_path / "python.onnx", tmp_path / "command.onnx"
        onnx_decompose.rewrite(source, outputs[0], SPLIT)
        arguments = ("-o", outputs[1], "--emit", "split", "--force", "--batch", "1")
        assert command("rewrite", source, *arguments).code == 0
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


class TestOptions:
    @pytest.mark.parametrize(
        "bounds", [{"metric": "a:b"}, {"output_budgets": (("y", 0.25), ("z", 0.0))}]
    )
    def test_command_line_options_reach_the_function(
        self,
        bounds: dict[str, Any],
        command: Command,
        tmp_path: Path,
        eight: Planted,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Every field of Options that has an option arrives as it was typed."""
        seen: list[Options] = []

        def rewrite(
            source: object, output: object, options: Options, *, reproducer: object
        ) -> None:
            del source, output, reproducer
            seen.append(options)
            raise onnx_decompose.OptionError("seen")

        monkeypatch.setattr("onnx_decompose.pipeline.rewrite", rewrite)
        model = save(eight.model, tmp_path / "m.onnx")
        np.savez(tmp_path / "data.npz", x=np.ones((2, 48), np.float32))
        wanted = Options(
            null="normal:0.5",
            null_config=tmp_path / "nulls.toml",
            criterion="fwer",
            alpha=0.2,
            calibration=tmp_path / "data.npz",
            annealing="calibrated",
            proposals=("support", "merging"),
            compensation="mean",
            budget=0.3,
            provider="cpu",
            emit="shrink",
            autotune=True,
            batch=(2, 7),
            axes=(("time", 3),),
            seed=11,
            force=True,
            **bounds,
        )
        arguments: list[object] = []
        pairs = {"output_budgets": "--output-budget", "axes": "--axis"}
        for field in dataclasses.fields(wanted):
            value = getattr(wanted, field.name)
            name = f"--{field.name.replace('_', '-')}"
            if field.name == "seeds" or value is None:
                continue
            if field.name in pairs:
                for key, content in value:
                    arguments += [pairs[field.name], f"{key}={content}"]
                continue
            if field.name == "proposals":
                arguments += [part for kind in value for part in (name, kind)]
                continue
            if field.name == "batch":
                value = ",".join(map(str, value))
            arguments += [name] if value is True else [name, value]
        result = command("rewrite", model, "-o", tmp_path / "o.onnx", *arguments)
        assert result.code == 2
        assert seen == [wanted]

    def test_defaults_are_the_same_on_both_sides(
        self,
        command: Command,
        tmp_path: Path,
        eight: Planted,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen: list[Options] = []

        def record(source: object, *arguments: object, **others: object) -> None:
            del source, others
            seen.extend(a for a in arguments if isinstance(a, Options))
            raise onnx_decompose.OptionError("seen")

        model = save(eight.model, tmp_path / "m.onnx")
        for verb in ("rewrite", "analyze"):
            monkeypatch.setattr(f"onnx_decompose.pipeline.{verb}", record)
        command("rewrite", model, "-o", tmp_path / "o.onnx")
        command("analyze", model)
        assert seen == [Options(), Options()]

    def test_report_of_the_function_is_the_report_of_the_command(
        self, command: Command, eight: Planted, tmp_path: Path
    ) -> None:
        source, path = save(eight.model, tmp_path / "in.onnx"), tmp_path / "r.json"
        arguments = ("--emit", "split", "--force", "--batch", "1", "--report", path)
        assert command("rewrite", source, "--dry-run", *arguments).code == 0
        told = json.loads(path.read_text("utf-8"))
        made = json.loads(
            json.dumps(onnx_decompose.rewrite(source, options=SPLIT).report.to_json())
        )
        for content in (told, made):
            del content["timing"]
            for claim in content["claims"].values():
                claim.pop("outputs", None)
        assert told == made


class TestErrors:
    def test_one_tree(self) -> None:
        with pytest.raises(onnx_decompose.DecomposeError) as caught:
            onnx_decompose.rewrite("no such file.onnx")
        assert isinstance(caught.value, onnx_decompose.ModelError)
        assert caught.value.exit_code == 2

    def test_claims_that_do_not_hold_raise_and_write_nothing(
        self, eight: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pass that emits a wrong weight is caught before anything is written."""
        import onnx_decompose.passes.branches as branches  # noqa: PLC0415, PLR0402

        emit = branches.BranchEmitter.emit

        def wrong(self: branches.BranchEmitter) -> object:
            record = emit(self)
            placed = [p for p in self._ops.placed if p.node.op == "MatMul"]
            values = placed[0].node.inputs[1].values
            placed[0].node.inputs[1].values = values + np.float32(0.01)
            return record

        monkeypatch.setattr(branches.BranchEmitter, "emit", wrong)
        with pytest.raises(onnx_decompose.StructuralError, match="nothing was written"):
            onnx_decompose.rewrite(eight.model, tmp_path / "out.onnx", SPLIT)
        assert list(tmp_path.iterdir()) == []

    def test_claim_failures_are_exit_code_1(
        self,
        command: Command,
        eight: Planted,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise onnx_decompose.StructuralError(
                "m.onnx: claim A does not hold: so; nothing was written"
            )

        monkeypatch.setattr("onnx_decompose.acceptance.structural_claim", fail)
        model = save(eight.model, tmp_path / "m.onnx")
        arguments = ("--emit", "split", "--force", "--batch", "1")
        result = command("rewrite", model, "-o", tmp_path / "out.onnx", *arguments)
        assert result.code == 1
        assert result.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_two_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    """No global state: two rewrites at once give what each gives alone."""
    planted = [plant(Recipe(), np.random.default_rng(seed)) for seed in (0, 1)]
    found: dict[int, onnx.ModelProto] = {}

    def work(number: int) -> None:
        found[number] = onnx_decompose.rewrite(
            planted[number].model, tmp_path / f"{number}.onnx", SPLIT
        ).model

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert found_partition(found[number], "up") == planted[number].partition("up")
