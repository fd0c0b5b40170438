"""The commands, through the same entry point as the installed program."""

import json

import pytest
import tiny
import yaml

from mmbridge import config
from mmbridge.bridge import Bridge
from mmbridge.cli.main import main


@pytest.fixture(scope="module")
def bridge(parts, tmp_path_factory):
    """A saved bridge of random weights."""
    folder = tmp_path_factory.mktemp("bridges") / "bridge"
    Bridge.from_config(tiny.bridge_config(parts)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(parts, tmp_path):
    """A recipe file over tiny parts and pictures of three colours."""
    path = tmp_path / "colours.yaml"
    data = tiny.colours_file(tmp_path / "data", 6)
    path.write_text(yaml.safe_dump(tiny.recipe(parts, data, stage="encoder_alignment", steps=50, batch_size=2)))
    return path


def test_generate_prints_the_reply_and_writes_it(bridge, tmp_path, capsys):
    tiny.colours_file(tmp_path / "data", 1)
    content = [{"type": "image", "path": "data/0-0.png"}, {"type": "text", "text": "What colour is it?"}]
    (tmp_path / "dialogue.json").write_text(json.dumps([{"role": "user", "content": content}]))
    arguments = ["generate", bridge, "--messages", str(tmp_path / "dialogue.json"), "--max-new-tokens", "5"]
    replies = []
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        out = tmp_path / name
        assert main([*arguments, "--temperature", "1", "--seed", seed, "--out", str(out)]) == 0
        replies.append(json.loads((out / "reply.json").read_text()))
        lines = [part["text"] if part["type"] == "text" else str(out / part["path"]) for part in replies[-1]["content"]]
        assert capsys.readouterr().out == "".join(f"{line}\n" for line in lines)
    assert replies[0]["role"] == "assistant"
    assert replies[0] == replies[1] != replies[2]


def test_generate_reads_the_dialogue_before_the_bridge(tmp_path, capsys):
    missing = str(tmp_path / "absent.json")
    assert main(["generate", "no-such-bridge", "--messages", missing, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"mmbridge: no file {missing}; give a JSON file")


def test_generate_does_not_leave_the_folder_of_the_dialogue(bridge, tmp_path, capsys):
    (tmp_path / "inside").mkdir()
    tiny.colours_file(tmp_path, 1)
    content = [{"type": "image", "path": "../0-0.png"}, {"type": "text", "text": "What is it?"}]
    (tmp_path / "inside" / "dialogue.json").write_text(json.dumps([{"role": "user", "content": content}]))
    arguments = ["--messages", str(tmp_path / "inside" / "dialogue.json"), "--out", str(tmp_path / "out")]
    assert main(["generate", bridge, *arguments]) == 2
    assert "../0-0.png" in capsys.readouterr().err


def test_train_writes_a_bridge_to_the_folder_of_the_recipe_name(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "run.steps=1", "optimizer.lr=1e-4"]) == 0
    capsys.readouterr()
    written = config.Recipe.load(tmp_path / "runs" / "colours" / "recipe.yaml")
    assert (written.run.steps, written.optimizer.lr, written.run.batch_size) == (1, 1e-4, 2)
    assert main(["train", str(recipe), "run.steps=1", "optimizer.lr=1e-4"]) == 2
    assert "runs/colours already holds a run" in capsys.readouterr().err
    assert main(["train", str(recipe), "--resume", "run.steps=1", "optimizer.lr=1e-4"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main(["train", str(recipe), "run.steps=2", "--overwrite"]) == 0
    assert Bridge.from_pretrained("runs/colours").lineage[0]["steps"] == 2


def test_evaluate_prints_the_table_that_it_writes(parts, tmp_path, capsys):
    Bridge.from_config(tiny.bridge_config(parts, out=False)).save_pretrained(tmp_path / "reader")
    arguments = [
        "evaluate",
        str(tmp_path / "reader"),
        "--out",
        str(tmp_path / "table"),
        "--samples",
        "1",
        "--seed",
        "2",
    ]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "table" / "any_to_any.json").read_text())
    keys = {"in", "out", "split", "accuracy", "low", "high", "bound", "n", "written", "emission", "factors"}
    assert all(set(row) == keys for row in rows), "turn is there only where it is 2, and nothing is made here"
    assert {(tuple(row["in"]), row["out"]) for row in rows} == {
        (source, wanted) for source in (("text",), ("image",), ("text", "image")) for wanted in ("text", "none")
    }
    assert {row["n"] for row in rows} == {1}
    page = (tmp_path / "table" / "index.html").read_text(encoding="utf-8")
    assert page.count('<table class="matrix">') == 4  # replies and factors of each split
    assert page.count("n = 1<") == len(rows)
    assert "src=" not in page and "href=" not in page, "the page needs nothing beside itself"
    printed = capsys.readouterr().out
    assert printed.count("unseen") == sum(row["split"] == "unseen" for row in rows) > 0
    assert main([*arguments, "--cells", "text:none"]) == 0
    assert len(json.loads((tmp_path / "table" / "any_to_any.json").read_text())) == 2
    assert main([*arguments, "--cells", "text:none,image:txt"]) == 2
    assert "no cell 'image:txt'; did you mean 'image:text'" in capsys.readouterr().err


def test_ls_lists_every_kind(capsys):
    assert main(["ls"]) == 0
    everything = capsys.readouterr().out
    for kind, name in (
        ("encoders", "imagebind"), ("projections", "grouping"), ("backbones", "causal_lm"), ("inputs", "encoded"),
        ("decoders", "stable_diffusion"), ("outputs", "signals"), ("templates", "vicuna"),
        ("recipes", "tiny/encoder_alignment"), ("checkpoints", "mmbridge/tiny-sd"),
    ):  # fmt: skip
        assert f"\n{kind}\n" in f"\n{everything}"
        assert main(["ls", kind]) == 0
        listed = capsys.readouterr().out
        assert name in [line.split()[0] for line in listed.splitlines()]
        assert all(f"  {line}" in everything for line in listed.splitlines())


def test_ls_filters_and_describes(capsys):
    assert main(["ls", "projections", "gr*"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split(maxsplit=1)[0] == "grouping"
    assert "grouping them around learned concepts" in line
    assert main(["ls", "recipes", "tiny/*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("tiny/") and ("of 4: " if "onellm" in line else "of 3: ") in line for line in lines)


def test_cp_copies_and_never_overwrites(tmp_path, capsys):
    target = tmp_path / "deep" / "mine.yaml"
    assert main(["cp", "tiny/encoder_alignment", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_bytes() == config.find_recipe("tiny/encoder_alignment").read_bytes()
    target.write_text("mine")
    assert main(["cp", "tiny/encoder_alignment", str(target)]) == 2
    assert "mine.yaml exists already and was not overwritten; name another file" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["cp", "tiny/encoder_alignment", str(tmp_path)]) == 0
    assert (tmp_path / "encoder_alignment.yaml").is_file()


def test_validate_prints_the_recipe_as_it_would_run(recipe, capsys):
    assert main(["validate", str(recipe), "run.steps=3"]) == 0
    first, _, text = capsys.readouterr().out.partition("\n")
    assert first == f"OK {recipe}"
    assert config.Recipe.from_dict(yaml.safe_load(text)) == config.Recipe.load(recipe, ["run.steps=3"])


def test_validate_names_what_is_wrong(recipe, capsys):
    assert main(["validate", str(recipe), "run.stpes=3"]) == 2
    assert "run.stpes is not a known key; did you mean 'steps'?" in capsys.readouterr().err
    assert main(["validate", str(recipe), "bridge.inputs.image.projection.name=grupping"]) == 2
    assert "inputs.image.projection: unknown projection 'grupping'; did you mean 'grouping'?" in capsys.readouterr().err
