"""Every recipe in recipes/: it is valid, fits its stage, follows its parent, and its bridge can be built."""

import fnmatch
from itertools import pairwise

import pytest
import torch
import yaml

from mmbridge import hub, planning
from mmbridge.bridge import Bridge
from mmbridge.config import Recipe, recipe_names
from mmbridge.encoders import UniversalConfig
from mmbridge.messages import TextPiece, parse_messages, render
from mmbridge.specs import ConditionSpec
from mmbridge.training.stages import check_stage

STAGES = ("encoder_alignment", "decoder_alignment", "instruction_tuning")
MODALITIES = ("image", "video", "audio", "pointcloud", "depth", "normal", "imu", "fmri")
ONELLM = ("image", "video_audio_pointcloud", "depth_normal_imu_fmri", "instruction_tuning")
TRAINED = {
    "encoder_alignment": ["inputs.*.projection"],
    "decoder_alignment": ["outputs.*.projection", "outputs.*.rows"],
    "instruction_tuning": ["inputs.*.projection", "outputs.*.projection", "outputs.*.rows", "backbone.lora"],
}
ONELLM_TRAINED = {"encoder_alignment": ["inputs.*"], "instruction_tuning": ["backbone.lora"]}
TINY_ONELLM_TRAINED = {
    **ONELLM_TRAINED,
    "instruction_tuning": ["backbone.lora", "outputs.*.projection", "outputs.*.rows"],
}


def test_every_system_has_the_three_stages():
    files = {path.relative_to(hub.package_folder("recipes")) for path in hub.package_folder("recipes").rglob("*.y*ml")}
    assert {file.with_suffix("").as_posix() for file in files} == set(recipe_names())
    systems = {name.split("/")[0] for name in recipe_names()}
    assert systems >= {"tiny", "nextgpt"}
    assert set(recipe_names("nextgpt/*")) == {f"nextgpt/{stage}" for stage in STAGES}
    assert set(recipe_names("tiny/*")) == {
        f"tiny/{stage}" for stage in (*STAGES, *(f"onellm-{name}" for name in ONELLM))
    }
    assert set(recipe_names("onellm/*")) == {f"onellm/{stage}" for stage in ONELLM}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid_and_fits_its_stage(name):
    recipe = Recipe.load(name)
    recipe.validate()
    stage, onellm = name.partition("/")[2].removeprefix("onellm-"), "onellm" in name
    if onellm:  # several alignments, called after what comes in new
        assert recipe.stage == ("encoder_alignment" if stage != ONELLM[-1] else stage)
    else:
        assert recipe.stage == stage
    trained = [part for part in recipe.bridge.part_names() if any(fnmatch.fnmatch(part, rule) for rule in recipe.train)]
    check_stage(recipe.stage, trained, recipe.losses)
    known = (TINY_ONELLM_TRAINED if name.startswith("tiny/") else ONELLM_TRAINED) if onellm else TRAINED
    assert recipe.train == known[recipe.stage]
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_tiny_onellm_grows_from_stage_to_stage():
    recipes = [Recipe.load(f"tiny/onellm-{stage}") for stage in ONELLM]
    before = [f"runs/tiny/onellm-{stage}" for stage in ONELLM[:-1]]
    assert [list(recipe.parents) for recipe in recipes] == [
        [],
        *([name] for name in before[:2]),
        [before[2], "mmbridge/tiny"],
    ]
    assert [tuple(recipe.bridge.inputs) for recipe in recipes] == [
        MODALITIES[:1],
        MODALITIES[:4],
        MODALITIES,
        MODALITIES,
    ]
    last = [{name: way.to_dict() for name, way in recipe.bridge.inputs.items()} for recipe in recipes[2:]]
    for name in MODALITIES:
        assert {**last[0][name], "like": None} == {**last[1][name], "like": None}
    tiny, ours = (
        Recipe.load(f"tiny/{name}").bridge.to_dict() for name in ("instruction_tuning", "onellm-instruction_tuning")
    )
    assert (tiny["outputs"], tiny["backbone"]) == (ours["outputs"], ours["backbone"])


@pytest.mark.parametrize("system", ["tiny", "nextgpt"])
def test_stages_follow_each_other(system):
    recipes = [Recipe.load(f"{system}/{stage}") for stage in STAGES]
    assert [recipe.parent for recipe in recipes] == [None, *(f"runs/{recipe.name}" for recipe in recipes[:-1])]
    first, second, third = (recipe.bridge.to_dict() for recipe in recipes)
    third["backbone"]["lora"] = None
    assert first == second == third


def test_nextgpt_has_the_settings_of_the_paper():
    recipes = [Recipe.load(f"nextgpt/{stage}") for stage in STAGES]
    assert [recipe.optimizer.lr for recipe in recipes] == [4e-4, 4e-4, 5e-4]
    assert [recipe.run.batch_size for recipe in recipes] == [18, 8, 4]
    for recipe in recipes:
        assert (recipe.optimizer.warmup, recipe.optimizer.weight_decay, recipe.optimizer.schedule) == (
            0.1,
            0.001,
            "linear",
        )
        assert set(recipe.bridge.inputs) == {"image", "video", "audio"}
        signals = {name: way.arguments["num_signals"] for name, way in recipe.bridge.outputs.items()}
        assert signals == {"image": 4, "video": 24, "audio": 8}
    lora = {"rank": 32, "alpha": 32, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    assert recipes[2].bridge.backbone.arguments["lora"] == lora


def test_onellm_goes_on_from_stage_to_stage_with_more_modalities():
    recipes = [Recipe.load(f"onellm/{stage}") for stage in ONELLM]
    assert [recipe.parent for recipe in recipes] == [None, *(f"runs/{recipe.name}" for recipe in recipes[:-1])]
    inputs = [recipe.bridge.to_dict()["inputs"] for recipe in recipes]
    assert [list(ways) for ways in inputs] == [
        ["image"],
        ["image", "video", "audio", "pointcloud"],
        [*MODALITIES],
        [*MODALITIES],
    ]
    for before, after in pairwise(inputs):
        assert before == {name: after[name] for name in before}
    assert not any(recipe.bridge.outputs for recipe in recipes)


def test_onellm_has_the_schedule_of_the_paper():
    recipes = [Recipe.load(f"onellm/{stage}") for stage in ONELLM]
    assert [recipe.optimizer.lr for recipe in recipes] == [5e-5, 1e-5, 1e-5, 2e-5]
    assert [recipe.run.batch_size * recipe.run.accumulate for recipe in recipes] == [5120, 1080, 1080, 512]
    assert [recipe.run.steps for recipe in recipes] == [200_000, 200_000, 100_000, 3918]
    assert [round(recipe.optimizer.warmup * recipe.run.steps) for recipe in recipes] == [2000, 2000, 2000, 196]
    lowest = [recipe.optimizer.lr * recipe.optimizer.floor for recipe in recipes]
    assert lowest == pytest.approx([5e-6, 5e-6, 5e-6, 0])
    for recipe in recipes:
        settings = recipe.optimizer
        assert (settings.betas, settings.weight_decay, settings.clip, settings.schedule) == (
            (0.9, 0.95),
            0.1,
            2.0,
            "cosine",
        )


def test_onellm_trains_the_whole_language_model_as_its_recipe_says():
    overrides = ["bridge.backbone.lora=null", "bridge.backbone.trainable=true", "train=[backbone.weights]"]
    recipe = Recipe.load("onellm/instruction_tuning", overrides)
    recipe.validate()
    text = (hub.package_folder("recipes") / "onellm" / "instruction_tuning.yaml").read_text()
    assert all(override in text for override in overrides)
    plan = planning.plan(recipe)
    assert [part.name for part in plan.parts if part.trained] == ["backbone.weights"]
    assert plan.gradients == 4 * 6_738_415_616
    assert plan.fits("H200") and not plan.fits("H100")


def test_onellm_stages_grow_as_the_paper_says():
    """One expert for pictures, of which the next stage makes three, and new modalities start as pictures; on meta."""
    single = Recipe.load("onellm/image", ["bridge.inputs.image.projection.num_experts=1"])
    ways = ("image", "video", "audio", "pointcloud")
    overrides = [f"bridge.inputs.{name}.projection.upcycle=0" for name in ways]
    overrides += [f"bridge.inputs.{name}.like=image" for name in ways[1:]]
    overrides += [f"losses.{name}.balance=0.01" for name in ways]
    several = Recipe.load("onellm/video_audio_pointcloud", overrides)
    for recipe, experts in ((single, 1), (several, 3)):
        recipe.validate()
        sizes = {part.name: part.parameters for part in planning.plan(recipe).parts}
        assert sizes["inputs.shared.experts"] == experts * 102_776_832


def test_onellm_aligns_with_nothing_but_the_caption_after_the_medium():
    templates = {Recipe.load(f"onellm/{stage}").bridge.backbone.arguments["template"] for stage in ONELLM[:-1]}
    assert len(templates) == 1
    pair = [
        {"role": "user", "content": [{"type": "image", "path": "cat.png"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    pieces = render(parse_messages(pair), templates.pop(), bos="<s>", eos="</s>")
    words = [(piece.text, piece.supervised) for piece in pieces if isinstance(piece, TextPiece)]
    assert [type(piece).__name__ for piece in pieces] == ["TextPiece", "MediumPiece", "TextPiece"]
    assert words == [("<s>", []), ("A cat.</s>", [(0, len("A cat.</s>"))])]


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.fixture(scope="module")
def build():
    """Build a recipe's bridge from configurations alone: no weights, no memory, no download."""

    def build_planned(name):
        with torch.device("meta"):
            bridge = Bridge.from_config(Recipe.load(name).bridge.to_dict())
        assert all(parameter.is_meta for parameter in bridge.parameters())
        return bridge

    return build_planned


@pytest.mark.parametrize("name", recipe_names())
def test_bridge_of_the_recipe_can_be_built(name, build):
    recipe = Recipe.load(name)
    bridge = build(name)
    assert list(bridge.parts()) == recipe.bridge.part_names()
    assert set(bridge.inputs) == set(recipe.bridge.inputs)
    assert set(bridge.outputs) == set(recipe.bridge.outputs)


def test_nextgpt_has_the_published_sizes(build):
    bridge = build("nextgpt/instruction_tuning")
    sizes = {name: count(parameters.values()) for name, parameters in bridge.parts().items()}
    assert sizes["backbone.lora"] == 33_554_432
    assert count(bridge.backbone.parameters()) - sizes["backbone.lora"] == 6_738_415_616
    assert sizes["outputs.image.projection"] == 31_958_784
    assert sizes["outputs.video.projection"] == 32_090_112
    assert sizes["outputs.audio.projection"] == 31_788_544
    rows = {name: sizes[f"outputs.{name}.rows"] / 4096 for name in bridge.outputs}
    assert rows == {"image": 4 + 1, "video": 24 + 1, "audio": 8 + 1}  # signals are read, the trigger alone is chosen
    assert bridge.inputs["image"].encoder.spec.dim == 1024
    assert [bridge.inputs[name].encoder.spec.tokens for name in ("image", "video", "audio")] == [256, 256, 228]
    specs = {name: way.decoder.spec for name, way in bridge.outputs.items()}
    assert specs["image"] == ConditionSpec(77, 768)
    assert specs["video"] == ConditionSpec(77, 1024)
    assert specs["audio"] == ConditionSpec(1, 512, normalized=True)
    video, audio = bridge.outputs["video"].decoder, bridge.outputs["audio"].decoder
    assert (video.frames, video.resolution, video.latent_shape) == (24, (320, 576), (4, 24, 40, 72))
    assert (audio.seconds, audio.sample_rate, audio.pixel_shape) == (5.12, 16000, (1, 512, 64))


def test_onellm_has_the_published_sizes(build):
    """7,597 million with CLIP's text tower and last projection, which are not used (124.4 million), and without LoRA."""
    bridge = build("onellm/instruction_tuning")
    sizes = {name: count(parameters.values()) for name, parameters in bridge.parts().items()}
    assert sizes["inputs.shared.experts"] == 3 * 102_776_832
    assert {sizes[f"inputs.{name}.projection"] for name in MODALITIES} == {
        1_051_648 + 4_206_592 + 4_210_691 + 30 * 1024
    }
    assert {sizes[f"inputs.{name}.tags"] for name in MODALITIES} == {2 * 4096}
    encoders = {name: way.encoder for name, way in bridge.inputs.items()}
    assert len({id(encoder.transformer) for encoder in encoders.values()}) == 1
    tokens = {name: encoder.spec.tokens for name, encoder in encoders.items()}
    pictures = dict.fromkeys(("image", "video", "depth", "normal"), 257)
    assert tokens == {**pictures, "audio": 1213, "pointcloud": 1025, "imu": 392, "fmri": 9}
    assert encoders["image"].sizes == UniversalConfig.published()
    assert encoders["pointcloud"].options["coordinates"] == (3, 4, 5)
    assert count(bridge.backbone.parameters()) - sizes["backbone.lora"] == 6_738_415_616


def test_configurations_that_ship_describe_the_published_models():
    """Sizes known from the models' cards: they would change with any number in the files."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from mmbridge.encoders.imagebind import ImageBindModel
    from mmbridge.encoders.imagebind_modules import ImageBindConfig

    folder = hub.resolve_config("stable-diffusion-v1-5/stable-diffusion-v1-5")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(hub.read_json(folder / "unet" / "config.json"))
        vae = AutoencoderKL.from_config(hub.read_json(folder / "vae" / "config.json"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        values = hub.read_json(hub.resolve_config("nielsr/imagebind-huge") / "config.json")
        imagebind = ImageBindModel(ImageBindConfig.from_dict(values))
    sizes = [count(model.parameters()) for model in (unet, vae, text, imagebind)]
    assert sizes[:3] == [859_520_964, 83_653_863, 123_060_480]
    assert round(sizes[3] / 1e6, 1) == 1200.8
    assert ImageBindConfig.from_dict(values) == ImageBindConfig.huge()


def test_decoders_to_sound_and_video_describe_the_published_models():
    """AudioLDM-L has a UNet of 739 M parameters (arXiv 2301.12503, section 4); ModelScope says 1.7 B of UNet and text encoder,
    the latter being Stable Diffusion 2's, and paints with Stable Diffusion's VAE."""
    from mmbridge.decoders import AudioLDM, ModelScope

    with torch.device("meta"):
        audio, video = AudioLDM("cvssp/audioldm-l-full"), ModelScope("cerspense/zeroscope_v2_576w")
        sizes = {
            f"{decoder.modality}.{name}": count(decoder.component(name).parameters())
            for decoder in (audio, video)
            for name, kind in decoder.classes.items()
            if kind is not None
        }
    assert round(sizes["audio.unet"] / 1e6) == 739
    assert sizes["video.vae"] == 83_653_863
    assert sizes["video.text_encoder"] == 340_387_840
    assert 1.7e9 < sizes["video.unet"] + sizes["video.text_encoder"] < 1.8e9
    assert audio.mel == {
        "n_fft": 1024, "win_length": 1024, "hop_length": 160, "mel_bins": 64, "low": 0, "high": 8000, "pad": 512, "peak": 0.5,
    }  # fmt: skip
