"""docs/world.md runs as written, and its tables hold the numbers that the renderers use."""

import re
from pathlib import Path

import pytest

from mmbridge.synthetic import FACTORS, Scene
from mmbridge.synthetic.audio import HARMONICS, PITCHES
from mmbridge.synthetic.geometry import AREAS, CENTRES, HUES, RADII, SATURATION_VALUE
from mmbridge.synthetic.imu import SWINGS
from mmbridge.synthetic.language import NAMES
from mmbridge.synthetic.relief import EDGE, MARGIN

PAGE = (Path(__file__).parents[2] / "docs" / "world.md").read_text(encoding="utf-8")


def test_the_examples_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 9
    names: dict = {}
    for block in blocks:
        exec(block, names)


def number(value):
    return f"{value:g}"


@pytest.mark.parametrize(
    "words",
    [
        *(f"| {factor} | {', '.join(values)} |" for factor, values in FACTORS.items()),
        *(f"| {shape} | {', '.join(map(number, recipe))} |" for shape, recipe in HARMONICS.items()),
        *(f"| {size} | {number(pitch)} Hz |" for size, pitch in PITCHES.items()),
        *(f"| {size} | {number(pace)} Hz |" for size, pace in SWINGS.items()),
        *(
            ", ".join(str(sum(scene.split_for(name) == split for scene in Scene.all())) for split in ("seen", "unseen"))
            for name in ("depth", "imu")
        ),
        f"over {number(EDGE)} pixels across the outline",
        f"within {number(MARGIN)} pixels of its outline",
        ", ".join(f"{size} {radius}" for size, radius in RADII.items()),
        " ".join(f"({number(x)}, {number(y)})" for x, y in CENTRES.values()),
        ", ".join(f"{colour} {number(hue)}" for colour, hue in HUES.items()),
        "; ".join(f"{colour} {s:.2f}, {v:.2f}" for colour, (s, v) in SATURATION_VALUE.items()),
        *(f"{area:.3f} |" for area in AREAS.values()),
        *(" ".join(words) for factor in ("size", "colour") for words in NAMES[factor].values()),
    ],
)
def test_the_tables_are_true(words):
    assert words in PAGE
