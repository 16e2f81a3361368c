"""What claim A's outputs see: false alarms on a correct rewrite, and how small a fault is found, outputs alone.

    python -m tools.claim_power ANNEALED.onnx REWRITTEN.onnx [--draws 200] [--faults 20]

ANNEALED.onnx is what ``rewrite --save-annealed`` writes. A fault is one number of one weight of the rewritten model,
wrong by a share of itself, or of the largest of its weight; the static proof, which finds all of them, takes no part.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.claims import Inputs
from onnx_decompose.verification.equivalence import measure_structural

if TYPE_CHECKING:
    from onnx_decompose.verification.claims import StructuralClaim

SHARES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


class _Acquitted(logging.Handler):
    """Counts what was suspected and acquitted."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "suspected" in record.msg


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("annealed", type=Path)
    parser.add_argument("rewritten", type=Path)
    parser.add_argument("--draws", type=int, default=200, help="seeds of the random inputs")
    parser.add_argument("--faults", type=int, default=20, help="of each size")
    options = parser.parse_args()
    annealed, rewritten = load_model(options.annealed), load_model(options.rewritten)
    acquitted = _Acquitted()
    logger = logging.getLogger("onnx_decompose.verification.rounding")
    logger.addHandler(acquitted)
    logger.setLevel(logging.INFO)
    claims = [_claim(annealed, rewritten, seed) for seed in range(options.draws)]
    alarms = sum(not claim for claim in claims)
    sets = sum(claim.cases for claim in claims)
    print(
        f"{len(claims)} claims on {sets} sets of inputs: {acquitted.count} outputs suspected "
        f"and acquitted, {alarms} false alarms\n"
    )
    print("| one number wrong by | of itself | of its weight's largest |\n|---|---|---|")
    for share in SHARES:
        found = [
            sum(
                not _claim(
                    annealed, _faulty(rewritten, share, fault, of_largest=largest), fault
                )
                for fault in range(options.faults)
            )
            for largest in (False, True)
        ]
        print(
            f"| {share:g} | {found[0]} of {options.faults} | {found[1]} of {options.faults} |"
        )


def _claim(annealed: Model, rewritten: Model, seed: int) -> StructuralClaim:
    return measure_structural(
        annealed, rewritten, inputs=Inputs(seed=seed), provider=Provider.CPU
    )


def _faulty(model: Model, share: float, seed: int, *, of_largest: bool) -> Model:
    """``model`` with one number of a weight off."""
    rng = np.random.default_rng(seed)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    weights = [t for t in proto.graph.initializer if len(t.dims) > 1 and t.data_type == 1]
    tensor = weights[rng.integers(len(weights))]
    values = onnx.numpy_helper.to_array(tensor).copy()
    place = rng.choice(np.flatnonzero(values))
    size = np.abs(values).max() if of_largest else values.flat[place]
    values.flat[place] += share * size
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return Model(proto)


if __name__ == "__main__":
    main()
