"""The any-to-any table of bridges of random tiny parts: cells, baselines, intervals, and going on after an interruption."""

import json

import numpy as np
import pytest
import tiny

from mmbridge import Bridge
from mmbridge.errors import ConfigError
from mmbridge.evaluation import any_to_any
from mmbridge.evaluation.any_to_any import (
    CaptionReader,
    Cell,
    bootstrap,
    directions,
    evaluate,
    format_table,
    gold_accuracy,
    make_tasks,
    measure,
    name_of,
)
from mmbridge.generation import Reply


@pytest.fixture(scope="module")
def bridge(parts, tmp_path_factory):
    """Pictures in and out; the decoder makes pictures of 32 pixels, as judges want them."""
    import shutil

    folder = tmp_path_factory.mktemp("sd")
    shutil.copytree(parts["sd"], folder / "sd")
    config = json.loads((folder / "sd" / "unet" / "config.json").read_text())
    config["sample_size"] *= 2
    (folder / "sd" / "unet" / "config.json").write_text(json.dumps(config))
    return Bridge.from_config(tiny.bridge_config({**parts, "sd": str(folder / "sd")}))


def test_directions_follow_from_what_goes_in_and_out(bridge, parts):
    names = {name_of(direction) for direction in directions(bridge)}
    assert names == {
        *(f"{source}:{wanted}" for source in ("text", "image", "text+image") for wanted in ("text", "image", "none")),
        "text:image:2",
        "image:image:2",
    }
    reader = Bridge.from_config(tiny.bridge_config(parts, out=False))
    assert {direction[1] for direction in directions(reader)} == {"text", "none"}


def test_directions_of_a_bridge_with_everything():
    class Everything:
        inputs = outputs = dict.fromkeys(("image", "video", "audio"))

    names = {name_of(direction) for direction in directions(Everything())}
    sources = ("text", "image", "audio", "video", "image+audio", "audio+video", "text+image")
    sources += ("text+audio", "text+video")
    assert names >= {f"{source}:{made}" for source in sources for made in ("text", "image", "audio", "video", "none")}
    assert names >= {"text:image+audio", "image:audio+video", "audio:video:2", "text:audio:2"}
    for direction in directions(Everything()):
        (task,) = make_tasks(*direction[:2], "unseen", 1, 0, direction[2])
        assert ("+".join(task.sources), task.wanted, len(task.messages)) == direction
        assert task.scene.split == "unseen"


def test_all_cells_are_about_the_same_scenes_so_that_bounds_are_shared(bridge):
    cells = [make_tasks(source, "image", "unseen", 5, 3) for source in ("text", "image", "text+image")]
    assert len({tuple(task.scene for task in cell) for cell in cells}) == 1
    reader = CaptionReader(bridge)
    gold = [[task.caption("image")] for task in cells[0]]

    class Bar:
        def __init__(self):
            self.counts = []

        def update(self, count):
            self.counts.append(count)

    first, second = Bar(), Bar()
    assert reader.accuracy(cells[0], gold, first) == reader.accuracy(cells[1], gold, second)
    assert first.counts == [0, 5] and second.counts == [5], "the second time nothing is decoded"


def test_bootstrap_intervals_are_those_of_the_binomial():
    rng = np.random.default_rng(0)
    right = list(rng.random(400) < 0.9)
    share = float(np.mean(right))
    low, high = bootstrap(right)
    spread = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert low == pytest.approx(share - spread, abs=0.01) and high == pytest.approx(share + spread, abs=0.01)
    assert bootstrap(right) == (low, high), "seeded"
    assert bootstrap([True] * 5) == (1.0, 1.0) and bootstrap([False]) == (0.0, 0.0)


def test_the_table_is_written_as_it_is_returned(bridge, tmp_path):
    cells = ("image:text", "text:image", "text:image:2")
    table = evaluate(bridge, tmp_path, samples=1, cells=cells, progress=False)
    assert json.loads((tmp_path / "any_to_any.json").read_text()) == table
    assert [path.name for path in tmp_path.iterdir()] == ["any_to_any.json"]
    assert [(cell["in"], cell["out"], cell.get("turn"), cell["split"]) for cell in table] == [
        (source, made, turn, split)
        for split in ("unseen", "seen")
        for source, made, turn in ((["image"], "text", None), (["text"], "image", None), (["text"], "image", 2))
    ]
    for cell in table:
        assert 0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1 and cell["n"] == 1
        assert cell["accuracy"] <= cell["emission"]
        assert (cell["written"] is None) == (cell["out"] == "text")
        assert cell["accuracy"] <= min(cell["factors"].values()) and max(cell["factors"].values()) <= cell["emission"]
    text = format_table(table).splitlines()
    assert len(text) == 1 + len(table) and len({len(line) for line in text}) == 1


def test_cells_agree_with_their_parts(bridge, tmp_path):
    (cell,) = evaluate(bridge, tmp_path, samples=3, seed=2, splits=("seen",), cells=("text:image",), progress=False)
    tasks = make_tasks("text", "image", "seen", 3, 2)
    assert cell["accuracy"] == np.mean(measure(bridge, tasks, seed=2))
    assert cell["bound"] == gold_accuracy(bridge, tasks, seed=2)


def test_factors_are_counted_where_they_were_asked_for():
    class Colourful:
        """Says the right shape and the colour red, whatever comes in."""

        inputs, outputs = {"image": None, "audio": None}, {}

        def generate(self, dialogues, **_):
            return [Reply([f"A red {next(shapes, 'ring')}."]) for _ in dialogues]

    tasks = make_tasks("image", "text", "seen", 40, 0)
    shapes = iter([task.scene.shape for task in tasks])
    reader = CaptionReader(Colourful())
    cell = any_to_any.measure_cell(Colourful(), tasks, "seen", 1, reader, 0, None).to_dict()
    red = np.mean([task.scene.colour == "red" for task in tasks])
    assert cell["factors"] == {"shape": 1.0, "colour": pytest.approx(red), "size": 0.0, "place": 0.0}
    assert cell["accuracy"] == 0.0 and 0 < red < 1
    tasks = make_tasks("audio", "none", "seen", 4, 0)
    assert any_to_any.measure_cell(Colourful(), tasks, "seen", 1, reader, 0, None).factors == {}


def test_an_interrupted_run_goes_on_where_it_was(bridge, tmp_path, monkeypatch):
    cells = ("text:text", "image:text", "text:none")
    wanted = evaluate(bridge, tmp_path / "whole", samples=1, splits=("seen",), cells=cells, progress=False)
    real, measured = any_to_any.measure_cell, []

    def interrupted(bridge, tasks, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(tasks[0].sources)
        return real(bridge, tasks, *rest)

    monkeypatch.setattr(any_to_any, "measure_cell", interrupted)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        evaluate(bridge, out, samples=1, splits=("seen",), cells=cells, progress=False)
    assert not (out / "any_to_any.json").exists()
    measured.clear()
    assert evaluate(bridge, out, samples=1, splits=("seen",), cells=cells, progress=False) == wanted
    assert measured == [("text",)], "only the last cell was left"
    with pytest.raises(KeyboardInterrupt):
        measured.clear()
        evaluate(bridge, out, samples=1, splits=("seen",), cells=cells, progress=False)
    measured.clear()
    evaluate(bridge, out, samples=1, seed=1, splits=("seen",), cells=cells[:2], progress=False)
    assert len(measured) == 2, "with other settings nothing that was kept counts"


def test_a_cell_says_its_turn_only_where_it_is_the_second():
    cell = Cell(["text"], "image", "seen", 1.0, 1.0, 1.0, 1.0, 3, 1.0, 1.0)
    assert "turn" not in cell.to_dict()
    cell.turn = 2
    assert cell.to_dict()["turn"] == 2 and list(cell.to_dict())[:2] == ["in", "out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cells": ("image:imag",)}, "no cell 'image:imag'; did you mean 'image:image'"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(bridge, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(bridge, tmp_path, progress=False, **options)
