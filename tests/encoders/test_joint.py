"""Joint embedders against the models' own forward passes, with small random models and the shipped ImageBind."""

import numpy as np
import pytest
import torch
from decoders.tiny_decoders import write_clip_vocabulary
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from mmbridge.encoders.joint import JointImageBind, JointTransformer, load_joint
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.media import Audio, Image

TEXTS = ["red", "a red car that is far too long for the text tower of this model"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = [Image(torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)) for _ in range(2)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip_vocabulary(folder / "files")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "files", model_max_length=12)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 12, **ids}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    model.save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "model")
    return folder / "model"


@torch.no_grad()
def test_clip_embeds_as_its_own_forward_pass(clip):
    joint = load_joint(clip)
    assert joint.modalities == ("image",)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    pictures = [picture.pixels.permute(1, 2, 0).numpy() for picture in PICTURES]
    inputs = processor(text=TEXTS, images=pictures, padding=True, truncation=True, max_length=12, return_tensors="pt")
    output = model(**inputs)
    torch.testing.assert_close(joint.embed_text(TEXTS), output.text_embeds)
    torch.testing.assert_close(joint.embed("image", PICTURES), output.image_embeds)
    # a text's neighbours do not change it
    torch.testing.assert_close(joint.embed_text(TEXTS[:1]), output.text_embeds[:1])
    with pytest.raises(ConfigError, match="embeds image only, not 'audio'"):
        joint.embed("audio", [])


@torch.no_grad()
def test_clap_embeds_as_its_own_forward_pass(clip, tmp_path):
    audio = {
        "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2], "num_hidden_layers": 2,
        "hidden_size": 16, "spec_size": 32, "num_mel_bins": 8, "window_size": 2, "projection_dim": 8, "patch_size": 2,
        "patch_stride": 2, "num_classes": 2,
    }  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(clip, model_max_length=12)
    text = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "projection_dim": 8,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8)).save_pretrained(tmp_path)
    extractor = ClapFeatureExtractor(feature_size=8, sampling_rate=16_000, max_length_s=1, truncation="rand_trunc")
    ClapProcessor(extractor, tokenizer).save_pretrained(tmp_path)
    joint = load_joint(tmp_path)
    assert joint.modalities == ("audio",)
    waves = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 16_000)).astype(np.float32)
    sounds = [Audio(torch.from_numpy(wave), 16_000) for wave in waves]
    model = ClapModel.from_pretrained(tmp_path).eval()
    words = joint.processor(text=TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    heard = joint.processor(audio=list(waves), sampling_rate=16_000, return_tensors="pt")
    output = model(**words, **heard)
    torch.testing.assert_close(joint.embed_text(TEXTS), output.text_embeds)
    torch.testing.assert_close(joint.embed("audio", sounds), output.audio_embeds)
    # of a sound that is too long the beginning is heard, and another rate is brought to the model's
    long = Audio(torch.from_numpy(np.concatenate([waves[0], waves[1]])), 16_000)
    torch.testing.assert_close(joint.embed("audio", [long]), output.audio_embeds[:1])
    assert joint.embed("audio", [Audio(long.samples, 8_000)]).shape == (1, 8)


def test_imagebind_is_one_too():
    joint = load_joint("mmbridge/tiny-imagebind")
    assert isinstance(joint, JointImageBind) and joint.modalities == ("image", "audio")
    vectors = joint.embed("image", PICTURES)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert vectors.shape == joint.embed_text(TEXTS).shape


def test_what_does_not_compare_words_with_media_is_refused(tmp_path, parts):
    with pytest.raises(ConfigError, match="has the towers vision; words can be compared"):
        load_joint(parts["imagebind"])
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=8)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="give CLIP, SigLIP, CLAP or ImageBind|could not load"):
        load_joint(tmp_path)
    with pytest.raises(CheckpointError, match="transformers could not load"):
        JointTransformer(tmp_path / "absent")
