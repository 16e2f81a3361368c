"""What other models make of texts that nothing was fitted to, against a language model.

    python -m tools.compare_texts ORIGINAL.onnx OTHER.onnx [OTHER.onnx ...] --texts TEST.npz

For each of the other models: divergence from the original (nats), top-1 agreement, loss of log probability of the token
that really follows (nats), and relative L2 error of the logits, over all positions of all texts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from onnx_decompose.model.model_io import load_model
from tools.merge_curve import judged


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("original", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, required=True)
    options = parser.parse_args()
    original = load_model(options.original)
    with np.load(options.texts) as file:
        tokens = file["input_ids"]
    print("| model | KL | top-1 agreement | loss, nats | relative L2 of the logits |")
    print("|---|---|---|---|---|")
    for path in options.others:
        kl, top1, nats, error = judged(original, load_model(path), tokens)
        print(f"| {path.name} | {kl:.2g} | {top1:.4f} | {nats:.5f} | {error:.2g} |", flush=True)


if __name__ == "__main__":
    _main()
