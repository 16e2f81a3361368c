"""A second opinion on rewritten sites: errors against what theory allows, not against what was measured.

Each part of the models between values that both have, with rewritten sites in it, is run on its own on the annealed
model's values there, on the CPU. Its error should be within the running bound of ``analysis.rounding_bound``.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from onnx_decompose.analysis.rounding_bound import (
    LIPSCHITZ,
    Bounded,
    activated,
    added,
    multiplied,
    product,
)
from onnx_decompose.errors import ModelError
from onnx_decompose.graph.sites import attribute_values
from onnx_decompose.model.metadata import read_decomposition
from onnx_decompose.model.model_io import Model, read_tensor
from onnx_decompose.model.tensors import is_float
from onnx_decompose.runtime.cases import made_up_cases, open_model, runnable
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.claims import BoundCheck
from onnx_decompose.verification.proof import annealed_model, prove_structure
from onnx_decompose.verification.reproducer import agreeing, first_value, part_of_both

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx

    from onnx_decompose.runtime.feeds import Feeds

__all__ = ["second_opinion"]

logger = logging.getLogger(__name__)

_MOST_PARTS = 64


def second_opinion(
    original: Model, rewritten: Model, provider: Provider
) -> tuple[BoundCheck, ...]:
    """Every rewritten site whose part has a bound; for models that passed claim A.

    Parts with operators that have no bound here are left out, as are those past the first 64.
    """
    decomposition = read_decomposition(rewritten.proto, rewritten.label)
    if decomposition is None:
        return ()
    fault, weights, biases, *_ = prove_structure(original, rewritten, decomposition)
    if fault is not None:
        return ()
    annealed = annealed_model(original, decomposition, weights, biases)
    rng = np.random.default_rng(0)
    session = open_model(annealed, provider)
    case, _ = next(
        runnable(
            lambda other: made_up_cases(annealed.proto, seeds=1, rng=rng, other=other), session
        )
    )
    agree = agreeing(annealed, rewritten, case, provider)
    targets = dict.fromkeys(first_value(annealed, agree, name) for name in decomposition.sites)
    models, checks = (annealed, rewritten), []
    for target in [name for name in targets if name is not None][:_MOST_PARTS]:
        try:
            checks.append(_check(*part_of_both(models, agree, target, case, provider), target))
        except ModelError as error:
            logger.info("no second opinion on '%s': %s", target, error)
    return tuple(check for check in checks if check is not None and check.sites)


def _check(
    parts: Sequence[onnx.ModelProto], feeds: Feeds, sites: tuple[str, ...], target: str
) -> BoundCheck | None:
    bounded = _bounded(parts[0], feeds, target)
    if bounded is None:
        return None
    errors = []
    for part in parts:
        names = {value.name for value in part.graph.input}
        given = {name: array for name, array in feeds.items() if name in names}
        found = open_model(Model(part), Provider.CPU).run(given)[target].astype(np.float64)
        errors.append(np.abs(found - bounded.value))
    allowed = np.maximum(bounded.error, np.finfo(np.float64).tiny)
    size = float(np.abs(bounded.value).max(initial=0.0)) or 1.0
    first, second = (float((error / allowed).max(initial=0.0)) for error in errors)
    return BoundCheck(
        target, sites, float(bounded.error.max(initial=0.0)) / size, first, second
    )


def _bounded(part: onnx.ModelProto, feeds: Feeds, target: str) -> Bounded | None:
    """The part's output in float64 and its bound; None where an operator has none."""
    known: dict[str, Bounded] = {}
    model = Model(part)
    tensors = {tensor.name: read_tensor(model, tensor) for tensor in part.graph.initializer}
    arrays = {**feeds, **tensors}
    floats = {name: array for name, array in arrays.items() if is_float(array.dtype)}
    if not floats:
        return None
    for name, array in floats.items():
        known[name] = Bounded(array.astype(np.float64), np.zeros(array.shape))
    roundoff = max(
        float(ml_dtypes.finfo(array.dtype).eps) / 2  # type: ignore[no-untyped-call]
        for array in floats.values()
    )
    for node in part.graph.node:
        made = _node(node, known, roundoff)
        if made is None:
            return None
        known[node.output[0]] = made
    return known.get(target)


def _node(node: onnx.NodeProto, known: dict[str, Bounded], roundoff: float) -> Bounded | None:
    given = [known.get(name) for name in node.input]
    inputs = [value for value in given if value is not None]
    if node.domain not in {"", "ai.onnx"} or len(inputs) < len(given) or not inputs:
        return None
    first = inputs[0]
    if node.op_type == "MatMul" and inputs[1].value.ndim == 2:
        return product(first, inputs[1], roundoff)
    if node.op_type == "Gemm":
        return _gemm(node, inputs, roundoff)
    if node.op_type in LIPSCHITZ:
        return activated(node.op_type, first, _exact(node, first), roundoff)
    pairs: dict[str, Callable[..., Bounded]] = {
        "Add": added,
        "Sub": functools.partial(added, sign=-1.0),
        "Mul": multiplied,
    }
    return pairs[node.op_type](first, inputs[1], roundoff) if node.op_type in pairs else None


def _gemm(node: onnx.NodeProto, inputs: list[Bounded], roundoff: float) -> Bounded | None:
    attributes = attribute_values(node)
    if (
        attributes.get("alpha", 1.0) != 1.0
        or attributes.get("beta", 1.0) != 1.0
        or attributes.get("transA", 0)
    ):
        return None
    weight = inputs[1]
    if attributes.get("transB", 0):
        weight = Bounded(weight.value.T, weight.error.T)
    made = product(inputs[0], weight, roundoff)
    return made if len(inputs) < 3 else added(made, inputs[2], roundoff)


def _exact(node: onnx.NodeProto, argument: Bounded) -> np.ndarray:
    x = argument.value
    if node.op_type == "LeakyRelu":
        return np.where(x >= 0, x, float(attribute_values(node).get("alpha", 0.01)) * x)
    if node.op_type == "Sigmoid":
        return np.exp(-np.logaddexp(0, -x))
    functions = {"Abs": np.abs, "Neg": np.negative, "Tanh": np.tanh}
    if node.op_type in functions:
        return np.asarray(functions[node.op_type](x))
    return np.maximum(x, 0) if node.op_type == "Relu" else x
