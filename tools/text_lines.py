"""Pictures of lines of real text, upright and upside down, as text recognizers read them; needs Pillow (13.0.0 here).

    python -m tools.text_lines OUTPUT_FOLDER [--count 1000] [--test 1000] [--width 192]

Lines are those of docstrings of Python's own library, 8 to 24 characters of each, written in Pillow's font, in sizes
and colours, on grounds and with noise of their own: 48 entries high, cut or filled up with 0 to ``--width`` entries,
from -1 to 1. Every second one is turned by 180 degrees.

Writes ``calibration.npz`` and ``test.npz``, of different modules: ``x`` (count, 3, 48, width) float32, and ``labels``,
1 for what is upside down.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.docstrings import library_docstrings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

HEIGHT = 48
SHORTEST, LONGEST = 8, 24


def lines(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Parts of lines, shuffled, of two halves of the modules."""
    halves: tuple[list[str], list[str]] = ([], [])
    files: dict[str, int] = {}
    for file, text in library_docstrings():
        half = files.setdefault(file, len(files) % 2)
        for line in text.splitlines():
            start = line.strip()[: int(rng.integers(SHORTEST, LONGEST + 1))]
            if len(start) >= SHORTEST and start.isascii() and any(map(str.isalpha, start)):
                halves[half].append(start)
    for texts in halves:
        rng.shuffle(texts)
    return halves


def picture(text: str, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(3, ``HEIGHT``, width): one line, upright."""
    image, draw, font = (
        importlib.import_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont")
    )
    letters: Any = font.load_default(size=int(rng.integers(20, 40)))
    left, top, right, bottom = letters.getbbox(text)
    edge = rng.integers(2, 10, 4)
    ground, ink = rng.integers(150, 256, 3), rng.integers(0, 110, 3)
    if rng.random() < 0.3:  # light on dark
        ground, ink = ink, ground
    size = (int(right - left + edge[0] + edge[1]), int(bottom - top + edge[2] + edge[3]))
    drawn = image.new("RGB", size, tuple(ground.tolist()))
    place = (int(edge[0] - left), int(edge[2] - top))
    draw.Draw(drawn).text(place, text, fill=tuple(ink.tolist()), font=letters)
    wide = min(width, max(round(HEIGHT * size[0] / size[1]), 1))
    scaled = drawn.resize((wide, HEIGHT), image.Resampling.BILINEAR)
    found = np.asarray(scaled, np.float32) + rng.normal(
        0, rng.uniform(0, 12), (HEIGHT, wide, 3)
    )
    return np.clip(found / 127.5 - 1, -1, 1).astype(np.float32).transpose(2, 0, 1)


def samples(
    texts: Iterator[str], count: int, width: int, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """``x`` and ``labels``."""
    x = np.zeros((count, 3, HEIGHT, width), np.float32)
    labels = np.arange(count) % 2
    for number in range(count):
        line = picture(next(texts), width, rng)
        x[number, :, :, : line.shape[2]] = line[:, ::-1, ::-1] if labels[number] else line
    return {"x": x, "labels": labels}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="to calibrate on")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    first, second = lines(rng)
    for name, texts, count in (
        ("calibration", first, options.count),
        ("test", second, options.test),
    ):
        arrays = samples(iter(texts), count, options.width, rng)
        np.savez(options.folder / f"{name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    _main()
