"""The ablations run through their command; the page says what the figures say."""

import importlib
import json
from collections import Counter

import pytest

from mmbridge.config import Recipe
from mmbridge.errors import ConfigError

QUICK = [
    "run.steps=2", "run.batch_size=2", "data.samples=8", "data.pool=4", "--samples", "2", "--seeds", "1", "--processes", "1",
]  # fmt: skip


@pytest.fixture
def load(root, monkeypatch):
    """Import a file of benchmarks/ by name, as its neighbours do."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module


@pytest.fixture
def results():
    """Two variants of one study, by hand: 80 and 20 of 100 requests are right, whatever the seed."""

    def variant(share):
        cell = {"image:text": {"share": share, "bound": 1.0, "n": 100}}
        seed = {"steps": 400, "seconds": 50.0, "trained": 1500, "parameters": 100_000, "cells": cell}
        return {"stages": ["encoder_alignment"], "seeds": {"0": seed, "1": seed}}

    study = {
        "title": "Grouping or linear", "question": "Which?", "paper": "Grouping.", "reference": "grouping",
        "cells": ["image:text"], "expected": {"linear": "lower"},
        "variants": {"grouping": variant(0.8), "linear": variant(0.2)},
    }  # fmt: skip
    return {"samples": 100, "environment": {"mmbridge": "0"}, "studies": {"input_projection": study}}


def test_the_command_trains_measures_and_goes_on(load, tmp_path, capsys):
    command = ["--only", "signal_tokens", "--out", str(tmp_path), *QUICK]
    load("ablations").main(command)
    written = capsys.readouterr().out
    assert "4 runs, 4 of them to do" in written and " minutes at the speed of now" in written
    study = json.loads((tmp_path / "assets" / "ablations.json").read_text())["studies"]["signal_tokens"]
    found = {label: variant["seeds"]["0"] for label, variant in study["variants"].items()}
    assert [one["steps"] for one in found.values()] == [2, 2, 2, 2]
    trained = [found[f"{count} signal{'s' * (count > 1)}"]["trained"] for count in (1, 2, 4, 8)]
    row = trained[1] - trained[0]  # width of the backbone
    assert trained == [trained[0], trained[0] + row, trained[0] + 3 * row, trained[0] + 7 * row]
    assert all(
        0 < one["trained"] < one["parameters"] and one["cells"]["text:image"]["n"] == 2 for one in found.values()
    )
    first = (tmp_path / "results.md").read_text()
    load("ablations").main(command)
    assert "4 runs, 0 of them to do" in capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() == first


def test_stages_of_onellm_follow_each_other_and_a_variant_has_cells_of_its_own(load, tmp_path, capsys, results):
    load("ablations_page").write_page("ablations", results, tmp_path)
    command = ["--studies", "onellm", "--only", "replay", "--out", str(tmp_path), *QUICK]
    load("ablations").main(command)
    assert "4 runs, 4 of them to do" in capsys.readouterr().out
    study = json.loads((tmp_path / "assets" / "onellm.json").read_text())["studies"]["replay"]
    found = {label: variant["seeds"]["0"] for label, variant in study["variants"].items()}
    assert {label: one["steps"] for label, one in found.items()} == {
        "after the first stage": 2, "none": 4, "15 %": 4, "50 %": 4,
    }  # fmt: skip
    assert set(found["after the first stage"]["cells"]) == {"image:text"}
    assert set(found["none"]["cells"]) == {"image:text", "video:text", "audio:text"}
    assert (
        len({one["trained"] for one in found.values()}) == 2
    )  # over both stages, pictures train also where none are repeated
    log = next(
        file.read_text()
        for file in (tmp_path / "runs").glob("onellm-video_audio-*/log.txt")
        if "MiB" in file.read_text()
    )
    assert "inputs.shared.experts: 3 experts start as the parent's one, with noise 0.1" in log
    assert "inputs.video.projection starts as inputs.image.projection" in log
    text = (tmp_path / "results.md").read_text()
    assert text.index("## NExT-GPT") < text.index("### Grouping or linear") < text.index("## OneLLM")
    assert "| after the first stage | 2 |" in text and text.index("## OneLLM") < text.index("### How much is repeated")
    assert (
        "| after the first stage | image to text |" in text and "| after the first stage | video to text |" not in text
    )


@pytest.mark.parametrize(
    ("paper", "stages"),
    [
        ("ablations", {"encoder_alignment": 4, "decoder_alignment": 5, "instruction_tuning": 7}),
        ("onellm", {"onellm-image": 4, "onellm-video_audio": 17}),
    ],
)
def test_every_variant_is_a_chain_of_valid_recipes(load, paper, stages):
    ablations = load("ablations")
    runs = set()
    for study in ablations.read_studies(paper).values():
        for variant in study.variants.values():
            run = ablations.run_of(study, variant, 0)
            while run is not None:
                run.recipe.validate()
                runs.add(run)
                run = run.parent
    counts = Counter(run.stage for run in runs)
    assert counts == stages


def test_what_variants_share_is_trained_once(load):
    ablations = load("ablations")
    studies = ablations.read_studies()
    whole, share = studies["stages"], studies["trained_share"]
    run = ablations.run_of(whole, whole.variants["all three"], 0)
    assert run == ablations.run_of(share, share.variants["LoRA of rank 8"], 0)
    none = ablations.run_of(share, share.variants["no LoRA"], 0)
    assert none != run and none.parent == run.parent
    assert none.recipe.bridge.part_names() != run.recipe.bridge.part_names()
    assert run != ablations.run_of(whole, whole.variants["all three"], 1)


def test_one_stage_instead_of_three_takes_as_many_steps(load):
    ablations = load("ablations")
    whole = ablations.read_studies()["stages"]
    alone = ablations.run_of(whole, whole.variants["instruction tuning alone, 930 steps"], 0)
    run, steps = ablations.run_of(whole, whole.variants["all three"], 0), 0
    while run is not None:
        steps, run = steps + run.recipe.run.steps, run.parent
    assert alone.parent is None and alone.recipe.run.steps == steps == 930


def test_all_at_once_and_alone_every_modality_is_drawn_as_often_as_step_by_step(load):
    ablations = load("ablations")
    study = ablations.read_studies("onellm")["training"]
    draws = {}
    for label, variant in study.variants.items():
        draws[label] = Counter()
        run = ablations.run_of(study, variant, 0)
        while run is not None:
            data, steps = run.recipe.data, run.recipe.run.steps
            for name in data.inputs:
                if data.replay is None:
                    draws[label][name] += steps / len(data.inputs)
                else:
                    share = data.replay.share if name in data.replay.of else (1 - data.replay.share) / 2
                    draws[label][name] += steps * share
            run = run.parent
    own = draws.pop("step by step")
    assert set(own) == {"image", "video", "audio"}
    assert draws.pop("all at once, 600 steps") == pytest.approx(own, abs=0.1)
    assert draws == {f"{label} alone": {name: own[name]} for label, name in
                     (("pictures", "image"), ("videos", "video"), ("sounds", "audio"))}  # fmt: skip


def test_a_star_stands_for_every_way_in(load):
    ablations = load("ablations")
    study = ablations.read_studies("onellm")["encoder"]
    run = ablations.run_of(study, study.variants["all of it"], 0)
    ways = run.recipe.bridge.inputs
    assert set(ways) == {"image", "video", "audio"}
    assert {way.arguments["encoder"].arguments["trains"] for way in ways.values()} == {"encoder"}
    assert "inputs.shared.encoder" in run.recipe.bridge.part_names()
    assert run.parent.recipe.bridge.inputs["image"].arguments["encoder"].arguments["trains"] == "encoder"


def test_a_study_that_is_not_there_is_named(load):
    with pytest.raises(ConfigError, match="no study 'signals'.*signal_tokens"):
        load("ablations").read_studies(only=["signals"])


def test_a_study_that_contradicts_itself_is_refused(load, root, tmp_path, monkeypatch):
    ablations = load("ablations")
    text = (root / "benchmarks" / "onellm.yaml").read_text()
    monkeypatch.setattr(ablations, "__file__", str(tmp_path / "ablations.py"))
    (tmp_path / "onellm.yaml").write_text(text.replace('largest alone: {"video:text"', 'largest alone: {"imu:text"'))
    with pytest.raises(ConfigError, match="router does not measure 'imu:text' of 'as published'"):
        ablations.read_studies("onellm")
    (tmp_path / "onellm.yaml").write_text(text.replace("reference: nothing", "reference: tokenizer"))
    with pytest.raises(ConfigError, match="encoder has no variant 'tokenizer'; did you mean 'tokenizers'"):
        ablations.read_studies("onellm")


def test_intervals_hold_seeds_and_requests(load):
    interval = load("ablations_page").interval
    mean, low, high = interval([0.5], 100)
    assert (
        mean == 0.5 and low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011) and high == pytest.approx(1 - low, abs=0.021)
    )
    assert interval([1.0, 1.0, 1.0], 100) == (1.0, 1.0, 1.0)
    mean, low, high = interval([0.0, 1.0], 100)  # a seed alone may be drawn twice
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    mean, low, high = interval([0.2, 0.9], 10_000, [0.1, 0.8])  # differs by seed, and alike for each
    assert mean == pytest.approx(0.1) and 0.08 < low < mean < high < 0.12


def test_the_page_says_what_the_figures_say(load, results, tmp_path):
    module = load("ablations_page")
    path = module.write_page("ablations", results, tmp_path)
    text = path.read_text()
    assert "| grouping | 400 | 1,500 (1.5 %) | 0.800 (" in text and "| linear | 400 | 1,500 (1.5 %) | 0.200 (" in text
    assert "| linear | image to text | -0.600 (" in text and "lower, as in the paper" in text
    assert "contrary" not in text and "seeds: 0, 1" in text and "1 come out as there, 0 the other way round" in text
    drawing = (tmp_path / "assets" / "ablations-input_projection.svg").read_text()
    assert "grouping" in drawing and "image to text" in drawing
    study = results["studies"]["input_projection"]
    study |= {"reference": "linear", "expected": {"grouping": {"image:text": "lower"}}}
    text = module.page({"ablations": results})
    assert "| grouping | image to text | +0.600 (" in text and "**higher, contrary to the paper**" in text
    assert "0 come out as there, 1 the other way round" in text
    study["expected"] = {"grouping": {"audio:text": "lower"}}
    assert "contrary" not in module.page({"ablations": results})


def test_verdicts(load):
    verdict = load("ablations_page").verdict
    assert verdict(-0.1, 0.1, "lower") == "not told apart"
    assert verdict(-0.2, -0.1, None) == "lower" and verdict(0.1, 0.2, None) == "higher"


def test_the_page_in_docs_is_that_of_its_figures(load, root):
    module = load("ablations_page")
    assert (root / "docs" / "results.md").read_text() == module.page(module.read_figures(root / "docs"))


@pytest.mark.parametrize(
    ("small", "tiny"),
    [
        ("encoder_alignment", "encoder_alignment"),
        ("decoder_alignment", "decoder_alignment"),
        ("instruction_tuning", "instruction_tuning"),
        ("onellm-image", "onellm-image"),
        ("onellm-video_audio", "onellm-video_audio_pointcloud"),
    ],
)
def test_the_shared_stages_differ_from_the_tiny_ones_in_size_alone(root, small, tiny):
    small, tiny = (
        Recipe.load(root / "recipes" / folder / f"{name}.yaml").bridge.to_dict()
        for folder, name in (("ablations", small), ("tiny", tiny))
    )
    assert small["backbone"] == tiny["backbone"]
    for group in ("inputs", "outputs"):
        assert small[group] == {name: tiny[group][name] for name in small[group]}
