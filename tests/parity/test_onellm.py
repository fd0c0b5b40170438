"""OneLLM's projection against numbers that its published code computed (commit in each file's metadata); 1e-5, absolute."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbridge.conversion import onellm
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
