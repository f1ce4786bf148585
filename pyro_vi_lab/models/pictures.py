"""Rows of images as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError


def picture_grid(images: Tensor, *, labels: Sequence[str] = (), size: float = 0.6) -> Any:
    """A matplotlib figure with images in rows and columns, all in one scale of grays (or in colors).

    Args:
        images: The images; of three channels they are colors from 0 to 1.
        labels: What to write on the left of every row.
        size: Of one image, in inches.

    Shape:
        images ``(R, C, H, W)``, ``(R, C, 1, H, W)`` or ``(R, C, 3, H, W)``.

    Raises:
        ArgumentError: The images have another shape, or there are not as many labels as rows.

    Example:
        >>> picture_grid(torch.rand(2, 5, 8, 8)).get_size_inches().tolist()
        [3.0, 1.2]
    """
    from matplotlib.figure import Figure

    if images.dim() == 4:
        images = images[:, :, None]
    if images.dim() != 5 or images.shape[2] not in (1, 3) or 0 in images.shape:
        raise ArgumentError(
            f"images have shape {tuple(images.shape)}; expected (rows, columns, height, width), with a dimension of 1 "
            "or 3 channels before the height or without"
        )
    rows, columns, _, height, _ = images.shape
    if labels and len(labels) != rows:
        raise ArgumentError(f"there are {len(labels)} labels for {rows} rows of images")
    images = images.detach().cpu()
    white = 1.0 if images.shape[2] == 3 else float(images.min())
    framed = torch.nn.functional.pad(images, (0, 1, 0, 1), value=white)  # a line between pictures
    grid = torch.cat([torch.cat([*row], -1) for row in framed], -2)
    figure = Figure(figsize=(columns * size, rows * size))
    figure.set_layout_engine("none")  # whatever the user's defaults are
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    pixels = grid[0] if len(grid) == 1 else grid.permute(1, 2, 0)
    axes.imshow(pixels.double().numpy(), cmap="gray_r", interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for number, label in enumerate(labels):
        axes.text(-0.5, number * (height + 1) + height / 2, f"{label} ", ha="right", va="center")
    return figure
