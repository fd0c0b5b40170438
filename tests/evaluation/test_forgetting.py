"""Forgetting over the bridges of successive stages: what is written, what is not measured twice, and what is refused."""

import json

import pytest
import tiny
import torch

from mmbridge import Bridge
from mmbridge.cli.main import main
from mmbridge.errors import ConfigError
from mmbridge.evaluation import any_to_any
from mmbridge.evaluation.forgetting import compare, format_forgetting, measure_forgetting

CELLS = ("text:none", "image:text")


@pytest.fixture(scope="module")
def stages(parts, tmp_path_factory):
    """A bridge that reads words alone, and two that read pictures too."""
    folder = tmp_path_factory.mktemp("stages")
    for seed, name in enumerate(("words", "pictures", "tuned")):
        torch.manual_seed(seed)
        config = tiny.bridge_config(parts, out=False)
        if not seed:
            config["inputs"] = {}
        Bridge.from_config(config).save_pretrained(folder / name)
    return [str(folder / name) for name in ("words", "pictures", "tuned")]


def cell(accuracy, source="image", split="unseen", **more):
    return {"in": source.split("+"), "out": "text", "split": split, "accuracy": accuracy, **more}


def test_drops_are_points_below_the_best_of_all_stages():
    result = compare({
        "one": [cell(0.9), cell(0.5, "audio"), cell(0.6, turn=2)],
        "two": [cell(0.96), cell(0.9, split="seen"), cell(0.2, "image+audio")],
        "three": [cell(0.93), cell(0.95, split="seen"), cell(0.7, "image+audio"), cell(0.7, turn=2)],
    })  # fmt: skip
    assert result["stages"] == ["one", "two", "three"]
    found = {("+".join(row["in"]), row["split"], row.get("turn")): row for row in result["directions"]}
    first = found["image", "unseen", None]
    assert (first["accuracy"], first["best"], first["drop"]) == ([0.9, 0.96, 0.93], 0.96, 3.0)
    assert found["image", "seen", None]["accuracy"] == [None, 0.9, 0.95]
    assert found["image+audio", "unseen", None]["drop"] == 0.0, "what gets better is not forgotten"
    assert found["audio", "unseen", None]["accuracy"] == [0.5, None, None]
    assert found["audio", "unseen", None]["drop"] is None
    assert found["image", "unseen", 2]["accuracy"] == [0.6, None, 0.7]
    text = format_forgetting(result).splitlines()
    assert len(text) == 6 and len({len(line) for line in text}) == 1
    assert text[1].split() == ["image", "text", "1", "unseen", "0.900", "0.960", "0.930", "0.960", "3.0"]


def test_every_stage_has_its_table_and_the_cells_that_it_can_have(stages, tmp_path):
    result = measure_forgetting(stages, tmp_path, samples=1, cells=CELLS, progress=False)
    assert json.loads((tmp_path / "forgetting.json").read_text()) == result
    assert result["stages"] == ["1-words", "2-pictures", "3-tuned"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*result["stages"], "forgetting.json"]
    rows = {(row["in"][0], row["split"]): row["accuracy"] for row in result["directions"]}
    assert set(rows) == {(source, split) for source in ("text", "image") for split in ("seen", "unseen")}
    assert rows["image", "seen"][0] is None and None not in rows["image", "seen"][1:]
    assert None not in rows["text", "seen"]
    table = json.loads((tmp_path / "3-tuned" / "any_to_any.json").read_text())
    assert table == any_to_any.evaluate(stages[2], tmp_path / "alone", samples=1, cells=CELLS, progress=False)


def test_finished_stages_are_not_measured_again(stages, tmp_path, monkeypatch):
    real, measured = any_to_any.measure_cell, []

    def interrupted(*arguments):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(any_to_any, "measure_cell", interrupted)
    options = {"samples": 1, "cells": ("text:none",), "progress": False}
    with pytest.raises(KeyboardInterrupt):
        measure_forgetting(stages, tmp_path, **options)
    assert len(measured) == 3, "both splits of the first stage, one of the second"
    measured.clear()
    measure_forgetting(stages, tmp_path, **options)
    assert len(measured) == 3


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (1, {}, "two bridges or more, not 1"),
        (2, {"cells": ("image:txt",)}, "none of these bridges has a cell 'image:txt'; did you mean 'image:text'"),
        (2, {"samples": 0}, "samples must be at least 1"),
    ],
)
def test_what_has_no_course_is_refused(stages, tmp_path, count, options, words):
    with pytest.raises(ConfigError, match=words):
        measure_forgetting(stages[:count], tmp_path, progress=False, **options)


def test_the_command_prints_writes_and_draws(stages, tmp_path, capsys):
    from xml.etree import ElementTree

    out = tmp_path / "out"
    assert main(["evaluate", *stages, "--out", str(out), "--samples", "1", "--cells", ",".join(CELLS)]) == 0
    printed = capsys.readouterr().out
    assert "2-pictures" in printed and printed.count("\nimage ") == 2 and str(out / "forgetting.svg") in printed
    drawing = ElementTree.parse(out / "forgetting.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    words = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1-words", "2-pictures", "3-tuned"} <= set(words) and any(
        word.startswith("image to text") for word in words
    )
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 2, "after two of the stages"
    benchmark = ["--benchmark", "gqa", "--data", str(tmp_path)]
    assert main(["evaluate", *stages, "--out", str(out), *benchmark]) == 2
    assert "--benchmark measures one bridge, not 3" in capsys.readouterr().err
