"""Curves as SVG: of the CSV file that training logs, coloured by the page's style sheet, or over stages in a file of its own."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from mmbridge.errors import DataError
from mmbridge.media.base import write_atomically

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 46, 10, 24
_MANY = 40
"""From so many points on a curve is drawn faint, with its running mean above it."""


def read_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the columns of a metrics file as (step, value) pairs by name; empty cells are left out.

    Raises:
        DataError: There is no such file, it has no column "step", or a cell is not a number.
    """
    columns: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = float(row.pop("step"))
                for name, cell in row.items():
                    if cell:
                        columns.setdefault(name, []).append((step, float(cell)))
    except FileNotFoundError:
        raise DataError(f"there are no metrics at {path}; train the stage first.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a table of numbers with a column 'step' ({error}); train the stage again."
        ) from None
    return columns


def line_chart(
    series: Mapping[str, Points],
    label: str,
    steps: float,
    *,
    logarithmic: bool = False,
    top: float | None = None,
    stages: Sequence[str] | None = None,
) -> Markup:
    """Draw curves over steps.

    Args:
        series: (step, value) pairs by name, at least one pair in all. Curve ``i`` gets the class ``curve-i``.
        label: What the chart shows, for screen readers.
        steps: Where the horizontal axis, which starts at 0, ends.
        logarithmic: Whether the vertical axis is logarithmic; values must then be above 0.
        top: Where a linear vertical axis from 0 ends; None fits it to the values.
        stages: Names of the steps from 0 on; the chart has room for them, and curves end with their names.
    """
    width = 130 * len(stages) + 200 if stages else _WIDTH
    height = max(_HEIGHT, 14 * len(series) + 60) if stages else _HEIGHT
    left, right = (80, 170) if stages else (_LEFT, _RIGHT)
    values = [value for curve in series.values() for _, value in curve]
    if logarithmic:
        low, high = min(values) / 1.1, max(values) * 1.1
        marks = log_ticks(low, high)
    else:
        low, high = 0.0, max(values) * 1.05 or 1.0 if top is None else top
        marks = ticks(low, high)

    def across(step: float) -> float:
        return left + step / steps * (width - left - right)

    def down(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return height - _BOTTOM - share * (height - _TOP - _BOTTOM)

    def path(curve: Points, name: str) -> str:
        line = " ".join(f"{across(step):.1f},{down(value):.1f}" for step, value in curve)
        return f'<polyline class="{name}" points="{line}"/>'

    parts = []
    for value in marks:
        y = down(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    for step, name in enumerate(stages) if stages else ((step, f"{step:g}") for step in ticks(0, steps)):
        x = across(step)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 7}" text-anchor="middle">{escape(name)}</text>')
    ends = []
    for index, curve in enumerate(series.values()):
        if not curve:
            continue
        ordered = sorted(curve)
        if len(ordered) >= _MANY:
            parts.append(path(ordered, f"curve-{index} raw"))
            ordered = running_mean(ordered, len(ordered) // 25, logarithmic)
        parts.append(path(ordered, f"curve-{index}"))
        if len(ordered) < _MANY:
            parts += [
                f'<circle class="curve-{index}" cx="{across(step):.1f}" cy="{down(value):.1f}" r="2.2"/>'
                for step, value in ordered
            ]
        ends.append((down(ordered[-1][1]), index, ordered[-1][1]))
    digits = ".3g" if logarithmic else ".3f"
    x = width - right + 6
    names = [f"{escape(name)} " if stages else "" for name in series]
    for y, index, value in spread(ends, height - _BOTTOM):
        parts.append(f'<text class="end curve-{index}" x="{x}" y="{y + 3.5:.1f}">{names[index]}{value:{digits}}</text>')
    opening = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{opening}{''.join(parts)}</svg>")


def running_mean(curve: Points, half: int, geometric: bool) -> list[tuple[float, float]]:
    """Return each point's mean (geometric on request) with its ``half`` neighbours on either side."""
    averaged = []
    for index, (step, _) in enumerate(curve):
        near = [value for _, value in curve[max(0, index - half) : index + half + 1]]
        mean = math.exp(math.fsum(map(math.log, near)) / len(near)) if geometric else math.fsum(near) / len(near)
        averaged.append((step, mean))
    return averaged


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most ``most`` round numbers in [low, high], evenly spaced."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = unit * factor
        start = math.ceil(low / step - 1e-9)
        stop = math.floor(high / step + 1e-9)
        if stop - start < most:
            break
    return [round(number * step, 12) for number in range(start, stop + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers in [low, high] for a logarithmic axis: powers of ten, with halves and fifths if few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [mark for decade in decades for factor in factors if low <= (mark := factor * 10.0**decade) <= high]
        if len(found) >= 3:
            return found
    return ticks(low, high)


def spread(
    ends: Sequence[tuple[float, int, float]], bottom: float = _HEIGHT - _BOTTOM, gap: float = 12
) -> list[tuple[float, int, float]]:
    """Move labels (height, ...) apart so that none covers another, above ``bottom``."""
    placed: list[tuple[float, int, float]] = []
    for y, index, value in sorted(ends):
        y = max(y, placed[-1][0] + gap) if placed else y
        placed.append((y, index, value))
    over = placed[-1][0] - bottom if placed else 0
    return [(y - max(0.0, over), index, value) for y, index, value in placed]


def save_chart(chart: Markup, curves: int, path: Path) -> None:
    """Write a chart as an SVG file that needs no style sheet, whole or not at all.

    Args:
        chart: From ``line_chart``.
        curves: How many it has.
        path: The file.

    Raises:
        MediaError: The file can't be written.
    """
    rules = [
        "text{font-family:sans-serif}",
        ".grid{stroke:#ddd}",
        ".tick{fill:#666;font-size:10px}",
        ".end{font-size:10px}",
    ]
    for index in range(curves):
        colour = f"hsl({round(360 * index / curves)},65%,40%)"
        rules.append(f"polyline.curve-{index}{{stroke:{colour};stroke-width:1.8;fill:none}}")
        rules.append(f"circle.curve-{index},text.curve-{index}{{fill:{colour}}}")
    opening, rest = str(chart).split(">", 1)
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" ', 1)
    write_atomically(path, f"{opening}><style>{''.join(rules)}</style>{rest}\n".encode())


def told(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the directions of a measured forgetting whose media are told in words, on unseen scenes."""
    return [
        row
        for row in result["directions"]
        if row["split"] == "unseen" and row["out"] == "text" and "text" not in row["in"]
    ]


def over_stages(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return a direction's accuracies as (stage, accuracy) pairs, of the stages that have it."""
    return [(step, value) for step, value in enumerate(row["accuracy"]) if value is not None]


def forgetting_chart(result: Mapping[str, Any], path: Path) -> None:
    """Draw how accuracies went over stages: of what comes in and is told in words, or of all if nothing is; unseen scenes.

    Args:
        result: As ``mmbridge.evaluation.forgetting.measure_forgetting`` returns it.
        path: The SVG file to write.

    Raises:
        MediaError: The file can't be written.
    """
    rows = [row for row in result["directions"] if row["split"] == "unseen"]
    series = {
        f"{'+'.join(row['in'])} to {row['out']}" + (", turn 2" if row.get("turn") == 2 else ""): over_stages(row)
        for row in told(result) or rows
    }
    stages = result["stages"]
    chart = line_chart(series, "Accuracy after every stage", len(stages) - 1, top=1.0, stages=stages)
    save_chart(chart, len(series), path)
