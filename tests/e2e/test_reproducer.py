"""Where claim A fails, ``validate --report`` leaves two small models and inputs that show it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from onnx_decompose.decomposition.decompose import rewritten_model
from tests.e2e.inner_graphs import (
    SQUARE,
    branch,
    call,
    loop,
    nested,
    scan,
)
from tests.e2e.planted import (
    Recipe,
    array_of,
    decomposition,
    plant,
    save,
    set_array,
)
from tests.e2e.test_corruptions import block_name, cross_branches, with_head
from tests.e2e.whole_rewrite import rewrite_once
from tools.planted_models import Blocks, residual_stack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = pytest.mark.e2e


@pytest.fixture
def pair() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A planted network with a dense head behind it, and its rewrite."""
    rng = np.random.default_rng(21)
    blocks = ((6, 12, 5), (6, 12, 5), (7, 10, 4))
    original = with_head(plant(Recipe(blocks=blocks), rng).model, rng)
    rewritten = rewrite_once(original, "split").model
    assert rewritten is not None
    return original, rewritten


def validated(
    command: Command,
    original: onnx.ModelProto,
    corrupted: onnx.ModelProto,
    folder: Path,
    *options: str,
) -> tuple[str, Path]:
    """The error line and the reproducer's folder."""
    paths = save(original, folder / "in.onnx"), save(corrupted, folder / "out.onnx")
    report = folder / "report.json"
    result = command("validate", *paths, "--samples", "1", "--report", report, *options)
    assert result.code == 1
    (line,) = result.err.splitlines()
    content = json.loads(report.read_text("utf-8"))
    assert content["passed"] is False
    made = folder / "report.reproducer"
    assert content["reproducer"] == str(made)
    assert f"; see {made}" in line
    return line, made


def run_both(folder: Path, before: str) -> list[Any]:
    inputs = dict(np.load(folder / "inputs.npz"))
    found = []
    for name in (before, "rewritten.onnx"):
        onnx.checker.check_model(onnx.load(folder / name))
        session = onnxruntime.InferenceSession(folder / name)
        wanted = {one.name for one in session.get_inputs()}
        assert wanted <= inputs.keys()
        found.append(session.run(None, {n: inputs[n] for n in wanted})[0])
    return found


def wrong_activation(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Abs"


def wrong_head(model: onnx.ModelProto) -> None:
    """Behind the region: nothing in it is at fault."""
    node = next(node for node in model.graph.node if node.name == "shifted")
    node.input[1] = node.input[0]


@pytest.mark.parametrize(
    ("corrupt", "value", "sites"),
    [
        (lambda model: cross_branches(model, np.random.default_rng(0)), "ffn", ["up", "down"]),
        (wrong_head, "y", []),
    ],
)
def test_it_is_cut_to_where_the_models_part(
    command: Command,
    pair: tuple[onnx.ModelProto, onnx.ModelProto],
    tmp_path: Path,
    corrupt: Callable[[onnx.ModelProto], None],
    value: str,
    sites: list[str],
) -> None:
    original, corrupted = pair
    corrupt(corrupted)
    line, folder = validated(command, original, corrupted, tmp_path)
    text = (folder / "README.md").read_text("utf-8")
    assert f"`{value}`" in text
    assert "Sites in between: " + (", ".join(f"`{site}`" for site in sites) or "none") in text
    assert (
        line.split("claim A does not hold: ")[1].split("; see ")[0].split("; claim B")[0]
        in text
    )
    before, after = run_both(folder, "annealed.onnx")
    assert np.abs(before - after).max() > 1e-3
    whole = {node.name for node in original.graph.node}
    part = {node.name for node in onnx.load(folder / "annealed.onnx").graph.node}
    assert part < whole
    assert len(list(folder.iterdir())) == 4


def test_the_line_in_it_runs(
    command: Command, pair: tuple[onnx.ModelProto, onnx.ModelProto], tmp_path: Path
) -> None:
    original, corrupted = pair
    wrong_head(corrupted)
    _, folder = validated(command, original, corrupted, tmp_path)
    before, after = run_both(folder, "annealed.onnx")
    stated = (folder / "README.md").read_text("utf-8").split("Largest difference here: ")[1]
    assert float(stated.split()[0].rstrip(".")) == pytest.approx(
        float(np.abs(before - after).max()), rel=1e-2
    )


def test_a_wrong_weight_is_cut_out_with_its_region(
    command: Command, pair: tuple[onnx.ModelProto, onnx.ModelProto], tmp_path: Path
) -> None:
    original, corrupted = pair
    name = block_name(corrupted, "down", 0)
    set_array(corrupted, name, array_of(corrupted, name) * np.float32(1.01))
    line, folder = validated(command, original, corrupted, tmp_path)
    assert "site 'down'" in line
    text = (folder / "README.md").read_text("utf-8")
    assert "Sites in between: `up`, `down`" in text
    before, after = run_both(folder, "original.onnx")
    assert np.abs(before - after).max() > 0


def test_renumbered_units_are_no_divergence(command: Command, tmp_path: Path) -> None:
    """Values whose units stand in another order agree; what comes behind them is looked at."""
    rng = np.random.default_rng(0)
    original = residual_stack((24, 48), Blocks(3), np.float32, rng, depth=2).model
    corrupted = rewrite_once(original, "auto").model
    assert corrupted is not None
    last = next(node for node in reversed(corrupted.graph.node) if node.op_type == "Relu")
    last.op_type = "Abs"
    for entry in list(last.metadata_props):
        last.metadata_props.remove(entry)
    _, folder = validated(command, original, corrupted, tmp_path)
    assert (folder / "README.md").is_file()


def test_no_report_no_reproducer(
    command: Command, pair: tuple[onnx.ModelProto, onnx.ModelProto], tmp_path: Path
) -> None:
    original, corrupted = pair
    wrong_head(corrupted)
    paths = save(original, tmp_path / "in.onnx"), save(corrupted, tmp_path / "out.onnx")
    assert command("validate", *paths, "--samples", "1").code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "out.onnx"}


def test_nothing_is_left_where_claim_a_holds(
    command: Command, pair: tuple[onnx.ModelProto, onnx.ModelProto], tmp_path: Path
) -> None:
    paths = save(pair[0], tmp_path / "in.onnx"), save(pair[1], tmp_path / "out.onnx")
    report = tmp_path / "report.json"
    assert command("validate", *paths, "--samples", "1", "--report", report).code == 0
    assert json.loads(report.read_text("utf-8"))["reproducer"] is None
    assert not (tmp_path / "report.reproducer").exists()


def test_tensors_of_the_parts_are_all_inside(
    command: Command, pair: tuple[onnx.ModelProto, onnx.ModelProto], tmp_path: Path
) -> None:
    original, corrupted = pair
    wrong_activation(corrupted)
    _, folder = validated(command, original, corrupted, tmp_path)
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            assert not tensor.external_data
            assert numpy_helper.to_array(tensor).size


def inner_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """All nodes, those of bodies last."""
    graphs = [model.graph]
    for graph in graphs:  # grows as it goes
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [node for graph in graphs for node in graph.node]


@pytest.mark.parametrize("make", [branch, loop, scan, call, nested])
def test_it_goes_inside(
    command: Command, tmp_path: Path, make: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> None:
    """Bodies and functions are looked into: the parts are plain nodes between two values inside."""
    original = make(plant(SQUARE, np.random.default_rng(0)).model)
    corrupted = rewrite_once(original, "split").model
    assert corrupted is not None
    wrong = next(node for node in reversed(inner_nodes(corrupted)) if node.op_type == "Relu")
    wrong.op_type = "Abs"
    for entry in list(wrong.metadata_props):
        wrong.metadata_props.remove(entry)
    _, folder = validated(command, original, corrupted, tmp_path)
    # The proof compares operators of calls with those of the function, before anything runs.
    dense = "original.onnx" if make is call else "annealed.onnx"
    before, after = run_both(folder, dense)
    assert np.abs(before - after).max() > 1e-3
    for name in (dense, "rewritten.onnx"):
        nodes = onnx.load(folder / name).graph.node
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in nodes}
        assert {node.domain for node in nodes} == {""}
    part = [node.op_type for node in onnx.load(folder / dense).graph.node]
    whole = ["Add", "Add", "MatMul", "MatMul", "Relu"]
    assert sorted(part) == (["Relu"] if make is call else whole)


@pytest.mark.parametrize("make", [branch, loop])
def test_a_wrong_weight_inside(
    command: Command, tmp_path: Path, make: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> None:
    original = make(plant(SQUARE, np.random.default_rng(0)).model)
    corrupted = rewrite_once(original, "split").model
    assert corrupted is not None
    name = block_name(corrupted, next(iter(decomposition(corrupted)["sites"])), 0)
    set_array(corrupted, name, array_of(corrupted, name) * np.float32(1.01))
    _, folder = validated(command, original, corrupted, tmp_path)
    before, after = run_both(folder, "original.onnx")
    assert np.abs(before - after).max() > 0
    assert "If" not in {node.op_type for node in onnx.load(folder / "original.onnx").graph.node}


class TestRewrite:
    """``rewrite`` itself finds claim A broken: nothing is written but what shows it."""

    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:

        def wrong(*arguments: Any) -> Any:
            model, decomposition = rewritten_model(*arguments)
            wrong_head(model.proto)
            return model, decomposition

        monkeypatch.setattr("onnx_decompose.acceptance.rewritten_model", wrong)

    def rewrite(
        self, command: Command, original: onnx.ModelProto, folder: Path, *options: object
    ) -> str:
        source = save(original, folder / "in.onnx", external=True)
        output = folder / "out.onnx"
        result = command(
            "rewrite", source, "-o", output, "--emit", "split", "--force", *options
        )
        assert result.code == 1
        assert not output.exists()
        (line,) = result.err.splitlines()
        assert "claim A does not hold" in line
        assert "; nothing was written; " in line
        return line

    @pytest.mark.usefixtures("broken", "quick_bench")
    def test_with_a_report(
        self,
        command: Command,
        pair: tuple[onnx.ModelProto, onnx.ModelProto],
        tmp_path: Path,
    ) -> None:
        line = self.rewrite(command, pair[0], tmp_path, "--report", tmp_path / "r.json")
        folder = tmp_path / "r.reproducer"
        assert line.endswith(f"; report it as a defect, with {folder}")
        before, after = run_both(folder, "annealed.onnx")
        assert np.abs(before - after).max() > 1e-3
        assert {path.name for path in tmp_path.iterdir()} == {
            *("in.onnx", "in.onnx.data", "r.reproducer"),
        }

    @pytest.mark.usefixtures("broken", "quick_bench")
    def test_without_a_report(
        self,
        command: Command,
        pair: tuple[onnx.ModelProto, onnx.ModelProto],
        tmp_path: Path,
    ) -> None:
        line = self.rewrite(command, pair[0], tmp_path)
        assert "with --report, models that show it are written" in line
        assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "in.onnx.data"}

    @pytest.mark.usefixtures("quick_bench")
    def test_a_model_that_does_not_run(
        self,
        command: Command,
        pair: tuple[onnx.ModelProto, onnx.ModelProto],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:

        def wrong(*arguments: Any) -> Any:
            model, decomposition = rewritten_model(*arguments)
            shape = numpy_helper.from_array(np.array([5, -1, 3, 7], np.int64), "shape")
            model.proto.graph.initializer.append(shape)
            last = next(n for n in model.proto.graph.node if n.output[0] == "y")
            last.output[0] = "flat"
            reshape = onnx.helper.make_node("Reshape", ["flat", "shape"], ["y"])
            model.proto.graph.node.append(reshape)
            return model, decomposition

        monkeypatch.setattr("onnx_decompose.acceptance.rewritten_model", wrong)
        self.rewrite(command, pair[0], tmp_path, "--report", tmp_path / "r.json")
        folder = tmp_path / "r.reproducer"
        assert "The second does not run." in (folder / "README.md").read_text("utf-8")
        assert {path.name for path in folder.iterdir()} == {
            *("annealed.onnx", "rewritten.onnx", "inputs.npz", "README.md"),
        }
