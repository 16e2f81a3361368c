"""A model with weights of integers, as onnxruntime's own quantizers make it.

    python -m tools.quantize_model MODEL.onnx INPUTS.npz OUT.onnx [--form qdq]

Forms: ``dynamic`` is products of integers whose inputs are quantized as they come, ``qdq`` pairs of quantizers around
every operator, ``qoperator`` operators on integers. Weights of 8 bits have one scale per tensor, or per output
(``-channel``). Scales of activations are taken from the data.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

FORMS = ("dynamic", "dynamic-channel", "qdq", "qdq-channel", "qoperator")
ROWS_AT_A_TIME = 64


def quantize(
    before: Path, after: Path, form: str, sets: Iterable[Mapping[str, NDArray[Any]]]
) -> None:
    """Write what onnxruntime's quantizers make of the model ``before`` to ``after``.

    Args:
        before: a model.
        after: where to.
        form: one of ``FORMS``.
        sets: inputs by name that scales of activations are taken from.
    """
    # Loads much, and is not wanted by those who only import this module.
    from onnxruntime import quantization as q  # noqa: PLC0415

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        """Hands out the sets."""

        def __init__(self) -> None:
            self._sets = iter(sets)

        def get_next(self) -> Any:
            """The next set."""
            return next(self._sets, None)

    per_channel = form.endswith("-channel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            if form.startswith("dynamic"):
                q.quantize_dynamic(
                    before, after, per_channel=per_channel, weight_type=q.QuantType.QInt8
                )
            else:
                q.quantize_static(
                    before,
                    after,
                    Reader(),
                    quant_format=(
                        q.QuantFormat.QOperator if form == "qoperator" else q.QuantFormat.QDQ
                    ),
                    per_channel=per_channel,
                    activation_type=q.QuantType.QUInt8,
                    weight_type=q.QuantType.QInt8,
                )
        finally:
            logging.disable(logging.NOTSET)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Quantize a model by onnxruntime's tools.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="npz with an array for each input")
    parser.add_argument("output", type=Path)
    parser.add_argument("--form", choices=FORMS, default="qdq")
    options = parser.parse_args()
    names = [value.name for value in onnx.load(options.model).graph.input]
    arrays = np.load(options.data)
    count = len(arrays[names[0]])
    sets = (
        {name: arrays[name][start : start + ROWS_AT_A_TIME] for name in names}
        for start in range(0, count, ROWS_AT_A_TIME)
    )
    quantize(options.model, options.output, options.form, sets)


if __name__ == "__main__":
    main()
