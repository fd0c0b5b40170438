"""One page from a report: HTML and CSS only, every medium inside it, nothing fetched from anywhere."""

import base64
import io
import math
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from PIL import Image as PilImage

from mmbridge import __version__, media
from mmbridge.demo.charts import Points, line_chart, over_stages, told
from mmbridge.demo.report import Exchange, PartReport, Report, StageReport
from mmbridge.media import Audio
from mmbridge.media.base import write_atomically

_FOLDER = Path(__file__).parent
_TYPES = {".mp3": "audio/mpeg", ".wav": "audio/wav", ".webp": "image/webp"}
_SPECTROGRAM = (120, 400)  # rows, columns
_AUDIO_COLOUR = (203, 82, 126)
_WORDS = {
    "audio": "sound",
    "depth": "depth map",
    "fmri": "brain scan",
    "image": "picture",
    "imu": "motion sensor",
    "none": "no medium",
    "normal": "normal map",
    "pointcloud": "point cloud",
}


def write_page(report: Report, out: Path) -> Path:
    """Build the page of a report and write ``index.html``, whole or not at all.

    Args:
        report: What to show.
        out: The demo's folder, to which paths of media in the report are relative.

    Raises:
        MediaError: The page can't be written, or a medium of the report can't be read.
    """
    path = out / "index.html"
    write_atomically(path, build_page(report, out).encode())
    return path


def build_page(report: Report, root: Path) -> str:
    """Return the page of a report.

    Args:
        report: What to show.
        root: Folder to which paths of media in the report are relative.
    """
    return template("page.html.jinja").render(
        report=report,
        embed=lambda path: data_uri(root / path),
        spectrogram=lambda path: spectrogram(root / path),
        drawing=lambda part: drawing(part, root),
        charts=charts,
        facts=facts(report),
        matrices=matrices,
        stages_chart=stages_chart,
        trained=[part for part in report.parts if not part.source],
        frozen=[part for part in report.parts if part.source],
        sizes=sizes(report.parts),
    )


def write_table(table: Sequence[Mapping[str, Any]], name: str, out: Path) -> Path:
    """Write ``index.html``, the any-to-any table as a heat map, whole or not at all.

    Args:
        table: Cells, as ``mmbridge.evaluation.any_to_any.evaluate`` returns them.
        name: What was measured.
        out: The folder.

    Raises:
        MediaError: The page can't be written.
    """
    path = out / "index.html"
    page = template("table.html.jinja").render(name=name, version=__version__, table=table, matrices=matrices)
    write_atomically(path, page.encode())
    return path


def template(name: str) -> jinja2.Template:
    """Return a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "duration": duration,
        "count": count,
        "percent": percent,
        "plain": plain_name,
        "in_full": in_full,
    }
    return environment.get_template(name)


def data_uri(path: Path) -> str:
    """Return a file as a data URI."""
    kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def drawing(part: Mapping[str, Any], root: Path) -> str:
    """Return the drawing of a medium that is no picture, as a data URI: a content part, its path below ``root``."""
    options = {"sample_rate": part["sample_rate"]} if "sample_rate" in part else {}
    medium: Any = media.load(part["type"], part["path"], root, **options)
    buffer = io.BytesIO()
    PilImage.fromarray(medium.draw().pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spectrogram(path: Path) -> str:
    """Return a picture of a sound as a data URI: time to the right, 150 Hz to 5 kHz (logarithmic) upwards."""
    samples = Audio.load(path).resample(16_000).samples
    power = torch.stft(samples, 4096, 80, 1024, torch.hann_window(1024), return_complex=True).abs().square()
    rows = torch.logspace(math.log10(5000), math.log10(150), _SPECTROGRAM[0]) / 16_000 * 4096
    level = 10 * torch.log10(power[rows.round().long()] + 1e-8)  # (rows, frames)
    alpha = PilImage.fromarray((((level - level.max() + 50) / 50).clamp(0, 1) * 255).to(torch.uint8).numpy())
    alpha = alpha.resize(_SPECTROGRAM[::-1])
    picture = PilImage.new("RGB", alpha.size, _AUDIO_COLOUR)
    picture.putalpha(alpha)
    buffer = io.BytesIO()
    picture.quantize(32, PilImage.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def charts(stage: StageReport) -> list[tuple[str, list[str], Markup]]:
    """Return a stage's curves: heading, names of the curves and the drawing; losses first, then accuracies."""
    drawn = []
    losses = [name.removeprefix("train/loss/") for name in stage.metrics if name.startswith("train/loss/")]
    for name in losses:
        if name == "total":  # the weighted sum of the others
            continue
        curves: dict[str, Points] = {"training": stage.metrics[f"train/loss/{name}"]}
        if f"val/loss/{name}" in stage.metrics:
            curves["unseen combinations"] = stage.metrics[f"val/loss/{name}"]
        logarithmic = all(value > 0 for curve in curves.values() for _, value in curve)
        title = f"Loss: {name.replace('.', ', ')}"
        drawing = line_chart(curves, f"{title}, {stage.name}", stage.steps, logarithmic=logarithmic)
        drawn.append((title, list(curves), drawing))
    accuracies = {
        name.removeprefix("val/accuracy/"): points
        for name, points in stage.metrics.items()
        if name.startswith("val/accuracy/")
    }
    if accuracies:
        title = "Right answers on unseen combinations"
        drawn.append((title, list(accuracies), line_chart(accuracies, f"{title}, {stage.name}", stage.steps, top=1.0)))
    return drawn


def stages_chart(forgetting: Mapping[str, Any]) -> tuple[Markup, dict[str, Any]]:
    """Return the accuracy of each medium after every stage as a drawing, and the direction that is furthest below its best.

    Args:
        forgetting: As ``mmbridge.evaluation.forgetting.compare`` returns it.
    """
    rows = [row for row in told(forgetting) if len(row["in"]) == 1]
    curves = {plain_name(row["in"][0]): over_stages(row) for row in rows}
    stages = [stage_name(name) for name in forgetting["stages"]]
    drawing = line_chart(curves, "Right answers after every stage", len(stages) - 1, top=1.0, stages=stages)
    return drawing, max(rows, key=lambda row: row["drop"])


def stage_name(name: str) -> str:
    """Return a stage of a measured forgetting, such as "2-onellm-video_audio_pointcloud", as words."""
    number, _, recipe = name.partition("-")
    return f"{number}: {recipe.removeprefix('onellm-').replace('_', ' ')}"


def facts(report: Report) -> list[tuple[str, str]]:
    """Return the figures at the top of the page: value and what it is."""
    answering = sum(exchange.seconds for exchange in report.exchanges)
    found = [(rights(report.exchanges), "prompts answered right, as judges measure it")]
    if report.eight:
        found.append((rights(report.eight.exchanges), "right of prompts in eight modalities, by a second bridge"))
    found.append((duration(report.loading_seconds + answering), "to open the shipped bridge and answer"))
    size = sizes(report.parts)
    found.append((percent(size["trained"] / size["total"]), f"of {count(size['total'])} parameters ever train"))
    if report.stages:
        seconds = sum(stage.seconds for stage in report.stages)
        found.append((duration(seconds), f"to train {len(report.stages)} stage{'s' if len(report.stages) > 1 else ''}"))
    return found


def rights(exchanges: Sequence[Exchange]) -> str:
    """Return how many dialogues were right: "23 of 25"."""
    return f"{sum(exchange.right for exchange in exchanges)} of {len(exchanges)}"


def matrices(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the any-to-any table as matrices: per split, one medium out, words that change media, two out, second turns."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for split in dict.fromkeys(cell["split"] for cell in table):
        name = f"{split.capitalize()} combinations"
        for cell in table:
            if cell["split"] == split:
                groups.setdefault(f"{name}{kind_of(cell)}", []).append(cell)
    return [matrix(title, cells) for title, cells in groups.items()]


def kind_of(cell: Mapping[str, Any]) -> str:
    """Return which matrix of a split a cell belongs to, as the end of its title."""
    if cell.get("turn") == 2:
        return ", second turn"
    if "+" in cell["out"]:
        return ", two media at once"
    return ", with words that change it" if len(cell["in"]) > 1 and "text" in cell["in"] else ""


def matrix(title: str, table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return part of the any-to-any table as rows of cells, for media in by media out, in the order of the table."""
    cells = {("+".join(cell["in"]), cell["out"]): cell for cell in table}
    sources = dict.fromkeys(source for source, _ in cells)
    columns = list(dict.fromkeys(made for _, made in cells))
    rows = [(source, [graded(cells.get((source, made))) for made in columns]) for source in sources]
    return {"title": title, "columns": columns, "rows": rows}


def graded(cell: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Add to a cell how good it is, from 0 (half of the bound or less) to 1 (the bound)."""
    if cell is None:
        return None
    share = cell["accuracy"] / cell["bound"] if cell["bound"] else 0.0
    return {
        "written": None,
        "emission": None,
        "factors": {},
        **cell,
        "grade": round(min(1.0, max(0.0, (share - 0.5) / 0.5)), 3),
    }


def in_full(cell: Mapping[str, Any]) -> str:
    """Return the figures of a cell as words: the share of each factor, the baselines and how many replies there were."""
    baselines = {"bound": cell["bound"], "written": cell["written"]} if cell["written"] is not None else {}
    shares = {**cell["factors"], **baselines, "emitted": cell["emission"]}
    figures = [f"{name} {100 * share:.1f} %" for name, share in shares.items() if share is not None]
    return ", ".join([*figures, f"n = {cell['n']}"])


def sizes(parts: Sequence[PartReport]) -> dict[str, int]:
    """Return the parameters that train, those that don't, and all."""
    trained = sum(part.parameters for part in parts if not part.source)
    total = sum(part.parameters for part in parts)
    return {"trained": trained, "frozen": total - trained, "total": total}


def plain_name(name: str) -> str:
    """Return a stage's or a medium's name as words."""
    return _WORDS.get(name, name.replace("_", " "))


def duration(seconds: float) -> str:
    """Return seconds for people: "0.42 s", "41 s", "6 min 12 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def count(number: int) -> str:
    """Return a number of parameters for people: "812 K", "9.4 M"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def percent(share: float) -> str:
    """Return a share in per cent."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
