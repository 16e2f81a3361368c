"""What cannot be used is refused with exit code 2, one line that names it, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.e2e.planted import (
    Planted,
    Recipe,
    array_of,
    dense_ffn,
    initializer,
    plant,
    save,
    set_array,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.conftest import Command, Result

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def tree(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Everything below ``folder``, with contents."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (kind, content)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Border:
    """Runs commands in a folder, and expects them to be refused without a trace."""

    command: Command
    folder: Path

    def refuse(self, *arguments: object, names: tuple[str, ...] = (), code: int = 2) -> str:
        before = tree(self.folder)
        result = self.command(*arguments)
        assert result.code == code, result
        line = one_line(result)
        for name in names:
            assert name in line, line
        assert tree(self.folder) == before
        return line

    def refuse_model(self, model: Path, *names: str) -> None:
        """Every command that reads a model refuses it, as the original and as the rewritten one."""
        output = self.folder / "out.onnx"
        good = save(dense_ffn(np.random.default_rng(0)), self.folder / "good.onnx")
        told = (model.name, *names)
        self.refuse("analyze", model, names=told)
        self.refuse("rewrite", model, "-o", output, names=told)
        self.refuse("rewrite", model, "--dry-run", names=told)
        for verb in ("validate", "bench"):
            self.refuse(verb, model, good, names=told)
            self.refuse(verb, good, model, names=told)


def one_line(result: Result) -> str:
    (line,) = result.err.splitlines()
    assert line.startswith("onnx-decompose: error: ")
    assert "Traceback" not in result.out + result.err
    assert len(line) < 700
    return line


@pytest.fixture
def border(command: Command, tmp_path: Path) -> Border:
    return Border(command, tmp_path)


@pytest.fixture
def good(eight: Planted, tmp_path: Path) -> Path:
    return save(eight.model, tmp_path / "model.onnx")


class TestModelFile:
    def test_empty(self, border: Border, tmp_path: Path) -> None:
        (tmp_path / "empty.onnx").touch()
        border.refuse_model(tmp_path / "empty.onnx", "empty")

    def test_missing(self, border: Border, tmp_path: Path) -> None:
        border.refuse_model(tmp_path / "missing.onnx", "no such file")

    def test_folder(self, border: Border, tmp_path: Path) -> None:
        (tmp_path / "folder.onnx").mkdir()
        border.refuse_model(tmp_path / "folder.onnx")

    @pytest.mark.skipif(IS_ROOT, reason="root may read everything")
    def test_unreadable(self, border: Border, good: Path) -> None:
        good.chmod(0)
        try:
            result = border.command("analyze", good)
        finally:
            good.chmod(0o644)
        assert result.code == 2
        assert good.name in one_line(result)

    @pytest.mark.parametrize(
        "content",
        [
            b"\x00garbage",
            b"not an onnx file\n" * 100,
            b"\xff" * 1000,
            b"\x08\x08",
            b"PK\x03\x04" + bytes(200),
            bytes(1000),
            b"{}",
        ],
        ids=["garbage", "text", "ones", "version-only", "zip", "zeros", "json"],
    )
    def test_garbage(self, border: Border, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.onnx").write_bytes(content)
        border.refuse_model(tmp_path / "bad.onnx")

    def test_random_garbage(
        self, border: Border, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        path = tmp_path / "bad.onnx"
        for _ in range(30):
            path.write_bytes(rng.bytes(int(rng.integers(1, 300))))
            border.refuse("rewrite", path, "-o", tmp_path / "o.onnx", names=("bad.onnx",))

    def test_truncated_anywhere(self, border: Border, good: Path, tmp_path: Path) -> None:
        content, cut = good.read_bytes(), tmp_path / "cut.onnx"
        size = len(content)
        ends = {*np.geomspace(1, size - 1, 30).astype(int), size - 2, size - 5}
        ends.update(size * percent // 100 for percent in range(1, 100))
        for end in sorted(ends):
            cut.write_bytes(content[:end])
            border.refuse("rewrite", cut, "-o", tmp_path / "o.onnx", names=("cut.onnx",))

    def test_bit_flips_are_refused_or_survived_but_never_raise(
        self, command: Command, good: Path, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        content, path = good.read_bytes(), tmp_path / "flipped.onnx"
        for _ in range(40):
            damaged = bytearray(content)
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            result = command("rewrite", path, "--dry-run")
            assert result.code in {0, 2}
            if result.code:
                one_line(result)


def damage_nan(model: onnx.ModelProto) -> None:
    values = array_of(model, "down.weight")
    values[3, 2] = np.nan
    set_array(model, "down.weight", values)


def damage_infinite(model: onnx.ModelProto) -> None:
    values = array_of(model, "down.weight")
    values[-1, -1] = -np.inf
    set_array(model, "down.weight", values)


def damage_duplicate(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(initializer(model, "down.weight"))


def damage_dims(model: onnx.ModelProto) -> None:
    initializer(model, "down.weight").dims[0] += 1


def damage_huge_dims(model: onnx.ModelProto) -> None:
    initializer(model, "down.weight").dims[:] = [1 << 40, 1 << 20]


def damage_negative_dims(model: onnx.ModelProto) -> None:
    initializer(model, "down.weight").dims[:] = [-96, -40]


def damage_raw_data(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "down.weight")
    tensor.raw_data = tensor.raw_data[:-1]


def damage_no_data(model: onnx.ModelProto) -> None:
    initializer(model, "down.weight").ClearField("raw_data")


def damage_float_data(model: onnx.ModelProto) -> None:
    """Typed instead of raw data, one value short."""
    tensor = initializer(model, "down.weight")
    values = numpy_helper.to_array(tensor).ravel().tolist()
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values[:-1])


def damage_type(model: onnx.ModelProto) -> None:
    initializer(model, "down.weight").data_type = 999


def damage_bytes(model: onnx.ModelProto) -> None:
    """A weight of bytes that holds fewer than it says."""
    tensor = initializer(model, "down.weight")
    tensor.data_type = onnx.TensorProto.INT8
    tensor.dims[:] = [1 << 40]


TENSOR_DAMAGES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "NaN": damage_nan,
    "infinite": damage_infinite,
    "duplicate": damage_duplicate,
    "dims": damage_dims,
    "huge dims": damage_huge_dims,
    "negative dims": damage_negative_dims,
    "raw data": damage_raw_data,
    "no data": damage_no_data,
    "float data": damage_float_data,
    "unknown type": damage_type,
    "bytes": damage_bytes,
}


class TestTensors:
    @pytest.mark.parametrize("damage", TENSOR_DAMAGES)
    def test_named_and_refused(
        self, border: Border, eight: Planted, tmp_path: Path, damage: str
    ) -> None:
        TENSOR_DAMAGES[damage](eight.model)
        model = save(eight.model, tmp_path / "damaged.onnx")
        told = (model.name, "down.weight")
        border.refuse("analyze", model, names=told)
        border.refuse("rewrite", model, "-o", tmp_path / "o.onnx", names=told)

    def test_nan_in_a_weight_that_is_a_constant_node(
        self, border: Border, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        model = dense_ffn(rng)
        damage_nan(model)
        tensor = initializer(model, "down.weight")
        node = onnx.helper.make_node("Constant", [], ["down.weight"], "stored", value=tensor)
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, node)
        path = save(model, tmp_path / "constant.onnx")
        border.refuse("analyze", path, names=("constant.onnx", "down.weight"))


class TestGraph:
    def test_a_value_that_nothing_makes(
        self, border: Border, eight: Planted, tmp_path: Path
    ) -> None:
        eight.model.graph.node[0].input[0] = "nowhere"
        border.refuse_model(save(eight.model, tmp_path / "g.onnx"), "'up'", "nowhere")

    def test_a_cycle(self, border: Border, eight: Planted, tmp_path: Path) -> None:
        eight.model.graph.node[0].input[0] = "up.active"
        border.refuse_model(save(eight.model, tmp_path / "g.onnx"), "'up'", "up.active")

    def test_an_output_that_nothing_makes(
        self, border: Border, eight: Planted, tmp_path: Path
    ) -> None:
        eight.model.graph.output[0].name = "z"
        border.refuse_model(save(eight.model, tmp_path / "g.onnx"), "'z'")

    def test_a_value_that_is_made_twice(
        self, border: Border, eight: Planted, tmp_path: Path
    ) -> None:
        last = eight.model.graph.node[-1]
        twin = eight.model.graph.node.add(name="twin", op_type="Neg", input=last.input[:1])
        twin.output[:] = last.output
        border.refuse_model(save(eight.model, tmp_path / "g.onnx"), "'twin'", last.output[0])

    def test_an_attribute_of_a_call_outside_of_functions(
        self, border: Border, eight: Planted, tmp_path: Path
    ) -> None:
        attribute = eight.model.graph.node[0].attribute.add(name="axis", type="INT")
        attribute.ref_attr_name = "outer"
        border.refuse_model(save(eight.model, tmp_path / "g.onnx"), "'up'", "'axis'")

    def test_what_only_the_checker_objects_to(
        self, border: Border, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        """A Softmax over an axis that is text: nothing looks at it before the unit spaces do."""
        model = plant(Recipe(), rng).model
        last = model.graph.output[0]
        axis = onnx.helper.make_attribute("axis", "text")
        node = onnx.helper.make_node("Softmax", [last.name], ["softmax"], "soft")
        node.attribute.append(axis)
        model.graph.node.append(node)
        last.name = "softmax"
        path = save(model, tmp_path / "g.onnx")
        border.refuse("analyze", path, names=("g.onnx", "not a valid ONNX model", "axis"))

    def test_no_outputs(self, border: Border, eight: Planted, tmp_path: Path) -> None:
        del eight.model.graph.output[:]
        border.refuse_model(save(eight.model, tmp_path / "g.onnx"))

    def test_no_operator_set(self, border: Border, eight: Planted, tmp_path: Path) -> None:
        del eight.model.opset_import[:]
        border.refuse_model(save(eight.model, tmp_path / "g.onnx"), "operator set")

    def test_a_site_without_its_second_input(
        self, border: Border, eight: Planted, tmp_path: Path
    ) -> None:
        del eight.model.graph.node[0].input[1:]
        border.refuse("analyze", save(eight.model, tmp_path / "g.onnx"), names=("g.onnx", "up"))

    def test_a_weight_that_does_not_fit_its_input(
        self, border: Border, eight: Planted, tmp_path: Path
    ) -> None:
        eight.model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 47
        path = save(eight.model, tmp_path / "g.onnx")
        border.refuse("rewrite", path, "-o", tmp_path / "o.onnx", *SPLIT, names=("g.onnx",))

    def test_models_that_are_not_versions_of_one_another(
        self, border: Border, good: Path, tmp_path: Path
    ) -> None:
        other = save(dense_ffn(np.random.default_rng(1), (48, 20, 41)), tmp_path / "other.onnx")
        for node in (model := onnx.load(other)).graph.node:
            node.output[:] = ["z" if name == "y" else name for name in node.output]
        model.graph.output[0].name = "z"
        save(model, other)
        border.refuse("validate", good, other, names=("other.onnx", "model.onnx", "outputs"))

    def test_rewritten_from_another_model(
        self, border: Border, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        model = onnx.load(pair[0])
        for node in model.graph.node:
            node.name = f"renamed.{node.name}"
        path = save(model, tmp_path / "renamed.onnx")
        border.refuse("validate", path, pair[1], names=("rewritten.onnx", "renamed.onnx"))


class TestExternalData:
    @pytest.fixture
    def external(self, eight: Planted, tmp_path: Path) -> Path:
        (tmp_path / "in").mkdir()
        return save(eight.model, tmp_path / "in" / "model.onnx", external=True)

    @staticmethod
    def point(path: Path, key: str, value: str) -> None:
        """Change an entry of the external data of ``down.weight``."""
        model = onnx.load(path, load_external_data=False)
        for entry in initializer(model, "down.weight").external_data:
            if entry.key == key:
                entry.value = value
        path.write_bytes(model.SerializeToString())

    def refuse(self, border: Border, model: Path, *names: str) -> None:
        told = (model.name, *names)
        border.refuse("analyze", model, names=told)
        border.refuse("rewrite", model, "-o", border.folder / "out.onnx", names=told)

    def test_good(self, command: Command, external: Path, tmp_path: Path) -> None:
        output = tmp_path / "out.onnx"
        assert command("rewrite", external, "-o", output, *SPLIT).code == 0

    def test_missing(self, border: Border, external: Path) -> None:
        (external.parent / "model.onnx.data").unlink()
        self.refuse(border, external, "model.onnx.data", "weight")

    @pytest.mark.parametrize("size", [0, 1, 100, -1])
    def test_too_short(self, border: Border, external: Path, size: int) -> None:
        data = external.parent / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:size])
        self.refuse(border, external, "model.onnx.data")

    def test_parent_folder(self, border: Border, external: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(bytes(100_000))
        self.point(external, "location", "../secret")
        self.refuse(border, external, "down.weight", "../secret")

    def test_parent_folder_in_the_middle(
        self, border: Border, external: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_bytes(bytes(100_000))
        (external.parent / "sub").mkdir()
        self.point(external, "location", "sub/../../secret")
        self.refuse(border, external, "down.weight")

    def test_absolute(self, border: Border, external: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(bytes(100_000))
        self.point(external, "location", str(tmp_path / "secret"))
        self.refuse(border, external, "down.weight")

    def test_link_out_of_the_folder(
        self, border: Border, external: Path, tmp_path: Path
    ) -> None:
        data = external.parent / "model.onnx.data"
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
        self.refuse(border, external, "model.onnx.data")

    def test_empty_location(self, border: Border, external: Path) -> None:
        self.point(external, "location", "")
        self.refuse(border, external, "down.weight")

    def test_a_name_with_a_zero_byte(self, border: Border, external: Path) -> None:
        self.point(external, "location", "model\0data")
        self.refuse(border, external, "down.weight", "zero byte")

    def test_a_name_that_is_not_text(self, border: Border, external: Path) -> None:
        self.point(external, "location", "model.data")
        external.write_bytes(
            external.read_bytes().replace(b"model.data", b"model.\xff\xfe\xff\xfe")
        )
        self.refuse(border, external, "down.weight", "not UTF-8")

    def test_the_data_is_a_folder(self, border: Border, external: Path) -> None:
        (external.parent / "sub").mkdir()
        self.point(external, "location", "sub")
        self.refuse(border, external, "down.weight")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("offset", "-4096"),
            ("offset", "many"),
            ("offset", str(1 << 62)),
            ("length", "8"),
            ("length", "-8"),
            ("length", "1e3"),
        ],
    )
    def test_wrong_range(self, border: Border, external: Path, key: str, value: str) -> None:
        self.point(external, key, value)
        self.refuse(border, external, "down.weight")

    def test_a_shape_past_the_end(self, border: Border, external: Path) -> None:
        """Without a length, the shape says how much is read; 2**62 + 1 numbers are 4 bytes in 64 bits."""
        model = onnx.load(external, load_external_data=False)
        weight = initializer(model, "down.weight")
        weight.dims[:] = [(1 << 62) + 1]
        kept = [entry for entry in weight.external_data if entry.key != "length"]
        del weight.external_data[:]
        weight.external_data.extend(kept)
        external.write_bytes(model.SerializeToString())
        self.refuse(border, external, "down.weight", "past its end")

    def test_another_shape_than_is_stored(self, border: Border, external: Path) -> None:
        model = onnx.load(external, load_external_data=False)
        initializer(model, "down.weight").dims[0] += 1
        external.write_bytes(model.SerializeToString())
        self.refuse(border, external, "down.weight", "declares shape")


class TestOutputs:
    def test_in_a_missing_folder(self, border: Border, good: Path, tmp_path: Path) -> None:
        output = tmp_path / "no" / "such" / "out.onnx"
        border.refuse("rewrite", good, "-o", output, *SPLIT, names=(str(output),))

    def test_the_output_is_a_folder(self, border: Border, good: Path, tmp_path: Path) -> None:
        output = tmp_path / "folder"
        output.mkdir()
        border.refuse("rewrite", good, "-o", output, *SPLIT, names=(str(output),))

    def test_a_file_where_the_folder_should_be(
        self, border: Border, good: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("x")
        output = tmp_path / "file" / "out.onnx"
        border.refuse("rewrite", good, "-o", output, *SPLIT, names=(str(output),))

    @pytest.fixture
    def locked(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "locked"
        folder.mkdir()
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)

    @pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
    def test_unwritable_folder(self, border: Border, good: Path, locked: Path) -> None:
        output = locked / "out.onnx"
        border.refuse("rewrite", good, "-o", output, *SPLIT, names=(str(output),))

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system")
    def test_a_file_system_that_takes_no_files(self, border: Border, good: Path) -> None:
        output = Path("/proc/self/out.onnx")
        border.refuse("rewrite", good, "-o", output, *SPLIT, names=(str(output),))

    @pytest.mark.parametrize("model", ["decomposable", "dense"])
    @pytest.mark.parametrize("how", ["same", "relative", "link", "hard link"])
    def test_the_input_is_never_the_output(
        self,
        border: Border,
        good: Path,
        monkeypatch: pytest.MonkeyPatch,
        model: str,
        how: str,
    ) -> None:
        source = good
        if model == "dense":
            save(dense_ffn(np.random.default_rng(0)), source)
        output: Path = source
        if how == "relative":
            monkeypatch.chdir(source.parent)
            output = Path(source.name)
        elif how == "link":
            output = source.with_name("link.onnx")
            output.symlink_to(source)
        elif how == "hard link":
            output = source.with_name("twin.onnx")
            output.hardlink_to(source)
        border.refuse("rewrite", source, "-o", output, *SPLIT, names=(output.name,))

    @pytest.mark.parametrize("option", ["--report", "--html", "--save-annealed"])
    def test_other_outputs_are_not_the_input_either(
        self, border: Border, good: Path, tmp_path: Path, option: str
    ) -> None:
        arguments = ("-o", tmp_path / "out.onnx", option, good)
        border.refuse("rewrite", good, *arguments, *SPLIT, names=(good.name,))

    @pytest.mark.parametrize("option", ["--report", "--html", "--save-annealed"])
    def test_no_two_outputs_in_one_file(
        self, border: Border, good: Path, tmp_path: Path, option: str
    ) -> None:
        output = tmp_path / "out.onnx"
        border.refuse(
            "rewrite", good, "-o", output, option, output, *SPLIT, names=("out.onnx",)
        )

    @pytest.mark.parametrize("option", ["--report", "--html", "--save-annealed"])
    def test_one_output_that_cannot_be_written_leaves_no_other(
        self, border: Border, good: Path, tmp_path: Path, option: str
    ) -> None:
        missing = tmp_path / "no" / "file"
        arguments = ("-o", tmp_path / "out.onnx", option, missing)
        border.refuse("rewrite", good, *arguments, *SPLIT, names=(str(missing),))

    def test_reports_of_the_other_commands(
        self, border: Border, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        missing = tmp_path / "no" / "r.json"
        border.refuse("analyze", pair[0], "--report", missing, names=(str(missing),))
        for verb in ("validate", "bench"):
            border.refuse(verb, *pair, "--report", missing, names=(str(missing),))

    def test_reports_do_not_replace_models(
        self, border: Border, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        original = save(onnx.load(pair[0]), tmp_path / "original.onnx")
        rewritten = save(onnx.load(pair[1]), tmp_path / "rewritten.onnx")
        border.refuse("analyze", original, "--report", original, names=("original.onnx",))
        for verb in ("validate", "bench"):
            border.refuse(verb, original, rewritten, "--report", rewritten)

    def test_rewrite_without_any_output(self, border: Border, good: Path) -> None:
        border.refuse("rewrite", good, names=("-o",))

    def test_external_data_is_not_written_over_a_stranger_s(
        self, command: Command, eight: Planted, tmp_path: Path
    ) -> None:
        """The input's data file keeps its bytes when the output lies in the same folder."""
        model = save(eight.model, tmp_path / "model.onnx", external=True)
        data = (tmp_path / "model.onnx.data").read_bytes()
        before = model.read_bytes()
        assert command("rewrite", model, "-o", tmp_path / "out.onnx", *SPLIT).code == 0
        assert (tmp_path / "model.onnx.data").read_bytes() == data
        assert model.read_bytes() == before


class TestInputs:
    """``--calibration`` of rewrite, ``--inputs`` of validate and bench."""

    @pytest.fixture
    def refuse(
        self, border: Border, pair: tuple[Path, Path], tmp_path: Path
    ) -> Callable[[Path, str], None]:
        def check(data: Path, told: str) -> None:
            names = (data.name, told)
            output = tmp_path / "out.onnx"
            border.refuse(
                "rewrite", pair[0], "-o", output, "--calibration", data, *SPLIT, names=names
            )
            for verb in ("validate", "bench"):
                border.refuse(verb, *pair, "--inputs", data, names=names)

        return check

    def test_missing_file(self, refuse: Callable[[Path, str], None], tmp_path: Path) -> None:
        refuse(tmp_path / "none.npz", "no such file")

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04broken", bytes(500)])
    def test_broken(
        self, refuse: Callable[[Path, str], None], tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "bad.npz").write_bytes(content)
        refuse(tmp_path / "bad.npz", "numpy")

    def test_truncated(self, refuse: Callable[[Path, str], None], tmp_path: Path) -> None:
        np.savez(tmp_path / "cut.npz", x=np.ones((8, 18), np.float32))
        content = (tmp_path / "cut.npz").read_bytes()
        for end in (10, len(content) // 2, len(content) - 10):
            (tmp_path / "cut.npz").write_bytes(content[:end])
            refuse(tmp_path / "cut.npz", "numpy")

    def test_pickles_are_not_run(
        self, refuse: Callable[[Path, str], None], tmp_path: Path
    ) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "trapped",))

        np.savez(tmp_path / "objects.npz", x=np.array([Trap()], dtype=object))
        refuse(tmp_path / "objects.npz", "Python objects")
        (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap()))
        refuse(tmp_path / "raw.npz", "numpy")
        assert not (tmp_path / "trapped").exists()

    def test_missing_input(self, refuse: Callable[[Path, str], None], tmp_path: Path) -> None:
        np.savez(tmp_path / "data.npz", other=np.ones((8, 18), np.float32))
        refuse(tmp_path / "data.npz", "'x'")

    @pytest.mark.parametrize(
        ("array", "told"),
        [
            (np.ones((8, 17), np.float32), "(8, 17)"),
            (np.ones((18,), np.float32), "(18,)"),
            (np.ones((0, 18), np.float32), "empty"),
            (np.full((8, 18), np.nan, np.float32), "NaN"),
            (np.full((8, 18), "text"), "float32"),
            (np.ones((8, 18), np.complex64), "float32"),
        ],
        ids=["width", "rank", "empty", "NaN", "strings", "complex"],
    )
    def test_arrays_that_do_not_fit(
        self,
        refuse: Callable[[Path, str], None],
        tmp_path: Path,
        array: np.ndarray[Any, Any],
        told: str,
    ) -> None:
        np.savez(tmp_path / "data.npz", x=array)
        refuse(tmp_path / "data.npz", told)

    def test_labels_of_another_length(
        self, refuse: Callable[[Path, str], None], tmp_path: Path
    ) -> None:
        np.savez(tmp_path / "data.npz", x=np.ones((8, 18), np.float32), label=np.ones(7))
        refuse(tmp_path / "data.npz", "'label'")

    def test_empty_folder(self, refuse: Callable[[Path, str], None], tmp_path: Path) -> None:
        (tmp_path / "inputs").mkdir()
        refuse(tmp_path / "inputs", ".npz")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (("--null", "nonsense"), "nonsense"),
            (("--null", "normal"), "normal"),
            (("--null", "normal:0"), "positive"),
            (("--null", "normal:-1"), "positive"),
            (("--null", "normal:x"), "'x'"),
            (("--null", "normal:nan"), "finite"),
            (("--null", "uniform:"), "uniform"),
            (("--null", "snapshot:"), "snapshot"),
            (("--null", "snapshot:none.safetensors"), "none.safetensors"),
            (("--null", "optimizer:none.pt"), "none.pt"),
            (("--null-config", "none.toml"), "none.toml"),
            (("--criterion", "nonsense"), "nonsense"),
            (("--criterion", "ksigma:x"), "ksigma:x"),
            (("--criterion", "ksigma:-1"), "ksigma:-1"),
            (("--alpha", "0"), "alpha"),
            (("--alpha", "1"), "alpha"),
            (("--alpha", "nan"), "alpha"),
            (("--alpha", "x"), "--alpha"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
    )
    @pytest.mark.parametrize("verb", ["analyze", "rewrite"])
    def test_evidence(
        self, border: Border, good: Path, verb: str, options: tuple[str, ...], told: str
    ) -> None:
        output = ("-o", border.folder / "out.onnx") if verb == "rewrite" else ()
        border.refuse(verb, good, *output, *options, names=(told,))

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (("--budget", "-0.1"), "budget"),
            (("--budget", "nan"), "budget"),
            (("--budget", "x"), "--budget"),
            (("--batch", "0"), "batch"),
            (("--batch", "1,,2"), "--batch"),
            (("--batch", "many"), "--batch"),
            (("--batch", ""), "--batch"),
            (("--emit", "magic"), "--emit"),
            (("--provider", "tpu"), "--provider"),
            (("--seed", "x"), "--seed"),
            (("--seed", "-1"), "seed"),
            (("--metric", "a:b"), "--calibration"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
    )
    def test_rewrite(
        self, border: Border, good: Path, options: tuple[str, ...], told: str
    ) -> None:
        output = border.folder / "out.onnx"
        border.refuse("rewrite", good, "-o", output, *options, names=(told,))

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (("--samples", "0"), "--samples"),
            (("--samples", "x"), "--samples"),
            (("--rtol", "-1"), "rtol"),
            (("--atol", "nan"), "atol"),
            (("--budget", "-1"), "budget"),
            (("--seed", "-1"), "seed"),
            (("--provider", "tpu"), "--provider"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
    )
    def test_validate(
        self,
        border: Border,
        pair: tuple[Path, Path],
        options: tuple[str, ...],
        told: str,
    ) -> None:
        border.refuse("validate", *pair, *options, names=(told,))

    @pytest.mark.parametrize("batch", ["0", "-1", "x", ""])
    def test_bench(self, border: Border, pair: tuple[Path, Path], batch: str) -> None:
        border.refuse("bench", *pair, "--batch", batch, names=("batch",))

    @pytest.mark.parametrize(
        "arguments",
        [(), ("x.onnx", "y.onnx"), ("x.onnx", "--output"), ("x.onnx", "-o", "a", "b")],
        ids=str,
    )
    def test_wrong_arguments(self, border: Border, arguments: tuple[str, ...]) -> None:
        border.refuse("rewrite", *arguments)


def test_an_input_whose_size_cannot_be_made_up_is_told_apart(
    border: Border, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A planted model with an input of unknown rank: the message says to give real inputs."""
    planted = plant(Recipe(blocks=((6, 12, 5),) * 2), rng)
    planted.model.graph.input[0].type.tensor_type.ClearField("shape")
    model = save(planted.model, tmp_path / "rank.onnx")
    line = border.refuse("rewrite", model, "-o", tmp_path / "out.onnx", *SPLIT, names=("'x'",))
    assert "--calibration" in line or "real inputs" in line
