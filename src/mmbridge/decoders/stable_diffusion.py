"""Stable Diffusion 1 and 2 as a decoder: a CLIP text encoder's hidden states steer a UNet on VAE latents.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752; guidance: Ho
and Salimans, arXiv 2207.12598. Training works on the components; sampling is diffusers' own pipeline, without its
safety checker. Image-to-image, inpainting and Stable Diffusion XL are deliberately absent.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmbridge.decoders.base import Decoder
from mmbridge.decoders.components import Folder, Given
from mmbridge.decoders.denoising import denoising_loss, draw_normal
from mmbridge.errors import CheckpointError, ConfigError, MediaError, ShapeError
from mmbridge.media import Image, prepare_image
from mmbridge.registry import decoders as registry
from mmbridge.specs import ConditionSpec, ImageInput

register = registry.register
log = logging.getLogger("mmbridge")

CLASSES = {
    "text_encoder": "transformers.CLIPTextModel",
    "tokenizer": None,
    "unet": "diffusers.UNet2DConditionModel",
    "vae": "diffusers.AutoencoderKL",
    "scheduler": None,
}


@register("stable_diffusion")
class StableDiffusion(Decoder):
    """A frozen Stable Diffusion: (B, tokens, dim) -> B pictures.

    The specification needs the folder's JSON files only; text encoder and tokenizer are loaded at the first ``encode``,
    VAE and UNet at the first ``target``, ``loss`` or ``sample``.

    Args:
        source: A diffusers folder: shipped name, local path or hub id.
        steps: Sampling steps; None takes the folder's own (``mmbridge.json``), else 50.
        guidance: Classifier-free guidance; None takes the folder's own, else 7.5. Up to 1 means none.
        resolution: Side of the pictures in pixels; None takes what the UNet was trained for.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        revision: Branch, tag or commit of a hub repository.

    Examples:
        >>> decoder = StableDiffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype="bfloat16")
        >>> condition, mask = decoder.encode(["a red cube"])
        >>> decoder.sample(condition, seed=1)[0].save("cube.png")
    """

    modality = "image"
    cached_components = ("text_encoder", "tokenizer", "vae")
    _unconditional: Tensor | None

    def __init__(
        self,
        source: str | Path,
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
    ):
        super().__init__(Folder(source, CLASSES, revision), dtype)
        self._steps, self._guidance, self._resolution = steps, guidance, resolution
        self.register_buffer("_unconditional", None, persistent=False)

    @classmethod
    def from_components(
        cls,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
    ) -> Self:
        """Build a decoder of components in memory; they are frozen, in place, when they are first used."""
        decoder = cls("components", steps, guidance, resolution, unet.dtype)
        parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "vae": vae, "scheduler": scheduler}
        decoder.components = Given(parts)
        return decoder.to(unet.device)

    def _read(self, component: str, key: str) -> Any:
        config = self.components.config(component)
        if key not in config:
            raise CheckpointError(
                f"the configuration of {component} in decoder {self.components.source!r} has no {key!r}; this is not a "
                "Stable Diffusion 1 or 2 folder, or the file is damaged."
            )
        return config[key]

    @cached_property
    def spec(self) -> ConditionSpec:
        """Shape of one condition: the text encoder's positions by the UNet's cross-attention width.

        Raises:
            CheckpointError: A configuration is missing or incomplete.
            ShapeError: The components do not fit together.
        """
        dim, hidden = self._read("unet", "cross_attention_dim"), self._read("text_encoder", "hidden_size")
        if dim != hidden:
            raise ShapeError(
                f"decoder {self.components.source!r} does not fit together: its UNet attends to conditions of width "
                f"{dim} but its text encoder gives width {hidden}; take both from the same model."
            )
        channels, latents = self._read("unet", "in_channels"), self._read("vae", "latent_channels")
        if channels != latents:
            raise ShapeError(
                f"decoder {self.components.source!r} does not fit together: its UNet takes {channels} channels but its "
                f"VAE makes {latents}; take both from the same text-to-image model (inpainting models don't serve)."
            )
        positions = self._read("text_encoder", "max_position_embeddings")
        longest = self.components.config("tokenizer").get("model_max_length", positions)
        return ConditionSpec(tokens=min(positions, longest), dim=dim)

    @cached_property
    def _scale(self) -> int:
        """Pixels per latent position, along one side."""
        return int(2 ** (len(self._read("vae", "block_out_channels")) - 1))

    @cached_property
    def resolution(self) -> int:
        """Side of the pictures in pixels.

        Raises:
            ConfigError: It is not a multiple of what the VAE needs, or neither given nor in the UNet's configuration.
        """
        side = self._resolution
        if side is None:
            size = self._read("unet", "sample_size")
            if not isinstance(size, int):
                raise ConfigError(
                    f"the UNet of decoder {self.components.source!r} has sample_size {size}; give a resolution."
                )
            side = size * self._scale
        multiple = max(8, self._scale)
        if side < multiple or side % multiple:
            raise ConfigError(
                f"the decoder's resolution is {side} but must be a positive multiple of {multiple} pixels."
            )
        return side

    @property
    def steps(self) -> int:
        """Sampling steps where ``sample`` is not told another number."""
        return int(self._steps if self._steps is not None else self.components.settings.get("steps", 50))

    @property
    def guidance(self) -> float:
        """Guidance where ``sample`` is not told another."""
        return float(self._guidance if self._guidance is not None else self.components.settings.get("guidance", 7.5))

    def options(self) -> dict[str, Any]:
        """Whatever changes ``encode`` and ``target`` besides weights; part of the fingerprint."""
        return {"tokens": self.spec.tokens, "resolution": self.resolution}

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the text encoder's last hidden states, as diffusers' ``encode_prompt`` does.

        Longer captions are cut at ``spec.tokens``, with a warning in the log.

        Returns:
            Condition (B, tokens, dim); mask (B, tokens), True at the caption's own positions, False at padding.

        Raises:
            ConfigError: There is no caption, or a string in place of a list.
        """
        if isinstance(captions, str) or not captions:
            raise ConfigError(f"encode takes a list of one or more captions, not {captions!r}; put it into a list.")
        tokens = self.spec.tokens
        text_encoder, tokenizer = self.component("text_encoder"), self.component("tokenizer")
        batch = tokenizer(list(captions), padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        cut = sum(bool(encoding.overflowing) for encoding in batch.encodings or ())
        if cut:
            log.warning("%d of %d captions were cut at %d tokens", cut, len(captions), tokens)
        mask = batch.attention_mask.to(self.anchor.device)
        # Few text encoders ask for the mask: Stable Diffusion was trained to see its padding.
        used = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
        condition = text_encoder(batch.input_ids.to(mask.device), attention_mask=used).last_hidden_state
        return condition, mask.bool()

    @torch.no_grad()
    def target(self, media: Sequence[Image]) -> Tensor:
        """Return the moments of the VAE's posterior for pictures, cropped to squares of the decoder's resolution.

        Returns:
            Mean and log-variance (B, 2 * channels, side, side), before the VAE's scaling factor.

        Raises:
            MediaError: There is no picture.
        """
        if not media:
            raise MediaError("a denoising target needs one or more images; none were given.")
        half = (0.5, 0.5, 0.5)
        pixels = torch.stack([prepare_image(image, ImageInput(self.resolution, half, half)) for image in media])
        return self.component("vae").encode(pixels.to(self.anchor)).latent_dist.parameters

    def loss(
        self,
        condition: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        min_snr_gamma: float | None = 5.0,
    ) -> Tensor:
        """Return the denoising loss: how badly ``condition`` helps the UNet to undo a random noising of the pictures.

        Args:
            condition: (B, tokens, dim); gradients flow to it and nowhere else.
            target: What ``target`` returned for the pictures.
            generator: Draws the latents, then the noise, then the timesteps; None takes torch's global state.
            min_snr_gamma: Cap of the min-SNR weights (arXiv 2303.09556); None weights all timesteps alike.

        Raises:
            ShapeError: Condition or target have another shape, or their batches differ.
        """
        self.check_condition(condition)
        side = self.resolution // self._scale
        unet, vae = self.component("unet"), self.component("vae")
        wanted = (len(condition), 2 * vae.config.latent_channels, side, side)
        if tuple(target.shape) != wanted:
            raise ShapeError(
                f"the denoising target has shape {tuple(target.shape)} instead of {wanted}; make it with this "
                "decoder's target(), one picture per condition."
            )
        mean, log_variance = target.to(self.anchor.device).float().chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        latents = (mean + deviation * draw_normal(mean, generator)) * vae.config.scaling_factor
        condition = condition.to(self.anchor)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return unet(noisy.to(condition.dtype), timesteps, encoder_hidden_states=condition).sample  # type: ignore[no-any-return]

        return denoising_loss(predict, self._training_schedule, latents, generator, min_snr_gamma)

    @cached_property
    def _training_schedule(self) -> Any:
        # Euler-like schedulers keep their samples in another scale, so they can't noise latents for the UNet.
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.component("scheduler").config)

    def sample(
        self,
        condition: Tensor,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        progress: bool = False,
    ) -> list[Image]:
        """Paint one picture for each condition.

        Args:
            condition: (B, tokens, dim).
            seed: One seed per row, or one number n: row i is then painted with seed n + i. A row's picture depends on
                its condition and its seed, not on its neighbours.
            steps: Sampling steps; None takes the decoder's own.
            guidance: Classifier-free guidance; None takes the decoder's own, up to 1 means none.
            progress: Show diffusers' progress bar.

        Raises:
            ShapeError: The condition has another shape.
            ConfigError: The number of seeds or of steps can't be used.
            MediaError: The pixels came out as NaN.
        """
        from diffusers import StableDiffusionPipeline

        self.check_condition(condition)
        seeds = [seed + row for row in range(len(condition))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(condition):
            raise ConfigError(
                f"{len(seeds)} seeds were given for {len(condition)} conditions; give one each, or one number."
            )
        scheduler = self.component("scheduler")
        steps, limit = self.steps if steps is None else steps, scheduler.config.num_train_timesteps
        if not 1 <= steps <= limit:
            raise ConfigError(f"the number of sampling steps is {steps} but must be in 1..{limit}.")
        guidance = self.guidance if guidance is None else guidance
        condition = condition.detach().to(self.anchor)
        pipeline: Any = StableDiffusionPipeline(
            vae=self.component("vae"),
            text_encoder=None,
            tokenizer=None,
            unet=self.component("unet"),
            scheduler=type(scheduler).from_config(scheduler.config),  # a new one: it carries state while sampling
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=not progress)
        pictures = pipeline(
            prompt_embeds=condition,
            negative_prompt_embeds=self.unconditional().expand_as(condition) if guidance > 1 else None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=self.resolution,
            width=self.resolution,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
            output_type="pt",
        ).images  # (B, 3, H, W) in 0..1
        if not pictures.isfinite().all():
            raise MediaError(
                f"decoder {self.components.source!r} computed NaN in {self.anchor.dtype}; check that the "
                "condition is finite, or use dtype 'float32'."
            )
        return [Image.load(picture) for picture in pictures]

    def unconditional(self) -> Tensor:
        """Return the condition of the empty caption (tokens, dim), computed once; guidance points away from it.

        A text encoder that was loaded for this alone is let go again, as sampling needs no other caption.
        """
        if self._unconditional is None:
            resident = self.is_loaded("text_encoder")
            self._unconditional = self.encode([""])[0][0]
            if not resident:
                del self.text_encoder
        return self._unconditional
