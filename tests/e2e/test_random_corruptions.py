"""Corruptions of random rewritten models of every kind: what validate does not catch changes nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_decompose.errors import DecomposeError
from onnx_decompose.metadata import parse_units
from onnx_decompose.model_io import Model
from onnx_decompose.options import Options
from onnx_decompose.sessions import Provider
from onnx_decompose.verify import Inputs, validate_models
from tests.e2e.random_models import NOISE, Recipe, random_model
from tests.e2e.whole_rewrite import EXACT, feeds_for_model, rewrite_once
from tests.passes.harness import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from onnx_decompose.state_graph import Emit

    Corruption = Callable[[onnx.ModelProto, onnx.ModelProto, np.random.Generator], bool]

ANNEALED = Options(null=f"normal:{NOISE}", criterion="ksigma:3", provider="cpu")
KEY = "onnx_decompose.decomposition"
UNITS = ("rows", "columns", "stored_rows", "stored_columns")
ATTRIBUTES = {"alpha", "axis", "beta", "group", "keepdims", "perm", "transB"}
ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "Neg", "Abs", "Softplus")
WANTED = {
    **dict.fromkeys(("grouped", "recurrent", "shared", "shrink", "split", "triangular"), 2),
    **dict.fromkeys(("absorbed", "folded", "renumbered"), 3),
}
"""How many models of each kind are corrupted, at least."""


def stored_float(
    model: onnx.ModelProto, original: onnx.ModelProto, rng: np.random.Generator
) -> bool:
    """A stored number that is a thousandth larger."""
    del original
    tensors = [
        tensor
        for tensor in (
            *model.graph.initializer,
            *(node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"),
        )
        if (values := numpy_helper.to_array(tensor)).dtype.kind == "f" and values.any()
    ]
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[rng.choice(np.flatnonzero(values))] *= 1.001
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def new_index(
    model: onnx.ModelProto, original: onnx.ModelProto, rng: np.random.Generator
) -> bool:
    """Two entries of a Gather's order, of sizes or of axes exchanged."""
    old = {tensor.name for tensor in original.graph.initializer}
    tensors = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT64 and tensor.name not in old
    ]
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor).copy()
    if not exchange(values.reshape(-1), rng):
        return False
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def metadata(
    model: onnx.ModelProto, original: onnx.ModelProto, rng: np.random.Generator
) -> bool:
    """Two units of a block, or of an order, exchanged."""
    del original
    entry = next(entry for entry in model.metadata_props if entry.key == KEY)
    content = json.loads(entry.value)
    places = list(unit_texts(content))
    holder, key = places[rng.integers(len(places))]
    units = parse_units(holder[key], 10**6, repeated=True)
    if not exchange(units, rng):
        return False
    holder[key] = ",".join(map(str, units))
    entry.value = json.dumps(content)
    return True


def unit_texts(content: dict[str, Any]) -> Iterator[tuple[dict[str, str], str]]:
    """Where the metadata has unit numbers."""
    for site in (*content["sites"].values(), *content.get("constants", {}).values()):
        for block in (*site["blocks"], *site.get("bias", {"blocks": ()})["blocks"]):
            yield from ((block, key) for key in UNITS if key in block)
    for constant in content.get("reordered", {}).values():
        yield from ((constant["axes"], axis) for axis in constant["axes"])


def exchange(values: Any, rng: np.random.Generator) -> bool:
    """Exchange two different entries of a vector, if it has any."""
    if np.unique(values).size < 2:
        return False
    first = int(rng.integers(values.size))
    second = int(rng.choice(np.flatnonzero(values != values[first])))
    values[[first, second]] = values[[second, first]]
    return True


def dropped_bias(
    model: onnx.ModelProto, original: onnx.ModelProto, rng: np.random.Generator
) -> bool:
    """A Gemm, a Conv or an Add without its constant."""
    del original
    stored = {tensor.name for tensor in model.graph.initializer}
    nodes = [
        node
        for node in model.graph.node
        if (node.op_type in {"Conv", "Gemm"} and len(node.input) > 2)
        or (node.op_type == "Add" and len(stored.intersection(node.input)) == 1)
    ]
    if not nodes:
        return False
    node = nodes[rng.integers(len(nodes))]
    if node.op_type == "Add":
        node.op_type = "Identity"
        node.input[:] = [name for name in node.input if name not in stored]
    else:
        del node.input[2:]
    return True


def attribute(
    model: onnx.ModelProto, original: onnx.ModelProto, rng: np.random.Generator
) -> bool:
    """Another axis, order of axes, number of groups or factor."""
    del original
    found = [a for node in model.graph.node for a in node.attribute if a.name in ATTRIBUTES]
    if not found:
        return False
    one = found[rng.integers(len(found))]
    if one.name == "perm":
        one.ints[0], one.ints[1] = one.ints[1], one.ints[0]
    elif one.HasField("f"):
        one.f *= 1.01
    elif one.name in {"keepdims", "transB"}:
        one.i = 1 - one.i
    else:
        one.i += 1
    return True


def activation(
    model: onnx.ModelProto, original: onnx.ModelProto, rng: np.random.Generator
) -> bool:
    """Another activation."""
    del original
    nodes = [node for node in model.graph.node if node.op_type in ACTIVATIONS]
    if not nodes:
        return False
    node = nodes[rng.integers(len(nodes))]
    node.op_type = str(rng.choice([op for op in ACTIVATIONS if op != node.op_type]))
    return True


def crossed(
    model: onnx.ModelProto, original: onnx.ModelProto, rng: np.random.Generator
) -> bool:
    """Two nodes that stand for one read each other's values."""
    del original
    copies: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for entry in node.metadata_props:
            copies.setdefault(entry.value, []).append(node)
    several = [nodes for nodes in copies.values() if len(nodes) > 1]
    if not several:
        return False
    first, second, *_ = several[rng.integers(len(several))]
    if first.input[0] == second.input[0]:
        return False
    first.input[0], second.input[0] = second.input[0], first.input[0]
    return True


CORRUPTIONS: tuple[Corruption, ...] = (
    stored_float,
    new_index,
    metadata,
    dropped_bias,
    attribute,
    activation,
    crossed,
)


@pytest.fixture(scope="module")
def rewrites() -> dict[str, list[tuple[onnx.ModelProto, onnx.ModelProto]]]:
    """Some models of every kind, before and after."""
    found: dict[str, list[tuple[onnx.ModelProto, onnx.ModelProto]]] = {k: [] for k in WANTED}
    emits: tuple[Emit, ...] = ("auto", "split", "grouped", "triangular", "shared", "shrink")
    for seed in range(1000):
        if all(len(found[kind]) >= number for kind, number in WANTED.items()):
            break
        noise = NOISE if seed % 2 else 0.0
        proto = random_model(Recipe.drawn(seed, noise))
        outcome = rewrite_once(proto, emits[seed // 2 % 6], ANNEALED if noise else EXACT)
        if outcome.model is None:
            continue
        kinds = outcome.decisions & found.keys()
        kinds |= {"folded"} if outcome.tried.added else set()
        kinds |= {"absorbed"} if outcome.tried.absorbed else set()
        text = next(e.value for e in outcome.model.metadata_props if e.key == KEY)
        kinds |= {"renumbered"} if "reordered" in json.loads(text) else set()
        wanted = [kind for kind in sorted(kinds) if len(found[kind]) < WANTED[kind]]
        if wanted:
            found[wanted[0]].append((proto, outcome.model))
    return found


@pytest.mark.parametrize("kind", WANTED)
def test_what_is_not_caught_changes_nothing(
    kind: str, rewrites: dict[str, list[tuple[onnx.ModelProto, onnx.ModelProto]]]
) -> None:
    assert len(rewrites[kind]) == WANTED[kind]
    tried = caught = 0
    for number, (original, rewritten) in enumerate(rewrites[kind]):
        assert is_valid(original, rewritten)
        for position, corrupt in enumerate((stored_float, stored_float, *CORRUPTIONS)):
            model = onnx.ModelProto()
            model.CopyFrom(rewritten)
            rng = np.random.default_rng([number, position])
            if not corrupt(model, original, rng):
                continue
            tried += 1
            if not is_valid(original, model):
                caught += 1
                continue
            assert corrupt is not stored_float
            assert corrupt is metadata or largest_change(rewritten, model) < 1e-5, corrupt
    assert tried >= 8
    assert caught >= tried / 2


def is_valid(original: onnx.ModelProto, model: onnx.ModelProto) -> bool:
    try:
        verdict = validate_models(
            Model(original),
            Model(model),
            inputs=Inputs(seeds=2),
            provider=Provider.CPU,
            budget=1e9,
        )
    except DecomposeError:
        return False
    return bool(verdict)


def largest_change(before: onnx.ModelProto, after: onnx.ModelProto) -> float:
    """How far outputs on random inputs differ, relative to their size."""
    rng = np.random.default_rng(0)
    feeds = feeds_for_model(before, rng, 4)
    changes = [
        float(np.abs(first - second).max(initial=0.0))
        / (float(np.abs(first).max(initial=0.0)) or 1.0)
        for first, second in zip(
            run(before, feeds, reference=False),
            run(after, feeds, reference=False),
            strict=True,
        )
    ]
    return max(changes)
