"""Evidence for every site: the asked null, put together with what the model and the user's files say."""

from __future__ import annotations

import fnmatch
import logging
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_decompose.analysis.evidence import Evidence, gather_evidence
from onnx_decompose.errors import ModelError, OptionError
from onnx_decompose.priors import prior_for, read_records, read_second_moments, read_snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx_decompose.analysis.record import InitRecord
    from onnx_decompose.model_io import Model
    from onnx_decompose.options import Options
    from onnx_decompose.sites import Site
    from onnx_decompose.study import Study

logger = logging.getLogger(__name__)

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
    asked = null or options.null
    kind, _, file = asked.partition(":")
    if kind in {"snapshot", "optimizer"} and not file:
        raise OptionError(f"null {asked!r}: name the file, as in {kind}:FILE")
    snapshot = read_snapshot(Path(file)) if kind == "snapshot" else None
    moments = read_second_moments(Path(file)) if kind == "optimizer" else None
    if kind in {"snapshot", "optimizer"}:
        asked = kind
    records = _records(study.model)
    globs = {} if null or options.null_config is None else read_null_config(options.null_config)
    evidence: dict[str, Evidence] = {}
    for site in study.sites:
        prior = prior_for(
            site.tensor,
            site.shape,
            site.transposed,
            records=records,
            snapshot=snapshot,
            second_moments=moments,
        )
        spec = _configured(site, globs) or asked
        evidence[site.name] = gather_evidence(study.weight(site), spec, prior)
    return evidence


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


def _configured(site: Site, globs: Mapping[str, str]) -> str | None:
    """The null of the first glob that matches the site's tensor or node."""
    for pattern, spec in globs.items():
        if fnmatch.fnmatchcase(site.tensor, pattern) or fnmatch.fnmatchcase(site.name, pattern):
            return spec
    return None
