"""Tiny real decoders: each function writes a folder of random weights and returns what builds the decoder from it."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioLDMPipeline,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

TOKENS, DIM, RESOLUTION = 12, 16, 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
FRAMES, BINS, HOP, RATE = 3, 8, 4, 1000


def write_clip_vocabulary(folder: Path) -> None:
    """Write the ``vocab.json`` and ``merges.txt`` of a CLIP tokenizer that knows letters and two merges."""
    letters = list(string.ascii_lowercase)
    entries = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def picture_vae(**options: Any) -> AutoencoderKL:
    """Return a VAE that halves pictures once."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        **options,
    ).eval()


def stable_diffusion_parts(folder: Path, **schedule: Any) -> dict[str, Any]:
    """Return the components of a Stable Diffusion of 16 x 16 pictures; ``folder`` takes the tokenizer's files."""
    write_clip_vocabulary(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=DIM,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = picture_vae()
    text_encoder = clip_text_encoder(tokenizer)
    scheduler = DDIMScheduler(**{**SCHEDULE, **STEPS, **schedule})
    for module in (unet, vae, text_encoder):
        module.eval()
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def stable_diffusion_pipeline(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """Return diffusers' own pipeline of the components."""
    return _quiet(
        StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    )


def stable_diffusion(folder: Path) -> dict[str, Any]:
    """Write a Stable Diffusion folder and return the decoder's arguments."""
    stable_diffusion_pipeline(stable_diffusion_parts(folder / "files")).save_pretrained(folder / "model")
    (folder / "model" / "mmbridge.json").write_text('{"steps": 3, "guidance": 2.0, "licence": "Apache-2.0"}')
    return {"source": folder / "model"}


def roberta_tokenizer(folder: Path) -> RobertaTokenizer:
    """Return a RoBERTa tokenizer that knows letters; ``folder`` takes its files."""
    letters = list(string.ascii_lowercase)
    entries = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *("\u0120" + letter for letter in letters), "re"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    return RobertaTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def clap_text_config(tokenizer: RobertaTokenizer) -> ClapTextConfig:
    """Return the configuration of a CLAP text encoder of two layers."""
    return ClapTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS + 2,
        projection_dim=DIM,
        pad_token_id=tokenizer.pad_token_id,
    )


def audioldm_parts(folder: Path, **schedule: Any) -> dict[str, Any]:
    """Return the components of an AudioLDM of 64 ms at 1 kHz, in 8 mel bins; ``folder`` takes the tokenizer's files."""
    tokenizer = roberta_tokenizer(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=(8, 16),
        attention_head_dim=2,
        norm_num_groups=4,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=DIM,
        class_embeddings_concat=True,
    ).eval()
    return {
        "unet": unet,
        "vae": picture_vae(in_channels=1, out_channels=1),
        "text_encoder": ClapTextModelWithProjection(clap_text_config(tokenizer)).eval(),
        "tokenizer": tokenizer,
        "vocoder": vocoder(),
        "scheduler": DDIMScheduler(**{**SCHEDULE, **STEPS, **schedule}),
    }


def vocoder() -> SpeechT5HifiGan:
    """Return a HiFi-GAN of 4 samples a mel frame."""
    made = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=BINS,
            sampling_rate=RATE,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )
    for module in made.modules():  # its own start is so small that nothing could be heard
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            module.reset_parameters()
    return made.eval()


def audioldm_pipeline(parts: dict[str, Any]) -> AudioLDMPipeline:
    """Return diffusers' own pipeline of the components."""
    return _quiet(AudioLDMPipeline(**parts))


def audioldm(folder: Path) -> dict[str, Any]:
    """Write an AudioLDM folder and return the decoder's arguments."""
    audioldm_pipeline(audioldm_parts(folder / "files")).save_pretrained(folder / "model")
    settings = {"steps": 3, "guidance": 2.0, "mel": {"n_fft": 32, "win_length": 32, "high": 500}, "licence": "MIT"}
    (folder / "model" / "mmbridge.json").write_text(json.dumps(settings))
    return {"source": folder / "model"}


def modelscope_parts(folder: Path, **schedule: Any) -> dict[str, Any]:
    """Return the components of a ModelScope of 16 x 16 videos; VAE, text encoder and tokenizer are Stable Diffusion's."""
    parts = stable_diffusion_parts(folder, **schedule)
    torch.manual_seed(1)
    parts["unet"] = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=DIM,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    return parts


def modelscope_pipeline(parts: dict[str, Any]) -> TextToVideoSDPipeline:
    """Return diffusers' own pipeline of the components."""
    return _quiet(TextToVideoSDPipeline(**parts))


def modelscope(folder: Path) -> dict[str, Any]:
    """Write a ModelScope folder and return the decoder's arguments."""
    modelscope_pipeline(modelscope_parts(folder / "files")).save_pretrained(folder / "model")
    settings = {"steps": 2, "guidance": 2.0, "frames": FRAMES, "fps": 4, "licence": "MIT"}
    (folder / "model" / "mmbridge.json").write_text(json.dumps(settings))
    return {"source": folder / "model"}


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows letters and ends every text as T5's does."""
    entries = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Return a T5 encoder of two layers, of width 24."""
    sizes = {"d_model": 24, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval()


def audioldm2_parts(folder: Path, **schedule: Any) -> dict[str, Any]:
    """Return the components of an AudioLDM 2 of 64 ms at 1 kHz; ``folder`` takes a tokenizer's files."""
    parts = audioldm_parts(folder, **schedule)
    torch.manual_seed(2)
    tokenizer_2 = t5_tokenizer()
    audio = ClapAudioConfig(
        spec_size=64,
        window_size=4,
        num_mel_bins=64,
        intermediate_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        hidden_size=32,
        projection_dim=DIM,
        patch_size=2,
        patch_stride=2,
        patch_embeds_hidden_size=16,
        patch_embed_input_channels=4,
    )
    text = clap_text_config(parts["tokenizer"])
    clap = ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=DIM)
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=([None, 16, 24], [None, 16, 24]),
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    language_model = GPT2Model(GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=40, vocab_size=8)).eval()
    language_model.config.max_new_tokens = 3
    return {
        **parts,
        "unet": unet,
        "text_encoder": ClapModel(clap).eval(),
        "text_encoder_2": t5_encoder(tokenizer_2),
        "tokenizer_2": tokenizer_2,
        "projection_model": AudioLDM2ProjectionModel(DIM, 24, 16).eval(),
        "language_model": language_model,
    }


def audioldm2_pipeline(parts: dict[str, Any]) -> AudioLDM2Pipeline:
    """Return diffusers' own pipeline of the components."""
    return _quiet(AudioLDM2Pipeline(**parts, feature_extractor=None))


def audioldm2(folder: Path) -> dict[str, Any]:
    """Write an AudioLDM 2 folder and return the decoder's arguments."""
    audioldm2_pipeline(audioldm2_parts(folder / "files")).save_pretrained(folder / "model")
    settings = {"steps": 3, "guidance": 2.0, "mel": {"n_fft": 32, "win_length": 32, "high": 500}, "licence": "MIT"}
    (folder / "model" / "mmbridge.json").write_text(json.dumps(settings))
    return {"source": folder / "model", "tokens": TOKENS}


def ltx_parts() -> dict[str, Any]:
    """Return the components of an LTX-Video of 5 frames of 32 x 32 pixels."""
    tokenizer = t5_tokenizer()
    torch.manual_seed(3)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=24,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False),
        decoder_inject_noise=(False,) * 4,
        downsample_type=("conv",) * 3,
        upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3,
        patch_size=2,
    ).eval()
    with torch.no_grad():
        vae.latents_mean.add_(0.1)
        vae.latents_std.mul_(0.5)
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": t5_encoder(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=64
        ),
    }


def ltx_pipeline(parts: dict[str, Any]) -> LTXPipeline:
    """Return diffusers' own pipeline of the components."""
    return _quiet(LTXPipeline(**parts))


def ltx(folder: Path) -> dict[str, Any]:
    """Write an LTX-Video folder and return the decoder's arguments."""
    ltx_pipeline(ltx_parts()).save_pretrained(folder / "model")
    settings = {"steps": 2, "guidance": 2.0, "frames": 5, "fps": 5, "resolution": [32, 32], "licence": "MIT"}
    (folder / "model" / "mmbridge.json").write_text(json.dumps(settings))
    return {"source": folder / "model"}


def _quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
