"""Draws original images, and below them what each attack recovered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UnsupportedError
from ..planning.picture import pyplot, save
from .study import Recovered

COLUMNS = 10


def draw(originals: torch.Tensor, rows: Sequence[Recovered], box: tuple[float, float], file: Path) -> None:
    """Writes the picture in the format of the file's extension. Raises UnsupportedError without matplotlib or images, and ParameterError if
    the file cannot be written."""
    if originals.ndim != 4 or originals.shape[1] not in (1, 3):
        raise UnsupportedError(f"--picture draws images of one or three channels; inputs of shape {list(originals.shape[1:])} are none")
    plt, columns = pyplot("privacy"), min(COLUMNS, len(originals))
    lines = [("original", originals), *((f"{row.spec}\n{row.attack}, {row.attacker}\n{said(row)}", row.inputs) for row in rows)]
    figure, grid = plt.subplots(
        len(lines), columns, figsize=(3.6 + 0.8 * columns, 0.85 * len(lines)), squeeze=False, facecolor="white",
        gridspec_kw={"left": 3.5 / (3.6 + 0.8 * columns), "right": 0.99, "top": 0.99, "bottom": 0.01, "wspace": 0.06, "hspace": 0.1},
    )  # fmt: skip
    for axes, (label, images) in zip(grid, lines, strict=True):
        for place, image in zip(axes, images[:columns], strict=True):
            place.imshow(image.permute(1, 2, 0).numpy().squeeze(), cmap="gray_r", vmin=box[0], vmax=box[1])
            place.set(xticks=[], yticks=[])
            for edge in place.spines.values():
                edge.set(color="#aaaaaa", linewidth=0.6)
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, color="#222222")
    save(figure, file)


def said(row: Recovered) -> str:
    """Returns the measures of a row in words."""
    return f"{row.psnr:.1f} dB" + ("" if row.ssim is None else f", SSIM {row.ssim:.2f}")
