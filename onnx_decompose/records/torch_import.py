"""The one place that imports torch: everything else works without it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from onnx_decompose.errors import OptionError, interruption

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["import_torch"]


def import_torch(purpose: str) -> ModuleType:
    """The torch package.

    Args:
        purpose: what cannot be done without it, for the message.

    Raises:
        OptionError: torch is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        stopped = interruption(error)
        if stopped is not None:
            raise stopped from None
        raise OptionError(
            f'{purpose} needs torch ({error}); pip install "onnx-decompose[export]"'
        ) from error
