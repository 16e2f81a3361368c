"""The pipeline on one model without its timing, and all that holds for every rewrite."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.reference

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.decomposition.decompose import annealed_model, attempt, rewritten_model
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.decomposition.joining import join_siblings
from onnx_decompose.decomposition.renumbering import choose_numbering
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.metadata import read_decomposition, write_decomposition
from onnx_decompose.model.model_io import Model, load_model, save_model
from onnx_decompose.options import Options
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.splice import origins_of
from onnx_decompose.planning.cost import CPU
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification import proof
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.verify import (
    Inputs,
    measure_annealing,
    structural_claim,
    validate_models,
)
from tests.passes.harness import FREE, check_rest, feeds_for, run
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from onnx_decompose.decomposition.decompose import Attempt
    from onnx_decompose.passes.join_siblings import Joined
    from onnx_decompose.planning.state_graph import Emit

JOINING = dataclasses.replace(FREE, lanes=10**6)
"""A provider where one product is worth any number of narrower ones."""

EXACT = Options(null="zero", provider="cpu", seeds=1)
ROUNDING = {"float16": 5e-2, "float32": 1e-3, "float64": 1e-9}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A rewritten model; ``model`` is None where nothing was to be done."""

    tried: Attempt
    model: onnx.ModelProto | None
    joined: tuple[Joined, ...] = ()

    @property
    def decisions(self) -> set[str]:
        made: set[str] = {plan.decision for _, plan in self.tried.rewrites}
        return made | {"recurrent"} if self.tried.recurrent.rewrites else made


def rewrite_once(
    proto: onnx.ModelProto | Path,
    emit: Emit,
    options: Options = EXACT,
    *,
    free: bool = True,
) -> Outcome:
    """The model as ``options`` ask, whatever claim B says; ``free``: every kernel and copy costs nothing.

    Whatever products can be joined are.
    """
    study = study_model(load_model(proto))
    tried = attempt(
        study,
        gather_all(study, options),
        make_criterion(options.criterion, options.alpha),
        cost=dataclasses.replace(FREE if free else CPU, batches=(1, 16)),
        emit=emit,
        rng=np.random.default_rng(options.seed),
    )
    if not tried.takes_apart:
        return Outcome(tried, None)
    model, decomposition = rewritten_model(tried, 1e9)
    joined: tuple[Joined, ...] = ()
    if emit == "auto":
        model, decomposition, joined = join_siblings(
            model, decomposition, tried.study, JOINING, {}
        )
    write_decomposition(model.proto, decomposition, "0")
    return Outcome(tried, model.proto, joined)


def check_rewrite(
    proto: onnx.ModelProto,
    emit: Emit,
    options: Options = EXACT,
    *,
    free: bool = True,
    reference: bool = False,
) -> Outcome:
    """Rewrite a model and check the result from the two files alone, then from what was planned."""
    before = proto.SerializeToString(deterministic=True)
    outcome = rewrite_once(proto, emit, options, free=free)
    annealed = annealed_model(outcome.tried).proto
    assert proto.SerializeToString(deterministic=True) == before
    if outcome.model is None:
        assert annealed.SerializeToString(deterministic=True) == before
        return outcome
    stored = outcome.model.SerializeToString(deterministic=True)
    again = rewrite_once(proto, emit, options, free=free).model
    assert again is not None
    assert again.SerializeToString(deterministic=True) == stored
    original, rewritten = Model(proto), load_model(onnx.ModelProto.FromString(stored))
    onnx.checker.check_model(annealed, full_check=True)
    if check_claim_a(original, rewritten):
        check_outputs(annealed, outcome.model, reference=reference)
        check_claim_b(outcome, original, rewritten)
    check_untouched(proto, stored, outcome)
    check_again(original, rewritten, emit, free=free)
    return outcome


def check_claim_a(original: Model, rewritten: Model) -> bool:
    """Claim A holds; or it refuses rounding of float16, which is allowed to, and the models are one in float64.

    On the CPU onnxruntime computes chains of float16 operators in float32 and rounds at their ends, which are others in
    a rewritten model: where large terms cancel, that is all that is left, and what float32 still holds may overflow.
    """
    inputs = Inputs(seeds=1)
    claim = structural_claim(original, rewritten, inputs=inputs, provider=Provider.CPU)
    if claim:
        return True
    types = {value.type.tensor_type.elem_type for value in original.proto.graph.output}
    assert onnx.TensorProto.FLOAT16 in types, claim.reason
    decomposition = read_decomposition(rewritten.proto, rewritten.label)
    assert decomposition is not None
    fault, weights, biases = proof.prove_structure(original, rewritten, decomposition)
    assert fault is None
    annealed = proof.annealed_model(original, decomposition, weights, biases)
    check_in_float64(annealed, rewritten)
    return False


def check_in_float64(annealed: Model, rewritten: Model) -> None:
    """Two models are one but for rounding: nothing of it is left in float64."""
    first, second = open_reference(annealed), open_reference(rewritten)
    assert isinstance(first, Reference), first
    assert isinstance(second, Reference), second
    rng = np.random.default_rng(0)
    for size in (1, 2):
        feeds = feeds_for_model(annealed.proto, rng, size)
        got = second.run(feeds)
        for name, value in first.run(feeds).items():
            np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-9)


def check_claim_b(outcome: Outcome, original: Model, rewritten: Model) -> None:
    """Where only exact zeros went, nothing but rounding is lost."""
    if not outcome.tried.is_exact:
        return
    exact = measure_annealing(
        original,
        rewritten,
        inputs=Inputs(seeds=1),
        provider=Provider.CPU,
        budget=largest_rounding(original.proto),
    )
    assert exact, exact.outputs


def check_outside(proto: onnx.ModelProto, emit: Emit, options: Options, *, free: bool) -> None:
    """A model whose tensors lie in a file beside it: what is written and read again is proved."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.onnx", Path(folder) / "sub" / "out.onnx"
        output.parent.mkdir()
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        onnx.save_model(
            copy, source, save_as_external_data=True, location="in.data", size_threshold=100
        )
        before = {path.name: path.read_bytes() for path in source.parent.glob("in.*")}
        made = rewrite_once(source, emit, options, free=free).model
        if made is not None:
            original = load_model(source)
            save_model(made, output, data_from=original)
            check_claim_a(original, load_model(output))
        assert {path.name: path.read_bytes() for path in source.parent.glob("in.*")} == before


def check_untouched(proto: onnx.ModelProto, stored: bytes, outcome: Outcome) -> None:
    """The rewritten model is the original in everything that was not rewritten."""
    tried = outcome.tried
    if (
        tried.study.model.proto is not proto
    ):  # opened: its nodes are not those of the main graph
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
            before.write_bytes(proto.SerializeToString())
            after.write_bytes(stored)
            assert untouched_faults(before, after) == []
        return
    rest = onnx.ModelProto.FromString(stored)
    while len(rest.metadata_props) > len(proto.metadata_props):
        rest.metadata_props.pop()
    check_rest(proto, rest, touched_nodes(tried) | joined_nodes(proto, rest))


def check_again(original: Model, rewritten: Model, emit: Emit, *, free: bool) -> None:
    """A rewritten model can be rewritten, and is what it was."""
    second = rewrite_once(rewritten.proto, emit, EXACT, free=free)
    if second.model is None:
        return
    after = load_model(second.model)
    verdict = validate_models(
        rewritten,
        after,
        inputs=Inputs(seeds=1),
        provider=Provider.CPU,
        budget=largest_rounding(original.proto),
    )
    assert verdict, verdict.failure


def check_outputs(expected: onnx.ModelProto, got: onnx.ModelProto, *, reference: bool) -> None:
    """Two models agree on random inputs, in onnxruntime or in the standard's reference implementation."""
    rng = np.random.default_rng(0)
    for size in (1, 2):
        feeds = feeds_for_model(expected, rng, size)
        for first, second in zip(
            run(expected, feeds, reference=reference),
            run(got, feeds, reference=reference),
            strict=True,
        ):
            assert (first.shape, first.dtype) == (second.shape, second.dtype)
            one, other = first.astype(np.float64), second.astype(np.float64)
            finite = np.isfinite(one)
            size_of = float(np.abs(one[finite]).max(initial=0)) or 1.0
            np.testing.assert_allclose(
                other, one, rtol=0, atol=ROUNDING[first.dtype.name] * size_of
            )


def feeds_for_model(
    proto: onnx.ModelProto, rng: np.random.Generator, size: int
) -> dict[str, Any]:
    """As ``feeds_for``, with token numbers where integers come in."""
    feeds = feeds_for(proto, rng, size)
    return {
        name: np.abs(values) % 5 if values.dtype.kind == "i" else values
        for name, values in feeds.items()
    }


def largest_rounding(proto: onnx.ModelProto) -> float:
    types = {
        onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        for value in proto.graph.output
    }
    return max(ROUNDING[name] for name in types)


def joined_nodes(before: onnx.ModelProto, after: onnx.ModelProto) -> set[int]:
    """The nodes that became one with others."""
    origins = {name for node in after.graph.node for name in origins_of(node)[1:]}
    origins |= {origins_of(node)[0] for node in after.graph.node if len(origins_of(node)) > 1}
    return {
        index
        for index, node in enumerate(before.graph.node)
        if origins.intersection(origins_of(node))
    }


def touched_nodes(tried: Attempt) -> set[int]:
    """The original's nodes that a rewrite may change."""
    model = tried.study.model
    nodes = {index for region, _ in tried.rewrites for index in region.nodes}
    nodes |= {site.find(model.proto.graph) for site, _ in tried.recurrent.rewrites}
    replacing = ReplaceWeights({}, tried.biases(), tried.absorbing, tried.sloping)
    nodes |= replacing.touched(model)
    folded = replacing(model).model
    dense = tried.study if folded is model else study_model(folded)
    numbering = choose_numbering(dense.spaces, tried.rewrites)
    renumbered = {
        folded.proto.graph.node[use.node].output[0]
        for space, _ in numbering.orders
        for use in space.constants
    }
    return nodes | {
        index
        for index, node in enumerate(model.proto.graph.node)
        if renumbered.intersection(node.output)
    }
