"""From a torch module to an ONNX model that knows how its weights were initialized."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from onnx import external_data_helper

from onnx_decompose.errors import ModelError, OptionError, OutputError
from onnx_decompose.model.model_io import writing
from onnx_decompose.model.renames import defined_names, renamed
from onnx_decompose.records.init_recorder import InitRecorder, parameter_array
from onnx_decompose.records.object_spec import imported_callable, one_line
from onnx_decompose.records.record_matching import attach_records
from onnx_decompose.records.torch_import import import_torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType
    from typing import Unpack

    import onnx
    import torch

logger = logging.getLogger(__name__)

__all__ = ["ExportOptions", "InitRecorder", "export", "export_factory"]

INLINE_BYTES = 2**31 - 2**20
"""Weights beyond this go to a file of their own: protobuf cannot hold 2 GiB."""

_NOISY_LOGGERS = ("torch", "onnxscript", "onnx_ir")

# The exporter notes the source line behind each node: paths of the machine that exported it.
_MACHINE_METADATA = frozenset({"pkg.torch.onnx.stack_trace"})


class ExportOptions(TypedDict, total=False):
    """Options of :func:`export`.

    Attributes:
        input_names: names of the graph inputs, in order.
        output_names: names of the graph outputs, in order.
        dynamic_shapes: as in ``torch.export.export``: per argument a dict from axis to
            ``torch.export.Dim`` or to a name.
        recorder: made right after the module was constructed; its records go into the model.
        opset: version of the ONNX operator set; by default the one that torch recommends.
    """

    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None
    recorder: InitRecorder | None
    opset: int | None


def export(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | Path | None = None,
    **options: Unpack[ExportOptions],
) -> onnx.ModelProto:
    """Export ``module`` in evaluation mode with torch's current exporter.

    Args:
        module: the trained module; its mode is as before afterwards.
        example_inputs: positional arguments of ``module.forward``.
        path: where to write the model, whole or not at all; None to only return it.
        **options: see :class:`ExportOptions`.

    Returns:
        The model. The records are in its metadata (``onnx_decompose.records.priors.read_records``).

    Raises:
        OptionError: torch is not installed, or an option is unknown or of the wrong type.
        ModelError: torch cannot export the module.
        OutputError: ``path`` cannot be written.
    """
    torch = import_torch("export")
    _check_arguments(torch, module, example_inputs, dict(options))
    with _evaluating(module), _quiet():
        model = _export_proto(torch, module, example_inputs, options)
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key not in _MACHINE_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    recorder = options.get("recorder")
    if recorder is not None:
        parameters = {
            name: parameter_array(name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.is_floating_point()
        }
        matched = attach_records(model, parameters, recorder.records)
        logger.info("attached %d initialization records", len(matched))
    if path is not None:
        _write(model, Path(path))
    return model


def export_factory(
    spec: str,
    output: str | Path,
    *,
    snapshot: str | Path | None = None,
    opset: int | None = None,
) -> onnx.ModelProto:
    """Export what a factory makes: the command ``onnx-decompose export MODULE:FACTORY``.

    The factory takes no arguments and returns ``(module, example_inputs)``, ``(module,
    example_inputs, options)`` with :class:`ExportOptions` as a dict, or a module that has an
    attribute ``example_inputs``.

    Args:
        spec: ``package.module:factory`` or ``path/to/file.py:factory``.
        output: where to write the model, whole or not at all.
        snapshot: where to write the initial weights, if the factory's recorder kept them.
        opset: version of the ONNX operator set, instead of the factory's.

    Returns:
        The model.

    Raises:
        OptionError: the factory cannot be found, raised, or returned something else.
        ModelError: torch cannot export the module.
        OutputError: a path cannot be written.
    """
    import_torch("export")
    if not Path(output).parent.is_dir():  # before a training that may take hours
        raise OutputError(f"{output}: no such folder; make it, or choose another path")
    with imported_callable(spec) as factory:
        try:
            made = factory()
        except (Exception, SystemExit) as error:
            raise OptionError(f"{spec} raised {one_line(error)}") from error
        module, example_inputs, options = _factory_result(spec, made)
        if opset is not None:
            options["opset"] = opset
        recorder = options.get("recorder")
        if snapshot is not None and not isinstance(recorder, InitRecorder):
            raise OptionError(
                f"{spec} returned no recorder, so there is no snapshot; "
                "return {'recorder': InitRecorder(module, snapshot=True)} third"
            )
        model = export(module, example_inputs, **options)
    if snapshot is not None and recorder is not None:
        recorder.save_snapshot(snapshot)
    _write(model, Path(output))
    return model


def _factory_result(
    spec: str, made: object
) -> tuple[torch.nn.Module, tuple[Any, ...], ExportOptions]:
    """Module, example inputs and options out of what a factory returned."""
    torch = import_torch("export")
    if isinstance(made, torch.nn.Module):
        made = (made, getattr(made, "example_inputs", None))
    match made:
        case (torch.nn.Module() as module, tuple() as example_inputs):
            return module, example_inputs, {}
        case (torch.nn.Module() as module, tuple() as example_inputs, dict() as options):
            # export checks them, and names what does not belong.
            return module, example_inputs, cast("ExportOptions", dict(options))
    kinds = [type(part).__name__ for part in (made if isinstance(made, tuple) else (made,))]
    raise OptionError(
        f"{spec} returned ({', '.join(kinds)}); return (module, "
        "example_inputs) or (module, example_inputs, options), with example_inputs a tuple"
    )


def _check_arguments(
    torch: ModuleType, module: object, example_inputs: object, options: dict[str, Any]
) -> None:
    if not isinstance(module, torch.nn.Module):
        raise OptionError(f"export needs a torch.nn.Module, not {type(module).__name__}")
    if not isinstance(example_inputs, tuple):
        raise OptionError(
            f"example_inputs is of type {type(example_inputs).__name__}; give a tuple: (x,)"
        )
    unknown = sorted(options.keys() - ExportOptions.__annotations__.keys())
    if unknown:
        raise OptionError(
            f"export has no option '{unknown[0]}'; "
            f"it has {', '.join(ExportOptions.__annotations__)}"
        )
    recorder = options.get("recorder")
    if recorder is not None and not isinstance(recorder, InitRecorder):
        raise OptionError(f"recorder is of type {type(recorder).__name__}, not InitRecorder")


def _export_proto(
    torch: ModuleType,
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    options: ExportOptions,
) -> onnx.ModelProto:
    opset = options.get("opset")
    inputs, outputs = (
        {f"onnx_decompose.{kind}.{number}": name for number, name in enumerate(names or ())}
        for kind, names in (
            ("input", options.get("input_names")),
            ("output", options.get("output_names")),
        )
    )
    try:
        program = torch.onnx.export(
            module,
            example_inputs,
            dynamo=True,
            verbose=False,
            input_names=list(inputs) or None,
            output_names=list(outputs) or None,
            dynamic_shapes=options.get("dynamic_shapes"),
            opset_version=opset,
        )
    except Exception as error:  # of any kind: from torch, or from the module's own code
        # Torch wraps the cause in pages of general advice.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(
            f"torch cannot export {type(module).__name__}: {one_line(cause)}; "
            "torch.export.export(module, example_inputs) shows where"
        ) from error
    model: onnx.ModelProto = program.model_proto
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if opset is not None and versions.get("") != opset:
        raise OptionError(
            f"torch cannot export {type(module).__name__} to opset {opset}; leave the opset out"
        )
    _give_names(model.graph, {**inputs, **outputs})
    return model


def _give_names(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Call inputs and outputs what was asked for; what else has such a name inside gets another.

    Torch itself gives a name twice, to an output and to a value that happens to be called so, too.

    Args:
        graph: the exported graph.
        names: asked for, by the name that a value has so far.
    """
    taken = set(defined_names(graph)) - names.keys()
    fixed = {tensor.name for tensor in graph.initializer} | {v.name for v in graph.input}
    wanted = list(names.values())
    for name in wanted:
        if wanted.count(name) > 1 or name in fixed:
            raise OptionError(
                f"the name {name!r} was asked for and is also that of another input, output or weight; choose others"
            )
    for name in taken & set(wanted):
        number = 1
        while f"{name}_{number}" in taken or f"{name}_{number}" in wanted:
            number += 1
        names[name] = f"{name}_{number}"
        taken.add(names[name])
    for node in graph.node:
        node.CopyFrom(renamed(node, lambda value: names.get(value, value)))
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; every submodule's own mode comes back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters print, log and warn off the terminal.

    What they print is logged here at DEBUG.
    """
    printed = io.StringIO()
    known = [n for n in logging.root.manager.loggerDict if n.split(".")[0] in _NOISY_LOGGERS]
    noisy = [logging.getLogger(name) for name in {*_NOISY_LOGGERS, *known}]
    levels = [entry.level for entry in noisy]
    try:
        for entry in noisy:
            entry.setLevel(logging.CRITICAL)
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for entry, level in zip(noisy, levels, strict=True):
            entry.setLevel(level)
        for line in printed.getvalue().splitlines():
            logger.debug("torch: %s", line)


def _write(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model``; weights beyond ``INLINE_BYTES`` go to ``<name>.data`` beside it."""
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= INLINE_BYTES:
        with writing(path) as temporary:
            temporary.write_bytes(model.SerializeToString())
        return
    shell = type(model)()
    shell.CopyFrom(model)
    data = path.with_name(f"{path.name}.data")
    external_data_helper.convert_model_to_external_data(shell, location=data.name)
    with (
        writing(path) as temporary,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder,
    ):
        # The helper writes to the location that the tensors name, in a folder that it is given.
        external_data_helper.write_external_data_tensors(shell, folder)
        temporary.write_bytes(shell.SerializeToString())
        with writing(data) as temporary_data:
            Path(folder, data.name).replace(temporary_data)
