"""On a file system that is really full: every output is absent, whole or as before, and a line says why."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import sys
import unittest.mock
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from onnx_decompose.planning.cost import CPU
from onnx_decompose.timing import calibration
from tests.e2e.forked import Run
from tests.e2e.planted import Recipe, plant, save
from tests.e2e.whole_rewrite import rewrite_once

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.usefixtures("quick_bench"),
    pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system, on Linux"),
]

SPLIT = ("--emit", "split", "--force", "--batch", "1", "--quiet")
PAGE = 4096
NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000
PRIVATE = 0x40000 | 0x4000  # MS_PRIVATE, of all mounts below
NOT_ALLOWED = 77

_libc = ctypes.CDLL(None, use_errno=True)


def mount(folder: Path, size: int) -> None:
    """A file system of ``size`` bytes at ``folder``, seen by this process alone; it ends where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(NEW_MOUNTS | (NEW_USERS if user else 0)):
        os._exit(NOT_ALLOWED)
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    failed = _libc.mount(None, b"/", None, PRIVATE, None) or _libc.mount(
        b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()
    )
    if failed:
        os._exit(NOT_ALLOWED)


def state(folder: Path) -> dict[str, str]:
    """What lies in a folder, and its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did on the small file system."""

    code: int
    told: str
    before: dict[str, str]
    after: dict[str, str]

    @property
    def made(self) -> dict[str, str]:
        """Files that are new or others than before."""
        return {
            name: what for name, what in self.after.items() if self.before.get(name) != what
        }


class Disk:
    """A small file system, which a command finds at ``folder``."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "disk"
        self.folder.mkdir()
        self._note = tmp_path / "state.json"

    def run(
        self,
        room: int,
        *arguments: object,
        there: dict[str, bytes] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Outcome:
        """A command with so many pages of room; ``there``: files that are there already."""
        files = there or {}
        before: list[dict[str, str]] = []

        def begin() -> None:
            used = sum(-(-len(content) // PAGE) for content in files.values())
            # Whatever is made needs a page or more; the file system itself has one for each name.
            mount(self.folder, max(used + room, 1) * PAGE)
            for name, content in files.items():
                (self.folder / name).write_bytes(content)
            if not room and not files:
                (self.folder / "filling").write_bytes(bytes(PAGE))
            before.append(state(self.folder))
            if prepare is not None:
                prepare()

        def end() -> None:
            self._note.write_text(json.dumps([before[0], state(self.folder)]))

        code, told = Run(*arguments, prepare=begin, afterwards=end).wait()
        if code == NOT_ALLOWED:
            pytest.skip(
                "this user may not mount a file system, not even in a namespace of its own"
            )
        return Outcome(code, told, *json.loads(self._note.read_text()))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture(scope="module")
def planted() -> onnx.ModelProto:
    return plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model


@pytest.fixture(scope="module")
def wide() -> onnx.ModelProto:
    """Of weights that go outside, also in parts."""
    return plant(Recipe(blocks=((24, 24, 24),) * 3), np.random.default_rng(0)).model


def refused(outcome: Outcome) -> bool:
    """Whether the disk was too full: then there is one line, which says so, and nothing of what was wanted."""
    if outcome.code == 0:
        return False
    assert outcome.code == 2, outcome.told
    (line,) = outcome.told.splitlines()
    assert line.startswith("onnx-decompose: error: ")
    assert "No space left on device" in line
    return True


@pytest.mark.parametrize("external", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_rewrite(
    disk: Disk, wide: onnx.ModelProto, tmp_path: Path, external: bool, replacing: bool
) -> None:
    """From no room at all until it is enough: the output comes as a whole, or what was there stays."""
    source = save(wide, tmp_path / "in.onnx", external=external)
    there: dict[str, bytes] = {}
    if replacing:
        earlier = save(wide, tmp_path / "earlier.onnx", external=external)
        there = {"out.onnx": earlier.read_bytes()}
        if external:
            there["earlier.onnx.data"] = (tmp_path / "earlier.onnx.data").read_bytes()
    refusals = 0
    for room in (0, 1, 3, 5, 7, 9, 12, 16, 24):
        found = disk.run(
            room, "rewrite", source, "-o", disk.folder / "out.onnx", *SPLIT, there=there
        )
        if not refused(found):
            break
        refusals += 1
        assert found.after == found.before
    else:
        pytest.fail("there was room enough")
    assert refusals > 1
    expected = {"out.onnx", "out.onnx.data"} if external else {"out.onnx"}
    assert set(found.made) == expected


@pytest.mark.parametrize("option", ["--report", "--html", "--save-annealed"])
def test_what_comes_beside_the_model(
    disk: Disk, planted: onnx.ModelProto, tmp_path: Path, option: str
) -> None:
    source = save(planted, tmp_path / "in.onnx")
    arguments = ("rewrite", source, "-o", tmp_path / "out.onnx", *SPLIT)
    mine = {"mine": b"what the user has there"}
    found = disk.run(0, *arguments, option, disk.folder / "other", there=mine)
    assert refused(found)
    assert found.after == found.before
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    roomy = disk.run(2000, *arguments, option, disk.folder / "other", there=mine)
    assert not refused(roomy)
    assert set(roomy.made) == {"other"}


def test_analyze(disk: Disk, planted: onnx.ModelProto, tmp_path: Path) -> None:
    source = save(planted, tmp_path / "in.onnx")
    found = disk.run(0, "analyze", source, "--report", disk.folder / "r.json", "--quiet")
    assert refused(found)
    assert found.after == found.before


def test_reproducer(disk: Disk, planted: onnx.ModelProto, tmp_path: Path) -> None:
    """A part of it would be of no use: it is there as a whole or not at all."""
    source = save(planted, tmp_path / "in.onnx")
    wrong = rewrite_once(planted, "split").model
    assert wrong is not None
    next(node for node in wrong.graph.node if node.op_type == "Relu").op_type = "Abs"
    output = save(wrong, tmp_path / "out.onnx")
    command = ("validate", source, output, "--samples", "1", "--report", disk.folder / "r.json")
    for room in (0, 2, 4, 6):
        found = disk.run(room, *command, "--quiet")
        assert refused(found)
        parts = [name for name in found.made if name.startswith("r.reproducer/")]
        assert len(parts) in {0, 4}
        assert found.made.keys() <= {"r.reproducer", *parts}
    found = disk.run(30, *command, "--quiet")
    assert found.code == 1, found.told
    assert {"r.json", "r.reproducer/inputs.npz"} <= set(found.made)


def test_measured_costs(disk: Disk) -> None:
    def prepare() -> None:
        os.environ["XDG_CACHE_HOME"] = str(disk.folder)
        unittest.mock.patch.object(calibration, "calibrate", return_value=CPU).start()

    found = disk.run(0, "calibrate", "--provider", "cpu", "--quiet", prepare=prepare)
    assert refused(found)
    assert not [name for name in found.made if name.endswith(".json")]
