"""AudioLDM as a decoder: a CLAP text embedding steers a UNet on latents of a log-mel VAE, and a HiFi-GAN makes sound.

Source: Liu et al., "AudioLDM: Text-to-Audio Generation with Latent Diffusion Models", arXiv 2301.12503; HiFi-GAN: Kong et
al., arXiv 2010.05646. The CLAP audio branch, with which AudioLDM was trained, is not needed and not loaded.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbridge.decoders.components import Folder
from mmbridge.decoders.latent_diffusion import LatentDiffusion, import_pipeline
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.media import Audio
from mmbridge.registry import decoders as registry
from mmbridge.specs import ConditionSpec

register = registry.register

MEL = {
    "n_fft": 1024,
    "win_length": 1024,
    "hop_length": None,
    "mel_bins": None,
    "low": 0,
    "high": 8000,
    "pad": None,
    "peak": 0.5,
}
"""AudioLDM's mel front end. ``hop_length`` and ``mel_bins`` None: what the vocoder takes. ``pad``: samples that are mirrored
at either end, None for half a window. ``peak``: what the loudest sample is scaled to, None for sounds as they are."""

_QUIETEST = 1e-5  # magnitudes are clamped there before the logarithm


@register("audioldm")
class AudioLDM(LatentDiffusion):
    """A frozen AudioLDM: (B, 1, dim) of unit norm -> B sounds.

    The folder's ``mmbridge.json`` may hold ``seconds`` and ``mel``, an object with keys of ``MEL``, besides steps and
    guidance.

    Args:
        source: A diffusers folder: shipped name, local path or hub id.
        steps: Sampling steps; None takes the folder's own (``mmbridge.json``), else 200.
        guidance: Classifier-free guidance; None takes the folder's own, else 2.5. Up to 1 means none.
        seconds: Length of the sounds; None takes the folder's own, else what the UNet was trained for.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        revision: Branch, tag or commit of a hub repository.
        offload: Keep components on the CPU and bring each to the device only while it works.

    Example:
        >>> decoder = AudioLDM("cvssp/audioldm-l-full", seconds=10)
        >>> condition, mask = decoder.encode(["rain on a tin roof"])
        >>> decoder.sample(condition, seed=1)[0].save("rain.wav")
    """

    modality = "audio"
    kind = "AudioLDM"
    sampling = ("unet", "vae", "vocoder")
    default_steps = 200
    default_guidance = 2.5
    classes = {
        "text_encoder": "transformers.ClapTextModelWithProjection",
        "tokenizer": None,
        "unet": "diffusers.UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
        "vocoder": "transformers.SpeechT5HifiGan",
        "scheduler": None,
    }

    def __init__(
        self,
        source: str | Path,
        steps: int | None = None,
        guidance: float | None = None,
        seconds: float | None = None,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        offload: bool = False,
    ):
        super().__init__(Folder(source, self.classes, revision), steps, guidance, dtype, offload)
        self._seconds = seconds

    @cached_property
    def spec(self) -> ConditionSpec:
        """Shape of one condition: one CLAP embedding.

        Raises:
            CheckpointError: A configuration is missing or incomplete.
            ShapeError: The components do not fit together.
        """
        dim, wanted = self._read("text_encoder", "projection_dim"), self._steered_by
        if dim != wanted:
            raise self._misfit(
                f"its text encoder projects to width {dim} but its UNet is steered by width {wanted}; take both from "
                "the same model."
            )
        self._check_sound()
        return ConditionSpec(tokens=1, dim=dim, normalized=True)

    @property
    def _steered_by(self) -> int:
        return int(self._read("unet", "projection_class_embeddings_input_dim") or 0)

    def _check_sound(self) -> None:
        """Check VAE, vocoder and mel front end against each other."""
        self._check_latents()
        bins, mel, channels = self._read("vocoder", "model_in_dim"), self.mel, self._read("vae", "in_channels")
        if bins != mel["mel_bins"]:
            raise self._misfit(
                f"its vocoder takes {bins} mel bins but the mel front end of mmbridge.json makes {mel['mel_bins']}; "
                "take the vocoder that the VAE was trained with."
            )
        if bins % self._scale:
            raise self._misfit(
                f"its vocoder takes {bins} mel bins but its VAE halves them to a {self._scale}th; take a vocoder with "
                f"a multiple of {self._scale}."
            )
        if self._hop != mel["hop_length"]:
            raise self._misfit(
                f"its vocoder makes {self._hop} samples of a mel frame but the mel front end of mmbridge.json steps by "
                f"{mel['hop_length']}; take the vocoder that the VAE was trained with."
            )
        if channels != 1:
            raise self._misfit(
                f"its VAE takes {channels} channels but a log-mel spectrogram, as its vocoder takes, has 1; take both "
                "from the same model."
            )

    @cached_property
    def mel(self) -> dict[str, Any]:
        """Settings of the mel front end: the folder's own over ``MEL``.

        Raises:
            CheckpointError: ``mel`` in ``mmbridge.json`` is not an object, or has keys or values that can't be used.
        """
        given = self.components.settings.get("mel", {})
        optional = {"peak", *(key for key, value in MEL.items() if value is None)}
        if not isinstance(given, dict) or any(
            key not in MEL or not (isinstance(value, int | float) or (value is None and key in optional))
            for key, value in given.items()
        ):
            raise CheckpointError(
                f"'mel' in the mmbridge.json of decoder {self.components.source!r} must be an object of numbers with "
                f"the keys {', '.join(MEL)}, not {given!r}."
            )
        mel = {**MEL, **given}
        own = {"hop_length": self._hop, "mel_bins": self._read("vocoder", "model_in_dim"), "pad": mel["n_fft"] // 2}
        mel = {key: own[key] if value is None and key in own else value for key, value in mel.items()}
        if 2 * mel["pad"] < mel["n_fft"] - mel["hop_length"]:
            raise CheckpointError(
                f"'mel' in the mmbridge.json of decoder {self.components.source!r} must be an object of numbers whose "
                f"'pad', {mel['pad']}, leaves no frame out: at least half of n_fft - hop_length."
            )
        return mel

    @property
    def sample_rate(self) -> int:
        """Samples a second of the sounds."""
        return int(self._read("vocoder", "sampling_rate"))

    @cached_property
    def _hop(self) -> int:
        """Samples that the vocoder makes of a mel frame."""
        return math.prod(self._read("vocoder", "upsample_rates"))

    @cached_property
    def seconds(self) -> float:
        """Length of the sounds.

        Raises:
            ConfigError: It is too short, or neither given nor in the UNet's configuration.
        """
        seconds = self.components.settings.get("seconds") if self._seconds is None else self._seconds
        if seconds is None:
            size = self._read("unet", "sample_size")
            if not isinstance(size, int):
                raise ConfigError(
                    f"the UNet of decoder {self.components.source!r} has sample_size {size}; give seconds."
                )
            seconds = size * self._scale * self._hop / self.sample_rate
        least = max(self._hop * self._scale, self.mel["pad"] + 1) / self.sample_rate  # more than what is mirrored
        if seconds < least:
            raise ConfigError(f"the decoder's sounds last {seconds:g} s but must last at least {least:g} s.")
        return float(seconds)

    @property
    def _frames(self) -> int:
        """Mel frames of a sound, in whole latent positions, rounded as the pipeline does."""
        frames = int(self.seconds / (self._hop / self.sample_rate))
        return -(-frames // self._scale) * self._scale

    @property
    def caption_tokens(self) -> int:
        """Positions of a caption that the text encoder reads."""
        # RoBERTa counts its positions from the padding's id on.
        positions = self._read("text_encoder", "max_position_embeddings")
        return self._longest(positions - int(self._read("text_encoder", "pad_token_id")) - 1)

    def options(self) -> dict[str, Any]:
        """Whatever changes ``encode`` and ``target`` besides weights; part of the fingerprint."""
        return {"tokens": self.caption_tokens, "frames": self._frames, "rate": self.sample_rate, "mel": self.mel}

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of a log-mel spectrogram: (1, frames, bins)."""
        return (1, self._frames, self.mel["mel_bins"])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a sound's latents: (channels, time, frequency)."""
        _, frames, bins = self.pixel_shape
        return (self._read("vae", "latent_channels"), frames // self._scale, bins // self._scale)

    @torch.no_grad()
    def encode(self, captions: Any) -> tuple[Tensor, Tensor]:
        """Return CLAP's embeddings of captions, of unit norm, as diffusers' pipeline does.

        Returns:
            Condition (B, 1, dim); mask (B, 1), all True.

        Raises:
            ConfigError: There is no caption, or a string in place of a list.
        """
        ids, mask = self._tokenize(captions, self.caption_tokens)
        with self.using("text_encoder"):
            embeddings = self.component("text_encoder")(ids, attention_mask=mask).text_embeds
        condition = F.normalize(embeddings, dim=-1)[:, None]  # (B, 1, D)
        return condition, torch.ones_like(condition[..., 0], dtype=torch.bool)

    def _prepare(self, medium: Audio) -> Tensor:
        return self.log_mel(medium)[None]

    def log_mel(self, audio: Audio) -> Tensor:
        """Return what the VAE encodes: log-magnitudes in Slaney's mel bins, of the beginning or filled with silence.

        As in Shen et al., arXiv 1712.05884, section 2.1 (Tacotron 2), on which AudioLDM's is modelled.

        Returns:
            (frames, bins).
        """
        from transformers.audio_utils import mel_filter_bank

        mel, length = self.mel, self._frames * self._hop
        samples = audio.resample(self.sample_rate).samples
        if mel["peak"] is not None:
            samples = samples - samples.mean()
            samples = samples * (mel["peak"] / (samples.abs().max() + 1e-8))
        samples = samples[:length]
        samples = F.pad(samples, (0, length - len(samples)))
        magnitudes = torch.stft(
            F.pad(samples[None], (mel["pad"], mel["pad"]), mode="reflect")[0],
            mel["n_fft"],
            mel["hop_length"],
            mel["win_length"],
            torch.hann_window(mel["win_length"]),
            center=False,
            return_complex=True,
        ).abs()[:, : self._frames]  # (n_fft // 2 + 1, frames)
        filters = mel_filter_bank(
            mel["n_fft"] // 2 + 1, mel["mel_bins"], mel["low"], mel["high"], self.sample_rate, "slaney", "slaney"
        )
        return (magnitudes.T @ torch.from_numpy(filters).float()).clamp_min(_QUIETEST).log()

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Return the UNet's prediction for noisy latents (B, C, time, frequency) at timesteps (B,)."""
        return self.component("unet")(noisy, timesteps, None, class_labels=condition[:, 0]).sample  # type: ignore[no-any-return]

    def _pipeline(self, scheduler: Any) -> Any:
        return import_pipeline("AudioLDMPipeline", "0.42")(
            vae=self.component("vae"),
            text_encoder=self.component("vocoder"),  # it is asked for its dtype only
            tokenizer=None,
            unet=self.component("unet"),
            scheduler=scheduler,
            vocoder=self.component("vocoder"),
        )

    def _prompt(self, condition: Tensor, empty: Tensor | None) -> dict[str, Any]:
        empty = None if empty is None else empty[:, 0]
        return {"prompt_embeds": condition[:, 0], "negative_prompt_embeds": empty}

    def _output_size(self) -> dict[str, Any]:
        return {"audio_length_in_s": self.seconds}

    def _render(self, latents: Tensor) -> Tensor:
        waves: Tensor = self.component("vocoder")(self._decode(latents)[:, 0].to(self.anchor.dtype))
        return waves[:, : int(self.seconds * self.sample_rate)]

    def _medium(self, output: Tensor) -> Audio:
        return Audio(output.float().clamp(-1, 1).clone(), self.sample_rate)
