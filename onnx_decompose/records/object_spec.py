"""Objects named on the command line as ``MODULE:NAME``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_decompose.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any

__all__ = ["imported_callable", "one_line"]


@contextlib.contextmanager
def imported_callable(spec: str) -> Iterator[Callable[..., Any]]:
    """The callable that ``spec`` names.

    ``MODULE`` is a dotted module name or the path of a ``.py`` file; ``NAME`` may be dotted
    too. For the duration of the block modules are also looked for in the file's folder (for a
    dotted name: in the current one), so call it inside.

    Raises:
        OptionError: no such module, file or attribute; not callable; or importing it raised.
    """
    module_name, separator, name = spec.rpartition(":")
    if not separator or not module_name or not name:
        raise OptionError(
            f"'{spec}' is not MODULE:NAME; write package.module:function or file.py:function"
        )
    is_file = module_name.endswith(".py")
    folder = Path(module_name).resolve().parent if is_file else Path.cwd()
    with _importable(folder):
        module = _import_file(Path(module_name)) if is_file else _import_module(module_name)
        found: Any = module
        for part in name.split("."):
            if not hasattr(found, part):
                raise OptionError(f"{module_name} has no '{name}'; it has {_callables(module)}")
            found = getattr(found, part)
        if not callable(found):
            raise OptionError(f"{spec} is of type {type(found).__name__}, not a function")
        yield found


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {lines[0][:200]}" if lines else kind


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Look for modules in ``folder`` too: a console script does not even look where the user is."""
    before = list(sys.path)
    sys.path.insert(0, os.fspath(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise OptionError(
                f"no module '{name}'; run this where the module is, or give a .py file"
            ) from error
        raise OptionError(f"importing {name} raised {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise OptionError(f"importing {name} raised {one_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"{path}: no such file; check the path")
    # Under a name of its own: a file called json.py must not replace the json module.
    name = f"_onnx_decompose_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise OptionError(f"importing {path} raised {one_line(error)}") from error
    return module


def _callables(module: ModuleType) -> str:
    """The functions and classes that a module defines itself."""
    names = [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(names[:10]) or "no function"
