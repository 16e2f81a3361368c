"""Rewrites a small model as its plan says and checks all that holds for every rewrite."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnxruntime
from onnx import numpy_helper

from onnx_decompose.analysis.anneal import anneal
from onnx_decompose.decomposition.renumbering import choose_numbering
from onnx_decompose.graph.closing import restore
from onnx_decompose.graph.sites import stored_nothing
from onnx_decompose.graph.study import state_graph, study_model
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model, load_model, read_tensor
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.rewrite_regions import RewriteRegions
from onnx_decompose.planning.copies import find_copies
from onnx_decompose.planning.cost import CPU, CostModel
from onnx_decompose.planning.plan import plan_region, plan_shared

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.metadata import Block, Reordered
    from onnx_decompose.planning.plan import RegionPlan
    from onnx_decompose.planning.stacks import StackLayout
    from onnx_decompose.planning.state_graph import Emit

    Array = NDArray[Any]

FREE = dataclasses.replace(
    CPU,
    kernel=1e-12,
    block=1e-12,
    copy_rate=1e15,
    elementwise_rate=1e15,
    gather_rate=1e15,
    pick_ratio=0.0,
)
"""A provider where every component is worth a branch."""

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}

TOUCHABLE = {"Constant", "Identity", "Transpose"}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rewritten:
    """A model before and after."""

    original: onnx.ModelProto
    annealed: onnx.ModelProto
    proto: onnx.ModelProto
    plans: list[tuple[Region, RegionPlan]]
    record: dict[str, tuple[Block, ...]]
    reordered: dict[str, Reordered]

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.proto.graph.node]

    @property
    def decisions(self) -> list[tuple[str, int]]:
        return [(plan.decision, len(plan.branches)) for _, plan in self.plans]


def parse(
    text: str, tensors: Mapping[str, Array], *, opsets: str = '"": 17', ir_version: int = 8
) -> onnx.ModelProto:
    """A model from ONNX text, with ``tensors`` as initializers."""
    proto = onnx.parser.parse_model(
        f"<ir_version: {ir_version}, opset_import: [{opsets}]> {text}"
    )
    for name, values in tensors.items():
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return proto


def blocks(
    rng: np.random.Generator,
    rows: Sequence[int],
    columns: Sequence[int],
    dtype: Any = np.float32,
) -> Array:
    """A weight with entries where the labels of input and output are equal; -1 has none."""
    first, second = np.asarray(rows), np.asarray(columns)
    inside = (first[:, None] == second) & (first[:, None] >= 0)
    # Away from zero, so that a wrong place is never within a tolerance.
    values = rng.uniform(0.5, 1.0, inside.shape) * rng.choice([-1, 1], inside.shape)
    return np.where(inside, values, 0).astype(dtype)


def rewrite(
    source: onnx.ModelProto,
    emit: Emit = "split",
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    cost: CostModel = FREE,
    layout: StackLayout | None = None,
) -> Rewritten:
    """Plan every region of a model and write it, with nonzero entries as supported unless told otherwise.

    Stacks are in ``layout``, where one is given and the region can be written so.
    """
    before = source.SerializeToString(deterministic=True)
    study = study_model(load_model(source))
    plans, weights, rewriting = passes_for(study, emit, masks, cost, layout)
    chosen = [region for region, plan in plans if plan.decision != "dense"]
    annealed = ReplaceWeights(weights)(study.model)
    after = rewriting(study.model)
    assert source.SerializeToString(deterministic=True) == before
    assert annealed.modified == after.modified == bool(chosen)
    flat = study.model.proto  # what is inside of nodes stands before them, until it is put back
    for proto, touched in (
        (annealed.model.proto, _reweighted(flat.graph, weights)),
        (after.model.proto, set(rewriting.touched(study.model))),
    ):
        check_rest(flat, proto, touched)
    result = Rewritten(
        source,
        restore(study.flat, annealed.model).proto,
        restore(study.flat, after.model).proto,
        plans,
        rewriting.record,
        rewriting.reordered,
    )
    check_record(result, weights)
    return result


def _reweighted(graph: onnx.GraphProto, sites: Iterable[Site]) -> set[int]:
    """The nodes of some sites, and those that make weights of integers for them."""
    made = {name for site in sites if site.quantized for name in site.quantized.made}
    making = {i for i, node in enumerate(graph.node) if not made.isdisjoint(node.output)}
    return making | {site.node for site in sites}


def passes_for(
    study: Study,
    emit: Emit,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    cost: CostModel = FREE,
    layout: StackLayout | None = None,
) -> tuple[list[tuple[Region, RegionPlan]], dict[Site, Array], RewriteRegions]:
    """The plans, the annealed weights and the pass that writes them."""
    supported = {site.name: study.weight(site) != 0 for site in study.sites} | dict(masks or {})
    plans = [
        (region, plan_for(study, region, supported, emit, cost, layout))
        for region in study.regions
    ]
    chosen = [(region, plan) for region, plan in plans if plan.decision != "dense"]
    numbering = choose_numbering(study.spaces, chosen)
    weights: dict[Site, Array] = {
        site: study.annealed(site, site.entries(mask))
        for region, plan in chosen
        for site, mask in zip(region.sites, plan.masks, strict=True)
    }
    rewriting = RewriteRegions(
        plans=[(region, numbering.plan(region, plan)) for region, plan in chosen],
        weight=weights.__getitem__,
        shapes=study.shapes,
        orders=numbering.orders,
    )
    return plans, weights, rewriting


def plan_for(
    study: Study,
    region: Region,
    masks: Mapping[str, NDArray[np.bool_]],
    emit: Emit,
    cost: CostModel,
    layout: StackLayout | None = None,
) -> RegionPlan:
    graph = state_graph(study, region, masks)
    if layout is not None:
        graph = dataclasses.replace(graph, layouts=graph.layouts & {layout})
    plan = plan_region(graph, cost, emit)
    if emit != "shared":
        return plan
    (site,) = region.sites
    copies = find_copies(anneal(study.weight(site), masks[site.name]))
    return plan if copies is None else plan_shared(graph, plan, copies, cost, emit)


def check_record(result: Rewritten, weights: Mapping[Site, Array]) -> None:
    """The blocks are the annealed weight, bit for bit."""
    stored = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    model = Model(result.proto)
    constants = Constants(Model(result.original))
    for site, weight in weights.items():
        rebuilt = np.zeros_like(weight) + stored_nothing(site, constants)
        for block in result.record[site.name]:
            values = read_tensor(model, stored[block.initializer])
            rebuilt[np.ix_(block.rows, block.columns)] = block.read(values)
        np.testing.assert_array_equal(rebuilt, weight, strict=True)
    assert result.record.keys() >= {site.name for site in weights}


def check_rest(before: onnx.ModelProto, after: onnx.ModelProto, touched: set[int]) -> None:
    """``after`` is valid, and is ``before`` in everything but the touched nodes and what they read."""
    onnx.checker.check_model(after, full_check=True)
    for field, value in before.ListFields():
        if field.name not in {"graph", "opset_import"}:
            assert getattr(after, field.name) == value
    # A new operator may bring its domain.
    imports = serialized(before.opset_import)
    assert serialized(after.opset_import)[: len(imports)] == imports
    for field, value in before.graph.ListFields():
        if field.name not in {"node", "initializer", "value_info", "quantization_annotation"}:
            assert getattr(after.graph, field.name) == value
    for field_name in ("value_info", "quantization_annotation"):
        assert subsequence(
            serialized(getattr(after.graph, field_name)),
            serialized(getattr(before.graph, field_name)),
        )
    untouched = [
        node
        for index, node in enumerate(before.graph.node)
        if index not in touched and node.op_type not in TOUCHABLE
    ]
    assert subsequence(serialized(untouched), serialized(after.graph.node))
    # Initializers keep their bytes and order; the new ones follow.
    old = {tensor.name: index for index, tensor in enumerate(before.graph.initializer)}
    kept = [t for t in after.graph.initializer if t.name in old]
    assert subsequence(serialized(kept), serialized(before.graph.initializer))
    assert list(after.graph.initializer)[: len(kept)] == kept
    check_names(before, after)


def check_names(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    made = [value.name for value in after.graph.input]
    made += [t.name for t in after.graph.initializer if t.name not in made]
    made += [name for node in after.graph.node for name in node.output if name]
    assert [name for name, n in collections.Counter(made).items() if n > 1] == []
    names = collections.Counter(node.name for node in after.graph.node if node.name)
    given = collections.Counter(node.name for node in before.graph.node if node.name)
    assert all(n == 1 or given[name] > 1 for name, n in names.items())
    # Nothing new is left unread, and nothing is said of values that are gone.
    read = {name for node in after.graph.node for name in node.input}
    old = {tensor.name for tensor in before.graph.initializer}
    assert {t.name for t in after.graph.initializer} - old <= read
    assert {value.name for value in after.graph.value_info} <= set(made)


def subsequence(some: Sequence[bytes], of: Sequence[bytes]) -> bool:
    rest = iter(of)
    return all(item in rest for item in some)


def serialized(protos: Iterable[Any]) -> list[bytes]:
    return [proto.SerializeToString(deterministic=True) for proto in protos]


def feeds_for(
    proto: onnx.ModelProto, rng: np.random.Generator, size: int = 3
) -> dict[str, Array]:
    """Random inputs, with ``size`` on every dynamic axis."""
    given = {tensor.name for tensor in proto.graph.initializer}
    feeds: dict[str, Array] = {}
    for value in proto.graph.input:
        if value.name in given:
            continue
        tensor = value.type.tensor_type
        shape = [d.dim_value or size for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            feeds[value.name] = np.array(True)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def run(proto: onnx.ModelProto, feeds: Mapping[str, Array], *, reference: bool) -> list[Array]:
    """Outputs in onnxruntime, without its graph optimizations, or in the standard's reference implementation."""
    if reference:
        evaluator = onnx.reference.ReferenceEvaluator(proto)
        return cast("list[Array]", evaluator.run(None, dict(feeds)))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return cast("list[Array]", session.run(None, dict(feeds)))


def check_parity(
    result: Rewritten,
    rng: np.random.Generator,
    *,
    exact: bool = True,
    reference: bool = False,
    sizes: Sequence[int] = (1, 3),
    tolerance: float | None = None,
) -> None:
    """The outputs of the rewritten model are the annealed model's; and the original's where only zeros were removed."""
    for size in sizes:
        feeds = feeds_for(result.original, rng, size)
        outputs = run(result.proto, feeds, reference=reference)
        others = [result.annealed] + ([result.original] if exact else [])
        for proto in others:
            for got, expected in zip(
                outputs, run(proto, feeds, reference=reference), strict=True
            ):
                assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
                size_of = float(np.abs(expected.astype(np.float64)).max()) or 1.0
                np.testing.assert_allclose(
                    got.astype(np.float64),
                    expected.astype(np.float64),
                    rtol=0,
                    atol=(tolerance or TOLERANCE[expected.dtype.name]) * size_of,
                )
