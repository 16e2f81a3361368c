"""A rewritten model that was tampered with fails ``validate``, whatever was changed and however little."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_decompose
from tests.e2e.conftest import make_quick
from tests.e2e.planted import (
    Recipe,
    array_of,
    decomposition,
    initializer,
    plant,
    save,
    set_array,
    units,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Command

    Corruption = Callable[[onnx.ModelProto, np.random.Generator], None]

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

BLOCKS = ((6, 12, 5), (6, 12, 5), (7, 10, 4))


def with_head(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The network with a LayerNormalization and a dense MatMul behind it, which no rewrite touches."""
    for node in model.graph.node:
        for position, name in enumerate(node.output):
            node.output[position] = "ffn" if name == "y" else name
    width = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    arrays = {
        "norm.scale": rng.uniform(0.5, 1.5, width),
        "norm.bias": rng.normal(size=width),
        "head.weight": rng.normal(size=(width, 6)),
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    normed = ["ffn", "norm.scale", "norm.bias"]
    shift = numpy_helper.from_array(rng.normal(size=6).astype(np.float32))
    model.graph.node.extend(
        [
            helper.make_node("LayerNormalization", normed, ["normed"], "norm", epsilon=1e-5),
            helper.make_node("MatMul", ["normed", "head.weight"], ["logits"], "head"),
            helper.make_node("Constant", [], ["shift"], "shift", value=shift),
            helper.make_node("Add", ["logits", "shift"], ["y"], "shifted"),
        ]
    )
    model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = 6
    return model


@pytest.fixture(scope="module", params=["matmul", "gemm"])
def headed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with original.onnx and rewritten.onnx."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(21)
    model = with_head(plant(Recipe(blocks=BLOCKS, form=request.param), rng).model, rng)
    save(model, folder / "original.onnx")
    options = onnx_decompose.Options(emit="split", force=True, batch=(1,))
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        onnx_decompose.rewrite(folder / "original.onnx", folder / "rewritten.onnx", options)
    return folder


# --- what is changed ---------------------------------------------------------------------------


def block_name(model: onnx.ModelProto, site: str, number: int) -> str:
    return str(decomposition(model)["sites"][site]["blocks"][number]["initializer"])


def bias_name(model: onnx.ModelProto, site: str, number: int) -> str:
    """The slice of a site's bias that one branch reads."""
    names = [t.name for t in model.graph.initializer if t.name.startswith(f"{site}.bias.")]
    return str(sorted(names)[number])


def nudge(values: Any, rng: np.random.Generator, change: Callable[[Any], Any]) -> Any:
    place = tuple(int(rng.integers(size)) for size in values.shape)
    values[place] = change(values[place])
    return values


def changed(model: onnx.ModelProto, name: str, values: Any) -> None:
    before = array_of(model, name)
    values = np.asarray(values, before.dtype)
    assert values.shape == before.shape
    assert not np.array_equal(values, before)
    set_array(model, name, values)


def edit_entry(site: str, change: Callable[[Any], Any]) -> Corruption:
    """Change one entry of one block."""

    def corrupt(model: onnx.ModelProto, rng: np.random.Generator) -> None:
        name = block_name(model, site, int(rng.integers(3)))
        changed(model, name, nudge(array_of(model, name), rng, change))

    return corrupt


def edit_tensor(name: str, change: Callable[[Any], Any]) -> Corruption:
    """Change one entry of a tensor that was not rewritten; its units may stand in a new order."""

    def corrupt(model: onnx.ModelProto, rng: np.random.Generator) -> None:
        stored = {tensor.name for tensor in model.graph.initializer}
        held = name if name in stored else f"{name}.renumbered"
        changed(model, held, nudge(array_of(model, held), rng, change))

    return corrupt


def swap_in_gather(position: int) -> Corruption:
    """Swap two entries of the index of the Gather at ``position``."""

    def corrupt(model: onnx.ModelProto, rng: np.random.Generator) -> None:
        gathers = [node for node in model.graph.node if node.op_type == "Gather"]
        name = gathers[position].input[1]
        values = array_of(model, name)
        first, second = rng.choice(values.size, 2, replace=False)
        values[[first, second]] = values[[second, first]]
        changed(model, name, values)

    return corrupt


def edit_bias(site: str, change: Callable[[Any], Any]) -> Corruption:
    """Change the largest entry of one branch's bias."""

    def corrupt(model: onnx.ModelProto, rng: np.random.Generator) -> None:
        name = bias_name(model, site, int(rng.integers(3)))
        values = array_of(model, name)
        values[np.abs(values).argmax()] = change(values[np.abs(values).argmax()])
        changed(model, name, values)

    return corrupt


def swap_bias_entries(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    del rng
    name = bias_name(model, "up", 0)
    values = array_of(model, name)
    low, high = values.argmin(), values.argmax()
    values[[low, high]] = values[[high, low]]
    changed(model, name, values)


def twins(model: onnx.ModelProto) -> tuple[int, int]:
    """The two branches of equal sizes."""
    blocks = decomposition(model)["sites"]["up"]["blocks"]
    hidden = [len(units(block["columns"])) for block in blocks]
    first, second = (number for number, size in enumerate(hidden) if size == BLOCKS[0][1])
    return first, second


def exchange_blocks(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Two branches of equal sizes get each other's weights."""
    del rng
    first, second = (block_name(model, "up", number) for number in twins(model))
    one, other = array_of(model, first), array_of(model, second)
    changed(model, first, other)
    changed(model, second, one)


def rescale_a_branch(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Twice the weights and biases before the ReLU, half of them behind it: the outputs are the same."""
    del rng
    changed(model, block_name(model, "up", 0), 2 * array_of(model, block_name(model, "up", 0)))
    changed(model, bias_name(model, "up", 0), 2 * array_of(model, bias_name(model, "up", 0)))
    name = block_name(model, "down", 0)
    changed(model, name, array_of(model, name) / 2)


def change_activation(op_type: str) -> Corruption:
    def corrupt(model: onnx.ModelProto, rng: np.random.Generator) -> None:
        nodes = [node for node in model.graph.node if node.op_type == "Relu"]
        nodes[int(rng.integers(len(nodes)))].op_type = op_type

    return corrupt


def cross_branches(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """The second products of two branches read each other's hidden units."""
    del rng
    weights = {block_name(model, "down", number) for number in twins(model)}
    first, second = (node for node in model.graph.node if weights.intersection(node.input))
    first.input[0], second.input[0] = second.input[0], first.input[0]


def reverse_concat(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    del rng
    (node,) = (node for node in model.graph.node if node.op_type == "Concat")
    names = list(node.input)[::-1]
    del node.input[:]
    node.input.extend(names)


def edit_epsilon(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """An attribute of a node that was not rewritten."""
    del rng
    (node,) = (node for node in model.graph.node if node.op_type == "LayerNormalization")
    node.attribute[[a.name for a in node.attribute].index("epsilon")].f = 1e-2


def edit_constant_node(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A Constant node that was not rewritten."""
    (node,) = (node for node in model.graph.node if node.op_type == "Constant")
    values = nudge(
        np.array(numpy_helper.to_array(node.attribute[0].t)), rng, lambda v: v + 0.01
    )
    node.attribute[0].t.CopyFrom(numpy_helper.from_array(values))


def drop_block(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    del rng
    model.graph.initializer.remove(initializer(model, block_name(model, "up", 1)))


def truncate_block(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    del rng
    tensor = initializer(model, block_name(model, "up", 1))
    tensor.raw_data = tensor.raw_data[:-4]


def reshape_block(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """The same bytes, declared with the axes exchanged."""
    del rng
    name = block_name(model, "up", 2)
    values = array_of(model, name)
    set_array(model, name, values.reshape(values.shape[::-1]))


def edit_metadata(change: Callable[[dict[str, Any]], None]) -> Corruption:
    def corrupt(model: onnx.ModelProto, rng: np.random.Generator) -> None:
        del rng
        content = decomposition(model)
        change(content)
        for entry in model.metadata_props:
            if entry.key == "onnx_decompose.decomposition":
                entry.value = json.dumps(content)

    return corrupt


def swap_rows_of_blocks(content: dict[str, Any]) -> None:
    first, second, _ = content["sites"]["up"]["blocks"]
    first["rows"], second["rows"] = second["rows"], first["rows"]


def swap_columns_of_blocks(content: dict[str, Any]) -> None:
    first, second, _ = content["sites"]["down"]["blocks"]
    first["columns"], second["columns"] = second["columns"], first["columns"]


def swap_initializers(content: dict[str, Any]) -> None:
    first, second, _ = content["sites"]["up"]["blocks"]
    first["initializer"], second["initializer"] = second["initializer"], first["initializer"]


def forget_a_block(content: dict[str, Any]) -> None:
    content["sites"]["down"]["blocks"].pop()


def edit_digest(content: dict[str, Any]) -> None:
    digest = content["sites"]["up"]["sha256"]
    content["sites"]["up"]["sha256"] = digest[:-1] + ("0" if digest[-1] != "0" else "1")


def one_ulp(value: Any) -> Any:
    return np.nextafter(value, np.float32(np.inf))


CORRUPTIONS: dict[str, Corruption] = {
    "block entry plus 0.01": edit_entry("up", lambda v: v + np.float32(0.01)),
    "block entry 1 % larger": edit_entry("up", lambda v: v * np.float32(1.01)),
    "block entry of the second site plus 0.01": edit_entry(
        "down", lambda v: v + np.float32(0.01)
    ),
    "block entry of the second site 1 % larger": edit_entry(
        "down", lambda v: v * np.float32(1.01)
    ),
    "block entry one unit in the last place up": edit_entry("down", one_ulp),
    "block entry with the other sign": edit_entry("up", lambda v: -v),
    "block entry zero": edit_entry("up", lambda _: 0),
    "block entry NaN": edit_entry("up", lambda _: np.nan),
    "untouched weight plus 0.01": edit_tensor("head.weight", lambda v: v + np.float32(0.01)),
    "untouched weight 1 % larger": edit_tensor("head.weight", lambda v: v * np.float32(1.01)),
    "untouched weight one unit in the last place up": edit_tensor("head.weight", one_ulp),
    "untouched scale plus 0.01": edit_tensor("norm.scale", lambda v: v + np.float32(0.01)),
    "untouched Constant node plus 0.01": edit_constant_node,
    "untouched attribute": edit_epsilon,
    "first Gather": swap_in_gather(0),
    "second Gather": swap_in_gather(1),
    "last Gather": swap_in_gather(-1),
    "hidden bias plus 0.01": edit_bias("up", lambda v: v + np.float32(0.01)),
    "hidden bias 1 % larger": edit_bias("up", lambda v: v * np.float32(1.01)),
    "output bias plus 0.01": edit_bias("down", lambda v: v + np.float32(0.01)),
    "output bias 1 % larger": edit_bias("down", lambda v: v * np.float32(1.01)),
    "bias entries swapped": swap_bias_entries,
    "blocks of two branches exchanged": exchange_blocks,
    "a branch rescaled without effect on the outputs": rescale_a_branch,
    "LeakyRelu in one branch": change_activation("LeakyRelu"),
    "Sigmoid in one branch": change_activation("Sigmoid"),
    "Identity in one branch": change_activation("Identity"),
    "branches crossed": cross_branches,
    "Concat in reverse": reverse_concat,
    "metadata: rows swapped": edit_metadata(swap_rows_of_blocks),
    "metadata: columns swapped": edit_metadata(swap_columns_of_blocks),
    "metadata: initializers swapped": edit_metadata(swap_initializers),
    "metadata: a block forgotten": edit_metadata(forget_a_block),
    "metadata: digest": edit_metadata(edit_digest),
}
BROKEN: dict[str, Corruption] = {
    "block removed": drop_block,
    "block truncated": truncate_block,
    "metadata: not JSON": lambda model, _: _set_metadata(model, "{"),
    "metadata: empty object": lambda model, _: _set_metadata(model, "{}"),
    "metadata: unit out of range": edit_metadata(
        lambda content: content["sites"]["up"]["blocks"][0].update(rows="5000")
    ),
    "metadata: a site that the original lacks": edit_metadata(
        lambda content: content["sites"].update(other=content["sites"]["up"])
    ),
    "metadata: a newer format": edit_metadata(lambda content: content.update(format=99)),
}


def _set_metadata(model: onnx.ModelProto, text: str) -> None:
    for entry in model.metadata_props:
        if entry.key == "onnx_decompose.decomposition":
            entry.value = text


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_corruption_is_caught(
    command: Command, headed: Path, tmp_path: Path, name: str, seed: int
) -> None:
    model = onnx.load(headed / "rewritten.onnx")
    CORRUPTIONS[name](model, np.random.default_rng(seed))
    path = save(model, tmp_path / "corrupted.onnx")
    result = command("validate", headed / "original.onnx", path, "--samples", "2")
    assert result.code == 1, result.out
    (line,) = result.err.splitlines()
    assert line.startswith(f"onnx-decompose: error: {path}: ")
    assert "claim A does not hold" in line


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_is_broken_is_bad_input(
    command: Command, headed: Path, tmp_path: Path, name: str
) -> None:
    model = onnx.load(headed / "rewritten.onnx")
    BROKEN[name](model, np.random.default_rng(0))
    path = save(model, tmp_path / "corrupted.onnx")
    result = command("validate", headed / "original.onnx", path, "--samples", "1")
    assert result.code == 2, result.out
    (line,) = result.err.splitlines()
    assert str(path) in line


def test_a_block_of_another_shape_fails_one_way_or_the_other(
    command: Command, headed: Path, tmp_path: Path
) -> None:
    model = onnx.load(headed / "rewritten.onnx")
    reshape_block(model, np.random.default_rng(0))
    path = save(model, tmp_path / "corrupted.onnx")
    result = command("validate", headed / "original.onnx", path, "--samples", "1")
    assert result.code in {1, 2}
    assert len(result.err.splitlines()) == 1


def test_the_untampered_model_is_valid(command: Command, headed: Path) -> None:
    """Without this, every test above would pass on a validate that always fails."""
    arguments = (headed / "original.onnx", headed / "rewritten.onnx", "--samples", "2")
    assert command("validate", *arguments).code == 0


@pytest.mark.parametrize("what", ["tensor", "bias", "permutation"])
def test_the_original_of_another_training_is_not_the_original(
    command: Command, headed: Path, tmp_path: Path, what: str
) -> None:
    """The rewritten model against a near twin of its original."""
    model = onnx.load(headed / "original.onnx")
    if what == "tensor":
        set_array(model, "up.weight", array_of(model, "up.weight") * np.float32(1.001))
    elif what == "bias":
        set_array(model, "up.bias", array_of(model, "up.bias") + np.float32(0.01))
    else:
        gemm = model.graph.node[0].op_type == "Gemm"
        weight = array_of(model, "up.weight")
        set_array(model, "up.weight", weight[:, ::-1] if gemm else weight[::-1])
    path = save(model, tmp_path / "twin.onnx")
    result = command("validate", path, headed / "rewritten.onnx", "--samples", "1")
    assert result.code == 1
    assert len(result.err.splitlines()) == 1


def test_report_of_a_failed_validation(command: Command, headed: Path, tmp_path: Path) -> None:
    model = onnx.load(headed / "rewritten.onnx")
    CORRUPTIONS["block entry plus 0.01"](model, np.random.default_rng(0))
    path = save(model, tmp_path / "corrupted.onnx")
    arguments = ("--samples", "1", "--report", tmp_path / "r.json")
    assert command("validate", headed / "original.onnx", path, *arguments).code == 1
    report = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert report["passed"] is False
    assert report["claims"]["structural"]["passed"] is False
    assert "site 'up'" in report["claims"]["structural"]["reason"]
