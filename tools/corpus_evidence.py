"""What the evidence says of real models that ship inside packages. Files are only read.

python -m tools.corpus_evidence snapshot LLAMA2.data
python -m tools.corpus_evidence shared FILE...          (.onnx, .safetensors, llama2 .data)
python -m tools.corpus_evidence null MODEL.onnx --null torch
python -m tools.corpus_evidence decayed MODEL.onnx      (a chain of MatMul layers)
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import numpy_helper

from onnx_decompose.analysis.anneal import anneal
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import gather_evidence
from onnx_decompose.analysis.groups import line_p_values, step_up
from onnx_decompose.analysis.null import parse_null
from onnx_decompose.analysis.record import Prior
from onnx_decompose.analysis.shared import shared_lines
from onnx_decompose.analysis.structure import Edge, live_units
from onnx_decompose.graph.sites import Site, find_sites, site_weight
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import load_model
from onnx_decompose.runtime.sessions import Provider, open_session
from tools.stories15m import initial_weights, read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.selection import SharedLines
    from onnx_decompose.model.model_io import Model

    FloatArray = NDArray[np.floating[Any]]

__all__ = ["float_weights", "live_widths", "relative_error"]

FEWEST_LINES = 64
MOST_SHOWN = 2
DRAWS = 2000
HAND_MADE = (1e-4, 3e-4, 1e-3)


def report_snapshot(path: Path) -> None:
    """Trained against initial weights, matrix by matrix."""
    shape, trained = read_checkpoint(path)
    initial = initial_weights(shape)
    print(
        "| parameter | correlation | slope on w0 | share of displacement | common factor "
        "| untouched | kept by displacement(0.01) | kept by magnitude > the same share |"
    )
    print("|---|---|---|---|---|---|---|---|")
    embedding = trained["tok_embeddings.weight"]
    rng = np.random.default_rng(0)
    untrained = max(shared_lines(embedding, 0, rng=rng), key=lambda g: g.members.size).members
    rest = np.setdiff1d(np.arange(len(embedding)), untrained)
    pairs = {
        name: (weight, initial[name])
        for name, weight in trained.items()
        if weight.ndim == 2 and name != "tok_embeddings.weight"
    }
    start = initial["tok_embeddings.weight"]
    pairs["embedding, rows of the common vector"] = (embedding[untrained], start[untrained])
    pairs["embedding, other rows"] = (embedding[rest], start[rest])
    for name, (weight, before) in pairs.items():
        print(f"| {name} | {_snapshot_row(weight.T, before.T)} |", flush=True)
    residual = embedding[untrained].astype(np.float64)
    residual -= residual.mean(axis=0)
    initials = start[untrained].astype(np.float64)
    energy = float(np.vdot(initials, initials))
    slope = float(np.vdot(residual, initials)) / energy
    error = math.sqrt(float(np.vdot(residual, residual)) / residual.size / energy)
    print(
        f"\nrows of the common vector, less their mean: slope on w0 {slope:.1e} "
        f"(standard error {error:.1e}), mean |residual| {np.abs(residual).mean():.1e}"
    )


def _snapshot_row(weight: FloatArray, before: FloatArray) -> str:
    now, then = weight.astype(np.float64).ravel(), before.astype(np.float64).ravel()
    slope = float(now @ then / (then @ then))
    moved = now - slope * then
    prior = Prior(weight.shape[0], weight.shape[1], snapshot=before)
    evidence = gather_evidence(weight, "snapshot", prior)
    assert evidence.untouched is not None
    rng = np.random.default_rng(0)
    kept = make_criterion("displacement", 0.01).select(evidence, rng=rng).mask
    largest = np.abs(weight) >= np.quantile(np.abs(weight), 1 - kept.mean())
    factor = "none" if evidence.decay is None else f"{evidence.decay.factor:.3f}"
    both = int(np.count_nonzero(kept & largest)) / max(int(np.count_nonzero(kept)), 1)
    return (
        f"{np.corrcoef(now, then)[0, 1]:.3f} | {slope:.3f} | {moved @ moved / (now @ now):.3f} "
        f"| {factor} | {evidence.untouched.mean():.1e} | {kept.mean():.3f} | {both:.3f}"
    )


def report_shared(paths: list[Path]) -> None:
    """Equal rows and columns of every float weight with at least ``FEWEST_LINES`` of them."""
    print(
        "| file | weight | axis | lines | members | norm of the common vector "
        "| farthest member | nearest other line | typical norm |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for path in paths:
        looked = found = 0
        for name, weight in float_weights(path):
            looked += 1
            for axis in (0, 1):
                lines = weight if axis == 0 else weight.T
                groups = shared_lines(weight, axis, rng=np.random.default_rng(0))
                found += bool(groups)
                for group in groups[:MOST_SHOWN]:
                    label = f"{path.name} | {name[-40:]} | {('rows', 'columns')[axis]}"
                    print(
                        f"| {label} | {len(lines)} | {_group_row(lines, group)} |", flush=True
                    )
        print(
            f"| {path.name} | {looked} weights looked at, {found} with equal lines |",
            flush=True,
        )


def _group_row(lines: FloatArray, group: SharedLines) -> str:
    others = np.delete(np.arange(len(lines)), group.members)
    inside, outside = (
        np.linalg.norm(lines[rows] - group.representative, axis=1)
        for rows in (group.members, others)
    )
    return (
        f"{group.members.size} | {np.linalg.norm(group.representative):.2g} | {inside.max():.1e} "
        f"| {outside.min(initial=np.inf):.1e} | {np.median(np.linalg.norm(lines, axis=1)):.2g}"
    )


def float_weights(path: Path) -> Iterator[tuple[str, FloatArray]]:
    """Every matrix in ``path``, quantized ones as the floats that they stand for.

    A convolution's kernel counts as a matrix when it is 1 x 1, a recurrent op's weight once per
    direction.
    """
    if path.suffix == ".safetensors":
        arrays = safetensors.numpy.load_file(path)
    elif path.suffix == ".data":
        arrays = {"tok_embeddings.weight": read_checkpoint(path)[1]["tok_embeddings.weight"]}
    else:
        arrays = dict(_onnx_arrays(onnx.load(path)))
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            continue
        if array.ndim == 3 and array.shape[0] <= 2:
            parts = [(f"{name}[{k}]", part) for k, part in enumerate(array)]
        else:
            parts = [(name, array.reshape([n for n in array.shape if n != 1] or [1]))]
        for label, part in parts:
            if part.ndim == 2 and max(part.shape) >= FEWEST_LINES and min(part.shape) >= 8:
                yield label, part


def _onnx_arrays(model: onnx.ModelProto) -> Iterator[tuple[str, NDArray[Any]]]:
    arrays = _stored_arrays(model)
    yield from arrays.items()
    casts: dict[str, NDArray[Any]] = {}
    for graph in _graphs(model.graph):
        for node in graph.node:
            inputs = [arrays.get(name) for name in node.input]
            if node.op_type == "Gather" and inputs[0] is not None:
                # A quantized table is looked up first; its rows stand for floats all the same.
                arrays[node.output[0]] = inputs[0]
            elif node.op_type == "DequantizeLinear" and all(x is not None for x in inputs):
                yield node.output[0], _dequantized(node, *inputs)
            elif node.op_type == "Cast" and inputs[0] is not None:
                casts[node.output[0]] = inputs[0]
            elif node.op_type == "Mul":
                quantized, scale = casts.get(node.input[0]), inputs[1]
                if quantized is not None and scale is not None:
                    yield node.output[0], quantized.astype(np.float32) * scale


def _stored_arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Initializers and constants of every graph by name."""
    arrays: dict[str, NDArray[Any]] = {}
    for graph in _graphs(model.graph):
        arrays |= {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return arrays


def _dequantized(
    node: onnx.NodeProto, values: Any, scale: Any, zero: Any = 0
) -> NDArray[np.float32]:
    """``scale * (values - zero)``, the scale along the node's axis where it is a vector."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    dims = [-1 if k == axis else 1 for k in range(values.ndim)] if np.ndim(scale) == 1 else []
    if dims and np.size(scale) > 1:
        scale, zero = np.reshape(scale, dims), np.reshape(zero, dims)
    return np.asarray(scale * (values.astype(np.float32) - np.float32(zero)), np.float32)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _graphs(inner)


def report_null(path: Path, null: str) -> None:
    """A model against a declared initialization: entries, rows, columns, and its output."""
    _, constants, sites = _opened(path)
    prior_of = {s.name: Prior(*s.shape) for s in sites}
    print(
        "| site | shape | common factor | pi0 | 95 % interval | fdr 0.01 | fwer 0.01 "
        "| unsupported rows | unsupported columns |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    masks: dict[str, dict[str, NDArray[np.bool_]]] = {"fdr": {}, "fwer": {}, "group": {}}
    for site in sites:
        weight = site_weight(site, constants)
        evidence = gather_evidence(weight, null, prior_of[site.name])
        chosen = {
            name: make_criterion(name, 0.01).select(evidence, rng=np.random.default_rng(0))
            for name in masks
        }
        for name, selection in chosen.items():
            masks[name][site.name] = selection.mask
        low, high = chosen["fdr"].pi0_interval
        fixed = parse_null(null, fan_in=site.shape[0], fan_out=site.shape[1])
        lines = [
            np.count_nonzero(
                ~step_up(line_p_values(w, fixed, rng=np.random.default_rng(0)), 0.01)
            )
            for w in (weight, weight.T)
        ]
        decay = evidence.decay
        factor = "none" if decay is None else f"{decay.factor:.3f} ({decay.basis})"
        print(
            f"| {site.name} | {site.shape[0]} x {site.shape[1]} | {factor} "
            f"| {chosen['fdr'].pi0:.3f} | {low:.3f} to {high:.3f} "
            f"| {chosen['fdr'].mask.mean():.4f} | {chosen['fwer'].mask.mean():.4f} "
            f"| {lines[0]} of {site.shape[0]} | {lines[1]} of {site.shape[1]} |",
            flush=True,
        )
    for name, kept in masks.items():
        error = relative_error(path, kept)
        share = sum(int(m.sum()) for m in kept.values()) / sum(m.size for m in kept.values())
        print(
            f"\nkeeping what {name} supports ({share:.4f} of the weights): "
            f"relative output error {error:.3g} on {DRAWS} standard normal inputs"
        )


def report_decayed(path: Path) -> None:
    """Unsupported weights and dead units of a chain, by the data's own threshold and others."""
    _, constants, sites = _opened(path)
    chain = [s for s in sites if s.shape[1] > 1]
    weights = {s.name: site_weight(s, constants) for s in chain}
    print("| site | shape | the data's edge | what marks it | entries below |")
    print("|---|---|---|---|---|")
    # Heads that read the same value are one stage of the chain.
    stages = [list(stage) for _, stage in itertools.groupby(chain, lambda s: s.input)]
    edges: dict[str, float] = {}
    marked: dict[str, bool] = {}
    for site in chain:
        evidence = gather_evidence(weights[site.name], "empirical", Prior(*site.shape))
        selection = make_criterion("fdr", 0.01).select(evidence, rng=np.random.default_rng(0))
        edges[site.name] = selection.threshold if selection.threshold is not None else 0.0
        marked[site.name] = "the bulk ends at" in evidence.note
        unsupported = float((~selection.mask).mean())
        print(
            f"| {site.name[-28:]} | {site.shape[0]} x {site.shape[1]} | {edges[site.name]:.2e} "
            f"| {evidence.note.split(':')[-1].strip()} | {unsupported:.4f} |",
            flush=True,
        )
    print("\n| threshold | unsupported | live widths | flops kept | output error |")
    print("|---|---|---|---|---|")
    decayed = {name: edges[name] if marked[name] else 0.0 for name in weights}
    choices = {
        "the data's edge, every layer": edges,
        "the data's edge, decayed layers": decayed,
    }
    choices |= {f"{t:g}": dict.fromkeys(weights, t) for t in HAND_MADE}
    for label, cut in choices.items():
        masks = {n: np.abs(w) >= cut[n] for n, w in weights.items()}
        widths = live_widths([np.hstack([masks[s.name] for s in stage]) for stage in stages])
        flops = sum(a * b for a, b in itertools.pairwise(widths))
        whole = sum(math.prod(s.shape) for s in chain)
        gone = 1 - sum(int(m.sum()) for m in masks.values()) / whole
        error = relative_error(path, masks)
        print(
            f"| {label} | {gone:.4f} | {' '.join(map(str, widths))} | {flops / whole:.3f} "
            f"| {error:.2g} |",
            flush=True,
        )


def live_widths(masks: list[NDArray[np.bool_]]) -> list[int]:
    """Units of each axis of a chain that vary and are needed, dead ones removed in cascade."""
    sizes = [masks[0].shape[0], *(mask.shape[1] for mask in masks)]
    edges = [Edge(k, k + 1, mask) for k, mask in enumerate(masks)]
    varies, needed = live_units(sizes, edges, {0}, {len(masks)})
    return [int(np.count_nonzero(a & b)) for a, b in zip(varies, needed, strict=True)]


def relative_error(path: Path, masks: Mapping[str, NDArray[np.bool_]]) -> float:
    """Largest relative L2 error of any output when what ``masks`` does not support is removed.

    Args:
        path: a model with one input, whose dynamic axes are batches.
        masks: by site name, (K, N); a site without one stays as it is.
    """
    model, constants, sites = _opened(path)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for site in (s for s in sites if s.name in masks):
        changed = anneal(site_weight(site, constants), masks[site.name])
        stored = np.ascontiguousarray(changed.T if site.transposed else changed)
        tensors[site.tensor].CopyFrom(numpy_helper.from_array(stored, site.tensor))
    inputs = _normal_inputs(model.proto)
    first, second = (
        open_session(m.SerializeToString(), Provider.CPU).run(inputs)
        for m in (model.proto, proto)
    )
    return max(_distance(first[name], second[name]) for name in first)


def _distance(reference: NDArray[Any], other: NDArray[Any]) -> float:
    exact = reference.astype(np.float64)
    return float(np.linalg.norm(other - exact)) / max(float(np.linalg.norm(exact)), 1e-300)


def _normal_inputs(proto: onnx.ModelProto) -> Mapping[str, NDArray[Any]]:
    (entry,) = proto.graph.input
    dims = [d.dim_value or DRAWS for d in entry.type.tensor_type.shape.dim]
    draws = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    return {entry.name: draws}


def _opened(path: Path) -> tuple[Model, Constants, tuple[Site, ...]]:
    model = load_model(path)
    constants = Constants(model)
    sites, _ = find_sites(model, constants)
    return model, constants, sites


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("question", choices=["snapshot", "shared", "null", "decayed"])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--null", default="torch")
    options = parser.parse_args()
    if options.question == "shared":
        report_shared(options.files)
        return
    for path in options.files:
        if options.question == "snapshot":
            report_snapshot(path)
        elif options.question == "null":
            report_null(path, options.null)
        else:
            report_decayed(path)


if __name__ == "__main__":
    _main()
