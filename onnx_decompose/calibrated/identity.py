"""Which search it is: a digest of all that what it finds out depends on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.model.external_data import without_weights
from onnx_decompose.model.model_io import model_files, read_tensor
from onnx_decompose.timing.cost_cache import this_machine
from onnx_decompose.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.options import Options
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.metrics import Metric
    from onnx_decompose.verification.verify import Inputs

__all__ = ["search_digest"]

_OPTIONS = ("seed", "compensation", "budget", "output_budgets", "metric", "emit", "batch")
"""The options that change what a proposal is, costs or comes to; others only choose among proposals."""
_CHUNK = 1 << 20


def search_digest(
    model: Model, options: Options, inputs: Inputs, cost: CostModel, provider: Provider
) -> str:
    """The same for two searches of which one can go on where the other was."""
    assert inputs.samples is not None
    digest = hashlib.sha256()
    versions = (
        VERSION,
        this_machine(provider).onnxruntime,
        *map(importlib.metadata.version, ("numpy", "scipy")),
    )
    asked = {name: getattr(options, name) for name in _OPTIONS}
    digest.update(repr((versions, asked, cost, provider.value)).encode())
    for part in (*_metric(inputs.metric), *_samples(inputs.samples)):
        digest.update(part)
    for part in _model(model):
        digest.update(part)
    return digest.hexdigest()


def _metric(metric: Metric | None) -> Iterator[bytes]:
    """The module that the metric is in."""
    module = None if metric is None else inspect.getmodule(metric.function)
    source = None if module is None else getattr(module, "__file__", None)
    if source is not None:
        yield Path(source).read_bytes()


def _samples(samples: Samples) -> Iterator[bytes]:
    for arrays in (samples.rows, samples.whole, samples.extras, samples.extras_whole):
        for name, array in arrays.items():
            yield repr((name, array.dtype, array.shape)).encode()
            # Strings are kept as objects, whose bytes are addresses.
            values = array.astype(str) if array.dtype == object else array
            yield np.ascontiguousarray(values).tobytes()


def _model(model: Model) -> Iterator[bytes]:
    """Its files; of one that came from none, its parts."""
    files = sorted(model_files(model))
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    if not files:
        light, weights = without_weights(model.proto)
        yield light.SerializeToString(deterministic=True)
        for _, tensor in weights:
            yield read_tensor(model, tensor).tobytes()
