"""Running a model in onnxruntime, on the provider that was asked for and on no other.

The only module that imports onnxruntime, and only when a session is wanted: analysis works
without it. A CUDA session never falls back to the CPU provider silently: the CPU provider is
not listed, onnxruntime's own fallback is disabled, and the session's providers are read back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import importlib
import itertools
import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar

import numpy as np
from onnx import TensorProto, helper

from onnx_decompose.errors import (
    DataError,
    ModelError,
    OptionError,
    ProviderError,
    interruption,
)
from onnx_decompose.model.tensors import BFLOAT16, TensorSpec, tensor_dtype
from onnx_decompose.runtime.runtime_faults import unsafe_optimizers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    from numpy.typing import NDArray

__all__ = [
    "ModelSource",
    "Provider",
    "ProviderName",
    "Session",
    "SessionSettings",
    "model_label",
    "open_session",
    "resolve_provider",
]

logger = logging.getLogger(__name__)

ProviderName = Literal["auto", "cpu", "cuda"]
ModelSource = bytes | str | os.PathLike[str]
"""A serialized model, or the path of one."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

_FATAL_ONLY = 4
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_GRAPH_ID = "gpu_graph_id"
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_TRIAL = f"""
import pathlib, sys, numpy, onnxruntime
model, trials, folder, *unsafe = sys.argv[1:]
onnxruntime.set_default_logger_severity({_FATAL_ONLY})
options = onnxruntime.SessionOptions()
if folder:
    options.add_session_config_entry("{_DATA_FOLDER}", folder)
content = pathlib.Path(model).read_bytes() if folder else model
session = onnxruntime.InferenceSession(
    content, options, providers=["CPUExecutionProvider"], disabled_optimizers=set(unsafe)
)
names = [value.name for value in session.get_inputs()]
feeds = {{}}
for path in sorted(pathlib.Path(trials).glob("*.npy")):
    number, index, _ = path.name.split(".")
    feeds.setdefault(number, {{}})[names[int(index)]] = numpy.load(path)
for trial in feeds.values():
    try:
        session.run(None, trial)
    except Exception:
        pass
"""


class _NodeArg(Protocol):
    name: str
    type: str
    shape: list[int | str | None]


class _SessionOptions(Protocol):
    log_severity_level: int
    graph_optimization_level: object
    intra_op_num_threads: int
    use_deterministic_compute: bool

    def add_session_config_entry(self, key: str, value: str) -> None: ...
    def add_external_initializers(self, names: list[str], values: list[_OrtValue]) -> None: ...


class _OrtValue(Protocol):
    @classmethod
    def ortvalue_from_numpy(
        cls, array: NDArray[Any], device: str, device_id: int
    ) -> _OrtValue: ...
    @classmethod
    def ortvalue_from_numpy_with_onnx_type(
        cls, array: NDArray[Any], onnx_type: int
    ) -> _OrtValue: ...
    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: tuple[int, ...], onnx_type: int, device: str, device_id: int
    ) -> _OrtValue: ...
    def update_inplace(self, array: NDArray[Any]) -> None: ...
    def numpy(self) -> NDArray[Any]: ...
    def shape(self) -> list[int]: ...
    def data_ptr(self) -> int: ...


class Provider(enum.StrEnum):
    """Where a session runs; the value is what the command line and the report call it."""

    CPU = "cpu"
    CUDA = "cuda"

    @property
    def execution_provider(self) -> str:
        """The name in onnxruntime, such as ``CUDAExecutionProvider``."""
        return f"{self.name}ExecutionProvider"


@dataclasses.dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a session runs.

    Attributes:
        tf32: let CUDA round float32 products to TF32 (about 1e-3 relative).
        optimize: onnxruntime's graph optimizations; off to run the graph as it is written.
        threads: threads within one operator; onnxruntime's choice by default.
        cuda_graph: on CUDA, capture the kernels of a bound run and launch them as one graph from then on; needs
            a model without control flow, and :meth:`Session.bind`.
        prepack: let onnxruntime keep weights in a layout of its own: faster, but a copy in memory, where the weights of
            a model with external data are otherwise mapped from their file.
        layouts: let onnxruntime turn convolutions into ones on another layout: faster on a CPU, but their weights and
            the ones in that layout are held, mapped or not.
        rounds: let onnxruntime round activations to 8 bits where a product's weight alone is quantized (about 5e-3
            relative), as it does by default.
        deterministic: ask for kernels that give the same bytes every time, where a provider has a choice.
    """

    tf32: bool = False
    optimize: bool = True
    threads: int | None = None
    cuda_graph: bool = False
    prepack: bool = True
    layouts: bool = True
    rounds: bool = True
    deterministic: bool = False


def resolve_provider(name: ProviderName, *, model: ModelSource | None = None) -> Provider:
    """The provider to run on.

    Args:
        name: ``cpu``, ``cuda``, or ``auto``: CUDA where a session can really be created on it.
        model: with ``auto``, a model that must run on CUDA as a whole for CUDA to be chosen
            (one with nodes that have no CUDA kernel goes to the CPU, which the log says).

    Raises:
        OptionError: another name.
        ProviderError: onnxruntime is not installed, or ``cuda`` cannot run here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f"provider {name!r} is unknown; choose auto, cpu or cuda")
    onnxruntime = _onnxruntime()
    if name == "cpu":
        return Provider.CPU
    if name == "cuda":
        _require_cuda()
        return Provider.CUDA
    if Provider.CUDA.execution_provider not in onnxruntime.get_available_providers():
        return Provider.CPU
    try:
        _require_cuda()
        if model is not None:
            open_session(model, Provider.CUDA)
    except ProviderError as error:
        logger.info("provider auto: running on the CPU, because %s", error)
        return Provider.CPU
    return Provider.CUDA


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A model loaded in onnxruntime; made by :func:`open_session`.

    Attributes:
        inputs: what :meth:`run` must be given.
        outputs: what it returns.
        provider: where it runs.
        label: what messages call the model.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provider: Provider
    label: str
    _session: Any = dataclasses.field(repr=False)
    _reopen: functools.partial[Session] = dataclasses.field(repr=False)
    _graphs: Iterator[int] | None = dataclasses.field(default=None, repr=False)

    def reopen(self) -> Session:
        """The same model loaded once more, into other memory."""
        return self._reopen()

    def close(self) -> None:
        """Free the model's memory: nothing can be run any more, whoever else holds the session."""
        object.__setattr__(self, "_session", None)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs for one set of inputs, by name.

        Raises:
            DataError: an input is missing.
            ModelError: onnxruntime cannot run the model on these inputs.
        """
        self._check_names(feeds)
        names = [spec.name for spec in self.outputs]
        if all(spec.dtype != BFLOAT16 for spec in (*self.inputs, *self.outputs)):
            arrays = self._call(self._session.run, names, dict(feeds))
            return {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}
        values = {name: _ort_value(array) for name, array in feeds.items()}
        results = self._call(self._session.run_with_ort_values, names, values)
        return {
            spec.name: _to_numpy(value, spec.dtype)
            for spec, value in zip(self.outputs, results, strict=True)
        }

    def survives(self, trials: Sequence[Mapping[str, NDArray[Any]]]) -> bool:
        """Whether runs on made-up inputs, in a process of their own, do not end that process.

        On sizes that its author never saw, a model can make native code divide by zero. That ends the process without
        a word; all other errors are for :meth:`run` to raise.

        Args:
            trials: sets of inputs, of types that numpy's files can hold (others are taken to be harmless).
        """
        model, options = self._reopen.args[0], self._reopen.keywords
        plain = all(array.dtype.kind in "biuf" for feeds in trials for array in feeds.values())
        if options.get("weights") or not plain:
            return True
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx" if isinstance(model, bytes) else Path(model)
            if isinstance(model, bytes):
                path.write_bytes(model)
            for number, feeds in enumerate(trials):
                for name, array in feeds.items():
                    target = Path(folder) / f"{number}.{self._names.index(name)}.npy"
                    np.save(target, array, allow_pickle=False)
            data_folder = str(options.get("data_folder") or "")
            unsafe = sorted(unsafe_optimizers(path))
            command = [sys.executable, "-c", _TRIAL, str(path), folder, data_folder, *unsafe]
            done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode < 0:
            logger.info("%s: onnxruntime ended with signal %d", self.label, -done.returncode)
        return done.returncode >= 0

    @property
    def _names(self) -> list[str]:
        return [spec.name for spec in self.inputs]

    def bind(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """A call that runs once on inputs that already lie on the device, for timing.

        Inputs are copied to the device here; outputs stay on it. The call returns when the
        device is done.

        Raises:
            DataError: an input is missing.
            ModelError: (also from the call) onnxruntime cannot run the model on these inputs.
        """
        self._check_names(feeds)
        binding = self._session.io_binding()
        for name, array in feeds.items():
            value = _ort_value(array, self.provider)
            self._call(binding.bind_ortvalue_input, name, value)
        for spec in self.outputs:
            device = "cpu" if spec.dtype == object else self.provider.value
            self._call(binding.bind_output, spec.name, device)

        options = None if self._graphs is None else self._captured(binding, next(self._graphs))

        def run_once() -> None:
            self._call(self._session.run_with_iobinding, binding, options)
            binding.synchronize_outputs()

        return run_once

    def _captured(self, binding: Any, number: int) -> object:
        """Run options under which ``binding`` is captured as CUDA graph ``number``; its outputs get fixed addresses.

        A captured graph is replayed at the addresses and shapes of its first run, so each binding has its own.
        """
        onnxruntime = _onnxruntime()
        plain = onnxruntime.RunOptions()
        plain.add_run_config_entry(_GRAPH_ID, "-1")  # only to learn the outputs' shapes
        self._call(self._session.run_with_iobinding, binding, plain)
        for spec, value in zip(self.outputs, binding.get_outputs(), strict=True):
            self._call(binding.bind_ortvalue_output, spec.name, value)
        options: object = onnxruntime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, str(number))  # type: ignore[attr-defined]
        return options

    def _check_names(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        missing = [spec.name for spec in self.inputs if spec.name not in feeds]
        if missing:
            raise DataError(
                f"{self.label}: input {missing[0]!r} has no data; give an array for it"
            )

    def _call(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # onnxruntime's errors share no base class
            raise ModelError(f"{self.label}: {_reason(error)}") from error


def open_session(
    model: ModelSource,
    provider: Provider,
    settings: SessionSettings | None = None,
    *,
    label: str | None = None,
    data_folder: Path | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> Session:
    """Load a model for running.

    Threads never spin while they wait: sessions in one process would disturb each other.

    Args:
        model: serialized bytes, or a path.
        provider: where to run, from :func:`resolve_provider`.
        settings: how to run it.
        label: what messages call the model; its path by default.
        data_folder: where the external data of a model given as bytes lies.
        weights: initializers that the model declares as external data and that are given here instead, not copied.

    Raises:
        ModelError: the model cannot be loaded.
        ProviderError: the provider is missing, or cannot run every node of this model.
    """
    onnxruntime = _onnxruntime()
    label = label or model_label(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(f"{label}: no such file; give the path of an ONNX model")
    settings = settings or SessionSettings()
    options = _session_options(onnxruntime, provider, settings)
    if data_folder is not None and isinstance(model, bytes):
        options.add_session_config_entry(_DATA_FOLDER, str(data_folder))
    if weights:
        values = [_ort_value(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    cuda = _cuda_options(settings) if provider is Provider.CUDA else {}
    source = model if isinstance(model, bytes) else os.fspath(model)
    without: dict[str, set[str]] = {}
    if provider is Provider.CPU and settings.optimize:
        unsafe = unsafe_optimizers(model if isinstance(model, bytes) else Path(model))
        if unsafe:
            logger.info("%s: loaded without %s, which would end the process", label, *unsafe)
            without = {"disabled_optimizers": unsafe}
    try:
        session = onnxruntime.InferenceSession(
            source,
            options,
            providers=[(provider.execution_provider, cuda)],
            enable_fallback=False,
            **without,
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise _load_error(error, label, provider) from error
    if provider.execution_provider not in session.get_providers():
        raise ProviderError(
            f"{label}: provider {provider} was asked for, but onnxruntime runs on "
            f"{', '.join(session.get_providers())}; check the driver and the CUDA libraries"
        )
    return Session(
        inputs=tuple(_spec(arg, label) for arg in session.get_inputs()),
        outputs=tuple(_spec(arg, label) for arg in session.get_outputs()),
        provider=provider,
        label=label,
        _session=session,
        _reopen=functools.partial(
            open_session,
            model,
            provider,
            settings,
            label=label,
            data_folder=data_folder,
            weights=weights,
        ),
        _graphs=itertools.count(1) if "enable_cuda_graph" in cuda else None,
    )


def model_label(model: ModelSource) -> str:
    """What messages call a model: its path, or ``model`` for bytes."""
    return "model" if isinstance(model, bytes) else os.fspath(model)


@functools.cache
def _onnxruntime() -> ModuleType:
    """The module, quiet: what goes wrong is reported by the error that it raises.

    Raises:
        ProviderError: it is not there, or cannot be loaded.
        BaseException: whatever interrupted the loading.
    """
    # Since 1.32 it sends what it is used for to its makers, if that is not turned off before it is loaded.
    os.environ.setdefault(_NO_TELEMETRY, "1")
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise ProviderError(
                "onnxruntime is not installed; install onnx-decompose[cpu] or onnx-decompose[cuda]"
            ) from error
        stopped = interruption(error)
        if stopped is not None:
            raise stopped from None
        raise ProviderError(
            f"onnxruntime cannot be loaded ({error}); install it again, or another version"
        ) from error
    module.set_default_logger_severity(_FATAL_ONLY)
    return module


def _session_options(
    onnxruntime: ModuleType, provider: Provider, settings: SessionSettings
) -> _SessionOptions:
    options: _SessionOptions = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    levels = onnxruntime.GraphOptimizationLevel
    level = levels.ORT_ENABLE_ALL if settings.layouts else levels.ORT_ENABLE_EXTENDED
    options.graph_optimization_level = level if settings.optimize else levels.ORT_DISABLE_ALL
    options.use_deterministic_compute = settings.deterministic
    if not settings.prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not settings.rounds:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if provider is Provider.CUDA:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _cuda_options(settings: SessionSettings) -> dict[str, str]:
    options = {"use_tf32": str(int(settings.tf32))}
    if settings.cuda_graph:
        options["enable_cuda_graph"] = "1"
    return options


def _require_cuda() -> None:
    """Create a session of one node on CUDA, or say why that is not possible."""
    onnxruntime = _onnxruntime()
    available = onnxruntime.get_available_providers()
    if Provider.CUDA.execution_provider not in available:
        raise ProviderError(
            f"provider cuda: the installed onnxruntime {onnxruntime.__version__} offers only "
            f"{', '.join(available)}; uninstall it and install onnx-decompose[cuda]"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        open_session(_probe_model(), Provider.CUDA, label="probe")
    except (ModelError, ProviderError) as error:
        raise ProviderError(
            "provider cuda: no session can be created on it; check nvidia-smi and that the "
            f"CUDA and cuDNN libraries fit onnxruntime {onnxruntime.__version__} ({error})"
        ) from error


def _probe_model() -> bytes:
    value = functools.partial(
        helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[4]
    )
    node = helper.make_node("Add", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "probe", [value("x")], [value("y")])
    opset = helper.make_opsetid("", 13)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return bytes(model.SerializeToString())


def _load_error(error: Exception, label: str, provider: Provider) -> Exception:
    reason = _reason(error)
    if "assigned to the default CPU EP" in reason:
        return ProviderError(
            f"{label}: some nodes have no CUDA kernel, onnxruntime would run them on the "
            "CPU; use --provider cpu for this model"
        )
    if "Could not find an implementation" in reason:
        # Such as products in bfloat16 on the CPU.
        return ModelError(
            f"{label}: {reason}; onnxruntime has no such kernel on this provider: use another one, or convert "
            "the model to float32"
        )
    if provider is Provider.CUDA and "CUDA" in reason:
        return ProviderError(f"{label}: {reason}")
    return ModelError(f"{label}: {reason}")


_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
# A source position, and the C++ signature that builds with full paths print behind it.
_POSITION = re.compile(
    r"\S+\.(?:cc|cpp|cu|cuh|h|hpp):\d+ (?:[^()]*::[^()]*\([^()]*\)(?: const)? )?"
)


def _reason(error: Exception) -> str:
    """The first line of onnxruntime's message, without error codes and C++ positions."""
    text = _PREFIX.sub("", str(error)).strip() or type(error).__name__
    line = _POSITION.sub("", text.splitlines()[0]).strip()
    return textwrap.shorten(line, 240, placeholder=" ...")


def _spec(arg: _NodeArg, label: str) -> TensorSpec:
    matched = re.fullmatch(r"tensor\((\w+)\)", arg.type)
    dtype = tensor_dtype(matched[1]) if matched else None
    if dtype is None:
        raise ModelError(
            f"{label}: {arg.name!r} is a {arg.type}, which cannot be run and compared"
        )
    shape = tuple(None if isinstance(d, int) and d < 0 else d for d in arg.shape)
    return TensorSpec(arg.name, dtype, shape)


def _ort_value(array: NDArray[Any], provider: Provider = Provider.CPU) -> _OrtValue:
    value_type: type[_OrtValue] = _onnxruntime().OrtValue
    array = np.asarray(array, order="C")
    if array.dtype != BFLOAT16:
        device = "cpu" if array.dtype == object else provider.value
        return value_type.ortvalue_from_numpy(array, device, 0)
    # numpy has no bfloat16 that onnxruntime knows: it travels as raw 16-bit words.
    words = array.view(np.uint16)
    onnx_type = TensorProto.BFLOAT16
    if provider is Provider.CPU:
        return value_type.ortvalue_from_numpy_with_onnx_type(words, onnx_type)
    value = value_type.ortvalue_from_shape_and_type(array.shape, onnx_type, provider.value, 0)
    value.update_inplace(words)
    return value


def _to_numpy(value: _OrtValue, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Copy an output from host memory; onnxruntime has no numpy type for bfloat16."""
    if dtype != BFLOAT16:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    words = np.empty(shape, np.uint16)
    if words.size:
        ctypes.memmove(words.ctypes.data, value.data_ptr(), words.nbytes)
    return words.view(dtype)
