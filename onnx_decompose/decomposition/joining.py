"""Products of the rewritten model that read one value, joined; and the record of where their weights lie, kept true."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.graph.regions import value_readers
from onnx_decompose.graph.sites import attribute_values
from onnx_decompose.model.metadata import Block, SiteBlocks, SlicedConstant, digest
from onnx_decompose.passes.join_siblings import JoinSiblings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import onnx

    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.metadata import Decomposition
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.passes.join_siblings import Joined, Place
    from onnx_decompose.planning.cost import CostModel

    Moved = Mapping[str, Sequence[Place]]

__all__ = ["join_siblings"]


def join_siblings(
    model: Model,
    decomposition: Decomposition,
    study: Study,
    cost: CostModel,
    sizes: Mapping[str, int],
) -> tuple[Model, Decomposition, tuple[Joined, ...]]:
    """Join products of one value where that is predicted to be faster, those that were not rewritten too.

    Args:
        model: the rewritten model.
        decomposition: where it stores the weights of rewritten sites.
        study: the original.
        cost: the provider's coefficients.
        sizes: of dynamic axes but the batch, by symbol, at which it is to be faster.

    Returns:
        The model, where it stores weights now, and what was joined.
    """
    dense = {
        site.output: site
        for site in study.sites
        if site.name not in decomposition.sites and site.quantized is None and not site.kernel
    }
    graph = model.proto.graph
    made = {node.output[0]: node for node in graph.node if len(node.input) > 1}
    owner = {
        block.initializer: name
        for name, site in decomposition.sites.items()
        for block in site.blocks
    }
    products = {
        output: owner[node.input[1]] for output, node in made.items() if node.input[1] in owner
    } | {
        output: site.name
        for output, site in dense.items()
        if output in made and made[output].input[1] == site.weight
    }
    before = study.model.proto.graph
    joining = JoinSiblings(cost, products, _biases(graph, decomposition, study), sizes, before)
    joined = joining(model).model
    stored = {tensor.name for tensor in joined.proto.graph.initializer}
    weights = {name: (place,) for name, place in joining.weights.items()}
    sites = {
        name: _moved_site(site, weights, joining.rows)
        for name, site in decomposition.sites.items()
    }
    for output, site in dense.items():
        if output in products and site.weight in weights:
            flipped = bool(attribute_values(made[output]).get("transB", 0))
            rows, columns = map(np.arange, site.shape)
            whole = Block(rows, columns, site.weight, flipped)
            sites[site.name] = SiteBlocks(
                site=site.name,
                shape=site.shape,
                annealing="exact",
                sha256=digest(study.stored(site)),
                blocks=_moved((whole,), weights),
            )
    found = dataclasses.replace(
        decomposition,
        sites=sites,
        constants=_constants(decomposition, joining.rows, stored),
        reordered={
            name: constant
            for name, constant in decomposition.reordered.items()
            if name not in joining.rows or name in stored
        },
    )
    return joined, found, tuple(joining.joined)


def _biases(
    graph: onnx.GraphProto, decomposition: Decomposition, study: Study
) -> Collection[str]:
    """The constants whose entries can be told wherever they lie."""
    readers = value_readers(graph)
    parts = {
        block.initializer
        for sliced in decomposition.constants.values()
        for block in sliced.blocks
    }
    folded = {
        block.initializer
        for site in decomposition.sites.values()
        if site.bias is not None
        for block in site.bias.blocks
        if len(readers.get(block.initializer, ())) == 1  # one place for each entry
    }
    rows = {
        name
        for name, constant in decomposition.reordered.items()
        if set(constant.axes) == {-1} and _takes_row(decomposition, constant.source)
    }
    plain = {name for name in study.constants.names if _takes_row(decomposition, name)}
    return parts | folded | rows | plain


def _takes_row(decomposition: Decomposition, name: str) -> bool:
    """Whether what is recorded of a constant's parts may go on with another row of units."""
    sliced = decomposition.constants.get(name)
    return sliced is None or (sliced.axis == -1 and sliced.shape[0] == 1)


def _moved_site(site: SiteBlocks, weights: Moved, rows: Moved) -> SiteBlocks:
    bias = site.bias
    if bias is not None:
        bias = dataclasses.replace(bias, blocks=_moved(bias.blocks, rows))
    return dataclasses.replace(site, blocks=_moved(site.blocks, weights), bias=bias)


def _moved(blocks: Iterable[Block], places: Moved) -> tuple[Block, ...]:
    """The blocks where they lie now; one whose tensor lies at several places is at each of them."""
    found: list[Block] = []
    for block in blocks:
        if block.initializer not in places:
            found.append(block)
        for place in places.get(block.initializer, ()):
            _, columns = block.places
            found.append(
                dataclasses.replace(
                    block, initializer=place.tensor, stored_columns=place.first + columns
                )
            )
    return tuple(found)


def _constants(
    decomposition: Decomposition, rows: Moved, stored: Collection[str]
) -> dict[str, SlicedConstant]:
    """What is recorded of constants that are stored in parts, with the biases that were moved.

    A part that something else reads as well is still ``stored`` where it was.
    """
    both = rows.keys() & stored
    found = {
        name: dataclasses.replace(
            sliced,
            blocks=(
                *_moved(sliced.blocks, rows),
                *(block for block in sliced.blocks if block.initializer in both),
            ),
        )
        for name, sliced in decomposition.constants.items()
    }
    known = {
        b.initializer for sliced in decomposition.constants.values() for b in sliced.blocks
    }
    known.update(
        block.initializer
        for site in decomposition.sites.values()
        if site.bias is not None
        for block in site.bias.blocks
    )
    for name, places in rows.items():
        if name in known:
            continue
        reordered = decomposition.reordered.get(name)
        units = np.arange(places[0].width) if reordered is None else reordered.axes[-1]
        source = name if reordered is None else reordered.source
        whole = Block(np.arange(1), units, name, False)
        before = found.get(source, SlicedConstant((1, units.size), ()))
        blocks = (*before.blocks, *_moved((whole,), rows))
        found[source] = dataclasses.replace(before, blocks=blocks)
    return found
