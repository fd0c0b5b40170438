"""What every encoder is: a frozen module from raw media tensors to tokens, which says what it takes and gives.

Published or self-made modules become encoders by subclassing ``Encoder``: set ``modality`` and ``licence``, give
``spec``, ``input`` and ``encode``, and call ``freeze()`` at the end of the constructor.
"""

import hashlib
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmbridge import hub, media
from mmbridge.errors import CheckpointError, MediaError
from mmbridge.specs import (
    AudioInput,
    DisparityInput,
    FmriInput,
    ImageInput,
    ImuInput,
    InputSpec,
    MapInput,
    PointsInput,
    TokenSpec,
    VideoInput,
)


class Encoder(nn.Module):
    """A frozen encoder: (B, ...) -> (B, T, D).

    Attributes:
        modality: What it reads: "image", "audio", "video", ...
        licence: SPDX name of the licence of its weights, or "unknown".
        source: Where its weights came from (name, folder or file), None for random weights.
        file: The weights file, None for random weights.
        options: Whatever changes the output besides weights and input spec; part of the fingerprint.
    """

    modality: str
    licence: str = "unknown"
    registry_name: str = ""
    source: str | None = None
    file: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}

    @property
    @abstractmethod
    def spec(self) -> TokenSpec:
        """Number and width of the tokens of one medium."""

    @property
    @abstractmethod
    def input(self) -> InputSpec | None:
        """The raw input that ``prepare`` makes; None where this modality is given as tensors only."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return tokens (B, T, D) for a batch of raw inputs."""

    def prepare(self, medium: Any) -> Tensor:
        """Turn one medium (``media.Image``, ``Audio``, ...) into raw input, without a batch dimension.

        Raises:
            MediaError: This encoder reads tensors only, or can't read this medium: a map without its picture, points at one
                place, brain activity of another length.
        """
        match self.input:
            case ImageInput() as spec:
                return media.prepare_image(medium, spec)
            case VideoInput() as spec:
                return media.prepare_video(medium, spec)
            case AudioInput() as spec:
                return media.prepare_audio(medium, spec)
            case MapInput() as spec:
                return media.prepare_map(medium, spec)
            case DisparityInput() as spec:
                return media.prepare_disparity(medium, spec)
            case PointsInput() as spec:
                return media.prepare_points(medium, spec)
            case ImuInput() as spec:
                return media.prepare_imu(medium, spec)
            case FmriInput() as spec:
                return media.prepare_fmri(medium, spec)
            case None:
                raise MediaError(
                    f"{type(self).__name__} can't read {self.modality} files; it takes tensors: call encoder(x) with a batch."
                )
            case spec:
                prepared: Tensor = spec.prepare(medium)
                return prepared

    def trainable(self) -> dict[str, nn.Module]:
        """Return the parts that a bridge may train, by name; most encoders have none."""
        return {}

    def gather(self, x: Tensor) -> Tensor:
        """Do the part of ``encode`` on a batch that no weight takes part in; it is done once where parts train."""
        return x

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, T, D), without gradients, in the precision of the weights."""
        dtype = next(self.parameters()).dtype
        return self.encode(x.to(dtype) if x.is_floating_point() else x)

    def freeze(self) -> Self:
        """Stop gradients to all parameters and leave training mode for good."""
        return self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the mode: a frozen encoder has no training behaviour."""
        return super().train(False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights, the preprocessing and the output options: the key of cached features.

        Read anew from the weights at each call, so that it can't be stale; ask once per run.
        """
        facts = {"class": type(self).__qualname__, "modality": self.modality, "options": self.options}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        digest.update(f"{self.input!r}{self.spec!r}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def describe(self) -> dict[str, str | None]:
        """Return what a manifest records of these weights: name, source, file hash, licence and hub revision."""
        return {
            "name": self.registry_name or type(self).__name__,
            "weights": self.source,
            "sha256": hub.file_sha256(self.file) if self.file else None,
            "licence": self.licence,
            "revision": find_revision(self.file) if self.file else None,
        }


def is_planning() -> bool:
    """Return whether parts are built on the meta device, to be measured: from configurations, without weights."""
    return torch.get_default_device().type == "meta"


def find_revision(path: Path) -> str | None:
    """Return the commit of a file in the Hugging Face cache (``.../snapshots/<commit>/...``), else None."""
    parents = path.parts
    return parents[parents.index("snapshots") + 1] if "snapshots" in parents[:-1] else None


def _shorten(names: list[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f", and {len(names) - shown} more" if len(names) > shown else "")


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Assign ``state`` to ``module``; every tensor must be used and every parameter filled.

    Raises:
        CheckpointError: Missing, unexpected or wrongly shaped tensors, listed.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = {
        "missing": [f"{name} {shapes[name]}" for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of the wrong shape": [
            f"{name} {found[name]} instead of {shapes[name]}"
            for name in shapes
            if found.get(name, shapes[name]) != shapes[name]
        ],
    }
    if any(faults.values()):
        lines = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in faults.items() if names]
        raise CheckpointError(
            f"{what} do not fit: {'; '.join(lines)}. Give the weights that belong to this configuration, or the "
            "configuration that belongs to these weights."
        )
    # assigned, because modules on the meta device have no storage to copy into; float32, whatever the file holds
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    module.load_state_dict(floats, strict=True, assign=True)
