"""What decoders to videos share: the number of frames, their rate and their size, from arguments, folder or class."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmbridge.decoders.latent_diffusion import LatentDiffusion
from mmbridge.errors import ConfigError
from mmbridge.media import Video, crop_video


class VideoDiffusion(LatentDiffusion):
    """A frozen latent diffusion model of videos: (B, tokens, dim) -> B videos.

    The folder's ``mmbridge.json`` may hold ``frames``, ``fps`` and ``resolution`` ([height, width]).

    Args:
        components: Where the components come from.
        steps: Sampling steps; None takes the folder's own, else the class's.
        guidance: Classifier-free guidance; None takes the folder's own, else the class's. Up to 1 means none.
        frames: Frames of a video; None takes the folder's own, else the class's.
        fps: Frames a second; None takes the folder's own, else the class's.
        resolution: Height and width in pixels; None takes the folder's own, else the class's.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        offload: Keep components on the CPU and bring each to the device only while it works.
    """

    modality = "video"
    default_frames: ClassVar[int]
    default_fps: ClassVar[float]
    # Frames of several videos would be too many at once, and stochastic schedulers take one generator for all frames.
    rows_at_once = 1

    def __init__(
        self,
        components: Any,
        steps: int | None,
        guidance: float | None,
        frames: int | None,
        fps: float | None,
        resolution: Sequence[int] | None,
        dtype: str | torch.dtype,
        offload: bool,
    ):
        super().__init__(components, steps, guidance, dtype, offload)
        self._frames, self._fps, self._resolution = frames, fps, resolution

    @cached_property
    def frames(self) -> int:
        """Frames of a video.

        Raises:
            ConfigError: The model can't make that many.
        """
        own = self.components.settings.get("frames", self.default_frames)
        frames = own if self._frames is None else self._frames
        if not isinstance(frames, int) or frames < 1 or (frames - 1) % self._frame_scale:
            more = f" that is 1 more than a multiple of {self._frame_scale}" if self._frame_scale > 1 else ""
            raise ConfigError(f"the decoder's videos have {frames} frames but need a positive number{more}.")
        return frames

    @property
    def fps(self) -> float:
        """Frames a second."""
        own = self.components.settings.get("fps", self.default_fps)
        return float(own if self._fps is None else self._fps)

    @cached_property
    def resolution(self) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            ConfigError: They are not multiples of what the VAE needs.
        """
        sides = self.components.settings.get("resolution") if self._resolution is None else self._resolution
        if sides is None:
            sides = self._own_resolution()
        multiple = self._side_multiple
        if (
            not isinstance(sides, Sequence)
            or len(sides) != 2
            or any(not isinstance(side, int) or side < multiple or side % multiple for side in sides)
        ):
            raise ConfigError(
                f"the decoder's resolution is {sides} but must be [height, width], positive multiples of {multiple} "
                "pixels."
            )
        return (sides[0], sides[1])

    def _own_resolution(self) -> Sequence[int]:
        """Return height and width that the model was trained for."""
        size = self._read("unet", "sample_size")
        if not isinstance(size, int):
            raise ConfigError(
                f"the UNet of decoder {self.components.source!r} has sample_size {size}; give a resolution."
            )
        return (size * self._scale, size * self._scale)

    @property
    def _side_multiple(self) -> int:
        return max(8, self._scale)

    @property
    def _frame_scale(self) -> int:
        """Frames per latent position in time, after the first."""
        return 1

    def options(self) -> dict[str, Any]:
        """Whatever changes ``encode`` and ``target`` besides weights; part of the fingerprint."""
        return {"tokens": self.spec.tokens, "frames": self.frames, "resolution": list(self.resolution)}

    def _prepare(self, medium: Video) -> Tensor:
        return crop_video(medium, self.frames, *self.resolution) * 2 - 1

    def _output_size(self) -> dict[str, Any]:
        height, width = self.resolution
        return {"height": height, "width": width, "num_frames": self.frames}

    def _medium(self, output: Tensor) -> Video:
        return Video.load(output.float().clamp(0, 1), fps=self.fps)
