"""Real text that is on every machine: the docstrings of Python's own library and of installed packages."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["docstrings", "library_docstrings", "package_docstrings"]

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "_vendor", "vendored"}


def library_docstrings(shortest: int = 40) -> Iterator[tuple[str, str]]:
    """(file, text) of Python's library but its tests, in a fixed order; ``shortest`` in characters."""
    return docstrings(Path(sysconfig.get_paths()["stdlib"]), shortest)


def package_docstrings(package: str, shortest: int = 40) -> Iterator[tuple[str, str]]:
    """The same of an installed package; nothing where it is not installed."""
    root = Path(sysconfig.get_paths()["purelib"])
    return docstrings(root / package, shortest, root)


def docstrings(
    folder: Path, shortest: int, root: Path | None = None
) -> Iterator[tuple[str, str]]:
    """(file relative to ``root``, text) of the files below ``folder``; nothing is imported."""
    root = root or folder
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT.intersection(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others' code: escapes that are none
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                text = ast.get_docstring(node) or ""
                if len(text) >= shortest:
                    yield "/".join(parts), text
