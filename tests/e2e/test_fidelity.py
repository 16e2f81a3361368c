"""What a rewrite does not touch comes out exactly as it went in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.model.external_data import set_entry
from tests.e2e.planted import (
    Planted,
    Recipe,
    array_of,
    dense_ffn,
    found_partition,
    plant,
    run,
    save,
)
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")
REGION = {"up", "up.add", "up.relu", "down", "down.add"}
REPLACED = {"up.weight", "up.bias", "down.weight", "down.bias"}


def serialized(messages: Iterable[Any]) -> list[bytes]:
    return [message.SerializeToString(deterministic=True) for message in messages]


@pytest.fixture
def rich(eight: Planted) -> onnx.ModelProto:
    """The planted network inside a model that has everything a model can have."""
    model, graph = eight.model, eight.model.graph
    for node in graph.node:
        for position, name in enumerate(node.output):
            node.output[position] = "ffn" if name == "y" else name
    rng = np.random.default_rng(5)
    scale = numpy_helper.from_array(rng.normal(size=40).astype(np.float32), "scale")
    scale.doc_string = "a scale"
    graph.initializer.append(scale)
    unused = numpy_helper.from_array(np.arange(3, dtype=np.int64), "unused")
    graph.initializer.append(unused)
    overridable = numpy_helper.from_array(np.array(0.5, np.float32), "overridable")
    graph.initializer.append(overridable)
    graph.input.append(helper.make_tensor_value_info("overridable", TensorProto.FLOAT, []))
    graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["scaled"], [f"{op}.out"], f"inner.{op}")],
            f"branch.{op}",
            [],
            [helper.make_tensor_value_info(f"{op}.out", TensorProto.FLOAT, None)],
        )
        for op in ("Tanh", "Sigmoid")
    ]
    graph.node.extend(
        [
            helper.make_node("Mul", ["ffn", "scale"], ["scaled"], "scaling"),
            helper.make_node(
                "If",
                ["flag"],
                ["chosen"],
                "choice",
                then_branch=branch[0],
                else_branch=branch[1],
            ),
            helper.make_node("Half", ["chosen"], ["halved"], "half", domain="local"),
            helper.make_node("Mul", ["halved", "overridable"], ["y"], "last"),
        ]
    )
    for node in graph.node:
        node.doc_string = f"doc of {node.name}"
        node.metadata_props.add(key="origin", value=node.name)
    half = helper.make_function(
        "local",
        "Half",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["two"], value_float=2.0),
            helper.make_node("Div", ["a", "two"], ["b"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    model.functions.append(half)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.producer_name, model.producer_version = "someone", "1.2.3"
    model.domain, model.model_version, model.doc_string = "org.example", 42, "about the model"
    model.metadata_props.add(key="author", value="nobody")
    graph.name, graph.doc_string = "a graph", "about the graph"
    graph.input[0].doc_string = "rows of 48 features"
    graph.metadata_props.add(key="graph key", value="graph value")
    graph.value_info.append(
        helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["batch", 40])
    )
    training = model.training_info.add()
    training.algorithm.name = "training"
    onnx.checker.check_model(model)
    return model


@pytest.fixture
def rewritten(command: Command, rich: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    source, output = save(rich, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    result = command("rewrite", source, "-o", output, *SPLIT)
    assert result.code == 0, result.err
    assert result.last_line.startswith("rewritten: ")
    return onnx.load(output)


class TestProtos:
    def test_it_was_rewritten_and_is_valid(
        self, rich: onnx.ModelProto, rewritten: onnx.ModelProto
    ) -> None:
        assert len(found_partition(rewritten, "up")) == 8
        onnx.checker.check_model(rewritten, full_check=True)
        names = [node.name for node in rewritten.graph.node]
        assert len(set(names)) == len(names)
        assert {node.domain for node in rewritten.graph.node} == {"", "local"}
        assert rich.graph.node[0].name not in names

    def test_nodes(self, rich: onnx.ModelProto, rewritten: onnx.ModelProto) -> None:
        kept = [node for node in rich.graph.node if node.name not in REGION]
        names = {node.name for node in kept}
        after = [node for node in rewritten.graph.node if node.name in names]
        assert serialized(after) == serialized(kept)

    def test_initializers(self, rich: onnx.ModelProto, rewritten: onnx.ModelProto) -> None:
        kept = [t for t in rich.graph.initializer if t.name not in REPLACED]
        names = {tensor.name for tensor in kept}
        after = [t for t in rewritten.graph.initializer if t.name in names]
        assert serialized(after) == serialized(kept)
        assert not REPLACED & {tensor.name for tensor in rewritten.graph.initializer}

    def test_inputs_outputs_and_value_info(
        self, rich: onnx.ModelProto, rewritten: onnx.ModelProto
    ) -> None:
        assert serialized(rewritten.graph.input) == serialized(rich.graph.input)
        assert serialized(rewritten.graph.output) == serialized(rich.graph.output)
        assert rewritten.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert set(serialized(rich.graph.value_info)) <= set(
            serialized(rewritten.graph.value_info)
        )

    def test_model_fields(self, rich: onnx.ModelProto, rewritten: onnx.ModelProto) -> None:
        for field in (
            "ir_version",
            "producer_name",
            "producer_version",
            "domain",
            "model_version",
            "doc_string",
        ):
            assert getattr(rewritten, field) == getattr(rich, field), field
        for field in ("opset_import", "functions", "training_info"):
            assert serialized(getattr(rewritten, field)) == serialized(getattr(rich, field))
        assert rewritten.graph.name == "a graph"
        assert rewritten.graph.doc_string == "about the graph"
        assert serialized(rewritten.graph.metadata_props) == serialized(
            rich.graph.metadata_props
        )

    def test_model_metadata_only_grows(
        self, rich: onnx.ModelProto, rewritten: onnx.ModelProto
    ) -> None:
        before = {entry.key: entry.value for entry in rich.metadata_props}
        after = {entry.key: entry.value for entry in rewritten.metadata_props}
        assert before.items() <= after.items()
        assert all(key.startswith("onnx_decompose.") for key in after.keys() - before.keys())

    def test_copies_of_nodes_keep_doc_and_metadata(self, rewritten: onnx.ModelProto) -> None:
        copies = [node for node in rewritten.graph.node if node.op_type == "MatMul"]
        assert len(copies) == 16
        for node in copies:
            origin = {entry.key: entry.value for entry in node.metadata_props}["origin"]
            assert origin in {"up", "down"}
            assert node.doc_string == f"doc of {origin}"

    def test_outputs_also_when_an_initializer_is_overridden(
        self, rich: onnx.ModelProto, rewritten: onnx.ModelProto
    ) -> None:
        import onnxruntime  # noqa: PLC0415

        rng = np.random.default_rng(6)
        feeds = {"x": rng.normal(size=(3, 48)).astype(np.float32), "flag": np.array(True)}
        for extra in ({}, {"overridable": np.array(-3, np.float32)}):
            outputs = []
            for model in (rich, rewritten):
                session = onnxruntime.InferenceSession(
                    model.SerializeToString(), providers=["CPUExecutionProvider"]
                )
                outputs.append(np.asarray(session.run(["y"], {**feeds, **extra})[0]))
            np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)

    def test_rewriting_the_result_again_changes_nothing(
        self, command: Command, rewritten: onnx.ModelProto, tmp_path: Path
    ) -> None:
        source = save(rewritten, tmp_path / "again.onnx")
        output = tmp_path / "twice.onnx"
        assert command("rewrite", source, "-o", output).last_line.startswith("nothing to do")
        assert output.read_bytes() == source.read_bytes()


def test_a_weight_that_can_be_overridden_is_no_constant(
    command: Command, eight: Planted, tmp_path: Path
) -> None:
    for name in ("up.weight", "down.weight"):
        dims = array_of(eight.model, name).shape
        eight.model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        )
    source, output = save(eight.model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).last_line.startswith(
        "nothing to do"
    )
    assert output.read_bytes() == source.read_bytes()


def test_unusual_bytes_of_an_unchanged_model_are_kept(command: Command, tmp_path: Path) -> None:
    """Unknown fields and another field order survive, because the file is copied."""
    source, output = tmp_path / "in.onnx", tmp_path / "out.onnx"
    content = dense_ffn(np.random.default_rng(0)).SerializeToString() + b"\xfa\x3f\x03abc"
    source.write_bytes(content)
    assert command("rewrite", source, "-o", output).code == 0
    assert output.read_bytes() == content


class TestExternalData:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        for name in ("in", "out"):
            (tmp_path / name).mkdir()
        return tmp_path / "in", tmp_path / "out"

    @staticmethod
    def with_dense_part(planted: Planted) -> onnx.ModelProto:
        """A dense product behind the network, so that some external data stays.

        What the network made is an output still, so that its units keep their numbers and the product's weight stays.
        """
        model = planted.model
        model.graph.node[-1].output[0] = "ffn"
        inner = model.graph.output.add()
        inner.CopyFrom(model.graph.output[0])
        inner.name = "ffn"
        weight = np.random.default_rng(3).normal(size=(40, 7)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, "dense.weight"))
        model.graph.node.append(
            helper.make_node("MatMul", ["ffn", "dense.weight"], ["y"], "dense")
        )
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
        return model

    def test_a_rewritten_model_takes_along_what_it_still_needs(
        self, command: Command, eight: Planted, folders: tuple[Path, Path]
    ) -> None:
        model = self.with_dense_part(eight)
        source = save(model, folders[0] / "m.onnx", external=True)
        before = {path.name: path.read_bytes() for path in folders[0].iterdir()}
        output = folders[1] / "r.onnx"
        assert command("rewrite", source, "-o", output, *SPLIT).last_line.startswith(
            "rewritten"
        )
        stored = onnx.load(output, load_external_data=False)
        for tensor in stored.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    assert (folders[1] / entry.value).is_file()
                    assert "/" not in entry.value
                    assert ".." not in entry.value
        np.testing.assert_array_equal(
            array_of(onnx.load(output), "dense.weight"), array_of(model, "dense.weight")
        )
        x = np.random.default_rng(4).normal(size=(3, 48)).astype(np.float32)
        np.testing.assert_allclose(run(output, x), run(source, x), rtol=1e-5, atol=1e-5)
        assert command("validate", source, output, "--samples", "1").code == 0
        assert {path.name: path.read_bytes() for path in folders[0].iterdir()} == before

    def test_constant_nodes_are_compared_by_what_they_hold(
        self, command: Command, eight: Planted, folders: tuple[Path, Path]
    ) -> None:
        """In the rewritten model they lie in another file; what lies there still counts."""
        model = self.with_dense_part(eight)
        held = array_of(model, "dense.weight")
        del model.graph.initializer[-1]
        value = numpy_helper.from_array(held, "dense.weight")
        model.graph.node.insert(
            0, helper.make_node("Constant", [], ["dense.weight"], value=value)
        )
        source, output = folders[0] / "m.onnx", folders[1] / "r.onnx"
        onnx.save_model(
            model,
            source,
            save_as_external_data=True,
            location="m.data",
            size_threshold=0,
            convert_attribute=True,
        )
        assert command("rewrite", source, "-o", output, *SPLIT).code == 0
        assert command("validate", source, output, "--samples", "1").code == 0
        stored = onnx.load(output, load_external_data=False)
        node = next(node for node in stored.graph.node if node.op_type == "Constant")
        place = {entry.key: entry.value for entry in node.attribute[0].t.external_data}
        data = bytearray((folders[1] / place["location"]).read_bytes())
        data[int(place["offset"])] ^= 1
        (folders[1] / place["location"]).write_bytes(data)
        result = command("validate", source, output, "--samples", "1")
        assert result.code == 1
        assert "'dense.weight' has other attributes" in result.err

    def test_an_unchanged_model_takes_all_of_it(
        self, command: Command, folders: tuple[Path, Path]
    ) -> None:
        model = dense_ffn(np.random.default_rng(0))
        source = save(model, folders[0] / "m.onnx", external=True)
        output = folders[1] / "m.onnx"
        assert command("rewrite", source, "-o", output).last_line.startswith("nothing to do")
        assert output.read_bytes() == source.read_bytes()
        data = [folder / "m.onnx.data" for folder in folders]
        assert data[1].read_bytes() == data[0].read_bytes()
        x = np.ones((2, 20), np.float32)
        np.testing.assert_array_equal(run(output, x), run(source, x))

    def test_beside_the_original(
        self, command: Command, eight: Planted, folders: tuple[Path, Path]
    ) -> None:
        source = save(self.with_dense_part(eight), folders[0] / "m.onnx", external=True)
        data = (folders[0] / "m.onnx.data").read_bytes()
        output = folders[0] / "r.onnx"
        assert command("rewrite", source, "-o", output, *SPLIT).code == 0
        assert (folders[0] / "m.onnx.data").read_bytes() == data
        x = np.ones((2, 48), np.float32)
        np.testing.assert_allclose(run(output, x), run(source, x), rtol=1e-5, atol=1e-5)

    def test_a_relative_path(
        self,
        command: Command,
        eight: Planted,
        folders: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        save(self.with_dense_part(eight), folders[0] / "m.onnx", external=True)
        monkeypatch.chdir(folders[0])
        assert command("rewrite", "m.onnx", "-o", "../out/r.onnx", *SPLIT).code == 0
        assert command("validate", "m.onnx", "../out/r.onnx", "--samples", "1").code == 0

    def test_another_model_s_data_of_the_same_name_is_not_overwritten(
        self, command: Command, eight: Planted, folders: tuple[Path, Path]
    ) -> None:
        """A stranger's model in the output folder keeps working, or the rewrite is refused."""
        source = save(self.with_dense_part(eight), folders[0] / "m.onnx", external=True)
        stranger = save(
            dense_ffn(np.random.default_rng(9)), folders[1] / "m.onnx", external=True
        )
        x = np.ones((2, 20), np.float32)
        before = run(stranger, x)
        result = command("rewrite", source, "-o", folders[1] / "r.onnx", *SPLIT)
        assert result.code in {0, 2}
        np.testing.assert_array_equal(run(stranger, x), before)

    def test_new_weights_of_a_model_with_external_data_are_external_too(
        self, command: Command, eight: Planted, folders: tuple[Path, Path]
    ) -> None:
        """Only what is in use goes along, in one aligned file beside the model."""
        model = self.with_dense_part(eight)
        weight = np.random.default_rng(8).normal(size=(40, 40)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, "more.weight"))
        source = save(model, folders[0] / "m.onnx", external=True)
        output = folders[1] / "r.onnx"
        assert command("rewrite", source, "-o", output, *SPLIT).code == 0
        assert {path.name for path in folders[1].iterdir()} == {"r.onnx", "r.onnx.data"}
        stored = onnx.load(output, load_external_data=False)
        entries = {
            t.name: {e.key: e.value for e in t.external_data}
            for t in stored.graph.initializer
            if t.external_data
        }
        assert {"dense.weight", "more.weight"} <= entries.keys()
        assert {entry["location"] for entry in entries.values()} == {"r.onnx.data"}
        assert all(int(entry["offset"]) % 4096 == 0 for entry in entries.values())
        np.testing.assert_array_equal(array_of(onnx.load(output), "more.weight"), weight)
        assert untouched_faults(source, output) == []
        assert command("validate", source, output, "--samples", "1").code == 0

    def test_several_files_with_offsets(
        self, command: Command, eight: Planted, folders: tuple[Path, Path]
    ) -> None:
        """A file of which everything is still in use is copied as it is; of the other one, what is in use."""
        model = self.with_dense_part(eight)
        content = {"a.bin": b"", "sub/b.bin": b""}
        for tensor in model.graph.initializer:
            name = "sub/b.bin" if tensor.name == "dense.weight" else "a.bin"
            content[name] += bytes(-len(content[name]) % 64 + 64)
            data, offset = tensor.raw_data, len(content[name])
            content[name] += data
            set_entry(tensor, name, offset, len(data))
        source = folders[0] / "m.onnx"
        source.write_bytes(model.SerializeToString())
        for name, data in content.items():
            (folders[0] / name).parent.mkdir(exist_ok=True)
            (folders[0] / name).write_bytes(data)
        output = folders[1] / "r.onnx"
        result = command("rewrite", source, "-o", output, *SPLIT)
        assert result.last_line.startswith("rewritten"), result
        assert (folders[1] / "sub/b.bin").read_bytes() == content["sub/b.bin"]
        assert not (folders[1] / "a.bin").exists()
        before = next(t for t in model.graph.initializer if t.name == "dense.weight")
        stored = onnx.load(output, load_external_data=False)
        after = next(t for t in stored.graph.initializer if t.name == "dense.weight")
        assert after == before
        x = np.ones((2, 48), np.float32)
        np.testing.assert_allclose(run(output, x), run(source, x), rtol=1e-5, atol=1e-5)
        assert untouched_faults(source, output) == []

    def test_beside_the_original_no_file_of_its_is_taken(
        self, command: Command, folders: tuple[Path, Path]
    ) -> None:
        """Also where the original's data has the name that the new data would get."""
        planted = plant(Recipe(blocks=((24, 48, 24),) * 4), np.random.default_rng(0))
        model = planted.model
        onnx.save_model(
            model,
            folders[0] / "m.onnx",
            save_as_external_data=True,
            location="r.onnx.data",
            size_threshold=0,
        )
        source, output = folders[0] / "m.onnx", folders[0] / "r.onnx"
        data = (folders[0] / "r.onnx.data").read_bytes()
        assert command("rewrite", source, "-o", output, *SPLIT).code == 0
        assert (folders[0] / "r.onnx.data").read_bytes() == data
        assert (folders[0] / "r.onnx.1.data").is_file()
        x = np.ones((2, 96), np.float32)
        np.testing.assert_allclose(run(output, x), run(source, x), rtol=1e-5, atol=1e-5)

    def test_weights_too_large_to_serialize_are_handed_over_by_reference(
        self,
        command: Command,
        folders: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("onnx_decompose.runtime.cases._MOST_SERIALIZED", 0)
        planted = plant(Recipe(blocks=((24, 48, 24),) * 4), np.random.default_rng(0))
        source = save(planted.model, folders[0] / "m.onnx", external=True)
        output = folders[1] / "r.onnx"
        result = command("rewrite", source, "-o", output, *SPLIT)
        assert result.last_line.startswith("rewritten"), result
        assert command("validate", source, output, "--samples", "1").code == 0

    def test_annealed_model_too(self, command: Command, folders: tuple[Path, Path]) -> None:
        recipe = Recipe(blocks=((8, 16, 8),) * 4, noise=1e-3)
        planted = plant(recipe, np.random.default_rng(0))
        source = save(planted.model, folders[0] / "m.onnx", external=True)
        output, annealed = folders[1] / "r.onnx", folders[1] / "a.onnx"
        null = ("--null", "normal:0.001", "--criterion", "fwer", "--save-annealed", annealed)
        assert command("rewrite", source, "-o", output, *null, *SPLIT).code == 0
        x = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
        np.testing.assert_allclose(run(annealed, x), run(output, x), rtol=1e-5, atol=1e-5)
