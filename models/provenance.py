"""What a reference model is, counted from its weights, and where it came from."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from scipy.sparse import csgraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PACKAGES = ("numpy", "onnx", "onnxscript", "scikit-learn", "scipy", "torch")


def environment() -> dict[str, str]:
    """Versions that a training's exact weights depend on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: version(name) for name in PACKAGES},
    }


def nonzero_structure(weights: Sequence[NDArray[Any]]) -> dict[str, Any]:
    """The union graph of all layers, an edge being a weight that is not exactly 0.

    Args:
        weights: per layer (K inputs, N outputs).

    Returns:
        ``nonzero`` weights per layer, ``density`` of all, and ``components``: per component with an edge its
        units per layer of units, inputs and outputs included, largest first.
    """
    edges = [weight != 0 for weight in weights]
    widths = [weights[0].shape[0], *(weight.shape[1] for weight in weights)]
    borders = np.cumsum([0, *widths])
    sources, targets = np.concatenate(
        [np.argwhere(mask) + borders[i : i + 2] for i, mask in enumerate(edges)]
    ).T
    graph = scipy.sparse.coo_array(
        (np.ones(len(sources), dtype=np.int8), (sources, targets)), shape=(borders[-1],) * 2
    )
    _, label = csgraph.connected_components(graph, directed=False)
    layers = np.split(label, borders[1:-1])
    components = [
        [int(np.count_nonzero(layer == component)) for layer in layers]
        for component in np.unique(label[sources])
    ]
    return {
        "nonzero": [int(mask.sum()) for mask in edges],
        "density": round(sum(m.sum() for m in edges) / sum(m.size for m in edges), 4),
        "components": sorted(components, reverse=True),
    }
