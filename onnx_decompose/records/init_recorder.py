"""Recording a torch module's initialization, before training moves it.

The record is what evidence later takes as the null distribution (Jin, arXiv 2601.15871, section
3): family, location, scale and a quantile sketch per parameter, a kilobyte each instead of the
whole initial weight.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from scipy import stats

from onnx_decompose.analysis.record import QUANTILE_LEVELS, InitRecord
from onnx_decompose.errors import ModelError, OptionError
from onnx_decompose.model.model_io import writing
from onnx_decompose.records.torch_import import import_torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

__all__ = ["InitRecorder", "fit_family", "parameter_array", "record_initialization"]

SKETCH_ENTRIES = 2**20
"""Entries that location, scale and quantiles are taken from; a larger tensor is sampled."""

TEST_ENTRIES = 2**14
"""Entries that goodness of fit is tested on.

More would reject a family for the rounding of bfloat16 alone.
"""

FIT_LEVEL = 1e-3
"""Level of the Kolmogorov-Smirnov test below which no family is named."""


class InitRecorder:
    """The initialization of every floating-point parameter of a module.

    Make it right after the module is constructed and before anything changes its parameters::

        module = make_module()
        recorder = InitRecorder(module)
        train(module)
        export(module, example_inputs, "model.onnx", recorder=recorder)

    Attributes:
        records: per parameter name its record; a tied parameter has one, under its first name.
    """

    def __init__(self, module: torch.nn.Module, *, snapshot: bool = False) -> None:
        """Record ``module`` as it is now.

        Args:
            module: the freshly constructed module.
            snapshot: keep a copy of every initial value too, for :meth:`save_snapshot`.

        Raises:
            ModelError: a parameter has no values yet (lazy or meta), or some are not finite.
        """
        rng = np.random.default_rng(0)
        self.records: dict[str, InitRecord] = {}
        self._snapshot: dict[str, NDArray[Any]] | None = {} if snapshot else None
        for name, values, (fan_in, fan_out) in _parameters(module):
            self.records[name] = record_initialization(name, values, fan_in, fan_out, rng=rng)
            if self._snapshot is not None:
                self._snapshot[name] = values.copy()
        logger.info("recorded the initialization of %d parameters", len(self.records))

    def save_snapshot(self, path: str | Path) -> None:
        """Write the initial values as safetensors, keyed by parameter name.

        Raises:
            OptionError: the recorder was made without ``snapshot=True``.
            OutputError: ``path`` cannot be written.
        """
        if self._snapshot is None:
            raise OptionError(
                "the recorder kept no snapshot; make InitRecorder(module, snapshot=True)"
            )
        with writing(Path(path)) as temporary:
            # Not save_file, which puts a file that only its owner can read in the place of this one.
            temporary.write_bytes(safetensors.numpy.save(self._snapshot))


def record_initialization(
    parameter: str,
    values: NDArray[Any],
    fan_in: int,
    fan_out: int,
    *,
    rng: np.random.Generator,
) -> InitRecord:
    """The record of one parameter.

    Args:
        parameter: its torch name.
        values: its initial values, of any floating-point type and any shape but an empty one.
        fan_in: inputs that one unit sums over.
        fan_out: units that one input feeds.
        rng: draws the entries to look at where there are more than ``SKETCH_ENTRIES``.

    Raises:
        ModelError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ModelError(
            f"parameter '{parameter}' holds NaN or infinite values; "
            "make the recorder after it is initialized"
        )
    entries = _draw(values.reshape(-1), SKETCH_ENTRIES, rng).astype(np.float64)
    bounds = float(values.min()), float(values.max())
    family, location, scale = fit_family(entries, bounds, rng=rng)
    return InitRecord(
        parameter=parameter,
        shape=tuple(values.shape),
        family=family,
        location=_short(location),
        scale=_short(scale),
        quantiles=tuple(_short(q) for q in np.quantile(entries, QUANTILE_LEVELS)),
        fan_in=fan_in,
        fan_out=fan_out,
    )


def fit_family(
    entries: NDArray[np.float64],
    bounds: tuple[float, float],
    *,
    rng: np.random.Generator,
) -> tuple[str, float, float]:
    """The family that a parameter's entries were drawn from.

    The likelier of normal and uniform, each at its maximum likelihood (Dumonceaux, Antle and
    Haas, 1973), unless a Kolmogorov-Smirnov test of at most ``TEST_ENTRIES`` entries rejects
    it at ``FIT_LEVEL``. Location and scale are estimated from the entries themselves, which
    makes the test conservative: a true family is rejected less often than the level says.

    Args:
        entries: (n,) entries, or a sample of them.
        bounds: smallest and largest of all entries.
        rng: draws the entries to test.

    Returns:
        Family, location and scale as in :class:`onnx_decompose.analysis.record.InitRecord`. The
        uniform half width is the unbiased one: (n + 1) / (n - 1) times half the range.
    """
    low, high = bounds
    if low == high:
        return "constant", low, 0.0
    count = entries.size
    mean, deviation = float(entries.mean()), float(entries.std())
    if deviation == 0:  # a few odd entries in a constant, and the sample missed them
        return "other", mean, deviation
    centre, half_range = (low + high) / 2, (high - low) / 2
    # Log-likelihoods per entry: -log(2a), and -log(s sqrt(2 pi e)).
    if -math.log(2 * half_range) >= -math.log(deviation * math.sqrt(2 * math.pi * math.e)):
        half_width = half_range * (count + 1) / (count - 1)
        family, location, scale = "uniform", centre, half_width
        null = stats.uniform(centre - half_width, 2 * half_width)
    else:
        family, location, scale = "normal", mean, deviation
        null = stats.norm(mean, deviation)
    tested = _draw(entries, TEST_ENTRIES, rng)
    if stats.kstest(tested, null.cdf).pvalue < FIT_LEVEL:
        return "other", mean, deviation
    return family, location, scale


def parameter_array(name: str, parameter: torch.Tensor) -> NDArray[Any]:
    """A parameter's values: a view of them where they are on the CPU and contiguous.

    Raises:
        ModelError: the parameter has no values (lazy or meta).
    """
    torch = import_torch("reading a parameter")
    if parameter.is_meta or torch.nn.parameter.is_lazy(parameter):
        raise ModelError(
            f"parameter '{name}' has no values yet; materialize the module first "
            "(a lazy one by running it once)"
        )
    tensor = parameter.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        # Numpy has no bfloat16 of its own: the same bits, read as ml_dtypes' type.
        bits: NDArray[Any] = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _parameters(
    module: torch.nn.Module,
) -> Iterator[tuple[str, NDArray[Any], tuple[int, int]]]:
    """Name, values, fan-in and fan-out of every floating-point parameter that has entries."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            values = parameter_array(name, parameter)
            if values.size:
                yield name, values, _fans(module, name, values.shape)


def _fans(module: torch.nn.Module, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Fan-in and fan-out by torch's convention: (outputs, inputs, *kernel).

    A bias has those of the weight that it belongs to, because initializations draw it by that
    weight's fan-in; another vector or scalar acts entry by entry, so 1 and 1.
    """
    owner, _, local = name.rpartition(".")
    if len(shape) < 2 and "bias" in local:
        weight = getattr(module.get_submodule(owner), local.replace("bias", "weight"), None)
        shape = tuple(getattr(weight, "shape", shape))
    if len(shape) < 2:
        return 1, 1
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def _draw(entries: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[Any]:
    """``count`` distinct entries, one drawn from each of as many equal stretches.

    A fixed stride could fall on one column of a matrix.
    """
    if entries.size <= count:
        return entries
    bounds = np.linspace(0, entries.size, count + 1).astype(np.int64)
    return entries[rng.integers(bounds[:-1], bounds[1:])]


def _short(value: float) -> float:
    """Nine significant digits tell every float32 apart, and keep the model's metadata small."""
    return float(f"{value:.9g}")
