"""Reads digits row by row in a Loop: trained as usual, exported by torch, nothing planted.

    python -m tools.loop_digits FOLDER [--seed N]

Writes into FOLDER the model (``loop_digits.onnx``, x: (N, 64), y: (N, 10)), images to calibrate on and to judge on
(``calibration.npz``, ``test.npz``, with the labels), none of which it was trained on. The cell is a network of its
own, so that its weights lie in the body of the Loop that torch.jit.script makes:

    h' = tanh(relu([h, row] W1 + b1) W2 + b2)        (32 + 8) x 512, 512 x 32
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from torch import nn

STATE, HIDDEN, ROWS = 32, 512, 8
EPOCHS, BATCH = 100, 64


class Reader(nn.Module):
    """Row by row, and a score for each digit at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(STATE + ROWS, HIDDEN)
        self.down = nn.Linear(HIDDEN, STATE)
        self.head = nn.Linear(STATE, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores, (N, 10), of images, (N, 64)."""
        rows = x.reshape(-1, 8, 8)
        h = torch.zeros(x.shape[0], 32)
        for step in range(rows.shape[1]):
            h = torch.tanh(self.down(torch.relu(self.up(torch.cat([h, rows[:, step]], dim=1)))))
        scores: torch.Tensor = self.head(h)
        return scores


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description="A recurrent digit reader in a Loop.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    pixels, digit = sklearn.datasets.load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32)
    order = np.random.default_rng(options.seed).permutation(len(x))
    train, calibration, test = np.split(order, [700, 1400])
    model = Reader()
    _train(model, torch.from_numpy(x[train]), torch.from_numpy(digit[train]))
    model.eval()
    torch.onnx.export(
        torch.jit.script(model),
        (torch.from_numpy(x[:2]),),
        str(options.folder / "loop_digits.onnx"),
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
        opset_version=17,
        dynamo=False,
    )
    for name, part in (("calibration", calibration), ("test", test)):
        np.savez(
            options.folder / f"{name}.npz",
            x=x[part],
            label=digit[part].astype(np.int64),
        )
    with torch.no_grad():
        right = model(torch.from_numpy(x[test])).argmax(dim=1).numpy() == digit[test]
    print(f"{right.mean():.4f} of {len(test)} test images are read right")


def _train(model: nn.Module, x: torch.Tensor, label: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[part]), label[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
