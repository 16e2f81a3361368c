"""Whose fault an unexpected error is: the model's, where ONNX itself does not call it valid.

Models that the checker refuses are read all the same, since many of them run; only where one leads to an error that
nobody foresaw is the checker asked, so that the user is told what is wrong with the model. What it finds nothing
against is a defect of onnx-decompose, and goes on as such.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import onnx

from onnx_decompose.errors import DecomposeError, ModelError
from onnx_decompose.model.shapes import skeleton

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx_decompose.model.model_io import Model

__all__ = ["blaming"]


@contextlib.contextmanager
def blaming(*models: Model) -> Iterator[None]:
    """Turn an unexpected error of the block into one that names the model which is not valid.

    Raises:
        ModelError: one of the models is not valid, or needs more memory than there is.
    """
    try:
        yield
    except DecomposeError:
        raise
    except MemoryError as error:
        label = " and ".join(model.label for model in models)
        raise ModelError(
            f"{label}: needs more memory than there is; check the sizes that it declares"
        ) from error
    except Exception as error:
        for model in models:
            objection = _objection(model)
            if objection is not None:
                raise ModelError(
                    f"{model.label}: not a valid ONNX model ({objection}); export it again"
                ) from error
        raise


def _objection(model: Model) -> str | None:
    """What ``onnx.checker`` has against a model; None if nothing."""
    try:
        onnx.checker.check_model(skeleton(model.proto), full_check=True)
    except Exception as error:  # the checker's, protobuf's, or that of a value that has no text
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0][:200] if lines else type(error).__name__
    return None
