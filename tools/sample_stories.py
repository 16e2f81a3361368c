"""Texts sampled from a language model in ONNX, as token numbers: realistic inputs without a tokenizer.

    python -m tools.sample_stories MODEL.onnx OUT.npz [--texts 32] [--tokens 64] [--temperature 0.8]
                                   [--start 1] [--seed 0]

The model maps (batch, time) int64 token numbers to (batch, time, vocabulary) logits, as
``tools.stories15m --onnx`` writes it. Every text begins with the same token; each further one is drawn
from the softmax of the last logits over the temperature (0: the likeliest). The file holds one array
named after the model's input, (texts, tokens) int64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["sample_texts"]


def sample_texts(
    session: onnxruntime.InferenceSession,
    *,
    texts: int,
    tokens: int,
    temperature: float,
    start: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Token numbers, (texts, tokens)."""
    name = session.get_inputs()[0].name
    sampled = np.full((texts, 1), start, np.int64)
    while sampled.shape[1] < tokens:
        logits = np.asarray(session.run(None, {name: sampled})[0])[:, -1].astype(np.float64)
        if temperature > 0:
            # The largest of logits with Gumbel noise is a draw from their softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        sampled = np.concatenate([sampled, logits.argmax(axis=1)[:, None]], axis=1)
    return sampled


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--start", type=int, default=1, help="the first token of every text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    session = onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"])
    texts = sample_texts(
        session,
        texts=options.texts,
        tokens=options.tokens,
        temperature=options.temperature,
        start=options.start,
        rng=np.random.default_rng(options.seed),
    )
    np.savez(options.output, allow_pickle=False, **{session.get_inputs()[0].name: texts})
    print(f"{texts.shape[0]} texts of {texts.shape[1]} tokens in {options.output}")


if __name__ == "__main__":
    _main()
