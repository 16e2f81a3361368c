"""Correct rewritten models of every kind, and ways of corrupting any of them."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_decompose.errors import DecomposeError
from onnx_decompose.model.metadata import parse_units, read_decomposition
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.options import Options
from onnx_decompose.runtime.cases import made_up_cases
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.equivalence import measure_structural
from onnx_decompose.verification.proof import annealed_model, prove_structure
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.verify import Inputs
from tests.e2e.inner_graphs import SQUARE, branch, loop
from tests.e2e.planted import Recipe as Planted
from tests.e2e.planted import plant
from tests.e2e.quantized_models import Coding, dynamic, qdq, quantized_network
from tests.e2e.random_models import NOISE, Recipe, random_model
from tests.e2e.whole_rewrite import EXACT, rewrite_once
from tools.planted_models import Blocks, residual_stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnx_decompose.planning.state_graph import Emit

__all__ = ["KINDS", "MUTATIONS", "Subject", "Verdict", "judge", "mutated", "subjects"]

ANNEALED = Options(null=f"normal:{NOISE}", criterion="ksigma:3", provider="cpu")
KEY = "onnx_decompose.decomposition"
LEAST = 8
"""Corruptions that a random model must allow, to be worth it."""
EMITS: dict[str, Emit] = {"residual stack": "auto", "grouped as Conv": "grouped"}
UNITS = ("rows", "columns", "stored_rows", "stored_columns")
ATTRIBUTES = {"alpha", "axis", "beta", "group", "keepdims", "perm", "transB"}
ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "Neg", "Abs", "Softplus")
PLANTED = (
    "residual stack",
    "grouped as Conv",
    "quantized weights",
    "quantized products",
    "If body",
    "Loop body",
)
KINDS = (
    *("shrink", "split", "grouped in stacks", "triangular", "shared"),
    *("recurrent", "folded", "absorbed", "renumbered", *PLANTED),
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A rewrite to corrupt."""

    kind: str
    original: onnx.ModelProto
    rewritten: onnx.ModelProto


# --- models ------------------------------------------------------------------------------------


def subjects(wanted: Mapping[str, int], most_seeds: int = 1000) -> list[Subject]:
    """At least so many rewrites of each kind, as far as there are as many."""
    found: list[Subject] = []
    for kind in PLANTED:
        for seed in range(wanted.get(kind, 0)):
            proto = _planted(kind, np.random.default_rng(seed))
            emit: Emit = EMITS.get(kind, "split")
            outcome = rewrite_once(proto, emit, free=kind != "grouped as Conv")
            assert outcome.model is not None, kind
            found.append(Subject(kind, proto, outcome.model))
    missing = {k: n for k, n in wanted.items() if k not in PLANTED and n}
    emits: tuple[Emit, ...] = ("auto", "split", "grouped", "triangular", "shared", "shrink")
    for seed in range(most_seeds):
        if not missing:
            break
        noise = NOISE if seed % 2 else 0.0
        proto = random_model(Recipe.drawn(seed, noise))
        if {node.op_type for node in proto.graph.node} <= {"If", "Loop"}:
            continue  # most corruptions are of the main graph; bodies are planted
        outcome = rewrite_once(proto, emits[seed // 2 % 6], ANNEALED if noise else EXACT)
        if outcome.model is None:
            continue
        kinds = {*outcome.decisions, *_traits(outcome.model)}
        kinds |= {"folded"} if outcome.tried.added else set()
        kinds |= {"absorbed"} if outcome.tried.absorbed or outcome.tried.slopes else set()
        for kind in sorted(kinds & missing.keys())[:1]:
            subject = Subject(kind, proto, outcome.model)
            if _applicable(subject) < LEAST:
                continue
            found.append(subject)
            missing[kind] -= 1
            if not missing[kind]:
                del missing[kind]
    return found


def _applicable(subject: Subject) -> int:
    """How many of the corruptions there is something for in a model."""
    rng = np.random.default_rng(0)
    return sum(mutated(subject, mutation, rng) is not None for mutation in MUTATIONS)


def _planted(kind: str, rng: np.random.Generator) -> onnx.ModelProto:
    if kind == "residual stack":
        return residual_stack((24, 48), Blocks(3), np.float32, rng, depth=2).model
    if kind == "If body":
        return branch(plant(SQUARE, rng).model)
    if kind == "Loop body":
        return loop(plant(SQUARE, rng).model)
    network = plant(Planted(blocks=((6, 12, 5),) * 4), rng).model
    if kind == "grouped as Conv":
        return network
    return quantized_network(
        network, qdq if kind == "quantized weights" else dynamic, Coding(), rng
    )


def _traits(rewritten: onnx.ModelProto) -> Iterator[str]:
    content = metadata_of(rewritten)
    if "reordered" in content:
        yield "renumbered"
    if any("part" in block for site in content["sites"].values() for block in site["blocks"]):
        yield "grouped in stacks"


def metadata_of(model: onnx.ModelProto) -> Any:
    return json.loads(next(entry.value for entry in model.metadata_props if entry.key == KEY))


# --- corruptions: each changes a model in place, or returns False ---------------------------------


def stored_float(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A stored number is a thousandth larger."""
    return _change_entry(model, rng, lambda value: value * 1.001)


def last_bit(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A stored number's last bit."""
    return _change_entry(model, rng, lambda value: np.nextafter(value, value + value))


def sign(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A stored number with the other sign."""
    return _change_entry(model, rng, lambda value: -value)


def stored_integer(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A quantized weight one step off."""
    tensors = [t for t in model.graph.initializer if t.data_type in {2, 3} and t.dims]
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor).copy()
    place = rng.integers(values.size)
    values.flat[place] = values.flat[place] - 1 if values.flat[place] > 0 else 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def narrowed(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A tensor that went through float16."""
    tensors = [t for t in _float_tensors(model) if t.dims]
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor)
    rounded = values.astype(np.float16).astype(values.dtype)
    if np.array_equal(rounded, values):
        return False
    tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    return True


def swapped_rows(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """Two rows of a block."""
    tensors = [t for t in _block_tensors(model) if len(t.dims) > 1 and t.dims[-2] > 1]
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor).copy()
    rows = values.reshape(-1, *values.shape[-2:])[0]
    first, second = rng.choice(len(rows), 2, replace=False)
    if np.array_equal(rows[first], rows[second]):
        return False
    rows[[first, second]] = rows[[second, first]]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def dropped_block(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A block that is zero."""
    tensors = list(_block_tensors(model))
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor)
    if not values.any():
        return False
    tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))
    return True


def new_index(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """Two entries of an order, of sizes or of axes exchanged."""
    tensors = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT64]
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor).copy()
    if not _exchange(values.reshape(-1), rng):
        return False
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def metadata(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """Two units of a block, or of an order, exchanged in what the model says of itself."""
    entry = next(entry for entry in model.metadata_props if entry.key == KEY)
    content = json.loads(entry.value)
    places = list(_unit_texts(content))
    if not places:
        return False
    holder, key = places[rng.integers(len(places))]
    units = parse_units(holder[key], 10**6, repeated=True)
    if not _exchange(units, rng):
        return False
    holder[key] = ",".join(map(str, units))
    entry.value = json.dumps(content)
    return True


def dropped_bias(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A Gemm, a Conv or an Add without its constant."""
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


def attribute(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """Another axis, order of axes, number of groups or factor."""
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


def activation(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """Another activation."""
    nodes = [node for node in model.graph.node if node.op_type in ACTIVATIONS]
    if not nodes:
        return False
    node = nodes[rng.integers(len(nodes))]
    node.op_type = str(rng.choice([op for op in ACTIVATIONS if op != node.op_type]))
    return True


def other_operator(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """A difference for a sum, a sum for a product."""
    others = {"Add": "Sub", "Mul": "Add", "Sub": "Add"}
    nodes = [node for node in model.graph.node if node.op_type in others]
    if not nodes:
        return False
    node = nodes[rng.integers(len(nodes))]
    node.op_type = others[node.op_type]
    return True


def crossed(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """Two nodes that stand for one read each other's values."""
    copies: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for entry in node.metadata_props:
            copies.setdefault(entry.value, []).append(node)
    several = [nodes for nodes in copies.values() if len(nodes) > 1]
    if not several:
        return False
    nodes = several[rng.integers(len(several))]
    first, second = (nodes[i] for i in rng.choice(len(nodes), 2, replace=False))
    if not first.input or not second.input or first.input[0] == second.input[0]:
        return False
    first.input[0], second.input[0] = second.input[0], first.input[0]
    return True


def reversed_parts(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """What a Concat joins, or a Split makes, in another order."""
    nodes = [n for n in model.graph.node if n.op_type in {"Concat", "Split"}]
    if not nodes:
        return False
    node = nodes[rng.integers(len(nodes))]
    names = node.input if node.op_type == "Concat" else node.output
    if len(set(names)) < 2:
        return False
    backwards = list(names)[::-1]
    del names[:]
    names.extend(backwards)
    return True


def swapped_operands(model: onnx.ModelProto, rng: np.random.Generator) -> bool:
    """The stored tensors of two nodes of one operator exchanged."""
    stored = {t.name: (t.data_type, tuple(t.dims)) for t in model.graph.initializer}
    places: dict[Any, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in stored:
                places.setdefault((node.op_type, position, stored[name]), []).append(
                    (node, position)
                )
    several = [
        nodes
        for nodes in places.values()
        if len({node.input[position] for node, position in nodes}) > 1
    ]
    if not several:
        return False
    nodes = several[rng.integers(len(several))]
    node, position = nodes[0]
    other = next(n for n, p in nodes if n.input[p] != node.input[position])
    name = node.input[position]
    node.input[position], other.input[position] = other.input[position], name
    return True


MUTATIONS = (
    *(stored_float, last_bit, sign, stored_integer, narrowed, swapped_rows, dropped_block),
    *(new_index, metadata, dropped_bias, attribute, activation, other_operator, crossed),
    *(reversed_parts, swapped_operands),
)


def mutated(
    subject: Subject, mutation: Any, rng: np.random.Generator
) -> onnx.ModelProto | None:
    """The rewritten model corrupted; None where there is nothing of that sort in it."""
    model = onnx.ModelProto()
    model.CopyFrom(subject.rewritten)
    return model if mutation(model, rng) else None


# --- verdicts ----------------------------------------------------------------------------------

Answer = Literal["caught", "missed"]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a mutant.

    Attributes:
        proof: of the static proof alone.
        outputs: of the outputs alone, against the annealed model of the rewrite before it was corrupted.
        equivalent: how it is known that the mutant is no other model, if it is.
    """

    proof: Answer
    outputs: Answer
    equivalent: str | None

    @property
    def caught(self) -> bool:
        return "caught" in {self.proof, self.outputs}


def judge(subject: Subject, mutant: onnx.ModelProto, seeds: int = 2) -> Verdict:
    """Both parts of claim A on a mutant, each alone."""
    original = Model(subject.original)
    decomposition = read_decomposition(subject.rewritten, "rewritten")
    assert decomposition is not None
    fault, weights, biases, *_ = prove_structure(
        original, Model(subject.rewritten), decomposition
    )
    assert fault is None
    annealed = annealed_model(original, decomposition, weights, biases)
    proof: Answer = "caught" if _proof_fails(original, mutant) else "missed"
    outputs: Answer = "caught"
    try:
        model = load_model(mutant)
        claim = measure_structural(
            annealed, model, inputs=Inputs(seeds=seeds), provider=Provider.CPU
        )
        outputs = "missed" if claim else "caught"
    except DecomposeError:
        pass
    missed = proof == outputs == "missed"
    return Verdict(proof, outputs, _equivalence(subject.rewritten, mutant) if missed else None)


def _proof_fails(original: Model, mutant: onnx.ModelProto) -> bool:
    try:
        decomposition = read_decomposition(mutant, "mutant")
        assert decomposition is not None
        return prove_structure(original, load_model(mutant), decomposition)[0] is not None
    except DecomposeError:
        return True


def _equivalence(before: onnx.ModelProto, after: onnx.ModelProto) -> str | None:
    """Why two models are one: the same graph, or the same values in float64 on inputs that the gate never saw."""
    if before.graph == after.graph:
        return "same graph, and its metadata still rebuilds every weight"
    first, second = (open_reference(Model(proto)) for proto in (before, after))
    if not isinstance(first, Reference) or not isinstance(second, Reference):
        return None
    largest = 0.0
    for case in made_up_cases(before, seeds=5, rng=np.random.default_rng(12345)):
        if case.poison:
            continue
        one, other = first.run(case.feeds), second.run(case.feeds)
        for name, value in one.items():
            size = float(np.abs(value).max(initial=0.0)) or 1.0
            largest = max(largest, float(np.abs(value - other[name]).max(initial=0.0)) / size)
    return f"equal in float64 to {largest:.0e}" if largest < 1e-10 else None


# --- parts -------------------------------------------------------------------------------------


def _float_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    constants = [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.HasField("t")
    ]
    return [
        tensor
        for tensor in (*model.graph.initializer, *constants)
        if (values := numpy_helper.to_array(tensor)).dtype.kind == "f" and values.any()
    ]


def _block_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    names = {
        block["initializer"]
        for site in metadata_of(model)["sites"].values()
        for block in site["blocks"]
    }
    yield from (tensor for tensor in model.graph.initializer if tensor.name in names)


def _change_entry(model: onnx.ModelProto, rng: np.random.Generator, change: Any) -> bool:
    tensors = _float_tensors(model)
    if not tensors:
        return False
    tensor = tensors[rng.integers(len(tensors))]
    values = numpy_helper.to_array(tensor).copy()
    place = rng.choice(np.flatnonzero(values))
    values.flat[place] = change(values.flat[place])
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def _unit_texts(content: dict[str, Any]) -> Iterator[tuple[dict[str, str], str]]:
    """Where the metadata has unit numbers."""
    for site in (*content["sites"].values(), *content.get("constants", {}).values()):
        for block in (*site["blocks"], *site.get("bias", {"blocks": ()})["blocks"]):
            yield from ((block, key) for key in UNITS if key in block)
    for constant in content.get("reordered", {}).values():
        yield from ((constant["axes"], axis) for axis in constant["axes"])


def _exchange(values: Any, rng: np.random.Generator) -> bool:
    """Exchange two different entries of a vector, if it has any."""
    if np.unique(values).size < 2:
        return False
    first = int(rng.integers(values.size))
    second = int(rng.choice(np.flatnonzero(values != values[first])))
    values[[first, second]] = values[[second, first]]
    return True
