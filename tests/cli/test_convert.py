"""`mmbridge convert` and `mmbridge verify`, through the entry point."""

import json

import pytest
import torch

from mmbridge.cli.main import main
from mmbridge.encoders import ImageBind, ImageBindConfig, ImageBindModel
from mmbridge.encoders.imagebind_modules import ImuConfig


@pytest.fixture
def file(tmp_path):
    """Weights of ImageBind's layout: one tower at the published width, so that nothing needs telling."""
    config = ImageBindConfig(imu=ImuConfig(depth=1))
    state = ImageBindModel(config).state_dict()
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "imagebind.pth")
    return str(tmp_path / "imagebind.pth")


def test_convert_and_verify(file, tmp_path, capsys):
    target, report = str(tmp_path / "out"), tmp_path / "report.json"
    assert main(["convert", "imagebind", file, target, "--dtype", "float32", "--report", str(report)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "licence: ImageBind: CC-BY-NC-SA 4.0 for weights and code, no commercial use", target
    ]  # fmt: skip
    assert json.loads(report.read_text())["unused"] == {}
    x = torch.randn(1, 6, 2000)
    assert torch.equal(ImageBind("imu", target)(x), ImageBind("imu", file, config={"imu": {"depth": 1}})(x))
    assert main(["verify", target]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✓ model: ") and line.endswith("hash, finite, shapes, self-check of imu")
    with open(f"{target}/model.safetensors", "ab") as part:
        part.write(b"x")
    assert main(["verify", target]) == 1
    assert capsys.readouterr().out.startswith("✗ model: ")
    assert main(["convert", "imagebind", file, target]) == 2
    assert "out exists already and was not overwritten; name another place, or remove it." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "a", "b"], "name the system, and then SRC and DST"),
        (["convert", "nextgpt", "a", "b", "--to", "nextgpt"], "name the system, and then SRC and DST"),
        (["convert", "--to", "nextgpt", "a", "b", "--report", "r.json"], "--report tells of published weights"),
        (["convert", "imagbind", "a", "b"], "no published weights of 'imagbind' to convert; did you mean 'imagebind'"),
        (
            ["convert", "imagebind", "absent.pth", "b"],
            "there is no file or folder absent.pth; give the published weights",
        ),
        (["convert", "--to", "imagebind", "a", "b"], "no way back to imagebind; take nextgpt or onellm"),
        (["verify", "absent-folder"], "no file or folder at 'absent-folder'"),
    ],
)
def test_bad_command_lines_are_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
