"""Stable Diffusion 1 and 2 as a decoder: a CLIP text encoder's hidden states steer a UNet on VAE latents.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752. Sampling goes
without the safety checker. Image-to-image, inpainting and Stable Diffusion XL are deliberately absent.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge.decoders.components import Folder
from mmbridge.decoders.latent_diffusion import LatentDiffusion
from mmbridge.errors import ConfigError
from mmbridge.media import Image, prepare_image
from mmbridge.registry import decoders as registry
from mmbridge.specs import ImageInput

register = registry.register


@register("stable_diffusion")
class StableDiffusion(LatentDiffusion):
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
        offload: Keep components on the CPU and bring each to the device only while it works.

    Examples:
        >>> decoder = StableDiffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype="bfloat16")
        >>> condition, mask = decoder.encode(["a red cube"])
        >>> decoder.sample(condition, seed=1)[0].save("cube.png")
    """

    modality = "image"
    kind = "Stable Diffusion 1 or 2"
    classes = {
        "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": None,
        "unet": "diffusers.UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
        "scheduler": None,
    }

    def __init__(
        self,
        source: str | Path,
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        offload: bool = False,
    ):
        super().__init__(Folder(source, self.classes, revision), steps, guidance, dtype, offload)
        self._resolution = resolution

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

    def options(self) -> dict[str, Any]:
        """Whatever changes ``encode`` and ``target`` besides weights; part of the fingerprint."""
        return {"tokens": self.spec.tokens, "resolution": self.resolution}

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of a picture: (3, side, side)."""
        return (3, self.resolution, self.resolution)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a picture's latents: (channels, side, side)."""
        side = self.resolution // self._scale
        return (self._read("vae", "latent_channels"), side, side)

    def _prepare(self, medium: Image) -> Tensor:
        half = (0.5, 0.5, 0.5)
        return prepare_image(medium, ImageInput(self.resolution, half, half))

    def _pipeline(self, scheduler: Any) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.component("vae"),
            text_encoder=None,
            tokenizer=None,
            unet=self.component("unet"),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def _output_size(self) -> dict[str, Any]:
        return {"height": self.resolution, "width": self.resolution}

    def _watch(self, preview: Callable[[int, int, Callable[[], list[Any]]], None], steps: int) -> dict[str, Any]:
        def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            preview(step + 1, pipeline.num_timesteps, lambda: self._media_of(tensors["latents"]))
            return tensors

        return {"callback_on_step_end": step_done}

    def _medium(self, output: Tensor) -> Image:
        return Image.load(output)
