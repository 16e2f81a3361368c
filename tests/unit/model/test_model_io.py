from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.errors import ModelError, OutputError
from onnx_decompose.model import model_io
from onnx_decompose.model.model_io import (
    Model,
    copy_model,
    external_files,
    load_model,
    read_tensor,
    save_model,
    writing,
)

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def matmul(weight: onnx.TensorProto) -> onnx.ModelProto:
    """y = x @ weight."""
    inputs, outputs = weight.dims
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", weight.name], ["y"], "product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(location: str, dims: tuple[int, ...] = (3, 4), **entries: int) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def stored(folder: Path, tensor: onnx.TensorProto, data: dict[str, bytes]) -> Path:
    for name, content in data.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = folder / "m.onnx"
    path.write_bytes(matmul(tensor).SerializeToString())
    return path


def plain() -> onnx.ModelProto:
    return matmul(numpy_helper.from_array(WEIGHT, "w"))


class TestLoading:
    def test_paths_strings_and_models(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(plain().SerializeToString())
        for source in (path, str(path)):
            model = load_model(source)
            assert model.proto == plain()
            assert (model.path, model.folder, model.label) == (path, tmp_path, str(path))
        proto = plain()
        in_memory = load_model(proto)
        assert in_memory.proto is proto
        assert (in_memory.path, in_memory.folder, in_memory.label) == (None, None, "model")

    def test_a_model_in_memory_is_checked_too(self) -> None:
        proto = plain()
        proto.graph.initializer.append(proto.graph.initializer[0])
        with pytest.raises(ModelError, match="two initializers are called 'w'"):
            load_model(proto)

    def test_values_of_an_outer_scope_and_optional_inputs_are_known(self) -> None:
        text = """<ir_version: 8, opset_import: ["" : 17]>
            g (float[n, 3] x, bool flag) => (float[n, 3] y) {
                a = Relu(x)
                c = Clip(a, , )
                y = If(flag) <
                    then_branch = t () => (float[n, 3] p) { p = Neg(c) },
                    else_branch = e () => (float[n, 3] q) { q = Abs(c) }
                >
            }"""
        assert load_model(onnx.parser.parse_model(text)).proto.graph.node


class TestReading:
    @pytest.mark.parametrize(
        "array",
        [
            WEIGHT,
            WEIGHT.astype(np.float16),
            WEIGHT.astype(np.float64),
            WEIGHT.astype(np.int64),
            np.array(1.5, np.float32),
            np.zeros((0, 4), np.float32),
            WEIGHT.astype(ml_dtypes.bfloat16),
        ],
        ids=lambda a: f"{a.dtype}{list(a.shape)}",
    )
    def test_inline(self, array: np.ndarray[Any, Any]) -> None:
        tensor = numpy_helper.from_array(array, "w")
        found = read_tensor(Model(plain()), tensor)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)

    def test_typed_fields(self) -> None:
        tensor = helper.make_tensor("w", TensorProto.FLOAT, [3, 4], WEIGHT.ravel().tolist())
        assert not tensor.HasField("raw_data")
        np.testing.assert_array_equal(read_tensor(Model(plain()), tensor), WEIGHT)

    def test_too_few_typed_values_name_the_tensor(self) -> None:
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4])
        tensor.float_data.extend([1.0] * 11)
        with pytest.raises(ModelError, match="tensor 'w' is broken"):
            read_tensor(Model(plain()), tensor)

    @pytest.mark.parametrize("offset", [0, 1, 4096])
    def test_external_at_an_offset(self, tmp_path: Path, offset: int) -> None:
        tensor = external("w.bin", offset=offset, length=48)
        path = stored(tmp_path, tensor, {"w.bin": bytes(offset) + WEIGHT.tobytes() + b"more"})
        found = read_tensor(load_model(path), tensor)
        np.testing.assert_array_equal(found, WEIGHT)

    def test_external_without_offset_and_length(self, tmp_path: Path) -> None:
        tensor = external("sub/w.bin")
        path = stored(tmp_path, tensor, {"sub/w.bin": WEIGHT.tobytes()})
        np.testing.assert_array_equal(read_tensor(load_model(path), tensor), WEIGHT)

    def test_external_is_not_loaded_until_read_and_cannot_be_written_to(
        self, tmp_path: Path
    ) -> None:
        tensor = external("w.bin", length=48)
        path = stored(tmp_path, tensor, {"w.bin": WEIGHT.tobytes()})
        model = load_model(path)
        assert not model.proto.graph.initializer[0].HasField("raw_data")
        found = read_tensor(model, tensor)
        assert isinstance(found, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            found[0, 0] = 1.0

    def test_a_length_that_contradicts_the_shape(self, tmp_path: Path) -> None:
        tensor = external("w.bin", length=44)
        path = stored(tmp_path, tensor, {"w.bin": WEIGHT.tobytes()})
        with pytest.raises(ModelError, match="tensor 'w'"):
            read_tensor(load_model(path), tensor)

    def test_no_length_and_a_file_shorter_than_the_shape(self, tmp_path: Path) -> None:
        tensor = external("w.bin")
        path = stored(tmp_path, tensor, {"w.bin": WEIGHT.tobytes()[:-4]})
        with pytest.raises(ModelError, match="tensor 'w'"):
            read_tensor(load_model(path), tensor)


class TestExternalFiles:
    def test_those_of_subgraphs_attributes_and_functions_count(self, tmp_path: Path) -> None:
        for name in ("a.bin", "b.bin", "c.bin", "d.bin"):
            (tmp_path / name).write_bytes(WEIGHT.tobytes())
        proto = plain()
        proto.graph.initializer.append(external("a.bin"))
        proto.graph.initializer[-1].name = "a"
        inner = helper.make_graph(
            [], "inner", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [3, 4])]
        )
        inner.initializer.append(external("b.bin"))
        inner.initializer[0].name = "b"
        flag = helper.make_node(
            "Constant", [], ["flag"], value=numpy_helper.from_array(np.array(True))
        )
        choice = helper.make_node(
            "If", ["flag"], ["chosen"], then_branch=inner, else_branch=inner
        )
        constant = helper.make_node("Constant", [], ["c"], value=external("c.bin"))
        proto.graph.node.extend([flag, choice, constant])
        body = [helper.make_node("Constant", [], ["o"], value=external("d.bin"))]
        opsets = [helper.make_opsetid("", 17)]
        proto.functions.append(helper.make_function("f", "F", [], ["o"], body, opsets))
        path = tmp_path / "m.onnx"
        path.write_bytes(proto.SerializeToString())
        found = external_files(load_model(path))
        assert {file.name for file in found} == {"a.bin", "b.bin", "c.bin", "d.bin"}
        (tmp_path / "d.bin").unlink()
        with pytest.raises(ModelError, match=r"d\.bin"):
            load_model(path)


class TestWriting:
    def test_the_file_appears_when_the_block_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        with writing(path) as temporary:
            temporary.write_bytes(b"new")
            assert not path.exists()
        assert path.read_bytes() == b"new"
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_leaves_what_was_there(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        path = tmp_path / "out"
        path.write_bytes(b"old")

        def fail_half_way() -> None:
            with writing(path) as temporary:
                temporary.write_bytes(b"half")
                raise error

        with pytest.raises(error):
            fail_half_way()
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    def test_a_full_disk_is_an_output_error(self, tmp_path: Path) -> None:
        with (
            pytest.raises(OutputError, match="No space left"),
            writing(tmp_path / "out") as temporary,
        ):
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("mask", [0o022, 0o077])
    def test_permissions_are_those_of_any_new_file(self, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            with writing(tmp_path / "out") as temporary:
                temporary.write_bytes(b"")
            assert os.umask(mask) == mask
        finally:
            os.umask(before)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~mask

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="choose another path"), writing(tmp_path / "a/b"):
            pytest.fail("the block must not run")


class TestSaving:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Model:
        (tmp_path / "in").mkdir()
        (tmp_path / "out").mkdir()
        tensor = external("data/w.bin", offset=16, length=48)
        content = bytes(16) + WEIGHT.tobytes()
        return load_model(stored(tmp_path / "in", tensor, {"data/w.bin": content}))

    def test_data_goes_along_under_its_relative_name(
        self, model: Model, tmp_path: Path
    ) -> None:
        target = tmp_path / "out" / "r.onnx"
        save_model(model.proto, target, data_from=model)
        assert (tmp_path / "out/data/w.bin").read_bytes() == bytes(16) + WEIGHT.tobytes()
        found = onnx.load(target)
        np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[0]), WEIGHT)

    def test_data_that_is_no_longer_referred_to_stays_behind(
        self, model: Model, tmp_path: Path
    ) -> None:
        save_model(plain(), tmp_path / "out" / "r.onnx", data_from=model)
        assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["r.onnx"]

    def test_beside_the_original_its_data_is_shared(self, model: Model, tmp_path: Path) -> None:
        before = (tmp_path / "in/data/w.bin").stat()
        save_model(model.proto, tmp_path / "in" / "r.onnx", data_from=model)
        after = (tmp_path / "in/data/w.bin").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_another_file_of_the_data_s_name_is_kept(
        self, model: Model, tmp_path: Path
    ) -> None:
        (tmp_path / "out/data").mkdir()
        (tmp_path / "out/data/w.bin").write_bytes(b"another model's")
        try:
            save_model(model.proto, tmp_path / "out" / "r.onnx", data_from=model)
        except OutputError as error:
            assert "w.bin" in str(error)  # noqa: PT017
            assert not (tmp_path / "out" / "r.onnx").exists()
        assert (tmp_path / "out/data/w.bin").read_bytes() == b"another model's"

    def test_a_copy_has_the_bytes_of_the_file(self, model: Model, tmp_path: Path) -> None:
        assert model.path is not None
        unusual = model.path.read_bytes() + b"\xfa\x3f\x03abc"  # a field that no schema knows
        model.path.write_bytes(unusual)
        copy_model(load_model(model.path), tmp_path / "out" / "c.onnx")
        assert (tmp_path / "out" / "c.onnx").read_bytes() == unusual
        assert (tmp_path / "out/data/w.bin").is_file()

    def test_saving_is_deterministic(self, tmp_path: Path) -> None:
        proto = plain()
        for name in ("a.onnx", "b.onnx"):
            save_model(proto, tmp_path / name, data_from=Model(proto))
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


class TestTheOutputIsWhole:
    """A model and its data at any moment: killed in between, or without space for the rest."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Model:
        (tmp_path / "in").mkdir()
        tensor = external("in.data", (32, 32))
        return load_model(stored(tmp_path / "in", tensor, {"in.data": bytes(4096)}))

    @staticmethod
    def weighted(source: Model, number: float) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(source.proto)
        values = np.full((32, 32), number, np.float32)
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "new"))
        proto.graph.node[0].input[1] = "new"
        return proto

    @staticmethod
    def held(path: Path) -> float:
        model = load_model(path)
        return float(read_tensor(model, model.proto.graph.initializer[0])[0, 0])

    def test_data_of_an_earlier_output_stays_until_the_new_model_is_there(
        self, source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out.onnx"
        save_model(self.weighted(source, 1), output, data_from=source)
        earlier = (tmp_path / "out.onnx").read_bytes()
        seen: list[float] = []

        def replace(temporary: Path, path: Path) -> None:
            if path == output:  # what a run that is killed here leaves
                assert output.read_bytes() == earlier
                seen.append(self.held(output))
            os.replace(temporary, path)

        monkeypatch.setattr(Path, "replace", replace)
        save_model(self.weighted(source, 2), output, data_from=source)
        assert seen == [1]
        assert self.held(output) == 2
        assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == [
            "out.onnx",
            "out.onnx.1.data",
        ]

    def test_the_same_again_changes_nothing(self, source: Model, tmp_path: Path) -> None:
        for _ in range(2):
            save_model(self.weighted(source, 1), tmp_path / "out.onnx", data_from=source)
        assert {file.name for file in tmp_path.iterdir()} == {
            "in",
            "out.onnx",
            "out.onnx.data",
        }

    def test_without_space_for_the_model_its_data_goes_too(
        self, source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match=r"out.onnx: cannot be written \(No space left"):
            save_model(self.weighted(source, 1), tmp_path / "out.onnx", data_from=source)
        assert [file.name for file in tmp_path.iterdir()] == ["in"]

    def test_data_that_another_model_may_read_is_never_replaced(
        self, source: Model, tmp_path: Path
    ) -> None:
        save_model(self.weighted(source, 1), tmp_path / "out.onnx", data_from=source)
        (tmp_path / "out.onnx").rename(tmp_path / "kept.onnx")
        save_model(self.weighted(source, 2), tmp_path / "out.onnx", data_from=source)
        assert self.held(tmp_path / "kept.onnx") == 1
        assert self.held(tmp_path / "out.onnx") == 2


def test_what_clearing_up_left_is_removed_at_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt), model_io.writing(tmp_path / "out.onnx"):
            raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 1
    model_io.remove_temporaries()
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_clearing_up_is_interrupted_goes_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "model.onnx").touch()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model_io.remove_folder(folder)
    assert folder.exists()
    model_io.remove_temporaries()
    assert not folder.exists()
