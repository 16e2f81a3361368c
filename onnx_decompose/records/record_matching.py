"""Attaching initialization records to the ONNX weights that they belong to.

Exporters rename weights (``val_5``, ``onnx::MatMul_109``) and store some of them transposed,
so a weight is recognized by its values; names only settle which of several equal-valued
parameters is meant.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper, numpy_helper

from onnx_decompose.analysis.record import METADATA_KEY, InitRecord
from onnx_decompose.model.tensors import is_float

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

__all__ = ["attach_records", "match_records"]


def attach_records(
    model: onnx.ModelProto,
    parameters: Mapping[str, NDArray[Any]],
    records: Mapping[str, InitRecord],
) -> dict[str, InitRecord]:
    """Write into ``model``'s metadata which record belongs to which initializer.

    Args:
        model: the exported model, changed in place (metadata only).
        parameters: the module's parameters by name, as they were exported.
        records: the records taken at construction, by parameter name then.

    Returns:
        What was attached, by initializer name.
    """
    matched = match_records(model, parameters, records)
    others = {p.key: p.value for p in model.metadata_props if p.key != METADATA_KEY}
    attached = {name: record.to_json() for name, record in matched.items()}
    helper.set_model_props(model, {**others, METADATA_KEY: json.dumps(attached)})
    return matched


def match_records(
    model: onnx.ModelProto,
    parameters: Mapping[str, NDArray[Any]],
    records: Mapping[str, InitRecord],
) -> dict[str, InitRecord]:
    """The record of each initializer whose values are a parameter's, or its transpose's.

    Equal-valued parameters (two zero biases) are ambiguous: the initializer's name decides;
    failing that, their records if they say the same; otherwise the initializer gets none.
    """
    known = _recorded(parameters, records)
    by_value: dict[bytes, list[_Candidate]] = collections.defaultdict(list)
    for name, record in known.items():
        values = parameters[name]
        by_value[_digest(values)].append(_Candidate(name, record))
        if values.ndim == 2:
            transposed = dataclasses.replace(record, transposed=True)
            by_value[_digest(values.T)].append(_Candidate(name, transposed))
    matched: dict[str, InitRecord] = {}
    used: set[str] = set()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        candidates = by_value.get(_digest(values)) if is_float(values.dtype) else None
        if not candidates:
            continue
        used.update(candidate.name for candidate in candidates)
        chosen = _choose(tensor.name, candidates)
        if chosen is not None:
            matched[tensor.name] = chosen
    for name in known:
        if name not in used:
            logger.info(
                "parameter '%s' is no weight of the exported model (folded into another, or "
                "unused); no record attached",
                name,
            )
    return matched


@dataclasses.dataclass(frozen=True, slots=True)
class _Candidate:
    """A parameter whose values an initializer has: its exported name, its record."""

    name: str
    record: InitRecord


def _recorded(
    parameters: Mapping[str, NDArray[Any]], records: Mapping[str, InitRecord]
) -> dict[str, InitRecord]:
    """The record of each parameter, also if the module was wrapped since then."""
    known: dict[str, InitRecord] = {}
    for name, values in parameters.items():
        same_name = [records[name]] if name in records else []
        found = same_name or [
            record
            for recorded, record in records.items()
            if name.endswith(f".{recorded}") or recorded.endswith(f".{name}")
        ]
        if len(found) == 1 and found[0].shape == values.shape:
            known[name] = found[0]
        else:
            logger.info("parameter '%s' was not recorded at construction", name)
    return known


def _choose(name: str, candidates: Sequence[_Candidate]) -> InitRecord | None:
    """The record of the initializer called ``name``; None if there is no telling."""
    named = [candidate for candidate in candidates if candidate.name == name]
    if named:
        candidates = named
    contents = {
        dataclasses.replace(candidate.record, parameter="", transposed=False)
        for candidate in candidates
    }
    if len(contents) > 1:
        logger.info(
            "initializer '%s' equals several parameters (%s) with different initializations; "
            "no record attached",
            name,
            ", ".join(sorted({candidate.name for candidate in candidates})),
        )
        return None
    # A symmetric matrix is its own transpose; the untransposed candidate comes first.
    return candidates[0].record


def _digest(values: NDArray[Any]) -> bytes:
    """Hash of type, shape and bits."""
    digest = hashlib.blake2b(f"{values.dtype.name}{values.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.digest()
