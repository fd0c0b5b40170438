"""OneLLM's projection against numbers that its published code computed (commit in each file's metadata); 1e-5, absolute."""

import json
import re
from pathlib import Path

import pytest
import torch
from conversion import tiny_onellm
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mmbridge import Bridge
from mmbridge.conversion import onellm
from mmbridge.encoders import UniversalConfig, UniversalEncoder
from mmbridge.errors import CheckpointError, ConfigError

HERE = Path(__file__).parent
FRAMES = {"video": 5, "rgbd": 2, "rgbn": 2}  # stand in the batch of the file's features, and are averaged first


@pytest.fixture(scope="module")
def oracle():
    return load_file(HERE / "onellm_upm.safetensors")


@pytest.fixture
def state(oracle):
    return {key.removeprefix("param."): value for key, value in oracle.items() if key.startswith("param.")}


def features_of(oracle, modality):
    return oracle[f"in.{modality}.features"].unflatten(0, (-1, FRAMES.get(modality, 1))).mean(1)


def assert_equal(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("modality", onellm.MODALITIES)
def test_tokens_match(oracle, state, modality):
    projection, features = onellm.mixture(state, modality).eval(), features_of(oracle, modality)
    assert_equal(projection(features), oracle[f"out.{modality}.tokens"])
    assert_equal(projection.weights(features).expand(2, -1, -1), oracle[f"out.{modality}.routing_weights"])
    both = torch.cat([projection.tokens.expand(2, -1, -1), projection.project_in(features)], dim=1)
    for number, states in enumerate(projection.experts(both, 30)):
        assert_equal(states, oracle[f"out.{modality}.expert{number}"])


@pytest.mark.parametrize("modality", ["audio", "imu"])
def test_routing_is_the_same_for_any_two_inputs(oracle, state, modality):
    projection = onellm.mixture(state, modality)
    one, two = projection.weights(features_of(oracle, modality)), projection.weights(torch.randn(3, 7, 64))
    assert torch.equal(one, two)


def test_a_block_matches():
    data = load_file(HERE / "onellm_block.safetensors")
    state = {key.removeprefix("param."): value for key, value in data.items() if key.startswith("param.")}
    state = {f"resample_layers.0.0.{key}": value for key, value in state.items()}
    rest = {"clip_proj1": 64, "clip_proj2": 64}
    for name, dim in rest.items():
        state |= {f"{name}.image.0.weight": torch.eye(dim), f"{name}.image.0.bias": torch.zeros(dim)}
        state |= {f"{name}.image.1.weight": torch.ones(dim), f"{name}.image.1.bias": torch.zeros(dim)}
    state |= {"routers.image.fc1.weight": torch.zeros(256, 64), "routers.image.fc1.bias": torch.zeros(256)}
    state |= {"routers.image.fc2.weight": torch.zeros(1, 256), "routers.image.fc2.bias": torch.zeros(1)}
    state["resample_tokens.image"] = torch.zeros(1, 2, 64)
    experts = onellm.mixture(state, "image", num_heads=4).experts
    assert_equal(experts(data["in.x"], 11)[0], data["out.expert"])
    assert_equal(experts(data["in.x"], 3)[0], data["out.expert"][:, :3])


@torch.no_grad()
def test_a_block_of_the_language_model_matches():
    data = load_file(HERE / "onellm_block.safetensors")
    block = {f"llma.layers.0.{key.removeprefix('param.')}": value for key, value in data.items() if "param." in key}
    file = tiny_onellm.state()
    assert block.keys() <= file.keys()
    model = LlamaForCausalLM(LlamaConfig(**onellm.base_configs(file, heads=4)["base.language_model"])).eval()
    model.load_state_dict(onellm.released(file | block, heads=4)["base.language_model"], strict=True)
    found = []
    model.model.layers[0].register_forward_hook(lambda module, given, made: found.append(made))
    model(inputs_embeds=data["in.x"])
    assert_equal(found[0] if isinstance(found[0], torch.Tensor) else found[0][0], data["out.llm"])


def published_file():
    keys = json.loads((HERE / "onellm_7b_keys.json").read_text())["keys"]
    return {name: torch.empty(shape, dtype=torch.half, device="meta") for name, shape in keys.items()}


def test_the_published_file_fills_full_size_modules(tmp_path):
    file = published_file()
    parts, mapped = onellm.released(file), onellm.keymap(file)
    used = [source for part in mapped.parts.values() for target in part.values() for source in target.sources]
    assert len(file) == 940 and sorted([*used, *mapped.unused]) == sorted(file)
    configs = onellm.base_configs(file)
    assert UniversalConfig.from_dict(configs["base.encoder"]) == UniversalConfig.published()
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    config = onellm.bridge_config(file, {name[5:]: str(tmp_path / name) for name in configs})
    for way in config["inputs"].values():
        way.pop("tags")
    with torch.device("meta"):
        bridge = Bridge.from_config(config)
    bridge.backbone.model.load_state_dict(parts["base.language_model"], strict=True, assign=True)
    unfilled = set(parts["base.encoder"])
    for way in bridge.inputs.values():
        own = f"tokenizers.{way.encoder.kind}."
        names = {name: name.replace("tokenizer.", own) for name in way.encoder.state_dict()}
        tensors = {name: parts["base.encoder"][source] for name, source in names.items()}
        way.encoder.load_state_dict(tensors, strict=True, assign=True)
        unfilled -= set(names.values())
    assert not unfilled
    for name, parameters in bridge.parts().items():
        assert {key: value.shape for key, value in parameters.items()} == {k: v.shape for k, v in parts[name].items()}
    assert parts.keys() - bridge.parts().keys() == {*configs, *(f"inputs.{name}.tags" for name in bridge.inputs)}
    shared = sum(value.numel() for value in bridge.parts()["inputs.shared.experts"].values())
    assert shared == 3 * 102_776_832


def test_the_way_back_from_full_size_has_the_published_names_and_shapes():
    file = published_file()
    back, unused = onellm.export(onellm.released(file)), onellm.keymap(file).unused
    assert back.keys() | unused.keys() == file.keys() and not back.keys() & unused.keys()
    assert all(value.shape == file[name].shape and value.dtype == torch.half for name, value in back.items())


def test_an_encoder_alone_has_the_published_sizes():
    small = {name: value for name, value in published_file().items() if not re.search(r"resblocks\.(?!0\.)", name)}
    state = {name: torch.zeros(()).half().expand(value.shape) for name, value in small.items()}  # expanded: no memory
    tokens = {}
    for modality in ("audio", "imu", "point", "rgbd"):
        encoder = onellm.encoder(state, modality)
        assert isinstance(encoder, UniversalEncoder) and not any(value.requires_grad for value in encoder.parameters())
        tokens[encoder.modality] = encoder.spec.tokens
    assert tokens == {"audio": 1213, "imu": 392, "pointcloud": 1025, "depth": 257}


DAMAGE = {
    "1 missing: routers.audio.fc2.bias": lambda state: state.pop("routers.audio.fc2.bias"),
    "1 unexpected: routers.audio.fc3.bias": lambda state: state.update({"routers.audio.fc3.bias": torch.zeros(3)}),
    "1 of the wrong shape: resample_layers.2.7.feed_forward.w2.weight (64, 5) instead of (64, 192)": lambda state: (
        state.update({"resample_layers.2.7.feed_forward.w2.weight": torch.zeros(64, 5)})
    ),
    "1 not finite: resample_layers.0.0.attention_norm.weight": lambda state: state.update({
        "resample_layers.0.0.attention_norm.weight": torch.full((64,), torch.nan)
    }),
    "18 missing: resample_layers.0.8.attention.wk.weight": lambda state: state.update({
        key.replace("resample_layers.1.0", "resample_layers.1.8"): value
        for key, value in list(state.items()) if key.startswith("resample_layers.1.0.")
    }),
}  # fmt: skip


@pytest.mark.parametrize("sentence", DAMAGE)
def test_damage_is_listed(state, sentence):
    DAMAGE[sentence](state)
    with pytest.raises(CheckpointError, match="does not fill the projection of 'audio'") as error:
        onellm.mixture(state, "audio")
    assert sentence in str(error.value)


def test_an_unknown_modality_is_named(state):
    with pytest.raises(ConfigError, match="no modality 'sound'"):
        onellm.mixture(state, "sound")


def test_names_of_the_file_are_taken_as_they_are(oracle, state):
    whole = {f"llma.{key}": value for key, value in state.items()}
    features = features_of(oracle, "image")
    assert torch.equal(onellm.mixture(whole, "image")(features), onellm.mixture(state, "image")(features))
