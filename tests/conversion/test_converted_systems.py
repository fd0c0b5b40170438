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

from mmbridge import hub, published, verification
from mmbridge.bridge import Bridge
from mmbridge.cli.main import main
from mmbridge.conversion import onellm
from mmbridge.conversion.files import Checkpoint
from mmbridge.encoders.imagebind import ImageBindModel
from mmbridge.encoders.imagebind_modules import ImageBindConfig
from mmbridge.errors import CheckpointError, ConfigError

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
    for name in ("back.pth", "back.safetensors"):
        published.export("onellm", tmp_path / "bridge", tmp_path / name)
        back = Checkpoint(tmp_path / name)
        assert back and all(torch.equal(back[name], state[name]) for name in back)
        assert state.keys() - back.keys() == onellm.keymap(state).unused.keys()


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """The bridge of a tiny OneLLM file beside which LLaMA's params.json lies."""
    torch.save(tiny_onellm.state(), tmp_path / "consolidated.00-of-01.pth")
    hub.write_json(tmp_path / "params.json", {"dim": tiny_onellm.LLM, "n_heads": tiny_onellm.HEADS})
    published.convert("onellm", tmp_path / "consolidated.00-of-01.pth", tmp_path / "bridge")
    return tmp_path / "bridge"


def findings(folder: Path) -> dict[str, tuple[bool | None, str]]:
    return {finding.part: (finding.whole, finding.text) for finding in verification.verify(folder)}


def test_heads_are_read_from_a_file_beside_the_weights(converted: Path, tmp_path: Path) -> None:
    state, place = tiny_onellm.state(), converted / "base" / "language_model"
    assert hub.read_json(place / "config.json")["num_attention_heads"] == tiny_onellm.HEADS
    wanted = onellm.released(state, tiny_onellm.HEADS)["base.language_model"]
    found = load_file(place / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    published.export("onellm", converted, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], state[name]) for name in back)
    (tmp_path / "params.json").rename(tmp_path / "kept.json")
    hub.write_json(tmp_path / "config.json", {"num_attention_heads": 2})
    assert onellm.beside(tmp_path) == {"heads": 2}
    assert onellm.beside(tmp_path / "absent") == {}
    for heads, error, words in (
        ("x", CheckpointError, "config.json has num_attention_heads='x'; write the number"),
        (5, ConfigError, "width 64 can't have heads=5"),
    ):
        hub.write_json(tmp_path / "config.json", {"num_attention_heads": heads})
        with pytest.raises(error, match=words):
            published.convert("onellm", tmp_path / "consolidated.00-of-01.pth", tmp_path / "other")


def test_a_language_model_that_computes_something_else_is_found(converted: Path) -> None:
    part, file = "base.language_model", converted / "base" / "language_model" / "config.json"
    whole, text = findings(converted)[part]
    assert whole and text.endswith("hash, finite, shapes, self-check of first layer")
    good = hub.read_json(file)
    for key, value in (("hidden_act", "gelu"), ("num_attention_heads", 8), ("rms_norm_eps", 0.5)):
        changed = {"num_key_value_heads": value} if key == "num_attention_heads" else {}
        hub.write_json(file, {**good, key: value, **changed})
        whole, text = findings(converted)[part]
        assert whole is False and text.startswith("self-check of first layer is off by"), key


def test_a_bridge_with_shared_experts_is_checked_without_its_frozen_models(converted: Path, tmp_path: Path) -> None:
    Bridge.from_pretrained(converted).save_pretrained(tmp_path / "own")
    converted.rename(tmp_path / "away")
    found = findings(tmp_path / "own")
    for modality in onellm.OURS.values():
        whole, text = found[f"inputs.{modality}.projection"]
        assert whole and text.endswith("shapes, self-check of projection")
    assert found["inputs.shared.experts"][0] and "shapes" in found["inputs.shared.experts"][1]
