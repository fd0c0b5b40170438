"""docs/extending.md, second part: its package brings thermal maps, and no file of mmbridge is edited."""

import json

import pytest
from doc_pages import ROOT, blocks_of, commands_of
from test_extending import copy_project, install, run

PAGE = ROOT / "docs" / "extending.md"
MARK = "file: my_thermal/"
FILES = {block.mark.removeprefix(MARK): block.text for block in blocks_of(PAGE) if block.mark.startswith(MARK)}
SETUP = FILES.pop("setup.cfg")
TRAIN = next(words for words in commands_of(PAGE) if words[0] == "train")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A copy of mmbridge, and the package beside it."""
    folder = tmp_path_factory.mktemp("ninth")
    copy_project(folder)
    install(folder, "my_thermal", FILES, SETUP)
    return [folder, folder / "src"]


@pytest.fixture(scope="module")
def trained(path):
    """What a bridge of two modalities and one that the page's line added a third to have in common."""
    overrides = [
        *(word for word in TRAIN if word.startswith(("bridge.inputs.thermal=", "train=", "data.in", "optimizer.", "run.batch"))),
        "data.mix={describe: 1.0}", "run.steps=120",
    ]  # fmt: skip
    script = ROOT / "tests" / "docs" / "ninth_modality.py"
    return json.loads(run(path[0], path, str(script), str(path[0]), *overrides).splitlines()[-1])


def test_the_package_is_small():
    assert list(FILES) == ["medium.py", "tokenizer.py", "world.py"]
    assert sum(len(text.splitlines()) for text in (*FILES.values(), SETUP)) < 150


def test_the_command_line_and_messages_know_it_and_load_no_torch(path):
    code = """
import sys
from mmbridge.messages import parse_messages
from mmbridge.cli.main import main
main(["ls", "media"])
turns = parse_messages([{"role": "user", "content": [{"type": "thermal", "path": "cat.npy"}]}])
print(turns[0].parts[0].type, "torch" in sys.modules)
"""
    listed = run(path[0], path, "-c", code).splitlines()
    assert [line.split()[0] for line in listed[:-1]][-2:] == ["fmri", "thermal"]
    assert listed[-1] == "thermal False"


FACTS = """
import json
import numpy as np, torch
from pathlib import Path
import PIL.Image
from mmbridge import media
from mmbridge.config import Recipe
from mmbridge.data.tasks import make_task, read_medium, render_medium
from mmbridge.encoders import UniversalEncoder
from mmbridge.errors import MMBridgeError
from mmbridge.messages import store_media
from mmbridge.synthetic import Scene

def refusal(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except MMBridgeError as error:
        return str(error)

rng = np.random.default_rng(0)
scenes = [Scene.random(rng) for _ in range(90)]
maps = [render_medium("thermal", scene, seed) for seed, scene in enumerate(scenes)]
PIL.Image.fromarray((maps[0].map.numpy() * 100).round().astype(np.uint16)).save("warm.png")
PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save("drawing.png")
stored = store_media([{"role": "user", "content": [{"type": "thermal", "data": maps[0]}]}], Path())[0]["content"][0]
own = dict(weights="mmbridge/tiny-universal", config={"thermal": {"stride": 4}}, trains="tokenizer")
encoder, picture = UniversalEncoder("thermal", **own), UniversalEncoder("image", "mmbridge/tiny-universal")
task = make_task("thermal", "text", scenes[0], 3)
print(json.dumps({
    "judged": np.mean([read_medium(m) == s.factors("thermal") for m, s in zip(maps, scenes)]),
    "unseen": {Scene.random(rng, "unseen", "thermal").split_for("depth") for _ in range(20)} == {"unseen"},
    "stored": [stored, torch.equal(media.load("thermal", stored["path"]).map, maps[0].map)],
    "png": float((media.load("thermal", "warm.png").map - maps[0].map).abs().max()),
    "shapes": [list(encoder.prepare(maps[0]).shape), list(encoder(encoder.prepare(maps[0])[None]).shape), encoder.spec.tokens],
    "shared": encoder.transformer is picture.transformer,
    "strides differ": encoder.fingerprint != UniversalEncoder("thermal", **{**own, "config": {"thermal": {}}}).fingerprint,
    "part": task.messages[0]["content"][0]["type"],
    "measured": task.measured,
    "refusals": [
        refusal(media.load, "thermal", "drawing.png"),
        refusal(media.load, "thermal", torch.zeros(4, 4)),
        refusal(UniversalEncoder, "thermal", "mmbridge/tiny-universal"),
        refusal(UniversalEncoder, "thermal", "mmbridge/tiny-universal", {"thermal": {"strid": 4}}),
        refusal(encoder.encode, torch.zeros(1, 64, 64)),
    ],
}))
"""


def test_it_is_stored_judged_and_cut_into_tokens(path):
    facts = json.loads(run(path[0], path, "-c", FACTS).splitlines()[-1])
    assert facts["judged"] == 1.0 and facts["unseen"]
    assert facts["stored"] == [{"type": "thermal", "path": "thermal-0.npy"}, True]
    assert facts["png"] < 0.006
    assert facts["shapes"] == [[1, 64, 64], [1, 226, 96], 226]
    assert facts["shared"] and facts["strides differ"]
    assert facts["part"] == "thermal" and facts["measured"] == ["shape", "size", "place"]
    drawing, zero, absent, unknown, shape = facts["refusals"]
    assert "16 bits" in drawing and "in kelvin" in zero
    assert "has no tokenizer 'thermal'" in absent and "did you mean 'stride'" in unknown
    assert "is (B, 1, 64, 64), not (1, 64, 64)" in shape


def test_nothing_of_the_others_changes(trained):
    assert trained["changed"] == [] and trained["kept"] > 20
    assert trained["image"][0] == trained["image"][1]
    assert trained["transformers"] == 1


def test_what_is_added_is_its_own(trained):
    assert trained["added"] == [f"inputs.thermal.{part}" for part in ("projection", "tags", "tokenizer")]


def test_it_is_learned(trained):
    assert min(trained["thermal"].values()) > 0.6  # shape, size and place; by chance at most 1 in 3
