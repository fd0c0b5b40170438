"""Words and media in one space: CLIP, SigLIP, CLAP and ImageBind as one thing that evaluation compares replies with.

Not encoders of a bridge, which give tokens, but the whole published models with their text towers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbridge import hub
from mmbridge.encoders.base import Encoder
from mmbridge.encoders.imagebind import ImageBind, ImageBindModel, find_weights, read_config
from mmbridge.errors import CheckpointError, ConfigError


class JointEmbedder(ABC):
    """Embeds words and media in one space.

    Attributes:
        modalities: What it embeds besides text: "image", "audio".
    """

    modalities: tuple[str, ...]

    @torch.no_grad()
    def embed(self, modality: str, media: Sequence[Any]) -> Tensor:
        """Return unit vectors (N, D) of ``media.Image`` or ``media.Audio`` objects.

        Raises:
            ConfigError: A modality that it does not embed.
        """
        if modality not in self.modalities:
            raise ConfigError(
                f"{type(self).__name__} embeds {' and '.join(self.modalities)} only, not {modality!r}; "
                "name CLIP or ImageBind for pictures, CLAP or ImageBind for sounds."
            )
        return F.normalize(self._embed(modality, media).float(), dim=-1)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D) of texts, which are cut to the length that the model reads."""
        return F.normalize(self._embed_text(list(texts)).float(), dim=-1)

    @abstractmethod
    def _embed(self, modality: str, media: Sequence[Any]) -> Tensor: ...

    @abstractmethod
    def _embed_text(self, texts: list[str]) -> Tensor: ...


class JointImageBind(JointEmbedder):
    """ImageBind (arXiv 2305.05665): pictures, sounds and words.

    Args:
        source: As for ``ImageBind``.

    Raises:
        CheckpointError: No weights there.
        ConfigError: Weights without a text tower, or with neither vision nor audio.
    """

    def __init__(self, source: str | Path):
        self.source = source
        towers = read_config(find_weights(hub.resolve(source)).parent).towers
        wanted = {"vision": "image", "audio": "audio"}
        self.modalities = tuple(modality for tower, modality in wanted.items() if tower in towers)
        if "text" not in towers or not self.modalities:
            raise ConfigError(
                f"{str(source)!r} has the towers {', '.join(towers)}; words can be compared with media only where "
                "there is 'text' and one of 'vision' and 'audio'."
            )
        self._text = ImageBindModel.from_pretrained(source, ("text",)).eval()
        self._media: dict[str, Encoder] = {}

    def _embed(self, modality: str, media: Sequence[Any]) -> Tensor:
        if modality not in self._media:
            self._media[modality] = ImageBind(modality, self.source, tokens="pooled")
        encoder = self._media[modality]
        return encoder(torch.stack([encoder.prepare(medium) for medium in media])).squeeze(1)  # (N, 1, D) -> (N, D)

    def _embed_text(self, texts: list[str]) -> Tensor:
        return self._text.embed("text", self._text.tokenize(texts))


class JointTransformer(JointEmbedder):
    """A model of transformers with ``get_text_features``: CLIP (arXiv 2103.00020), SigLIP, CLAP (arXiv 2211.06687).

    Args:
        folder: Model, preprocessor and tokenizer as ``save_pretrained`` writes them.

    Raises:
        CheckpointError: The folder can't be loaded, or its model does not compare words with media.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoModel, AutoProcessor

        try:
            self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"transformers could not load {str(folder)!r} ({reason}); give a folder with model, preprocessor and "
                "tokenizer, or download the model anew."
            ) from error
        self.modalities = tuple(name for name in ("image", "audio") if hasattr(self.model, f"get_{name}_features"))
        if not hasattr(self.model, "get_text_features") or not self.modalities:
            raise CheckpointError(
                f"{str(folder)!r} holds a {type(self.model).__name__}, which does not compare words with media; "
                "give CLIP, SigLIP, CLAP or ImageBind."
            )

    def _embed(self, modality: str, media: Sequence[Any]) -> Tensor:
        if modality == "image":
            pictures = [medium.pixels.permute(1, 2, 0).numpy() for medium in media]
            return self.model.get_image_features(**self.processor(images=pictures, return_tensors="pt")).pooler_output
        extractor = self.processor.feature_extractor
        rate, longest = extractor.sampling_rate, getattr(extractor, "nb_max_samples", None)
        # the beginning of what is too long, because CLAP's extractor would take a part at random
        sounds = [medium.resample(rate).samples[:longest].numpy() for medium in media]
        inputs = self.processor(audio=sounds, sampling_rate=rate, return_tensors="pt")
        return self.model.get_audio_features(**inputs).pooler_output

    def _embed_text(self, texts: list[str]) -> Tensor:
        positions = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=texts,
            # SigLIP reads its last position, whatever the text's length, and was trained so
            padding="max_length" if self.model.config.model_type.startswith("siglip") else True,
            truncation=True,
            max_length=min(self.processor.tokenizer.model_max_length, positions),
            return_tensors="pt",
        )
        return self.model.get_text_features(**inputs).pooler_output


def load_joint(source: str | Path) -> JointEmbedder:
    """Return the model at a source: a transformers folder or hub id, or ImageBind's folder, file or shipped name.

    Raises:
        CheckpointError: Nothing usable is there.
        ConfigError: A model that does not compare words with media.
    """
    path = hub.resolve(source)
    config = path / "config.json"
    if path.is_dir() and config.is_file() and "model_type" in hub.read_json(config):
        return JointTransformer(path)
    return JointImageBind(source)
