"""A stage from recipe to bridge: what it writes, what it refuses, and that nothing can interrupt it harmfully."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.errors import CheckpointError, ConfigError, DataError
from mmbridge.training.checkpoint import checkpoints_in, step_of
from mmbridge.training.freezing import frozen_digests
from mmbridge.training.run import build_bridge, train
from mmbridge.verification import verify


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return tiny.colours_file(folder), tiny.colours_file(folder, 9, seed=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(parts, data):
    def make_recipe(validation=False, changes=None, **run):
        values = tiny.recipe(parts, data[0], data[1] if validation else None, **run)
        for key, value in (changes or {}).items():
            section, _, name = key.partition(".")
            values[section] = {**values[section], name: value} if name else value
        return Recipe.from_dict(values)

    return make_recipe


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[tuple[str, ...]]:
    """Every logged value but wall time, as written: equal strings are equal to the last digit."""
    return [tuple(row.values()) for row in rows(out)]


@pytest.fixture(scope="module")
def finished(parts, data, cache, tmp_path_factory):
    """A finished run of the third stage with validation."""
    out = tmp_path_factory.mktemp("runs") / "third"
    train(Recipe.from_dict(tiny.recipe(parts, *data)), out, cache=cache, progress=False)
    return out


def test_run_writes_bridge_logs_samples_and_recipe(finished, make):
    assert Recipe.load(finished / "recipe.yaml") == make(validation=True)
    logged = rows(finished)
    assert [row["step"] for row in logged] == ["1", "6", "10", "12", "12"]
    assert {
        "train/loss/text",
        "train/loss/image.alignment",
        "train/loss/total",
        "train/lr",
        "val/loss/total",
    } <= logged[0].keys()
    assert float(logged[-2]["train/loss/total"]) < float(logged[0]["train/loss/total"])
    sample = finished / "samples" / "step-12" / "0"
    assert json.loads((sample / "prompt.json").read_text())["wanted"] == "It is red."
    assert json.loads((sample / "reply.json").read_text())["role"] == "assistant"
    assert list((finished / "logs").glob("events.out.tfevents*"))
    assert [path.name for path in checkpoints_in(finished / "checkpoints")] == ["step-12", "step-8"]


def test_no_file_of_a_run_is_a_pickle(finished):
    files = [path for path in finished.rglob("*") if path.is_file() and "tfevents" not in path.name]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".csv", ".yaml", ".md", ".png"}


def test_bridge_of_a_run_opens_from_the_run_folder_and_knows_its_lineage(finished):
    bridge = Bridge.from_pretrained(finished)
    (entry,) = bridge.lineage
    assert (entry["stage"], entry["steps"], entry["parent"], entry["seed"]) == ("instruction_tuning", 12, None, 0)
    assert entry["trained"] == list(bridge.parts())
    assert not bridge.training


def test_training_changes_what_it_declares_and_nothing_else(make, cache, tmp_path, parts):
    recipe = make(stage="encoder_alignment", steps=4)
    torch.manual_seed(recipe.run.seed)
    before, _ = build_bridge(recipe)
    after = Bridge.from_pretrained(train(recipe, tmp_path / "run", cache=cache, progress=False))
    for name, parameters in before.parts().items():
        same = all(torch.equal(value, after.parts()[name][key]) for key, value in parameters.items())
        assert same != (name == "inputs.image.projection"), name


def test_a_language_model_trains_as_a_whole_and_opens_with_the_same_replies(make, cache, tmp_path, parts, monkeypatch):
    import mmbridge.training.run as run

    seen = []
    build = run.build_bridge

    def watch(recipe):
        bridge, lineage = build(recipe)
        seen.append((bridge, {name: value.detach().clone() for name, value in bridge.named_parameters()}))
        return bridge, lineage

    monkeypatch.setattr(run, "build_bridge", watch)
    config = tiny.bridge_config(parts)
    config["backbone"]["trainable"] = True
    changes = {"bridge": config, "train": ["backbone.weights"]}
    folder = train(
        make(steps=1, checkpoint_activations=True, changes=changes), tmp_path / "run", cache=cache, progress=False
    )
    bridge, before = seen[0]
    changed = {
        name for name, value in bridge.named_parameters() if name in before and not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if name.startswith("backbone.")}
    again = Bridge.from_pretrained(folder)
    weights = again.parts()["backbone.weights"]
    assert all(torch.equal(value, weights[name]) for name, value in bridge.parts()["backbone.weights"].items())
    asked = [{"role": "user", "content": "What colour is it?"}]
    replies = [opened.generate(asked, max_new_tokens=12).text for opened in (bridge, again)]
    assert replies[0] == replies[1]
    assert again.lineage[0]["trained"] == ["backbone.weights"]
    assert all(finding.whole is not False for finding in verify(folder))


def test_frozen_parts_are_bit_identical_after_training(make, cache, tmp_path, monkeypatch):
    import mmbridge.training.run as run

    seen = []
    build = run.build_bridge

    def watch(recipe):
        bridge, lineage = build(recipe)
        run.freeze(bridge, recipe.train)
        seen.append((bridge, frozen_digests(bridge)))
        return bridge, lineage

    monkeypatch.setattr(run, "build_bridge", watch)
    train(make(steps=3), tmp_path / "run", cache=cache, progress=False)
    bridge, before = seen[0]
    after = frozen_digests(bridge)
    assert {"inputs.image.encoder.model", "backbone.model.model.layers"} <= before.keys()
    assert {name: after[name] for name in before} == before


def test_stages_follow_each_other_through_parents(make, cache, tmp_path):
    first = tmp_path / "first"
    train(make(stage="encoder_alignment", steps=2), first, cache=cache, progress=False)
    train(
        make(stage="decoder_alignment", steps=2, changes={"parent": str(first)}),
        tmp_path / "second",
        cache=cache,
        progress=False,
    )
    bridge = Bridge.from_pretrained(tmp_path / "second")
    assert [entry["stage"] for entry in bridge.lineage] == ["encoder_alignment", "decoder_alignment"]
    assert bridge.lineage[1]["parent"] == str(first)
    assert len(bridge.lineage[1]["parent_sha256"]) == 64
    projected = [opened.parts()["inputs.image.projection"] for opened in (Bridge.from_pretrained(first), bridge)]
    assert all(torch.equal(value, projected[1][key]) for key, value in projected[0].items())


def test_denoising_loss_trains_where_it_has_a_weight(make, cache, tmp_path):
    recipe = make(
        stage="decoder_alignment", steps=2, changes={"losses": {"image.alignment": 1.0, "image.denoising": 0.5}}
    )
    train(recipe, tmp_path / "run", cache=cache, progress=False)
    first = rows(tmp_path / "run")[0]
    total = float(first["train/loss/image.alignment"]) + 0.5 * float(first["train/loss/image.denoising"])
    assert float(first["train/loss/total"]) == pytest.approx(total, rel=1e-5)
    assert Bridge.from_pretrained(tmp_path / "run").outputs["image"].denoising


def test_balance_loss_trains_where_it_has_a_weight(make, cache, tmp_path, parts):
    config = tiny.bridge_config(parts)
    config["inputs"]["image"]["projection"] = tiny.MIXTURE
    recipe = make(
        stage="encoder_alignment", steps=2, changes={"bridge": config, "losses": {"text": 1.0, "image.balance": 0.5}}
    )
    train(recipe, tmp_path / "run", cache=cache, progress=False)
    first = rows(tmp_path / "run")[0]
    balance = float(first["train/loss/image.balance"])
    assert balance > 0
    assert float(first["train/loss/total"]) == pytest.approx(float(first["train/loss/text"]) + 0.5 * balance, rel=1e-5)
    assert Bridge.from_pretrained(tmp_path / "run").inputs["image"].projection.balance
    unweighted, _ = build_bridge(make(stage="encoder_alignment", changes={"bridge": config}))
    assert not unweighted.inputs["image"].projection.balance


def test_accumulated_batches_give_the_gradient_of_one_large_batch(make, cache, tmp_path):
    for name, run in (("large", {"batch_size": 8}), ("small", {"batch_size": 4, "accumulate": 2})):
        # Alignment alone: a mean over blocks, of which every batch here has equally many.
        recipe = make(stage="decoder_alignment", steps=1, save_every=1, **run)
        train(recipe, tmp_path / name, cache=cache, progress=False)
    large, small = (Bridge.from_pretrained(tmp_path / name).parts() for name in ("large", "small"))
    difference = [
        (value - small[part][key]).abs().max()
        for part, parameters in large.items()
        for key, value in parameters.items()
    ]
    assert max(difference) < 0.003 * 2.01  # Adam's first step is lr times a sign, whatever the gradient's size


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(make, cache, tmp_path, precision):
    train(make(steps=3, precision=precision), tmp_path / "run", cache=cache, progress=False)
    assert all(float(row["train/loss/total"]) < 20 for row in rows(tmp_path / "run"))


def test_checkpointed_activations_give_the_same_losses(make, cache, tmp_path):
    for name, flag in (("kept", False), ("recomputed", True)):
        train(make(steps=3, checkpoint_activations=flag), tmp_path / name, cache=cache, progress=False)
    kept, recomputed = (float(rows(tmp_path / name)[-1]["train/loss/total"]) for name in ("kept", "recomputed"))
    assert recomputed == pytest.approx(kept, rel=1e-5)


def test_worker_processes_give_the_same_batches(make, cache, tmp_path):
    for workers in (0, 2):
        train(make(steps=3, workers=workers), tmp_path / str(workers), cache=cache, progress=False)
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


RUNNER = """
import os, signal, sys
import torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as in conftest.py: other kernels, other last digits
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from mmbridge.config import Recipe
from mmbridge.training import callbacks
from mmbridge.training.run import train
recipe, out, cache, name, step, resume = sys.argv[1:]
inner = callbacks.Metrics.on_step
def on_step(self, trainer, stage, now):
    inner(self, trainer, stage, now)
    if now == int(step):
        os.kill(os.getpid(), getattr(signal, name))
callbacks.Metrics.on_step = on_step
train(Recipe.load(recipe), out, cache=cache, resume=resume == "True", progress=False)
"""


def signal_at(name: str, step: int, recipe: Recipe, out: Path, cache: Path, resume: bool = False):
    """Train in a process of its own, which sends itself a signal after a step; step 0 never comes."""
    file = out.with_suffix(".yaml")
    recipe.save(file)
    command = [sys.executable, "-c", RUNNER, file, out, cache, name, step, resume]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


def test_killed_run_resumes_to_the_same_losses_to_the_last_digit(make, cache, tmp_path):
    recipe = make(validation=True, steps=14, accumulate=2, save_every=3, validate_every=5)
    signal_at("SIGKILL", 0, recipe, tmp_path / "whole", cache)
    step = 4 + time.time_ns() % 9
    killed = signal_at("SIGKILL", step, recipe, tmp_path / "killed", cache)
    assert killed.returncode == -signal.SIGKILL
    assert step_of(checkpoints_in(tmp_path / "killed" / "checkpoints")[0]) == (step - 1) // 3 * 3
    signal_at("SIGKILL", 0, recipe, tmp_path / "killed", cache, resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"killed at step {step}"
    whole, again = (Bridge.from_pretrained(tmp_path / name).parts() for name in ("whole", "killed"))
    assert all(torch.equal(value, again[part][key]) for part in whole for key, value in whole[part].items())


def test_interrupted_run_saves_says_so_and_resumes(make, cache, tmp_path):
    recipe = make(steps=6, save_every=100)
    stopped = signal_at("SIGINT", 3, recipe, tmp_path / "run", cache)
    assert stopped.returncode == 130
    assert "stopped: step 3 is saved" in stopped.stdout
    assert "Traceback" not in stopped.stderr
    signal_at("SIGINT", 0, recipe, tmp_path / "run", cache, resume=True)
    signal_at("SIGINT", 0, recipe, tmp_path / "whole", cache)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_lost_numbers_stop_the_run_and_keep_the_last_good_checkpoint(make, cache, tmp_path):
    recipe = make(steps=40, save_every=2, changes={"optimizer": {"lr": 1e18, "warmup": 0.0, "clip": None}})
    with pytest.raises(ConfigError, match=r"not a finite number .* lower optimizer\.lr"):
        train(recipe, tmp_path / "run", cache=cache, progress=False)
    for path in checkpoints_in(tmp_path / "run" / "checkpoints"):
        assert step_of(path) < 40
    assert not (tmp_path / "run" / "bridge").exists()


def test_full_disk_while_saving_keeps_the_last_good_checkpoint(make, cache, tmp_path, monkeypatch):
    out = tmp_path / "run"
    fsync = os.fsync

    def full(handle):
        if "step-6" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    recipe = make(steps=8, save_every=3)
    with pytest.raises(CheckpointError, match="No space left"):
        train(recipe, out, cache=cache, progress=False)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
    monkeypatch.undo()
    train(recipe, out, cache=cache, resume=True, progress=False)
    train(recipe, tmp_path / "whole", cache=cache, progress=False)
    assert losses(out) == losses(tmp_path / "whole")


def test_a_folder_with_a_run_is_not_overwritten_unasked(finished, make, cache):
    with pytest.raises(ConfigError, match="already holds a run .* --resume, --overwrite"):
        train(make(validation=True), finished, cache=cache, progress=False)


def test_resuming_a_finished_run_returns_its_bridge(finished, make, capsys):
    assert train(make(validation=True), finished, resume=True) == finished / "bridge"
    assert "finished already" in capsys.readouterr().out


def test_a_run_killed_while_its_bridge_was_saved_only_saves_it(make, cache, tmp_path):
    out = tmp_path / "run"
    recipe = make(steps=4, save_every=4)
    before = Bridge.from_pretrained(train(recipe, out, cache=cache, progress=False)).parts()
    logged = losses(out)
    shutil.rmtree(out / "bridge")
    after = Bridge.from_pretrained(train(recipe, out, cache=cache, resume=True, progress=False)).parts()
    assert all(torch.equal(value, after[part][key]) for part in before for key, value in before[part].items())
    assert losses(out) == logged


def test_a_run_that_failed_before_it_began_is_no_obstacle(make, cache, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no file or folder"):
        train(make(steps=2, changes={"parent": "./nowhere"}), out, cache=cache, progress=False)
    assert train(make(steps=2), out, cache=cache, progress=False) == out / "bridge"


def test_a_parent_without_common_parts_is_refused(make, cache, tmp_path, parts):
    config = tiny.bridge_config(parts)
    Bridge.from_config({**config, "outputs": {}}).save_pretrained(tmp_path / "reader")
    alone = {**config, "inputs": {}}
    changes = {"bridge": alone, "parent": str(tmp_path / "reader")}
    with pytest.raises(ConfigError, match="no part in common"):
        train(make(stage="decoder_alignment", changes=changes), tmp_path / "run", cache=cache, progress=False)


def test_other_frozen_weights_than_the_parents_are_pointed_out(make, cache, tmp_path, parts, caplog):
    Bridge.from_config(tiny.bridge_config(parts)).save_pretrained(tmp_path / "parent")
    torch.manual_seed(5)
    other = tiny.bridge_config({**parts, "llama": tiny.llama(tmp_path / "llama", num_hidden_layers=1)})
    changes = {"bridge": other, "parent": str(tmp_path / "parent")}
    with caplog.at_level(logging.WARNING, "mmbridge"):
        build_bridge(make(stage="encoder_alignment", changes=changes))
    assert "other weights of the frozen part 'backbone'" in caplog.text


def test_a_language_model_that_the_recipe_would_lose_is_pointed_out(make, tmp_path, parts, caplog):
    Bridge.from_config(tiny.bridge_config(parts, lora=True)).save_pretrained(tmp_path / "parent")
    changes = {"parent": str(tmp_path / "parent")}
    with caplog.at_level(logging.WARNING, "mmbridge"):
        build_bridge(make(changes=changes))
        assert not caplog.text
        build_bridge(make(stage="encoder_alignment", changes=changes))
    assert "has the part 'backbone.lora', which this recipe's backbone lacks" in caplog.text


def test_a_validation_prompt_without_room_for_a_reply_costs_its_sample_not_the_run(
    make, cache, tmp_path, caplog, parts
):
    changes = {"bridge": tiny.bridge_config(parts, lora=True, output={"num_signals": 8})}
    bridge, _ = build_bridge(make(changes=changes))
    text = "What is it?"
    # A reply's first round may add a whole block of signals, for which there is no room below the context's end.
    while len(bridge.prepare([[{"role": "user", "content": text}]], reply=True)[0].ids) < bridge.backbone.context - 6:
        text += "x"  # one token each
    held = tmp_path / "held.jsonl"
    full = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    held.write_text(json.dumps({"messages": full}))
    recipe = make(validation=True, steps=2, changes={**changes, "data.validation": str(held)})
    recipe.data.root = str(Path(recipe.data.path).parent)
    with caplog.at_level(logging.WARNING, "mmbridge"):
        train(recipe, tmp_path / "run", cache=cache, progress=False)
    assert "no samples at step 2: the prompt has" in caplog.text
    assert rows(tmp_path / "run")[-1]["val/loss/total"]


def test_resuming_with_another_recipe_is_refused(finished, make):
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.003, now 0\.5"):
        train(make(validation=True, changes={"optimizer.lr": 0.5}), finished, resume=True)


def test_overwrite_starts_anew_but_keeps_the_cache(make, tmp_path, capsys):
    out = tmp_path / "run"
    train(make(steps=2), out, progress=False)
    shards = sorted((out / "cache").glob("*.safetensors"))
    train(make(steps=3), out, overwrite=True, progress=False)
    assert sorted((out / "cache").glob("*.safetensors")) == shards
    assert yaml.safe_load((out / "recipe.yaml").read_text())["run"]["steps"] == 3
    assert "3 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (
            "encoder_alignment",
            {"train": ["outputs.*"]},
            "trains inputs.* only, but the recipe names 'outputs.image.projection'",
        ),
        ("decoder_alignment", {"train": ["inputs.*"]}, "trains outputs.* only"),
        ("encoder_alignment", {"losses": {"image.alignment": 1.0}}, "has the losses text and *.balance only"),
        ("decoder_alignment", {"losses": {"text": 1.0}}, "needs the loss"),
        ("instruction_tuning", {"losses": {"image.alignment": 1.0}}, "needs the loss text"),
        ("instruction_tuning", {"train": ["inputs.audio.*"]}, "matches no part"),
    ],
)
def test_a_recipe_that_contradicts_its_stage_is_refused(make, tmp_path, stage, changes, words):
    with pytest.raises(ConfigError, match=words.replace("*", r"\*").replace(".", r"\.")):
        train(make(stage=stage, changes=changes), tmp_path / "run", progress=False)


def test_dialogue_that_the_bridge_cannot_read_is_named_by_file_and_line(make, tmp_path, parts):
    path = tmp_path / "bad.jsonl"
    good = {"role": "assistant", "content": "It is red."}
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, good]},
        {"messages": [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}, good]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: this bridge can't read media of type 'audio'"):
        train(make(changes={"data": {"path": str(path)}}), tmp_path / "run", progress=False)
