"""Numbers as pictures: colour maps, points seen from a corner, lines over time."""

import math

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor

# Dark blue over green to yellow, evenly bright steps: five colours of the "viridis" map (Smith and van der Walt, CC0).
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
_CURVES = ((214, 69, 65), (46, 139, 87), (52, 104, 192))  # x, y, z
_PAPER, _GRID = (255, 255, 255), (222, 222, 222)
_MATRIX = 256  # pixels of the longer side of a matrix, at least


def colourise(values: Tensor) -> Tensor:
    """Return colours, uint8 (3, ...), of values in 0..1."""
    places = values.clamp(0, 1).numpy() * (len(_COLOURS) - 1)
    channels = [np.interp(places, np.arange(len(_COLOURS)), _COLOURS[:, index]) for index in range(3)]
    return torch.from_numpy(np.stack(channels).round().astype(np.uint8))


def stretch(values: Tensor) -> Tensor:
    """Return values from 0 at the smallest to 1 at the largest; zeros where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def draw_matrix(values: Tensor) -> Tensor:
    """Draw a vector (V,) as a matrix of about as many rows as columns, by rows: uint8 (3, H, W); what is left is white."""
    columns = math.ceil(math.sqrt(len(values)))
    rows = math.ceil(len(values) / columns)
    cells = torch.full((3, rows * columns), 255, dtype=torch.uint8)
    cells[:, : len(values)] = colourise(stretch(values))
    size = max(1, _MATRIX // columns)
    return cells.unflatten(1, (rows, columns)).repeat_interleave(size, 1).repeat_interleave(size, 2)


def draw_points(points: Tensor, colours: Tensor | None, size: int) -> Tensor:
    """Draw points as seen from a corner, above: uint8 (3, size, size), nearer points over farther ones.

    Args:
        points: (N, 3), the third coordinate upwards.
        colours: (N, 3) in 0..1; None for colours by height.
        size: Sides of the picture.
    """
    turn, tilt = math.radians(30), math.radians(30)
    spin = torch.tensor(
        [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]], dtype=torch.float32
    )
    centred = points - (points.amin(0) + points.amax(0)) / 2
    x, y, z = (centred @ spin.T).unbind(1)
    right, up, away = x, z * math.cos(tilt) + y * math.sin(tilt), y * math.cos(tilt) - z * math.sin(tilt)
    reach = torch.stack([right, up]).abs().max().clamp_min(1e-9)
    dot = max(1, min(5, round(size / 2 / math.sqrt(len(points)))))
    scale = (size / 2 - dot) / reach
    columns = (size / 2 + right * scale).round().long()
    rows = (size / 2 - up * scale).round().long()
    shades = colourise(stretch(points[:, 2])).T if colours is None else (colours * 255).round().to(torch.uint8)
    order = away.argsort(descending=True, stable=True)
    canvas = torch.full((size, size, 3), 255, dtype=torch.uint8).numpy()
    drawn = shades[order].numpy()
    for step in range(dot * dot):  # NumPy keeps the last of several values for one place: the nearest point
        down, along = step // dot - dot // 2, step % dot - dot // 2
        place = (rows[order] + down).clamp(0, size - 1).numpy(), (columns[order] + along).clamp(0, size - 1).numpy()
        canvas[place] = drawn
    return torch.from_numpy(canvas).permute(2, 0, 1).contiguous()


def draw_curves(panels: Tensor, width: int, height: int) -> Tensor:
    """Draw curves over time: uint8 (3, height, width), one panel above the other, x red, y green, z blue.

    Args:
        panels: (panels, 3, T); each panel has a scale of its own, around a line at 0.
        width: Pixels.
        height: Pixels.
    """
    canvas = PIL.Image.new("RGB", (width, height), _PAPER)
    pen = PIL.ImageDraw.Draw(canvas)
    each = height / len(panels)
    for index, panel in enumerate(panels.double()):
        middle, reach = each * (index + 0.5), max(float(panel.abs().max()), 1e-9)
        pen.line([(0, middle), (width, middle)], fill=_GRID)
        if index:
            pen.line([(0, each * index), (width, each * index)], fill=_GRID, width=3)
        across = np.linspace(0, width - 1, panel.shape[1])
        for curve, colour in zip(panel.numpy(), _CURVES, strict=True):
            pen.line(list(zip(across, middle - curve / reach * each * 0.45, strict=True)), fill=colour, width=2)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()
