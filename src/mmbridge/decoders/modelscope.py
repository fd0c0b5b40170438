"""ModelScope's text-to-video synthesis as a decoder, and ZeroScope, which has the same architecture.

Source: Wang et al., "ModelScope Text-to-Video Technical Report", arXiv 2308.06571. A CLIP text encoder's hidden states steer
a UNet with convolutions and attention over time; the VAE knows single frames only. Video-to-video is deliberately absent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge.decoders.components import Folder
from mmbridge.decoders.latent_diffusion import import_pipeline
from mmbridge.decoders.video_diffusion import VideoDiffusion
from mmbridge.registry import decoders as registry

register = registry.register


@register("modelscope")
class ModelScope(VideoDiffusion):
    """A frozen ModelScope or ZeroScope: (B, tokens, dim) -> B videos.

    The folder's ``mmbridge.json`` may hold ``frames``, ``fps`` and ``resolution`` ([height, width]) besides steps and
    guidance. Published folders say neither frames nor their rate: ZeroScope was trained on 24 frames, ModelScope on 16
    at 8 a second.

    Args:
        source: A diffusers folder: shipped name, local path or hub id.
        steps: Sampling steps; None takes the folder's own, else 50.
        guidance: Classifier-free guidance; None takes the folder's own, else 9. Up to 1 means none.
        frames: Frames of a video; None takes the folder's own, else 24.
        fps: Frames a second; None takes the folder's own, else 8.
        resolution: Height and width in pixels; None takes the folder's own, else a square of the UNet's ``sample_size``.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        revision: Branch, tag or commit of a hub repository.
        offload: Keep components on the CPU and bring each to the device only while it works.

    Example:
        >>> decoder = ModelScope("cerspense/zeroscope_v2_576w", resolution=[320, 576], dtype="float16")
        >>> condition, mask = decoder.encode(["a red ball rolls to the left"])
        >>> decoder.sample(condition, seed=1)[0].save("ball.mp4")
    """

    kind = "ModelScope text-to-video"
    default_guidance = 9.0
    default_frames = 24
    default_fps = 8.0
    classes = {
        "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": None,
        "unet": "diffusers.UNet3DConditionModel",
        "vae": "diffusers.AutoencoderKL",
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

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of a video: (frames, 3, height, width), each frame being a picture of its own."""
        return (self.frames, 3, *self.resolution)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a video's latents: (channels, frames, height, width)."""
        height, width = self.resolution
        return (self._read("vae", "latent_channels"), self.frames, height // self._scale, width // self._scale)

    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance (B, 2 * channels, F, h, w) of prepared videos (B, F, 3, H, W), one at a time."""
        return torch.stack([super(ModelScope, self).moments(video).transpose(0, 1) for video in pixels])

    def _render(self, latents: Tensor) -> Tensor:
        frames = super()._render(latents.transpose(1, 2).flatten(0, 1))  # (B * F, 3, H, W)
        return frames.unflatten(0, (len(latents), -1))

    def _pipeline(self, scheduler: Any) -> Any:
        return import_pipeline("TextToVideoSDPipeline", "0.42")(
            vae=self.component("vae"),
            text_encoder=None,
            tokenizer=None,
            unet=self.component("unet"),
            scheduler=scheduler,
        )
