"""Which files the commands open, in C++ too: every one that a model leads to lies in the model's folder.

    python -m tools.trace_opens

Models whose external data lies in their folder, and ones that point out of it (a path with ``..``, an absolute path,
a link; in an initializer, a body, a Constant, a sparse tensor), go through ``analyze``, ``rewrite``, ``validate`` and
``bench`` under strace (Linux). Each line tells the exit code and what was opened outside the model's folder, but for
the system's own files and the installation; the exit code is 1 where there is such a file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.e2e.inner_graphs import branch
from tests.e2e.planted import Recipe, plant, save

if TYPE_CHECKING:
    from collections.abc import Callable

_RUN = "from onnx_decompose.cli import main; main()"
_OPENED = re.compile(r'open(?:at2?)?\([^"]*"([^"]+)"[^)]*\) = \d')
_SYSTEM = tuple(
    os.path.realpath(place)
    for place in (
        *("/dev", "/etc", "/lib", "/lib64", "/proc", "/sys", "/usr"),
        *(sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])),
        str(Path.home() / ".cache"),
    )
)
PLACES: dict[str, str] = {
    "inside": "data.bin",
    "up": "../secret.bin",
    "absolute": "{outside}/secret.bin",
    "link": "link.bin",
}


def with_initializer(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    """Beside the model's own."""
    tensor.name = "stranger"
    model.graph.initializer.append(tensor)
    model.graph.node.append(helper.make_node("Identity", ["stranger"], ["unused"]))


def with_constant(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    """As the value of a node."""
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def with_body(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    """In the branch of an If."""
    model.CopyFrom(branch(model))
    (body,) = (a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    tensor.name = "stranger"
    body.initializer.append(tensor)
    body.node.append(helper.make_node("Identity", ["stranger"], ["unused"]))


def with_sparse(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    """As the values of a sparse tensor."""
    tensor.name = "stranger"
    places = numpy_helper.from_array(np.arange(16), "places")
    sparse = onnx.SparseTensorProto(values=tensor, indices=places, dims=[16])
    model.graph.sparse_initializer.append(sparse)


FORMS: dict[str, Callable[[onnx.ModelProto, onnx.TensorProto], None]] = {
    "initializer": with_initializer,
    "constant": with_constant,
    "body": with_body,
    "sparse": with_sparse,
}


def stored_at(location: str) -> onnx.TensorProto:
    """A tensor of 16 numbers in a file."""
    tensor = onnx.TensorProto(
        dims=[16], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def opened(folder: Path, *arguments: object) -> tuple[int, set[Path]]:
    """The exit code of a command, and the files that it opened but those of the system and the installation."""
    log = folder.parent / "trace"
    command = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file", "-o", str(log)]
    command += [sys.executable, "-c", _RUN, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    found: set[Path] = set()
    for line in log.read_text("utf-8", "replace").splitlines():
        match = _OPENED.search(line)
        if match is None:
            continue
        path = Path(os.path.realpath(folder / match.group(1)))
        if not path.is_dir() and not str(path).startswith(_SYSTEM):
            found.add(path)
    return done.returncode, found


def main() -> None:
    """Run everything, and say what was opened."""
    model = plant(Recipe(blocks=((6, 12, 6),) * 8), np.random.default_rng(0)).model
    outside_opened = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        for form, put in FORMS.items():
            for place, location in PLACES.items():
                folder = root / f"{form}.{place}" / "model"
                folder.mkdir(parents=True)
                for file in (folder / "data.bin", folder.parent / "secret.bin"):
                    file.write_bytes(bytes(64))
                (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
                made = onnx.ModelProto()
                made.CopyFrom(model)
                put(made, stored_at(location.format(outside=folder.parent)))
                path, other = folder / "m.onnx", save(model, folder / "other.onnx")
                path.write_bytes(made.SerializeToString())
                for command in (
                    ("analyze", path),
                    ("rewrite", path, "-o", folder / "o.onnx", "--force", "--batch", "1"),
                    ("validate", other, path, "--samples", "1"),
                    ("bench", path, path, "--batch", "1"),
                ):
                    code, files = opened(folder, *command)
                    allowed = (folder, Path(tempfile.gettempdir()) / "tmp")
                    outside = {
                        f for f in files if not str(f).startswith(tuple(map(str, allowed)))
                    }
                    outside |= {f for f in files if f.name == "secret.bin"}
                    outside_opened += len(outside)
                    told = ", ".join(sorted(map(str, outside))) or "nothing outside"
                    print(f"{form:12} {place:9} {command[0]:9} exit {code}: {told}", flush=True)
    print(f"{outside_opened} files outside the model's folder were opened")
    sys.exit(bool(outside_opened))


if __name__ == "__main__":
    main()
