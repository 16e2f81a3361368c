"""What a rewritten model stores, proved against the original before anything runs.

Every weight is rebuilt from its blocks, bit for bit, and so are biases that were folded, constants that are read in
parts or in another order; what was not rewritten is the original's, and operators that stand for others are those.
"""

from __future__ import annotations

import collections
import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_decompose.analysis.recurrence import CELLS
from onnx_decompose.errors import ModelError
from onnx_decompose.graph.biases import find_biases
from onnx_decompose.graph.closing import restore
from onnx_decompose.graph.flat import flatten
from onnx_decompose.graph.gates import find_gates, reading_sites, with_slopes
from onnx_decompose.graph.rearranged import Rearranged
from onnx_decompose.graph.recurrent import RecurrentWeight, find_recurrent
from onnx_decompose.graph.sites import Site, find_sites, stored_nothing, stored_weight
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.external_data import external_tensors
from onnx_decompose.model.metadata import Decomposition, digest
from onnx_decompose.model.model_io import Model, read_tensor
from onnx_decompose.model.renames import renamed, subgraphs
from onnx_decompose.passes.recurrent import ReplaceRecurrentWeights
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.splice import ORIGIN_KEY, origins_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.graph.biases import Bias
    from onnx_decompose.model.metadata import Block, SiteBlocks


__all__ = ["annealed_model", "prove_structure"]


def prove_structure(
    original: Model, rewritten: Model, decomposition: Decomposition
) -> tuple[str | None, dict[Site | RecurrentWeight, NDArray[Any]], dict[Site, NDArray[Any]]]:
    """Rebuild every rewritten weight and folded bias from its blocks and compare bit for bit, before anything runs.

    Returns:
        What is wrong first, or None; and by site of the original the annealed weights, (K, N) each, and the biases,
        (N,) each, that are not the original's.
    """
    original, rewritten = _flat(original, rewritten)
    constants = Constants(original)
    sites = {site.name: site for site in find_sites(original, constants)[0]}
    cells, _ = find_recurrent(original, constants)
    recurrent = {weight.name: weight for cell in cells for weight in cell.all_weights}
    stored = {tensor.name: tensor for tensor in rewritten.proto.graph.initializer}
    weights: dict[Site | RecurrentWeight, NDArray[Any]] = {}
    used: dict[str, NDArray[np.bool_]] = {}
    biases: dict[Site, NDArray[Any]] = {}
    places = _places(original, sites, constants, decomposition)
    fault = _missing_gate(original, sites, constants, decomposition)
    for name, blocks in decomposition.sites.items():
        site = sites.get(name) or recurrent.get(name)
        if site is None or site.shape != blocks.shape:
            raise ModelError(
                f"{rewritten.label}: was not made from {original.label}: it has no site '{name}' of shape "
                f"{list(blocks.shape)}; give the model that was rewritten"
            )
        weight = (
            site.array if isinstance(site, RecurrentWeight) else stored_weight(site, constants)
        )
        before = places[name].scaled(weight) if isinstance(site, Site) else weight
        rest = np.zeros_like(before)
        if isinstance(site, Site):
            rest += stored_nothing(site, constants)
        reason, rebuilt = _rebuild(rewritten, stored, blocks.blocks, rest, used)
        if rebuilt is None:
            return f"site '{name}': {reason}", weights, biases
        fault = fault or reason or _compare_weights(blocks, before, rebuilt, rest)
        takes_in = blocks.absorbed is not None or blocks.slope
        if takes_in or not np.array_equal(rebuilt, weight):
            weights[site] = rebuilt
        if isinstance(site, RecurrentWeight):
            continue
        reason, bias = _rebuild_bias(rewritten, stored, blocks, places[name], used)
        fault = fault or reason
        if bias is not None:
            biases[site] = bias
    fault = fault or _foreign_entries(rewritten, stored, decomposition, used)
    fault = fault or _compare_rest(original, rewritten, decomposition, constants)
    return fault, weights, biases


def _flat(original: Model, rewritten: Model) -> tuple[Model, Model]:
    """Both models with the same open."""
    first = flatten(original)
    return first.model, flatten(rewritten, first).model


def annealed_model(
    original: Model,
    decomposition: Decomposition,
    weights: Mapping[Site | RecurrentWeight, NDArray[Any]],
    biases: Mapping[Site, NDArray[Any]],
) -> Model:
    """``original`` with the rebuilt weights and biases."""
    flat = flatten(original)
    counts = _absorbed(decomposition)
    plain = {site: array for site, array in weights.items() if isinstance(site, Site)}
    absorbed = {site: counts[site.name] for site in plain if site.name in counts}
    slopes = [site for site in plain if decomposition.sites[site.name].slope]
    others = {site.name: array for site, array in weights.items() if site not in plain}
    cells = find_recurrent(flat.model, Constants(flat.model))[0] if others else ()
    model = ReplaceWeights(plain, biases, absorbed, slopes)(flat.model).model
    return restore(flat, ReplaceRecurrentWeights(cells, others)(model).model)


def _rebuild(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    blocks: Sequence[Block],
    rest: NDArray[Any],
    used: dict[str, NDArray[np.bool_]],
    *,
    are_rows: bool = False,
) -> tuple[str | None, NDArray[Any] | None]:
    """A dense weight or bias from its blocks, and what is wrong with them; no array where it cannot be made.

    Args:
        model: the rewritten model.
        stored: its initializers by name.
        blocks: the parts.
        rest: (K, N), or (1, N) for a bias: what stands where no block is.
        used: collects which entries of each stored tensor belong to something.
        are_rows: the stored tensors are rows of units, whatever axes of size 1 they have.
    """
    rebuilt = rest.copy()
    covered = np.zeros(rest.shape, bool)
    for block in blocks:
        tensor = stored.get(block.initializer)
        if tensor is None:
            return f"block '{block.initializer}' is missing", None
        values = read_tensor(model, tensor)
        if values.dtype != rest.dtype:
            return f"block '{block.initializer}' has another type", None
        places = used.setdefault(block.initializer, np.zeros(values.shape, bool))
        units = np.ix_(block.rows, block.columns)
        try:
            if are_rows:
                values, places = _as_rows(values, block), _as_rows(places, block)
            rebuilt[units] = block.read(values)
        except ValueError as error:
            return f"block {error}", None
        if covered[units].any():
            return (
                f"block '{block.initializer}' holds entries that another block holds too",
                None,
            )
        covered[units] = True
        block.view(places)[np.ix_(*block.places)] = True
    return None, rebuilt


def _rebuild_bias(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    blocks: SiteBlocks,
    place: Bias,
    used: dict[str, NDArray[np.bool_]],
) -> tuple[str | None, NDArray[Any] | None]:
    """What is wrong with a site's bias, and the bias, (N,); None where that is the original's."""
    if blocks.bias is None:
        takes_in = blocks.absorbed is not None or blocks.slope
        if takes_in and place.stored(0.0).any():
            return f"site '{blocks.site}': the bias that it absorbed is missing", None
        return None, None
    if place.is_missing:
        fault = "a bias is recorded, and there is no constant that it could be"
        return f"site '{blocks.site}': {fault}", None
    rest = place.stored(0.0)[None, :]
    reason, row = _rebuild(model, stored, blocks.bias.blocks, rest, used, are_rows=True)
    if row is None:
        return f"site '{blocks.site}': {reason}", None
    if digest(row[0]) != blocks.bias.sha256:
        reason = (
            f"site '{blocks.site}': the bias rebuilt from its blocks is not the annealed bias"
        )
    return reason, row[0]


def _as_rows(values: NDArray[Any], block: Block) -> NDArray[Any]:
    """Rows of units, or a stack of such, as the matrices that ``block`` reads.

    Raises:
        ValueError: there are not as many entries.
    """
    stack, rows = (() if block.part is None else values.shape[:1]), block.rows.size
    return values.reshape(*stack, *((-1, rows) if block.transposed else (rows, -1)))


def _foreign_entries(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    decomposition: Decomposition,
    used: Mapping[str, NDArray[np.bool_]],
) -> str | None:
    """The first tensor with parts of weights or annealed biases that holds more than those and parts of constants.

    A stack of unequal blocks is padded, and an operator that several weights are written into may have room that none
    of them fills; whatever stands there takes part in the product.
    """
    for constant in decomposition.constants.values():
        for block in constant.blocks:
            if block.initializer in used:
                # Of one that does not fit, the comparison with the original says so.
                with contextlib.suppress(ValueError):
                    places = _as_rows(used[block.initializer], block)
                    block.view(places)[np.ix_(*block.places)] = True
    for name, places in used.items():
        values = read_tensor(model, stored[name])
        if (values.reshape(places.shape)[~places] != 0).any():
            return f"block '{name}' holds entries that are no part of the weight"
    return None


def _compare_weights(
    blocks: SiteBlocks, before: NDArray[Any], rebuilt: NDArray[Any], nothing: NDArray[Any]
) -> str | None:
    """What is wrong with a weight; ``nothing``, (K, N), is stored where there is no dependency."""
    if digest(rebuilt) != blocks.sha256:
        return f"site '{blocks.site}': the weight rebuilt from its blocks is not the annealed weight"
    if blocks.annealing == "refitted":
        return None
    foreign = (rebuilt != before) & (rebuilt != nothing)
    if foreign.any():
        return (
            f"site '{blocks.site}': entry {_first(foreign)} is neither the original's nor zero"
        )
    removed = rebuilt != before
    if blocks.annealing == "exact" and removed.any():
        return (
            f"site '{blocks.site}': entry {_first(removed)} was removed, and the metadata says that only exact "
            "zeros were"
        )
    return None


def _first(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """Row and column of the first True of ``flags``, (K, N)."""
    row, column = np.argwhere(flags)[0].tolist()
    return row, column


def _absorbed(decomposition: Decomposition) -> dict[str, int]:
    """How many nodes after each site its weight and bias hold, by site name."""
    return {
        name: site.absorbed
        for name, site in decomposition.sites.items()
        if site.absorbed is not None
    }


def _places(
    original: Model,
    sites: Mapping[str, Site],
    constants: Constants,
    decomposition: Decomposition,
) -> dict[str, Bias]:
    """The affine part of each site, with all that the metadata says it absorbed."""
    graph, slopes = original.proto.graph, _slopes(decomposition)
    places = find_biases(graph, sites.values(), constants, _absorbed(decomposition))
    return with_slopes(graph, sites.values(), constants, places, slopes)


def _slopes(decomposition: Decomposition) -> set[str]:
    """Names of the sites whose weight and bias hold the slope of the gate after them."""
    return {name for name, site in decomposition.sites.items() if site.slope}


def _missing_gate(
    original: Model,
    sites: Mapping[str, Site],
    constants: Constants,
    decomposition: Decomposition,
) -> str | None:
    """A slope that cannot have been absorbed: there is no such gate, or something reads it that was not rewritten."""
    graph = original.proto.graph
    holding = [sites[name] for name in sorted(_slopes(decomposition)) if name in sites]
    places = find_biases(graph, holding, constants, _absorbed(decomposition))
    gates = find_gates(graph, holding, constants, places)
    for site in holding:
        gate = gates.get(site.name)
        if gate is None:
            return f"site '{site.name}': no gate whose slope it could have absorbed follows it in the original"
        reading = reading_sites(graph, gate, site, sites.values())
        if not reading or any(reader.name not in decomposition.sites for reader in reading):
            return f"site '{site.name}': the gate after it is read by more than rewritten sites"
    return None


def _compare_rest(
    original: Model, rewritten: Model, decomposition: Decomposition, constants: Constants
) -> str | None:
    """What is wrong with all that is no weight and no bias."""
    stored = {tensor.name: tensor for tensor in rewritten.proto.graph.initializer}
    fault = _compare_reordered(rewritten, stored, decomposition, constants)
    fault = fault or _compare_constants(
        rewritten, stored, decomposition, Rearranged(original, constants)
    )
    changed = _changed_tensor(original, rewritten)
    if fault is None and changed is not None:
        fault = f"tensor '{changed}', which was not rewritten, is not the original's"
    return fault or _changed_node(original, rewritten)


def _compare_reordered(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    decomposition: Decomposition,
    constants: Constants,
) -> str | None:
    """Constants whose units are in another order must hold the original's entries, bit for bit."""
    for name, constant in decomposition.reordered.items():
        if name not in stored or constant.source not in constants:
            return f"constant '{constant.source}' or its reordered form '{name}' is missing"
        found = read_tensor(model, stored[name])
        try:
            wanted = constant.apply(constants.array(constant.source))
        except ValueError as error:
            return f"constant {error}"
        if found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
            return f"constant '{constant.source}': its reordered form '{name}' is not the original's"
    return None


def _compare_constants(
    model: Model,
    stored: Mapping[str, onnx.TensorProto],
    decomposition: Decomposition,
    constants: Rearranged,
) -> str | None:
    """Constants that rewritten operators read in parts must hold the original's entries, bit for bit."""
    for name, constant in decomposition.constants.items():
        if name not in constants:
            return f"constant '{name}' is missing from the original"
        array = np.atleast_1d(constants.array(name))
        if -array.ndim <= constant.axis < 0:
            array = np.moveaxis(array, constant.axis, -1)
        rows = math.prod(array.shape[:-1])
        if rows != constant.shape[0] or array.shape[-1] not in {1, constant.shape[1]}:
            return f"constant '{name}' has another shape"
        wanted = np.broadcast_to(array.reshape(rows, -1), constant.shape)
        for block in constant.blocks:
            tensor = stored.get(block.initializer)
            if tensor is None:
                return f"constant '{name}': its part '{block.initializer}' is missing"
            try:
                found = block.read(_as_rows(read_tensor(model, tensor), block))
            except ValueError as error:
                return f"constant '{name}': part {error}"
            expected = wanted[np.ix_(block.rows, block.columns)]
            if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
                return (
                    f"constant '{name}': its part '{block.initializer}' is not the original's"
                )
    return None


def _changed_tensor(original: Model, rewritten: Model) -> str | None:
    """The first tensor that both models store under one name with other bytes."""
    before = {tensor.name: tensor for tensor in original.proto.graph.initializer}
    for tensor in rewritten.proto.graph.initializer:
        if tensor.name not in before or tensor == before[tensor.name]:
            continue
        first, second = (
            read_tensor(original, before[tensor.name]),
            read_tensor(rewritten, tensor),
        )
        if (
            first.dtype != second.dtype
            or first.shape != second.shape
            or first.tobytes() != second.tobytes()
        ):
            return str(tensor.name)
    return None


def _changed_node(original: Model, rewritten: Model) -> str | None:
    """What is wrong with the first node that is not what it was, or not what the node was that it stands for.

    Nodes are compared by operator and attributes: inputs are others where something was rewritten. A site may become
    another product, and a recurrent operator has its size and activations among its attributes.
    """
    nodes = original.proto.graph.node
    maker = {name: node for node in nodes for name in node.output if name}
    names = collections.Counter(_name(node) for node in nodes)
    named = {_name(node): node for node in nodes if names[_name(node)] == 1}
    for node in rewritten.proto.graph.node:
        is_new = any(entry.key == ORIGIN_KEY for entry in node.metadata_props)
        if is_new:
            sources = [named.get(origin) for origin in origins_of(node)]
        else:
            sources = [maker.get(next(iter(node.output), ""))]
        for source in sources:
            if source is not None and source.op_type not in CELLS:
                fault = _difference(original, rewritten, node, source, is_new=is_new)
                if fault is not None:
                    return fault
    return None


def _difference(
    original: Model,
    rewritten: Model,
    node: onnx.NodeProto,
    source: onnx.NodeProto,
    *,
    is_new: bool,
) -> str | None:
    """What is wrong with one node of the rewritten model that is, or stands for, ``source``."""
    if node.op_type != source.op_type:
        if _may_stand_for(node, source, is_new=is_new):
            return None
        return (
            f"node '{_name(node)}' is {node.op_type}, and '{_name(source)}' of the original "
            f"{source.op_type}"
        )
    # A convolution's groups are its blocks, which the weight is rebuilt from.
    aside = ("group",) if is_new and node.op_type == "Conv" else ()
    if _attributes(node, aside) != _attributes(source, aside) and (
        _attributes(_inlined(rewritten, node), aside)
        != _attributes(_inlined(original, source), aside)
    ):
        return (
            f"node '{_name(node)}' has other attributes than '{_name(source)}' in the original"
        )
    return None


_PRODUCTS = {"Conv", "Gemm", "MatMul"}
_JOINTS = {
    *("Add", "ArrayFeatureExtractor", "Concat", "Gather", "Pad", "Reshape", "Squeeze"),
    *("Transpose", "Unsqueeze"),
}
"""Operators that put together what a region makes."""


def _may_stand_for(node: onnx.NodeProto, source: onnx.NodeProto, *, is_new: bool) -> bool:
    """Whether a rewrite can put ``node`` in the place of ``source``, which has another operator."""
    if not is_new:
        of_several = node.op_type == "Split" and source.op_type in {*_PRODUCTS, "Add", "Mul"}
        return node.op_type in _JOINTS or of_several
    if source.op_type in _PRODUCTS:
        return node.op_type in _PRODUCTS
    if node.op_type in _PRODUCTS:  # it absorbed what followed it, and makes the value of that
        return not source.name
    return (source.op_type, node.op_type) == ("Mul", "Add")  # the bias that a scale left


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or next(iter(node.output), ""))


def _attributes(node: onnx.NodeProto, aside: Collection[str]) -> dict[str, bytes]:
    """The attributes in a form that compares; what a body reads from outside is an input like others."""
    plain = renamed(node, lambda _: "") if any(subgraphs(node)) else node
    return {
        a.name: a.SerializeToString(deterministic=True)
        for a in plain.attribute
        if a.name not in aside
    }


def _inlined(model: Model, node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy of a node that holds its external data itself: the two models have it in files of their own."""
    copy = onnx.ModelProto(graph=onnx.GraphProto(node=[node]))
    for tensor in external_tensors(copy):
        content = read_tensor(model, tensor).tobytes()
        del tensor.external_data[:]
        tensor.ClearField("data_location")
        tensor.raw_data = content
    inlined: onnx.NodeProto = copy.graph.node[0]
    return inlined
