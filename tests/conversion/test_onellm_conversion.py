"""A whole OneLLM file to parts and back: nothing lost, nothing invented, every fault named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion.tiny_onellm import BATCHES, HEADS, LLM, TOKENS, TRANSFORMER_HEADS, VOCABULARY, shapes, state
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mmbridge import Bridge
from mmbridge.config import BridgeConfig, Part
from mmbridge.conversion import onellm
from mmbridge.encoders import UniversalEncoder
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.projections import MixtureOfExperts
from mmbridge.projections.mixture import add_modality

OURS = {"point": "pointcloud", "rgbd": "depth", "rgbn": "normal"}
UNUSED = 7


@pytest.fixture
def file() -> dict[str, Tensor]:
    return state()


def llama(file: dict[str, Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**onellm.base_configs(file, HEADS)["base.language_model"])).eval()
    model.load_state_dict(onellm.released(file, HEADS)["base.language_model"], strict=True)
    return model


def test_a_projection_shares_its_experts_by_the_name_of_the_recipes(file: dict[str, Tensor]) -> None:
    projection = onellm.mixture(file, "image", num_heads=2)
    config = onellm.bridge_config(file, num_heads=2)["inputs"]["image"]["projection"]
    assert projection.arguments["experts"] == config["experts"] == "experts"
    ways = {"image": projection}
    thermal = add_modality(ways, "thermal", like="image")
    assert thermal.experts is projection.experts and ways["thermal"] is thermal
    tokens = torch.randn(2, 5, 16)
    assert torch.equal(thermal(tokens), projection(tokens))


@pytest.fixture
def opened(file: dict[str, Tensor], tmp_path: Path) -> Bridge:
    """The bridge that opens a converted file, from folders on the disk."""
    parts = onellm.released(file, HEADS)
    configs = onellm.base_configs(file, HEADS)
    configs["base.encoder"]["heads"] = TRANSFORMER_HEADS
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(
            {k: v.contiguous() for k, v in parts[name].items()}, tmp_path / name / "model.safetensors", {"format": "pt"}
        )
    base = {name: str(tmp_path / f"base.{name}") for name in ("encoder", "language_model")}
    config = onellm.bridge_config(file, base, num_heads=2)
    assert all(way["tags"] is True for way in config["inputs"].values())
    bridge = Bridge.from_config(config).eval()
    names = [name for name in parts if name.startswith("inputs.")]
    ways = {modality: Part.from_plain(way, modality) for modality, way in config["inputs"].items()}
    assert BridgeConfig(Part("causal_lm"), ways).part_names() == list(bridge.parts())
    assert sorted(bridge.parts()) == sorted(names)
    for name, parameters in bridge.parts().items():
        assert parameters.keys() == parts[name].keys()
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(parts[name][key])
    return bridge


def test_every_tensor_is_used_once_or_named_with_a_reason(file: dict[str, Tensor]) -> None:
    found = onellm.keymap(file, HEADS)
    used = [source for part in found.parts.values() for target in part.values() for source in target.sources]
    assert sorted([*used, *found.unused]) == sorted(file)
    assert len(found.unused) == UNUSED and all(len(reason) > 20 for reason in found.unused.values())
    assert json.loads(json.dumps(found.report()))["unused"] == found.unused


def test_the_way_back_is_bit_for_bit(file: dict[str, Tensor]) -> None:
    half = {name: value.bfloat16() for name, value in file.items()}
    found = onellm.keymap(half, HEADS)
    back = onellm.export(onellm.released(half, HEADS), HEADS)
    assert back.keys() | found.unused.keys() == half.keys()
    for name, tensor in back.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, half[name]), name


def test_some_parts_can_be_exported_alone(file: dict[str, Tensor]) -> None:
    parts = onellm.released(file, HEADS)
    names = ("inputs.depth.tags", "inputs.shared.experts")
    back = onellm.export({name: parts[name] for name in names})
    assert set(back) == {name for name in file if "resample_layers" in name or name.endswith("_tag.rgbd")}


def test_parts_that_are_not_onellms_are_not_exported(file: dict[str, Tensor]) -> None:
    parts = onellm.released(file, HEADS)
    with pytest.raises(CheckpointError, match=r"no part 'inputs\.smell\.tags'"):
        onellm.export({"inputs.smell.tags": parts["inputs.image.tags"]})
    with pytest.raises(
        CheckpointError, match=r"'inputs\.image\.tags' can't be exported: it lacks end and has nothing more"
    ):
        onellm.export({"inputs.image.tags": {"start": torch.zeros(1, 8)}})


def change(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda file: file.update({name: make(file[name])})


FAULTS = {
    "1 missing: clip.visual.ln_post.bias": lambda file: file.pop("llma.clip.visual.ln_post.bias"),
    "1 missing: layers.1.attention.wk.weight": lambda file: file.pop("llma.layers.1.attention.wk.weight"),
    "1 missing: start_tag.rgbn": lambda file: file.pop("llma.start_tag.rgbn"),
    "1 missing: resample_tokens.fmri": lambda file: file.pop("llma.resample_tokens.fmri"),
    "lacks tok_embeddings.weight, from which sizes are read": lambda file: file.pop("llma.tok_embeddings.weight"),
    "1 unexpected: conv1.audio.scale": lambda file: file.update({"llma.conv1.audio.scale": torch.ones(1)}),
    "1 unexpected: layers.0.attention.wq.bias": lambda file: file.update({
        "llma.layers.0.attention.wq.bias": torch.ones(1)
    }),
    "1 of the wrong shape: layers.1.feed_forward.w2.weight (64, 5) instead of (64, 192)": change(
        "llma.layers.1.feed_forward.w2.weight", lambda value: value[:, :5]
    ),
    "1 of the wrong shape: resample_layers.1.0.attention_norm.weight (1,) instead of (16,)": change(
        "llma.resample_layers.1.0.attention_norm.weight", lambda value: value[:1]
    ),
    "1 of the wrong shape: end_tag.video (1, 64) instead of (1, 1, 64)": change(
        "llma.end_tag.video", lambda value: value[0]
    ),
    "conv1.fmri.weight (30, 11) instead of (32, 11)": change("llma.conv1.fmri.weight", lambda value: value[:30]),
    "clip.visual.class_embedding (1, 16) instead of 1 axes": change(
        "llma.clip.visual.class_embedding", lambda value: value[None]
    ),
    "1 not finite: llma.output.weight": change("llma.output.weight", lambda value: value * torch.nan),
    "1 not finite: llma.clip.visual.class_embedding": change(
        "llma.clip.visual.class_embedding", lambda value: value / 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", FAULTS)
def test_damage_is_one_error(file: dict[str, Tensor], sentence: str) -> None:
    FAULTS[sentence](file)
    with pytest.raises(CheckpointError, match="OneLLM checkpoint") as error:
        onellm.released(file, HEADS)
    assert sentence in str(error.value)


def test_heads_that_cannot_be_are_asked_for(file: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"width 64 can't have heads=5; pass the number"):
        onellm.keymap(file, 5)


@pytest.mark.parametrize("modality", BATCHES)
def test_an_encoder_alone_is_that_of_the_whole_file(file: dict[str, Tensor], opened: Bridge, modality: str) -> None:
    alone = onellm.encoder(file, modality, heads=TRANSFORMER_HEADS)
    theirs = {ours: theirs for theirs, ours in OURS.items()}.get(modality, modality)
    x = torch.randn(BATCHES[modality])
    way = opened.inputs[modality]
    tokens = alone(x)
    assert alone.modality == modality and tokens.abs().max() > 0.1
    assert torch.equal(tokens, way.encoder(x)) and alone.spec == way.encoder.spec
    assert torch.equal(tokens, onellm.encoder(file, theirs, heads=TRANSFORMER_HEADS)(x))
    slots = onellm.mixture(file, theirs, num_heads=2)(tokens)
    torch.testing.assert_close(way.projection(tokens), slots, rtol=0, atol=1e-6)
    assert slots.shape == (2, TOKENS, LLM)


def test_an_encoder_needs_only_its_own_tensors(file: dict[str, Tensor]) -> None:
    kept = {name: value for name, value in file.items() if "clip.visual." in name or ".imu" in name}
    imu = onellm.encoder(kept, "imu", heads=TRANSFORMER_HEADS)
    assert {parameter.dtype for parameter in imu.parameters()} == {torch.float32}
    kept.pop("llma.positional_embedding.imu")
    with pytest.raises(CheckpointError, match=r"fill the encoder of 'imu': 1 missing: positional_embedding\.imu"):
        onellm.encoder(kept, "imu")
    with pytest.raises(CheckpointError, match=r"1 unexpected: clip\.visual\.extra"):
        onellm.encoder(file | {"llma.clip.visual.extra": torch.zeros(1)}, "image")
    with pytest.raises(CheckpointError, match=r"positional_embedding (\(6, 16\)) instead of \(5, 16\)"):
        onellm.encoder(file | {"llma.clip.visual.positional_embedding": torch.zeros(6, 16)}, "image")
    with pytest.raises(CheckpointError, match=r"1 not finite: conv1\.audio\.bias"):
        onellm.encoder(file | {"llma.conv1.audio.bias": torch.full((16,), torch.inf)}, "audio")
    with pytest.raises(ConfigError, match="no key 'audio.strde'; did you mean 'stride'"):
        onellm.encoder(file, "audio", strde=3)


def test_points_are_grouped_by_colour_as_published_unless_asked_otherwise(file: dict[str, Tensor]) -> None:
    plain, published = (
        onellm.encoder(file, "point", heads=2, neighbours=3, **options) for options in ({"coordinates": (0, 1, 2)}, {})
    )
    assert isinstance(plain, UniversalEncoder)
    x = torch.randn(1, 30, 6)
    turned = x[..., [3, 4, 5, 0, 1, 2]]
    assert (plain(x) - published(x)).abs().max() > 1e-3
    with torch.no_grad():
        weight = plain.tokenizer.projection.weight
        weight.copy_(weight[:, [3, 4, 5, 0, 1, 2]].clone())
    torch.testing.assert_close(plain(turned), published(x))


def test_experts_are_one_module_and_one_part(opened: Bridge) -> None:
    projections = [way.projection for way in opened.inputs.values()]
    assert len({id(projection.experts) for projection in projections}) == 1
    parts = opened.parts()
    counted = sum(value.numel() for part in parts.values() for value in part.values())
    modules = [module for way in opened.inputs.values() for module in way.trainable().values()]
    assert counted == sum(value.numel() for value in {id(v): v for m in modules for v in m.parameters()}.values())
    assert not any("experts" in key for key in parts["inputs.image.projection"])


def test_shared_experts_are_saved_once_and_opened_together(opened: Bridge, tmp_path: Path) -> None:
    opened.save_pretrained(tmp_path / "bridge")
    again = Bridge.from_pretrained(tmp_path / "bridge")
    for name, parameters in opened.parts().items():
        assert all(torch.equal(value, again.parts()[name][key]) for key, value in parameters.items())
    assert again.inputs["imu"].projection.experts is again.inputs["audio"].projection.experts
    assert again.inputs["imu"].projection.experts is not opened.inputs["imu"].projection.experts
    holders = [file.name for file in (tmp_path / "bridge" / "parts").iterdir() if "shared" in file.name]
    assert holders == ["inputs.shared.experts.safetensors"]


def rotated(x: Tensor) -> Tensor:
    """Rotary positions in Meta's layout: neighbouring numbers are one complex one. (B, T, heads, size)."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def published(file: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of embeddings by LLaMA's definition (arXiv 2302.13971), with the tensors as they are in the file."""
    weight = {name.removeprefix("llma."): value for name, value in file.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight[f"{name}.weight"]

    for number in range(2):
        layer = f"layers.{number}"
        normed = norm(x, f"{layer}.attention_norm")
        query, key, value = (
            (normed @ weight[f"{layer}.attention.{name}.weight"].T).unflatten(-1, (HEADS, -1))
            for name in ("wq", "wk", "wv")
        )
        scores = torch.einsum("bthd,bshd->bhts", rotated(query), rotated(key)) / query.shape[-1] ** 0.5
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        read = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value).flatten(-2)
        x = x + read @ weight[f"{layer}.attention.wo.weight"].T
        normed = norm(x, f"{layer}.ffn_norm")
        gate, up = (normed @ weight[f"{layer}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weight[f"{layer}.feed_forward.w2.weight"].T
    return norm(x, "norm") @ weight["output.weight"].T


@pytest.fixture
def prompt(file: dict[str, Tensor]) -> Tensor:
    """BOS, start tag, slots, end tag and text as embeddings (2, 11, LLM)."""
    words = file["llma.tok_embeddings.weight"]
    features = torch.randn(2, 5, 16)
    with torch.no_grad():
        slots = onellm.mixture(file, "image", num_heads=2)(features)
    tags = [file[f"llma.{tag}.image"].expand(2, -1, -1) for tag in ("start_tag", "end_tag")]
    text = words[torch.randint(VOCABULARY, (2, 5))]
    return torch.cat([words[1].expand(2, 1, -1), tags[0], slots, tags[1], text], dim=1)


@torch.no_grad()
def test_the_language_model_equals_llamas_definition(file: dict[str, Tensor], prompt: Tensor) -> None:
    model = llama(file)
    torch.testing.assert_close(model(inputs_embeds=prompt).logits, published(file, prompt), rtol=1e-5, atol=1e-5)
    ids = torch.randint(VOCABULARY, (2, 7))
    words = file["llma.tok_embeddings.weight"][ids]
    torch.testing.assert_close(model(ids).logits, published(file, words), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("offset", [0, 2])
def test_cached_decoding_equals_full_decoding_or_repeats_the_published_offset(
    file: dict[str, Tensor], prompt: Tensor, offset: int
) -> None:
    model, cache = llama(file), DynamicCache()
    words = file["llma.tok_embeddings.weight"][torch.randint(VOCABULARY, (2, 6))]
    first = model(inputs_embeds=prompt, past_key_values=cache).logits
    torch.testing.assert_close(first, published(file, prompt), rtol=1e-5, atol=1e-5)
    if offset:
        onellm.repeat_cache_offset(cache)
    # new tokens stand where the prompt's last ones stood, and see none of them
    kept = prompt.shape[1] - offset
    wanted = published(file, torch.cat([prompt[:, :kept], words], dim=1))[:, kept:]
    for step in range(6):
        found = model(inputs_embeds=words[:, step : step + 1], past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(found, wanted[:, step], rtol=1e-5, atol=1e-5)


def test_sizes_of_the_bridge_are_those_of_the_tensors(file: dict[str, Tensor]) -> None:
    config = onellm.bridge_config({name: torch.empty(shape, device="meta") for name, shape in shapes().items()})
    assert config["backbone"]["source"] == "base.language_model"
    assert list(config["inputs"]) == ["image", "video", "audio", "pointcloud", "depth", "normal", "fmri", "imu"]
    way = config["inputs"]["depth"]
    assert way["encoder"] == {"name": "universal", "modality": "depth", "weights": "base.encoder"}
    assert config["inputs"]["pointcloud"]["encoder"]["coordinates"] == [3, 4, 5]
    arguments = {key: value for key, value in way["projection"].items() if key != "name"}
    sizes = MixtureOfExperts(dim_in=16, dim_out=LLM, **{**arguments, "num_heads": 2}).experts.sizes
    assert sizes == (2, 2, 16, 2, 24) and arguments["normalize"] == "sigmoid"
    assert json.loads(json.dumps(config)) == config
