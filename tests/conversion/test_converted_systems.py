"""Tiny files in NExT-GPT's and OneLLM's layouts, through `mmbridge convert`, opened, verified and written back."""

from pathlib import Path

import pytest
import tiny as factories
import torch
from conversion import tiny_onellm
from conversion.test_nextgpt_files import tiny as nextgpt_file
from decoders import tiny_decoders
from safetensors.torch import load_file
from transformers import AutoConfig

from mmbridge import published, verification
from mmbridge.bridge import Bridge
from mmbridge.cli.main import main
from mmbridge.conversion import onellm
from mmbridge.encoders.imagebind import ImageBindModel
from mmbridge.encoders.imagebind_modules import ImageBindConfig

AUDIO = {"dim": 16, "depth": 1, "heads": 2, "patch": 8, "stride": 6, "mel_bins": 20, "frames": 26}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen models of the released NExT-GPT, tiny, in folders of the usual names."""
    root = tmp_path_factory.mktemp("models")
    factories.llama(root / "vicuna-7b-v0")
    config = ImageBindConfig.from_dict({**factories.IMAGEBIND, "audio": AUDIO})
    ImageBindModel(config, ("image", "audio")).save_pretrained(root / "imagebind-huge")
    for make, name in (
        (tiny_decoders.stable_diffusion, "stable-diffusion-v1-5"),
        (tiny_decoders.modelscope, "zeroscope_v2_576w"),
        (tiny_decoders.audioldm, "audioldm-l-full"),
    ):
        Path(make(root / "made" / name)["source"]).rename(root / name)
    return root


def test_a_released_nextgpt_file_is_converted_opened_verified_and_written_back(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = nextgpt_file(words=AutoConfig.from_pretrained(models / "vicuna-7b-v0").vocab_size)
    torch.save(state, tmp_path / "pytorch_model.pt")
    source, target = str(tmp_path / "pytorch_model.pt"), str(tmp_path / "bridge")
    assert main(["convert", "nextgpt", source, target, "--base", str(models)]) == 0
    assert "CC" in capsys.readouterr().out
    bridge = Bridge.from_pretrained(target)
    assert torch.equal(bridge.parts()["inputs.audio.projection"]["layer.weight"], state["llama_proj.weight"].float())
    assert main(["verify", target]) == 0
    assert "✗" not in capsys.readouterr().out
    assert main(["convert", "--to", "nextgpt", target, str(tmp_path / "back.safetensors"), "--base", source]) == 0
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_a_onellm_file_is_converted_opened_verified_and_written_back(tmp_path: Path) -> None:
    state = tiny_onellm.state()
    torch.save(state, tmp_path / "consolidated.00-of-01.pth")
    published.convert("onellm", tmp_path / "consolidated.00-of-01.pth", tmp_path / "bridge")
    bridge = Bridge.from_pretrained(tmp_path / "bridge")
    features = torch.randn(2, 5, tiny_onellm.DIM)
    wanted = onellm.mixture(state, "imu")(features)
    torch.testing.assert_close(bridge.inputs["imu"].projection(features), wanted)
    encoded = bridge.inputs["pointcloud"].encoder(torch.randn(tiny_onellm.BATCHES["pointcloud"]))
    assert encoded.shape[-1] == tiny_onellm.DIM
    assert not [finding for finding in verification.verify(tmp_path / "bridge") if finding.whole is False]
    published.export("onellm", tmp_path / "bridge", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back and all(torch.equal(back[name], state[name]) for name in back)
    assert state.keys() - back.keys() == onellm.keymap(state).unused.keys()
