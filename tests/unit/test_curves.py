"""What the tools that draw curves make of their measurements."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import samples_from_arrays
from tools import removal_table
from tools.judge import Judge
from tools.removal_table import mean_and_error

if TYPE_CHECKING:
    from pathlib import Path

LANGUAGE = """
<ir_version: 8, opset_import: ["" : 17]>
language (int64[N, T] input_ids) => (float[N, T, 8] logits)
{
    logits = Gather(table, input_ids)
}
"""


def _language(table: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(LANGUAGE)
    proto.graph.initializer.append(numpy_helper.from_array(table.astype(np.float32), "table"))
    return Model(proto)


def test_a_model_is_judged_by_error_cosine_and_nats(rng: np.random.Generator) -> None:
    table = rng.normal(size=(8, 8))
    original = _language(table)
    tokens = rng.integers(8, size=(70, 5))
    samples = samples_from_arrays({"input_ids": tokens}, graph_inputs(original.proto))
    judge = Judge(original, samples)
    twice = judge(_language(2 * table))
    assert twice["error"] == pytest.approx(1)
    assert twice["cosine"] == pytest.approx(1)
    now, after = (t - np.log(np.exp(t).sum(1, keepdims=True)) for t in (table, 2 * table))
    first, second = tokens[:, :-1], tokens[:, 1:]
    lost = (now - after)[first, second].mean()
    assert twice["nats"] == pytest.approx(lost, rel=1e-5)
    assert judge(original) == {"error": 0, "cosine": pytest.approx(1), "nats": 0}


def test_draws_of_one_model_count_once() -> None:
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 4.0, ("b", 1): 4.0}
    assert mean_and_error(values) == (3.0, 1.0)
    one = {("a", 0): 1.0, ("a", 1): 3.0}
    assert mean_and_error(one) == (2.0, 1.0)


def test_methods_are_compared_in_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ratios of 1/2, 1/4 and 1/8, whatever the size of the error: log2 is -2 +- 4.30 / sqrt(3), by Student's t."""
    rows = [
        {"model": model, "draw": 0, "method": method, "share": 0.1, "error": error}
        for model, base, ratio in (("a", 1.0, 1 / 2), ("b", 100.0, 1 / 4), ("c", 1e-3, 1 / 8))
        for method, error in (("obs", base), ("greedy", base * ratio))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["removal_table", str(file)])
    removal_table._main()
    printed = capsys.readouterr().out
    wide = 4.302653 / np.sqrt(3)
    told = (
        f"| greedy | 0.250 ({2 ** (-2 - wide):.3f} to {2 ** (-2 + wide):.3f}), less in 3 of 3 |"
    )
    assert told in printed
