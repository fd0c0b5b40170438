"""The Inception network of FID, by torch-fidelity, whose weights are never downloaded here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge import hub
from mmbridge.errors import CheckpointError, ConfigError, MissingExtraError

ADDRESS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"
"""First digits of the weights' hash, which their file name carries."""


class Inception:
    """Inception-v3 of 2015 as TensorFlow had it, up to its last pooling: pictures to vectors of 2048.

    Source: Heusel et al., arXiv 1706.08500, appendix A1; numbers compare only with those of this network. Pictures of any
    size are brought to 299 x 299 by the network's own bilinear resize, without cropping.

    Args:
        file: The weights; None for the file of the same name in torch.hub's folder of checkpoints.

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        CheckpointError: The weights are not there, or are others; the message says where they are had from.
    """

    def __init__(self, file: str | Path | None = None):
        if file is None:
            file = Path(torch.hub.get_dir()) / "checkpoints" / ADDRESS.rsplit("/", 1)[1]
        file = Path(file)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise MissingExtraError("FID needs torch-fidelity: pip install 'mmbridge[metrics]'.") from error
        if not file.is_file():
            raise CheckpointError(f"FID needs the Inception weights as {file}; download {ADDRESS} to there.")
        found = hub.file_sha256(file)
        if not found.startswith(SHA256):  # torch-fidelity unpickles it, so nothing else may stand there
            raise CheckpointError(
                f"{file} is not the Inception network of FID (its hash is {found[:16]}..., not {SHA256}...); "
                f"download {ADDRESS} anew."
            )
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))

    @torch.no_grad()
    def embed(self, modality: str, media: Sequence[Any]) -> Tensor:
        """Return features (N, 2048) of ``media.Image`` objects, one by one because their sizes differ.

        Raises:
            ConfigError: Another modality than "image".
        """
        if modality != "image":
            raise ConfigError(f"Inception reads pictures, not {modality!r}; name CLAP or ImageBind for sounds.")
        return torch.cat([self.network(image.pixels.unsqueeze(0))[0] for image in media])
