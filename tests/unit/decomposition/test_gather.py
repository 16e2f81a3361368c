from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.analysis.record import METADATA_KEY, QUANTILE_LEVELS, InitRecord
from onnx_decompose.decomposition.gather import gather_all, read_null_config
from onnx_decompose.errors import InputError, ModelError, OptionError
from onnx_decompose.graph.study import Study, study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.options import Options
from tests.passes.recurrent_models import Recipe, plant

if TYPE_CHECKING:
    from pathlib import Path

    from onnx_decompose.analysis.recurrence import CellType


@pytest.fixture
def proto(rng: np.random.Generator) -> onnx.ModelProto:
    """Two products: encoder.weight (4, 6) and decoder.weight (6, 3)."""
    weights = {"encoder": rng.normal(size=(4, 6)), "decoder": rng.normal(size=(6, 3))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "encoder.weight"], ["h"], "first"),
            helper.make_node("MatMul", ["h", "decoder.weight"], ["y"], "second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [
            numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight")
            for name, weight in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def study(proto: onnx.ModelProto) -> Study:
    return study_model(Model(proto))


def record(name: str, shape: tuple[int, int], scale: float) -> dict[str, object]:
    quantiles = tuple(np.linspace(-scale, scale, len(QUANTILE_LEVELS)).tolist())
    made = InitRecord(name, shape, "normal", 0.0, scale, quantiles, shape[0], shape[1])
    return made.to_json()


class TestNulls:
    def test_every_site_gets_evidence_on_its_own_weight(self, study: Study) -> None:
        found = gather_all(study, Options(null="normal:0.5"))
        assert list(found) == ["first", "second"]
        for site in study.sites:
            np.testing.assert_array_equal(found[site.name].weight, study.weight(site))
        assert {evidence.source for evidence in found.values()} == {"normal:0.5"}

    def test_the_default_is_zero_where_nothing_is_known(self, study: Study) -> None:
        assert {e.source for e in gather_all(study, Options()).values()} == {"zero"}

    def test_a_null_given_apart_goes_before_options_and_file(
        self, study: Study, tmp_path: Path
    ) -> None:
        config = tmp_path / "n.toml"
        config.write_text('[nulls]\n"*" = "normal:1"\n')
        found = gather_all(study, Options(null="torch", null_config=config), "zero")
        assert {evidence.source for evidence in found.values()} == {"zero"}

    def test_fan_in_decides_a_framework_s_null(self, study: Study) -> None:
        found = gather_all(study, Options(null="torch"))
        for site in study.sites:
            null = found[site.name].null
            # Weights of standard deviation 1 are wider than any default, so no decay is seen.
            assert null.scale == pytest.approx(site.shape[0] ** -0.5)

    def test_unknown(self, study: Study) -> None:
        with pytest.raises(OptionError, match="'nonsense'"):
            gather_all(study, Options(null="nonsense"))


class TestRecords:
    def test_auto_takes_them_where_they_are(self, proto: onnx.ModelProto) -> None:
        content = {"encoder.weight": record("encoder.weight", (4, 6), 2.0)}
        proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(content))
        found = gather_all(study_model(Model(proto)), Options())
        assert found["first"].source == "recorded"
        assert found["first"].null.scale == pytest.approx(2.0)
        assert found["second"].source == "zero"

    def test_a_broken_one_names_the_file(self, proto: onnx.ModelProto, tmp_path: Path) -> None:
        proto.metadata_props.add(key=METADATA_KEY, value='{"encoder.weight": 3}')
        with pytest.raises(ModelError, match=r"m\.onnx.*encoder\.weight"):
            gather_all(study_model(Model(proto, tmp_path / "m.onnx")), Options())


class TestSnapshots:
    @pytest.fixture
    def snapshot(self, study: Study, tmp_path: Path) -> Path:
        """The initial weights; training moved the first row of each, and nothing else."""
        initial = {}
        for site in study.sites:
            weight = np.array(study.weight(site))
            weight[0] += 1.0
            initial[site.tensor] = weight
        path = tmp_path / "init.safetensors"
        safetensors.numpy.save_file(initial, path)
        return path

    def test_named_in_the_option(self, study: Study, snapshot: Path) -> None:
        found = gather_all(study, Options(null=f"snapshot:{snapshot}"))
        for site in study.sites:
            evidence = found[site.name]
            assert evidence.source == "snapshot"
            assert evidence.untouched is not None
            untouched = np.ones(site.shape, bool)
            untouched[0] = False
            np.testing.assert_array_equal(evidence.untouched, untouched)

    def test_named_in_the_configuration(
        self, study: Study, snapshot: Path, tmp_path: Path
    ) -> None:
        """Either it is used, or it is refused; never quietly something else."""
        config = tmp_path / "n.toml"
        config.write_text(f'[nulls]\n"encoder.*" = "snapshot:{snapshot}"\n')
        try:
            found = gather_all(study, Options(null_config=config))
        except OptionError as error:
            assert "snapshot" in str(error)  # noqa: PT017
        else:
            assert found["first"].source == "snapshot"

    @pytest.mark.parametrize("null", ["snapshot:none.safetensors", "optimizer:none.pt"])
    def test_missing_files(self, study: Study, null: str) -> None:
        with pytest.raises(InputError, match="none"):
            gather_all(study, Options(null=null))

    @pytest.mark.parametrize("null", ["snapshot", "snapshot:", "optimizer", "optimizer:"])
    def test_without_a_file(self, study: Study, null: str) -> None:
        with pytest.raises(OptionError, match=null.rstrip(":")):
            gather_all(study, Options(null=null))


class TestConfiguration:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "n.toml"
        path.write_text(text, "utf-8")
        return path

    def test_globs_match_tensors_and_nodes_and_the_first_wins(
        self, study: Study, tmp_path: Path
    ) -> None:
        text = '[nulls]\n"enc*" = "normal:3"\n"second" = "uniform:4"\n"*" = "normal:5"\n'
        options = Options(null="zero", null_config=self.write(tmp_path, text))
        found = gather_all(study, options)
        assert [e.source for e in found.values()] == ["normal:3", "uniform:4"]

    def test_globs_know_upper_and_lower_case(self, study: Study, tmp_path: Path) -> None:
        text = '[nulls]\n"ENC*" = "normal:3"\n'
        options = Options(null="zero", null_config=self.write(tmp_path, text))
        assert gather_all(study, options)["first"].source == "zero"

    def test_reading(self, tmp_path: Path) -> None:
        text = '# nulls\n[nulls]\n"a.*" = "normal:1"\n\n[other]\nx = 1\n'
        assert read_null_config(self.write(tmp_path, text)) == {"a.*": "normal:1"}

    @pytest.mark.parametrize(
        "text",
        ["", "nulls = 1", "[nulls]\na = 1", '[other]\na = "b"', "[nulls", "[[nulls]]\n"],
    )
    def test_anything_else_is_refused_with_the_file_s_name(
        self, tmp_path: Path, text: str
    ) -> None:
        with pytest.raises(OptionError, match=r"n\.toml"):
            read_null_config(self.write(tmp_path, text))

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "n.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(OptionError, match=r"n\.toml: is not TOML"):
            read_null_config(tmp_path / "n.toml")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"none\.toml: cannot be read"):
            read_null_config(tmp_path / "none.toml")


@pytest.mark.parametrize(("cell", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_the_gates_of_a_recurrent_operator_are_its_channels(
    cell: CellType, gates: int, rng: np.random.Generator
) -> None:
    study = study_model(Model(plant(Recipe(cell), rng).model))
    evidence = gather_all(study, Options(null="torch"))
    assert evidence.keys() == {"rnn.W", "rnn.R"}
    assert {found.channels for found in evidence.values()} == {gates}


def test_any_other_weight_is_one_channel(study: Study) -> None:
    assert {found.channels for found in gather_all(study, Options()).values()} == {1}
