"""Evidence for every site: the asked null, put together with what the model and the user's files say."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_decompose.analysis.evidence import Evidence, gather_evidence
from onnx_decompose.analysis.record import Prior
from onnx_decompose.errors import ModelError, OptionError
from onnx_decompose.graph.recurrent import RecurrentWeight
from onnx_decompose.graph.sites import Site
from onnx_decompose.records.priors import (
    prior_for,
    read_records,
    read_second_moments,
    read_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from onnx_decompose.analysis.record import InitRecord
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.options import Options

    FloatArray = NDArray[np.floating[Any]]

logger = logging.getLogger(__name__)

_SCALE_FREE = {"zero", "auto", "empirical"}
"""Nulls that do not depend on the unit of a weight: that of a MatMulInteger is known after the product alone."""

__all__ = ["gather_all", "read_null_config"]


def gather_all(study: Study, options: Options, null: str | None = None) -> dict[str, Evidence]:
    """Evidence of each site by name.

    Args:
        study: the model.
        options: where the null comes from.
        null: used instead of the options' null for every site, whatever the configuration file says.

    Raises:
        OptionError: the null is not understood.
        InputError: a file it names cannot be read.
    """
    files = _Files()
    asked = files.read(null or options.null)
    globs = {} if null or options.null_config is None else read_null_config(options.null_config)
    configured = {pattern: files.read(spec) for pattern, spec in globs.items()}
    records = _records(study.model)
    evidence: dict[str, Evidence] = {}
    for site in study.weights:
        source = _configured(site, configured) or asked
        stepwise = isinstance(site, Site) and site.op_type == "MatMulInteger"
        if stepwise and source.spec not in _SCALE_FREE:
            logger.info("%s: %s says nothing of integers: null zero", site.name, source.spec)
            source = _Source("zero")
        if isinstance(site, RecurrentWeight):
            prior, channels = _recurrent_prior(site, source.spec), site.gates
        else:
            channels = 1
            prior = prior_for(
                site.tensor,
                site.shape,
                site.transposed,
                records=records,
                snapshot=source.snapshot,
                second_moments=source.second_moments,
            )
            if prior.record is None and site.taps > 1:
                # Initializers count a convolution's kernel on both sides.
                prior = dataclasses.replace(prior, fan_out=prior.fan_out * site.taps)
        found = gather_evidence(study.weight(site), source.spec, prior)
        evidence[site.name] = dataclasses.replace(found, channels=channels)
    return evidence


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A null as the analysis takes it, and the arrays of the file that it names."""

    spec: str
    snapshot: Mapping[str, FloatArray] | None = None
    second_moments: Mapping[str, FloatArray] | None = None


class _Files:
    """Snapshot and optimizer files by the null that names them, each read once."""

    def __init__(self) -> None:
        self._read: dict[str, _Source] = {}

    def read(self, null: str) -> _Source:
        """The null ``snapshot:FILE``, ``optimizer:FILE``, or one without a file."""
        if null not in self._read:
            self._read[null] = self._source(null)
        return self._read[null]

    def _source(self, null: str) -> _Source:
        kind, _, file = null.partition(":")
        if kind not in {"snapshot", "optimizer"}:
            return _Source(null)
        if not file:
            raise OptionError(f"null {null!r}: name the file, as in {kind}:FILE")
        if kind == "snapshot":
            return _Source(kind, snapshot=read_snapshot(Path(file)))
        return _Source(kind, second_moments=read_second_moments(Path(file)))


def _records(model: Model) -> dict[str, InitRecord]:
    """The init records that the model carries; a broken one is an error that names the file."""
    try:
        return read_records(model.proto)
    except ModelError as error:
        raise ModelError(f"{model.label}: {error}") from error


def read_null_config(path: Path) -> dict[str, str]:
    """The table ``[nulls]`` of a TOML file: a glob of weight or node names, and its null.

    Raises:
        OptionError: the file cannot be read, or holds anything else.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: is not TOML ({error})") from error
    nulls = content.get("nulls")
    if not isinstance(nulls, dict) or not all(isinstance(spec, str) for spec in nulls.values()):
        raise OptionError(
            f'{path}: has no table [nulls] of lines such as "encoder.*" = "normal:0.02"'
        )
    return nulls


def _recurrent_prior(weight: RecurrentWeight, spec: str) -> Prior:
    """What is known of a recurrent weight: its shape alone.

    Frameworks order the gates in other ways than the ONNX standard, so no record, snapshot or optimizer state is taken
    to be in this weight's order.
    """
    inputs, outputs = weight.shape
    # torch draws all weights of its recurrent modules from U(-1/sqrt(H), 1/sqrt(H)), H the hidden size.
    return Prior(fan_in=weight.hidden if spec == "torch" else inputs, fan_out=outputs)


def _configured(site: Site | RecurrentWeight, globs: Mapping[str, _Source]) -> _Source | None:
    """The null of the first glob that matches the site's tensor or node."""
    for pattern, source in globs.items():
        if fnmatch.fnmatchcase(site.tensor, pattern) or fnmatch.fnmatchcase(site.name, pattern):
            return source
    return None
