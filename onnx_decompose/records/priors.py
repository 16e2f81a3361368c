"""What is known of each weight's initialization besides the weight itself.

Three sources, each optional: the records that the exporter put into the model, a snapshot of
the initial weights, and an optimizer's state.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from onnx_decompose.analysis.record import METADATA_KEY, QUANTILE_LEVELS, InitRecord, Prior
from onnx_decompose.errors import ModelError
from onnx_decompose.model.tensors import is_float
from onnx_decompose.records.object_spec import one_line
from onnx_decompose.records.torch_import import import_torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx
    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]

logger = logging.getLogger(__name__)

__all__ = ["prior_for", "read_records", "read_second_moments", "read_snapshot"]

_FAMILIES = frozenset({"normal", "uniform", "constant", "other"})

_MOMENTS = ("exp_avg_sq", "momentum_buffer")


def read_records(model: onnx.ModelProto) -> dict[str, InitRecord]:
    """The initialization records in a model's metadata.

    Returns:
        Record by initializer name; empty where the model was exported without a recorder.

    Raises:
        ModelError: the metadata is not what the exporter writes.
    """
    stored = next((p.value for p in model.metadata_props if p.key == METADATA_KEY), "{}")
    try:
        entries = json.loads(stored)
    except ValueError as error:
        raise ModelError(
            f"metadata '{METADATA_KEY}' is not JSON ({error}); export the model again"
        ) from error
    if not isinstance(entries, dict):
        raise ModelError(f"metadata '{METADATA_KEY}' is not an object; export the model again")
    return {name: _parse_record(name, fields) for name, fields in entries.items()}


def read_snapshot(path: str | Path) -> dict[str, FloatArray]:
    """Initial weights by parameter name, from a safetensors file.

    Types that numpy lacks (bfloat16) come as float32, which holds each of their values exactly.

    Raises:
        ModelError: the file is missing, or not a safetensors file.
    """
    return _read_safetensors(Path(path))


def read_second_moments(path: str | Path) -> dict[str, FloatArray]:
    """Second moments by parameter name, from an optimizer's saved state.

    Reads a safetensors file of arrays named by parameter, or what ``torch.save`` wrote: the
    state dict of an optimizer that was given named parameters, or ``{"optimizer": state_dict,
    "names": [...]}`` with the names in the order that the optimizer got the parameters. Adam's
    ``exp_avg_sq`` is taken, else SGD's ``momentum_buffer``. Only exact zeros mean anything: no
    gradient ever arrived. (Coupled weight decay, ``weight_decay`` of Adam or SGD, counts as
    gradient and leaves no zeros.)

    Raises:
        ModelError: the file is missing or unreadable, or lacks second moments or names.
        OptionError: reading it needs torch, which is not installed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; check the path")
    torch = import_torch(f"reading {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage makes the unpickler raise almost anything
        raise ModelError(
            f"{path}: not a torch file of tensors only ({one_line(error)}); "
            "save an optimizer's state_dict() with torch.save"
        ) from error
    try:
        moments = dict(_named_moments(path, content))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: not an optimizer's state ({one_line(error)}); save its state_dict()"
        ) from error
    if not moments:
        raise ModelError(
            f"{path}: holds no {' or '.join(_MOMENTS)}; "
            "save the state of an optimizer that keeps one, after its first step"
        )
    return moments


def prior_for(
    weight_name: str,
    shape_kn: tuple[int, int],
    transposed: bool,
    *,
    records: Mapping[str, InitRecord] | None = None,
    snapshot: Mapping[str, FloatArray] | None = None,
    second_moments: Mapping[str, FloatArray] | None = None,
) -> Prior:
    """Everything known about one weight, oriented (K inputs, N outputs).

    An array belongs to the weight by its record's parameter name; without a record by an equal
    name, or by the only name that ends with the other's (``module.a.weight`` and
    ``a.weight``). A snapshot's array may also belong by being the only one of the weight's
    shape; a second moment may not, because its zeros remove weights. An array that fits
    several ways belongs to none.

    Args:
        weight_name: the initializer's name.
        shape_kn: (K, N).
        transposed: the initializer is stored as (N, K).
        records: from :func:`read_records`.
        snapshot: from :func:`read_snapshot`.
        second_moments: from :func:`read_second_moments`.
    """
    record = (records or {}).get(weight_name)
    if record is not None and sorted(_matrix_shape(record.shape)) != sorted(shape_kn):
        logger.info("%s: its record is of shape %s; ignored", weight_name, record.shape)
        record = None
    fan_in, fan_out = (record.fan_in, record.fan_out) if record is not None else shape_kn
    # How the torch parameter of a square weight is laid out, where its shape cannot tell.
    outputs_first = transposed != (record is not None and record.transposed)
    name = record.parameter if record is not None else weight_name

    def oriented(arrays: Mapping[str, FloatArray], by_shape: bool) -> FloatArray | None:
        found = _by_name(name, arrays)
        if found is not None:
            return _oriented(found, arrays[found], shape_kn, outputs_first)
        if by_shape and record is None:
            found = _by_shape(name, shape_kn, arrays)
            # Nothing but the shape is known: torch's own layout, (N, K).
            return None if found is None else _oriented(found, arrays[found], shape_kn, True)
        return None

    return Prior(
        fan_in=fan_in,
        fan_out=fan_out,
        record=record,
        snapshot=oriented(snapshot or {}, by_shape=True),
        second_moment=oriented(second_moments or {}, by_shape=False),
    )


def _by_name(name: str, arrays: Mapping[str, FloatArray]) -> str | None:
    """The key of ``arrays`` that means ``name``: equal, or the only one that ends alike."""
    if name in arrays:
        return name
    found = [key for key in arrays if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(found) > 1:
        logger.info("%s: could be any of %s; none taken", name, ", ".join(found))
    return found[0] if len(found) == 1 else None


def _by_shape(
    name: str, shape_kn: tuple[int, int], arrays: Mapping[str, FloatArray]
) -> str | None:
    """The key of the only array with as many inputs and outputs."""
    wanted = sorted(shape_kn)
    found = [
        key for key, array in arrays.items() if sorted(_matrix_shape(array.shape)) == wanted
    ]
    if len(found) == 1:
        logger.info("%s: taken to be '%s', the only array of its shape", name, found[0])
        return found[0]
    if found:
        logger.info("%s: %d arrays have its shape; none taken", name, len(found))
    return None


def _oriented(
    name: str, array: FloatArray, shape_kn: tuple[int, int], outputs_first: bool
) -> FloatArray | None:
    """``array`` as (K, N); a shape tells its layout unless it is square."""
    matrix = array.reshape(_matrix_shape(array.shape))
    inputs, outputs = shape_kn
    if matrix.shape == (outputs, inputs) and (inputs != outputs or outputs_first):
        return matrix.T
    if matrix.shape == shape_kn:
        return matrix
    logger.info("'%s' has shape %s, not %s; not taken", name, array.shape, shape_kn)
    return None


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape as that of a matrix: outputs, and inputs times entries of the kernel."""
    return shape if len(shape) < 3 else (shape[0], math.prod(shape[1:]))


def _parse_record(name: str, fields: Mapping[str, Any]) -> InitRecord:
    try:
        record = InitRecord.from_json(fields)
    except (TypeError, ValueError) as error:
        raise _broken_record(name, one_line(error)) from error
    problem = _record_problem(record)
    if problem is not None:
        raise _broken_record(name, problem)
    return record


def _broken_record(name: str, problem: str) -> ModelError:
    return ModelError(
        f"metadata '{METADATA_KEY}': the record of '{name}' is broken ({problem}); "
        "export the model again"
    )


def _record_problem(record: InitRecord) -> str | None:
    """What is wrong with the values that JSON gave a record; None if nothing is."""
    sizes: list[object] = [*record.shape, record.fan_in, record.fan_out]
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return "a size is not a whole number"
    if record.family not in _FAMILIES:
        return f"the family '{record.family}' is unknown"
    values: list[object] = [record.location, record.scale, *record.quantiles]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return "a value is not a finite number"
    if len(record.quantiles) != len(QUANTILE_LEVELS):
        return f"it has {len(record.quantiles)} quantiles, not {len(QUANTILE_LEVELS)}"
    return None


def _read_safetensors(path: Path) -> dict[str, FloatArray]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; check the path")
    try:
        arrays = safetensors.numpy.load_file(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: not a safetensors file, or a truncated one ({one_line(error)}); "
            "save it again"
        ) from error
    return {
        name: array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)
        for name, array in arrays.items()
        if is_float(array.dtype)
    }


def _named_moments(path: Path, content: object) -> Iterator[tuple[str, FloatArray]]:
    """Name and second moment of every parameter that the optimizer kept one for."""
    names: object = None
    state_dict = content
    if isinstance(content, dict) and "optimizer" in content:
        state_dict, names = content["optimizer"], content.get("names")
    if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
        raise ModelError(f"{path}: holds no optimizer state; save an optimizer's state_dict()")
    labels = _parameter_names(path, state_dict, names)
    for key, values in state_dict["state"].items():
        moment = next((values[m] for m in _MOMENTS if values.get(m) is not None), None)
        if moment is not None:
            yield labels[key], moment.float().numpy()


def _parameter_names(path: Path, state_dict: dict[str, Any], names: object) -> dict[Any, str]:
    """Name by state key, where the keys are numbers."""
    if all(isinstance(key, str) for key in state_dict["state"]):
        return {key: key for key in state_dict["state"]}
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if names is None:
        names = [name for group in groups for name in group.get("param_names", ())]
    if not isinstance(names, list) or len(names) != len(keys):
        raise ModelError(
            f"{path}: the optimizer knows its parameters by number only; save {{'optimizer': "
            "state_dict, 'names': [name for name, _ in module.named_parameters()]}"
        )
    return dict(zip(keys, names, strict=True))
