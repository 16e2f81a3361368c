from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from onnx_decompose.errors import OutputError
from onnx_decompose.reporting.report import (
    Alternative,
    RefusedNode,
    Report,
    SiteReport,
    Summary,
    claims_json,
    validation_json,
    write_json,
)
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BatchTiming, Timing
from onnx_decompose.verification.metrics import Deviation
from onnx_decompose.verification.verify import AnnealingClaim, StructuralClaim, Validation

if TYPE_CHECKING:
    from pathlib import Path

SITE = SiteReport(
    name="up",
    op_type="MatMul",
    shape=(4, 6),
    region="up",
    null="zero",
    pi0=0.5,
    pi0_interval=(0.4, 0.6),
    density=0.5,
    components=2,
    isolated=0,
    sccs=None,
    layers=None,
    decision="split",
    reason="2 components",
    blocks=((2, 3), (2, 3)),
    p_structure=None,
)
SUMMARY = Summary(
    sites=1,
    rewritten=1,
    substructures=2,
    weights_before=24,
    weights_after=12,
    flops_before=48,
    flops_after=24,
    decomposable=True,
    reason="2 substructures in 1 region",
)
DEVIATION = Deviation(
    elements=10,
    max_abs=0.0,
    mean_abs=0.0,
    relative_l2=0.0,
    cosine=1.0,
    sqnr_db=math.inf,
    top1_agreement=None,
    mismatch_share=0.0,
    non_finite=0,
)
STRUCTURAL = StructuralClaim(True, "1 weight rebuilt bit for bit", 1, 12, 1e-7)
ANNEALING = AnnealingClaim(True, 0.001, 0.01, "random", "relative L2 error", {"y": DEVIATION})


def report(**fields: Any) -> Report:
    values = {
        "version": "0.0",
        "model": "m.onnx",
        "null": "auto",
        "criterion": "fdr(0.01)",
        "summary": SUMMARY,
        "sites": (SITE,),
    }
    return Report(**{**values, **fields})


class TestJson:
    def test_keys_and_values(self) -> None:
        entry = BatchTiming(4, 2.0, 1.0, 2.0, 1.9, 2.1, 9)
        content = report(
            refused=(RefusedNode("n", "MatMul", "transA is set"),),
            alternatives=(Alternative("torch", "fdr(0.01)", 0.25, 4, 12),),
            structural=STRUCTURAL,
            annealing=ANNEALING,
            timing=Timing(Provider.CPU, (entry,)),
        ).to_json()
        assert content["version"] == "0.0"
        assert content["summary"]["weights_after"] == 12
        (site,) = content["sites"]
        assert site["shape"] == (4, 6)
        assert site["blocks"] == ((2, 3), (2, 3))
        assert content["refused"] == [
            {"node": "n", "op_type": "MatMul", "reason": "transA is set"}
        ]
        assert content["alternatives"][0]["substructures"] == 4
        assert content["claims"]["structural"]["passed"] is True
        assert content["claims"]["annealing"]["error"] == 0.001
        assert content["claims"]["annealing"]["outputs"]["y"]["cosine"] == 1.0
        assert content["timing"]["speedup"] == pytest.approx(2.0)
        assert content["timing"]["provider"] == "cpu"
        json.dumps(content)

    def test_what_was_not_measured_is_none(self) -> None:
        content = report().to_json()
        assert content["claims"] == {"structural": None, "annealing": None}
        assert content["timing"] is None
        assert claims_json(None, ANNEALING)["structural"] is None

    def test_of_a_validation(self) -> None:
        content = validation_json("0.0", "r.onnx", Validation(STRUCTURAL, ANNEALING))
        assert content["passed"] is True
        broken = StructuralClaim(False, "entry (0, 1)", 1, 0, math.nan)
        content = validation_json("0.0", "r.onnx", Validation(broken, ANNEALING))
        assert content["passed"] is False
        assert content["claims"]["structural"]["reason"] == "entry (0, 1)"


def test_weights_after_is_the_blocks_or_the_dense_weight() -> None:
    import dataclasses  # noqa: PLC0415

    assert SITE.weights_after == 12
    assert dataclasses.replace(SITE, decision="dense", blocks=()).weights_after == 24


class TestWriting:
    def test_numbers_that_json_lacks_become_null(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        write_json({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (-math.inf, True)}}, path)
        assert json.loads(path.read_text("utf-8"), parse_constant=pytest.fail) == {
            "a": None,
            "b": [None, 1.5],
            "c": {"d": [None, True]},
        }

    def test_a_perfect_match_is_writable(self, tmp_path: Path) -> None:
        """Equal outputs have an infinite signal-to-noise ratio."""
        write_json(report(annealing=ANNEALING).to_json(), tmp_path / "r.json")
        content = json.loads((tmp_path / "r.json").read_text("utf-8"))
        assert content["claims"]["annealing"]["outputs"]["y"]["sqnr_db"] is None

    def test_names_in_any_script_survive(self, tmp_path: Path) -> None:
        write_json({"site": "слой/層"}, tmp_path / "r.json")
        assert json.loads((tmp_path / "r.json").read_text("utf-8")) == {"site": "слой/層"}

    def test_a_report_that_fails_half_way_leaves_the_old_one(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        path.write_text("old")
        with pytest.raises(TypeError):
            write_json({"a": object()}, path)
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]

    def test_a_missing_folder_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "no" / "r.json"
        with pytest.raises(OutputError, match=r"no/r\.json: cannot be written"):
            write_json({}, path)
