"""What a training leaves: the model, its samples, and where both came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from models.provenance import environment
from onnx_decompose.exporter import export

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

__all__ = ["Trained", "write"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A trained model and what belongs to it.

    Attributes:
        name: of the files.
        training: the hyperparameters, a dataclass.
        model: the model.
        example: inputs to export it with.
        inputs: name of its input.
        outputs: name of its output.
        dynamic: axes of the input that are not fixed, as ``torch.export`` takes them.
        samples: arrays per file: ``NAME_calibration.npz``, say.
        facts: for the provenance: data, scores.
        seconds: processor time of the training.
    """

    name: str
    training: Any
    model: torch.nn.Module
    example: torch.Tensor
    inputs: str
    outputs: str
    dynamic: Mapping[int, Any]
    samples: Mapping[str, Mapping[str, NDArray[Any]]]
    facts: Mapping[str, Any]
    seconds: float


def write(trained: Trained, folder: Path) -> dict[str, Any]:
    """Write ``NAME.onnx``, ``NAME_SPLIT.npz`` and ``NAME.json``, the provenance, which is also returned."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{trained.name}.onnx"
    export(
        trained.model,
        (trained.example,),
        output,
        input_names=[trained.inputs],
        output_names=[trained.outputs],
        dynamic_shapes=(dict(trained.dynamic),),
    )
    for split, arrays in trained.samples.items():
        file = output.with_name(f"{trained.name}_{split}.npz")
        np.savez_compressed(file, allow_pickle=False, **arrays)
    provenance = {
        "name": trained.name,
        **trained.facts,
        "training": dataclasses.asdict(trained.training),
        "environment": environment(),
        "training_cpu_seconds": round(trained.seconds, 1),
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
    }
    text = json.dumps(provenance, indent=2)
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return provenance
