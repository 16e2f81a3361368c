"""What an attempt holds."""

from __future__ import annotations

import gc
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.decomposition.decompose import attempt
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.options import Options
from onnx_decompose.planning.cost import CPU
from tools.make_large_model import make_large_model

if TYPE_CHECKING:
    from pathlib import Path


def test_an_attempt_holds_few_bits_of_each_entry(tmp_path: Path) -> None:
    make_large_model(tmp_path / "m.onnx", 1 << 23, width=256, hidden=1024, blocks=4)
    study = study_model(load_model(tmp_path / "m.onnx"))
    evidence = gather_all(study, Options(null="zero"))
    criterion = make_criterion("fdr", 0.01)
    rng = np.random.default_rng(0)
    entries = sum(site.size for site in study.sites)
    tracemalloc.start()
    tried = attempt(study, evidence, criterion, cost=CPU, emit="split", rng=rng)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert tried.takes_apart
    # A bit for what is selected and one for what leads to an exit, and the numbers of the units.
    assert held < entries // 2
    assert not tried.recurrent.masks
