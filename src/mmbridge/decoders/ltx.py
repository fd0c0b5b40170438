"""LTX-Video as a decoder: T5 states steer a transformer that moves noise to latents of a video VAE along straight lines.

Source: HaCohen et al., "LTX-Video: Realtime Video Latent Diffusion", arXiv 2501.00103; rectified flow: Liu et al., arXiv
2209.03003. The VAE packs 32 x 32 pixels of 8 frames into one latent position. Image-to-video is deliberately absent.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mmbridge.decoders.components import Folder
from mmbridge.decoders.denoising import flow_matching_loss
from mmbridge.decoders.latent_diffusion import import_pipeline, join_mask, split_mask
from mmbridge.decoders.video_diffusion import VideoDiffusion
from mmbridge.registry import decoders as registry
from mmbridge.specs import ConditionSpec

register = registry.register

_TOKENS = 128  # of a caption, as in the pipeline


@register("ltx")
class LTX(VideoDiffusion):
    """A frozen LTX-Video: (B, tokens, dim) -> B videos.

    A condition holds T5's states, zero at padding, and as a last number of each position 1 where it is attended to and 0
    at padding, decided at a half. The folder's ``mmbridge.json`` may hold ``frames``, ``fps`` and ``resolution``
    ([height, width]) besides steps and guidance.

    Args:
        source: A diffusers folder: shipped name, local path or hub id.
        steps: Sampling steps; None takes the folder's own, else 50.
        guidance: Classifier-free guidance; None takes the folder's own, else 3. Up to 1 means none.
        frames: Frames of a video, 1 more than a multiple of 8; None takes the folder's own, else 161.
        fps: Frames a second; None takes the folder's own, else 25.
        resolution: Height and width in pixels, multiples of 32; None takes the folder's own, else [512, 704].
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        revision: Branch, tag or commit of a hub repository.
        offload: Keep components on the CPU and bring each to the device only while it works.

    Example:
        >>> decoder = LTX("Lightricks/LTX-Video", dtype="bfloat16", offload=True).to("cuda")
        >>> condition, mask = decoder.encode(["a red ball rolls to the left"])
        >>> decoder.sample(condition, seed=1)[0].save("ball.mp4")
    """

    kind = "LTX-Video"
    denoiser = "transformer"
    sampling = ("transformer", "vae")
    default_guidance = 3.0
    default_frames = 161
    default_fps = 25.0
    classes = {
        "text_encoder": "transformers.T5EncoderModel",
        "tokenizer": None,
        "transformer": "diffusers.LTXVideoTransformer3DModel",
        "vae": "diffusers.AutoencoderKLLTXVideo",
        "scheduler": None,
    }

    def __init__(
        self,
        source: str | Path,
        steps: int | None = None,
        guidance: float | None = None,
        frames: int | None = None,
        fps: float | None = None,
        resolution: Sequence[int] | None = None,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        offload: bool = False,
    ):
        folder = Folder(source, self.classes, revision)
        super().__init__(folder, steps, guidance, frames, fps, resolution, dtype, offload)

    @cached_property
    def spec(self) -> ConditionSpec:
        """Shape of one condition: T5's states, and whether they are attended to.

        Raises:
            CheckpointError: A configuration is missing or incomplete.
            ShapeError: The components do not fit together.
        """
        dim, width = self._read("transformer", "caption_channels"), self._read("text_encoder", "d_model")
        if dim != width:
            raise self._misfit(
                f"its transformer attends to conditions of width {dim} but its text encoder gives width {width}; take "
                "both from the same model."
            )
        channels = self._read("transformer", "in_channels")
        latents = self._read("vae", "latent_channels") * math.prod(self._patch) * self._patch[1]
        if channels != latents:
            raise self._misfit(
                f"its transformer takes {channels} channels but its VAE makes {latents}; take both from the same model."
            )
        return ConditionSpec(tokens=self._longest(_TOKENS), dim=dim + 1)

    @property
    def _patch(self) -> tuple[int, int]:
        """Latent positions that the transformer takes as one: in time and along a side."""
        return self._read("transformer", "patch_size_t"), self._read("transformer", "patch_size")

    @cached_property
    def _scale(self) -> int:
        """Pixels per latent position, along one side."""
        given = self.components.config("vae").get("spatial_compression_ratio")
        return int(given or self._read("vae", "patch_size") * self._halvings)

    @property
    def _frame_scale(self) -> int:
        given = self.components.config("vae").get("temporal_compression_ratio")
        return int(given or self._read("vae", "patch_size_t") * self._halvings)

    @property
    def _halvings(self) -> int:
        return int(2 ** sum(self._read("vae", "spatio_temporal_scaling")))

    @property
    def _side_multiple(self) -> int:
        return max(32, self._scale)  # the pipeline asks for 32

    def _own_resolution(self) -> Sequence[int]:
        return (512, 704)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of a video: (3, frames, height, width)."""
        return (3, self.frames, *self.resolution)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a video's latents: (channels, frames, height, width)."""
        height, width = (side // self._scale for side in self.resolution)
        return (self._read("vae", "latent_channels"), (self.frames - 1) // self._frame_scale + 1, height, width)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return T5's states of captions, as diffusers' ``encode_prompt`` does, joined with their mask.

        Returns:
            Condition (B, tokens, dim); mask (B, tokens), False at padding.

        Raises:
            ConfigError: There is no caption, or a string in place of a list.
        """
        ids, mask = self._tokenize(captions, self.spec.tokens)
        with self.using("text_encoder"):
            states = self.component("text_encoder")(ids).last_hidden_state  # it sees its padding, as in the pipeline
        return join_mask(states, mask), mask.bool()

    def _prepare(self, medium: Any) -> Tensor:
        return super()._prepare(medium).transpose(0, 1)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, F, h, w) in the scale that is denoised."""
        vae = self.component("vae")
        mean, deviation = (
            value.to(latents).view(-1, 1, 1, 1) for value in (vae.latents_mean, vae.latents_std)
        )  # (C, 1, 1, 1)
        return (latents - mean) * (vae.config.scaling_factor / deviation)

    def loss(
        self,
        condition: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        min_snr_gamma: float | None = None,
    ) -> Tensor:
        """Return the flow matching loss: how badly ``condition`` helps to tell which way noise lies from a noisy video.

        Args:
            condition: (B, tokens, dim); gradients flow to it and nowhere else.
            target: What ``target`` returned for the videos.
            generator: Draws the latents, then the noise, then the times; None takes torch's global state.
            min_snr_gamma: Not used: here the times' distribution weighs them.

        Raises:
            ShapeError: Condition or target have another shape, or their batches differ.
        """
        latents, condition = self._draw_latents(condition, target, generator)
        self.component(self.denoiser).to(self.anchor.device)
        scheduler = self.component("scheduler")

        def predict(noisy: Tensor, sigmas: Tensor) -> Tensor:
            times = sigmas * scheduler.config.num_train_timesteps
            return self.denoise(noisy.to(condition.dtype), times, condition)

        return flow_matching_loss(predict, latents, self._shift(scheduler.config), generator)

    def _shift(self, config: Any) -> float:
        """Return the logarithm of the factor by which the odds of noise grow: more for longer videos."""
        if not config.use_dynamic_shifting:
            return math.log(config.shift)
        positions = math.prod(self.latent_shape[1:])
        rise = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + rise * (positions - config.base_image_seq_len))

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Return the transformer's velocity for noisy latents (B, C, F, h, w) at times (B,) in 0..1000."""
        states, mask = split_mask(condition)
        _, frames, height, width = self.latent_shape
        time, side = self._patch
        patches = "b (f h w) (c t p q)"
        sizes = {"t": time, "p": side, "q": side}
        velocity = self.component("transformer")(
            hidden_states=rearrange(noisy, f"b c (f t) (h p) (w q) -> {patches}", **sizes),
            encoder_hidden_states=states,
            timestep=timesteps,
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self._frame_scale / self.fps, self._scale, self._scale),
            return_dict=False,
        )[0]
        grid = {"f": frames // time, "h": height // side, "w": width // side}
        return rearrange(velocity, f"{patches} -> b c (f t) (h p) (w q)", **sizes, **grid)

    def _watch(self, preview: Any, steps: int) -> dict[str, Any]:
        return {}  # its latents are packed and scaled on their way through the pipeline

    def _pipeline(self, scheduler: Any) -> Any:
        return import_pipeline("LTXPipeline", "0.42")(
            scheduler=scheduler,
            vae=self.component("vae"),
            text_encoder=None,
            tokenizer=None,
            transformer=self.component("transformer"),
        )

    def _prompt(self, condition: Tensor, empty: Tensor | None) -> dict[str, Any]:
        states, mask = split_mask(condition)
        without, unseen = (None, None) if empty is None else split_mask(empty)
        return {
            "prompt_embeds": states,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": without,
            "negative_prompt_attention_mask": unseen,
        }

    def _output_size(self) -> dict[str, Any]:
        return {**super()._output_size(), "frame_rate": self.fps}
