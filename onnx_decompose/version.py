"""The version of this package, as installed."""

import importlib.metadata

__all__ = ["VERSION"]

VERSION = importlib.metadata.version("onnx-decompose")
