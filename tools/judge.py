"""What the tools that draw curves share: samples drawn by a seed, and a rewritten model put against the original."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.language_metrics import compare
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.parts import Parts
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.samples import Samples

__all__ = ["Judge", "drawn"]

_JUDGED_AT_A_TIME = 64
_LOGITS_AXES = 3


class Judge:
    """What the original makes of the samples that are left to judge on, to put others against."""

    def __init__(self, original: Model, samples: Samples) -> None:
        self.count = samples.count
        self._output = original.proto.graph.output[0].name
        self._batches = [feeds for feeds, _ in samples.batches(_JUDGED_AT_A_TIME)]
        self._before = self._outputs(original)

    def __call__(self, other: Model) -> dict[str, float]:
        """Relative L2 error of the first output, mean cosine, and of a language model the loss in nats."""
        apart = size = 0.0
        cosines: list[NDArray[np.float64]] = []
        nats: list[NDArray[np.float64]] = []
        for feeds, before, after in zip(
            self._batches, self._before, self._outputs(other), strict=True
        ):
            apart += float(np.square(after - before, dtype=np.float64).sum())
            size += float(np.square(before, dtype=np.float64).sum())
            cosines.append(_cosines(before, after))
            if before.ndim == _LOGITS_AXES and "input_ids" in feeds:
                nats.append(compare(feeds["input_ids"], before, after)["nats"])
        found = {
            "error": float(np.sqrt(apart / size)),
            "cosine": float(np.concatenate(cosines).mean()),
        }
        return found | ({"nats": float(np.concatenate(nats).mean())} if nats else {})

    def _outputs(self, model: Model) -> list[NDArray[np.floating]]:
        session = open_model(model, Provider.CPU)
        return [session.run(feeds)[self._output] for feeds in self._batches]


def _cosines(before: NDArray[np.floating], after: NDArray[np.floating]) -> NDArray[np.float64]:
    first, second = (
        rows.reshape(-1, rows.shape[-1]).astype(np.float64) for rows in (before, after)
    )
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: NDArray[np.float64] = (first * second).sum(axis=1) / np.maximum(lengths, 1e-300)
    return cosines


def drawn(study: Study, samples: Samples, count: int | None, draw: int) -> CalibrationContext:
    """What a seed chooses of the samples: 3 of 4 to fit, the rest to choose the ridge.

    Args:
        study: the model.
        samples: all there are.
        count: how many of them are used; all if None.
        draw: the seed.
    """
    rng = np.random.default_rng(draw)
    if count and count < samples.count:
        samples, _ = samples.split(rng, count / samples.count)
    fit, choose = samples.split(rng, 0.75)
    return CalibrationContext(study, Parts(fit, choose, choose), Provider.CPU, neighbours=False)
