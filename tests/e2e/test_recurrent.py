"""Recurrent operators through the command line: planted groups are found, proved and written; nothing else is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_decompose import Options, analyze
from onnx_decompose.analysis.recurrence import CELLS, GATES, CellType
from tests.e2e.planted import array_of, decomposition, save, set_array, units
from tests.e2e.rewriting import SPLIT, rewrite
from tests.passes.recurrent_models import Planted, Recipe, network, plant

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]


def found_groups(model: onnx.ModelProto, weight: str, hidden: int) -> set[tuple[int, ...]]:
    """The hidden units of every part of a W, from the metadata alone."""
    blocks = decomposition(model)["sites"][weight]["blocks"]
    return {tuple(sorted({unit % hidden for unit in units(b["columns"])})) for b in blocks}


def found_inputs(model: onnx.ModelProto, weight: str) -> set[tuple[int, ...]]:
    return {units(b["rows"]) for b in decomposition(model)["sites"][weight]["blocks"]}


def inputs_of(planted: Planted) -> set[tuple[int, ...]]:
    groups = range(int(planted.inputs.max()) + 1)
    return {tuple(np.flatnonzero(planted.inputs == group).tolist()) for group in groups}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
def test_three_in_cascade_behind_a_permutation(
    command: Command, tmp_path: Path, cell: CellType, direction: str, initial: bool
) -> None:
    recipe = Recipe(cell, direction=direction, initial=initial)
    planted = plant(recipe, np.random.default_rng(5))
    rewritten, report = rewrite(command, planted.model, tmp_path, *SPLIT)
    sides = [""] if recipe.directions == 1 else [".forward", ".reverse"]
    for number, side in enumerate(sides):
        name = f"rnn{side}.W"
        assert found_groups(rewritten, name, recipe.hidden) == planted.groups(number)
        assert found_inputs(rewritten, name) == inputs_of(planted)
    sites = {site["name"]: site for site in report["sites"]}
    assert sites.keys() == {f"rnn{side}.{operand}" for side in sides for operand in "WR"}
    for name, site in sites.items():
        state = name.endswith("R")
        assert site["op_type"] == cell
        assert site["decision"] == "split"
        assert site["shape"] == [18 if state else 9, GATES[cell] * 18]
        assert (site["sccs"], site["layers"]) == ((3, 3) if state else (None, None))
        assert site["components"] == (1 if state else 3)
        assert len(site["blocks"]) == 3
    assert report["summary"]["substructures"] == 3 * recipe.directions
    count = 3 * recipe.directions
    assert (
        f"in 1 recurrent operator, run as {count} smaller ones" in report["summary"]["reason"]
    )
    entries = sum(site["shape"][0] * site["shape"][1] for site in sites.values())
    assert report["summary"]["weights_before"] == entries
    kept = sum(rows * columns for site in sites.values() for rows, columns in site["blocks"])
    assert report["summary"]["weights_after"] == kept < entries
    assert report["claims"]["structural"]["passed"]
    assert report["claims"]["structural"]["sites"] == 2 * recipe.directions
    assert report["claims"]["annealing"]["passed"]


def test_sequence_lengths(command: Command, tmp_path: Path) -> None:
    planted = plant(Recipe("GRU", lengths=True), np.random.default_rng(6))
    rewritten, _ = rewrite(command, planted.model, tmp_path, *SPLIT)
    assert found_groups(rewritten, "rnn.W", 18) == planted.groups()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [(), SPLIT], ids=["auto", "forced"])
def test_random_dense_weights_stay_byte_for_byte(
    command: Command, tmp_path: Path, cell: CellType, options: tuple[str, ...]
) -> None:
    """Also where half of the entries are zero: a digraph of 40 units is still one giant component."""
    rng = np.random.default_rng(7)
    recipe = Recipe(cell)
    rows = GATES[cell] * 40
    w, r = (rng.normal(size=(1, rows, k)) * (rng.random((1, rows, k)) < 0.5) for k in (12, 40))
    _, report = rewrite(command, network(recipe, w, r, rng), tmp_path, *options)
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    summary = report["summary"]
    assert summary["decomposable"] is False
    assert (
        "the largest (rnn): 1 strongly connected component over 40 units, the largest with 40 (100%)"
        in summary["reason"]
    )
    assert {site["sccs"] for site in report["sites"]} == {1, None}


@pytest.mark.parametrize("cell", CELLS)
def test_noise_around_the_groups_is_removed_within_the_budget(
    command: Command, tmp_path: Path, cell: CellType
) -> None:
    """Only entries between the groups go: what lies in an operator's matrices stays, however small."""
    rng = np.random.default_rng(8)
    planted = plant(Recipe(cell, bias=False), rng)
    for name in ("W", "R"):
        values = array_of(planted.model, name)
        noise = rng.normal(0, 1e-3, values.shape).astype(np.float32)
        small = rng.random(values.shape) < 0.1
        set_array(planted.model, name, np.where((values == 0) | small, noise, values))
    options = (*SPLIT, "--null", "normal:0.001", "--criterion", "fwer", "--budget", "0.1")
    rewritten, report = rewrite(command, planted.model, tmp_path, *options)
    assert found_groups(rewritten, "rnn.W", 18) == planted.groups()
    for site in report["sites"]:
        assert site["null"] == "normal:0.001 normal(0, 0.001)"
        assert site["density"] < sum(r * c for r, c in site["blocks"]) / np.prod(site["shape"])
    assert 0 < report["claims"]["annealing"]["error"] < 0.1
    stored = np.concatenate(
        [array_of(rewritten, f"rnn.cell{n}.R").reshape(-1) for n in range(3)]
    )
    assert (stored != 0).all()
    assert (np.abs(stored) < 0.01).any()


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_gates_that_moved_a_little_each_show_the_groups_together(cell: CellType) -> None:
    """By 4 deviations per gate: too little for single entries, more than enough for a dependency."""
    rng = np.random.default_rng(8)
    planted = plant(Recipe(cell, cascade=(), bias=False), rng)
    for name in ("W", "R"):
        inside = array_of(planted.model, name) != 0
        noise = rng.normal(0, 0.01, inside.shape)
        moved = np.where(inside, rng.choice([-0.04, 0.04], inside.shape), 0)
        set_array(planted.model, name, (noise + moved).astype(np.float32))
    found = {
        criterion: {
            site.name: (site.components, site.density)
            for site in analyze(
                planted.model, Options(null="normal:0.01", criterion=criterion, alpha=1e-4)
            ).sites
        }
        for criterion in ("channel", "fdr")
    }
    assert {name: count for name, (count, _) in found["channel"].items()} == {
        "rnn.W": 3,
        "rnn.R": 3,
    }
    for name, (_, density) in found["channel"].items():
        assert density > 1.2 * found["fdr"][name][1]


def with_head(planted: Planted, rng: np.random.Generator) -> onnx.ModelProto:
    """The model with a MatMul of two blocks behind Y_h."""
    model = planted.model
    blocks = np.kron(np.eye(2), rng.uniform(0.5, 1, (9, 4))).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(blocks, "head"))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["Y_h", "head"], ["z"], "head"))
    shape: list[str | int | None] = [1, "batch", 8]
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, shape))
    return model


def test_a_recurrent_operator_beside_a_network(command: Command, tmp_path: Path) -> None:
    """Regions and recurrent operators of one model are rewritten together."""
    rng = np.random.default_rng(9)
    model = with_head(plant(Recipe("RNN", outputs=("Y_h",)), rng), rng)
    rewritten, report = rewrite(command, model, tmp_path, *SPLIT)
    assert [site["name"] for site in report["sites"]] == ["rnn.W", "rnn.R", "head"]
    assert [site["decision"] for site in report["sites"]] == ["split"] * 3
    assert report["summary"]["substructures"] == 5
    assert decomposition(rewritten)["sites"].keys() == {"rnn.W", "rnn.R", "head"}


def test_where_the_model_is_slower_recurrent_operators_are_left_dense_first(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts: list[str | None] = ["slower at batch 1: 0.50x", None]
    monkeypatch.setattr("onnx_decompose.acceptance.slowdown", lambda _: verdicts.pop(0))
    rng = np.random.default_rng(9)
    model = with_head(plant(Recipe("RNN", outputs=("Y_h",)), rng), rng)
    options = ("--emit", "split", "--batch", "1")
    rewritten, report = rewrite(command, model, tmp_path, *options)
    decisions = {site["name"]: site["decision"] for site in report["sites"]}
    assert decisions == {"rnn.W": "dense", "rnn.R": "dense", "head": "split"}
    assert "left dense: the model was slower at batch 1: 0.50x" in report["sites"][0]["reason"]
    assert [n.op_type for n in rewritten.graph.node].count("RNN") == 1


@pytest.mark.parametrize("place", ["block", "between", "bias"])
def test_a_changed_entry_fails_validation(command: Command, tmp_path: Path, place: str) -> None:
    planted = plant(Recipe(sizes=((3, 6), (0, 5)), initial=True), np.random.default_rng(10))
    rewritten, _ = rewrite(command, planted.model, tmp_path, *SPLIT)
    name = next(
        t.name
        for t in rewritten.graph.initializer
        if t.name.endswith(".B" if place == "bias" else ".W")
    )
    values = array_of(rewritten, name)
    values.reshape(-1)[0] += 0.25
    if place == "between":
        # The last group reads no input: the zeros that stand in their place belong to its W all the same.
        name = "rnn.cell1.W"
        values = array_of(rewritten, name)
        assert not values[0, :, 0].any()
        values[0, 0, 0] = 0.25
    set_array(rewritten, name, values)
    save(rewritten, tmp_path / "bad.onnx")
    result = command("validate", tmp_path / "in.onnx", tmp_path / "bad.onnx")
    assert result.code == 1
    assert "claim A does not hold" in result.err


def test_entries_that_no_weight_owns_fail_validation(command: Command, tmp_path: Path) -> None:
    """A column of a cell's W that neither W nor R of the original accounts for."""
    planted = plant(Recipe(), np.random.default_rng(11))
    rewritten, _ = rewrite(command, planted.model, tmp_path, *SPLIT)
    content = decomposition(rewritten)
    shared = "rnn.cell2.W"
    blocks = content["sites"]["rnn.R"]["blocks"]
    content["sites"]["rnn.R"]["blocks"] = [b for b in blocks if b["initializer"] != shared]
    entry = next(p for p in rewritten.metadata_props if p.key == "onnx_decompose.decomposition")
    entry.value = json.dumps(content)
    save(rewritten, tmp_path / "bad.onnx")
    result = command("validate", tmp_path / "in.onnx", tmp_path / "bad.onnx")
    assert result.code == 1
    assert "claim A does not hold" in result.err


def test_analyze_tells_what_other_nulls_would_give(command: Command, tmp_path: Path) -> None:
    save(plant(Recipe(), np.random.default_rng(12)).model, tmp_path / "in.onnx")
    result = command("analyze", tmp_path / "in.onnx", "--report", tmp_path / "r.json")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert [site["name"] for site in report["sites"]] == ["rnn.W", "rnn.R"]
    assert "torch" in {other["null"] for other in report["alternatives"]}


@pytest.mark.torch
class TestTorch:
    """What torch's own exporter makes of its modules."""

    FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self, kind, two):
        super().__init__()
        self.rnn = kind(9, 18, bidirectional=two, batch_first=two)
        self.head = torch.nn.Linear(36 if two else 18, 5)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.arange(9)[torch.randperm(9, generator=generator)] % 3
        units = torch.arange(18)[torch.randperm(18, generator=generator)] % 3
        self.units = units
        with torch.no_grad():
            for name, parameter in self.rnn.named_parameters():
                if "weight" in name:
                    sources = units if "hh" in name else inputs
                    mask = units[:, None] == sources
                    if "hh" in name and kind is torch.nn.LSTM:
                        mask |= (units[:, None] == 1) & (sources == 0)
                    parameter *= mask.repeat(parameter.shape[0] // 18, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])

def lstm():
    axes = {"dynamic_shapes": ({1: "batch"},), "input_names": ["x"]}
    return Net(torch.nn.LSTM, False), (torch.zeros(6, 3, 9),), axes

def gru():
    axes = {"dynamic_shapes": ({0: "batch"},), "input_names": ["x"]}
    return Net(torch.nn.GRU, True), (torch.zeros(3, 6, 9),), axes
"""

    @pytest.mark.parametrize(("kind", "count"), [("lstm", 3), ("gru", 6)])
    def test_exported_and_rewritten(
        self, command: Command, tmp_path: Path, kind: str, count: int
    ) -> None:
        factory = tmp_path / "recurrent_factory.py"
        factory.write_text(self.FACTORY, "utf-8")
        exported = tmp_path / "exported.onnx"
        result = command("export", f"{factory}:{kind}", "-o", exported)
        assert result.code == 0, result.err
        rewritten, report = rewrite(command, onnx.load(exported), tmp_path, *SPLIT)
        assert report["summary"]["substructures"] == count
        ops = [node.op_type for node in rewritten.graph.node]
        assert ops.count(kind.upper()) == count
        weights = [site for site in decomposition(rewritten)["sites"] if site.endswith(".W")]
        for weight in weights:
            sizes = sorted(len(group) for group in found_groups(rewritten, weight, 18))
            assert sizes == [6, 6, 6]
