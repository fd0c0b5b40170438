"""What decoders by latent diffusion share: settings, seeds, the empty caption, posteriors, loss and the way to diffusers.

A latent diffusion model denoises latents of an autoencoder, steered by a condition (Rombach et al., arXiv 2112.10752;
guidance: Ho and Salimans, arXiv 2207.12598). Training works on the components; sampling is diffusers' own pipeline. Each
kind of model is a file beside this one, which says how its condition is made, and what its media and latents look like.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mmbridge.decoders.base import Decoder
from mmbridge.decoders.components import Given, quiet_libraries
from mmbridge.decoders.denoising import denoising_loss, draw_normal
from mmbridge.errors import CheckpointError, ConfigError, MediaError, MissingExtraError, ShapeError
from mmbridge.specs import ConditionSpec

log = logging.getLogger("mmbridge")

Preview = Callable[[int, int, int, Callable[[], list[Any]]], None]
"""What looks at media in the making: the first's row, the step from 1, the number of steps, and how to get what there is."""

_PLURALS = {"image": "images", "audio": "sounds", "video": "videos"}


class LatentDiffusion(Decoder):
    """A frozen latent diffusion model: (B, tokens, dim) -> B media.

    ``spec`` and ``encode`` are those of models that attend to the hidden states of their text encoder; others override
    them. The specification needs the folder's JSON files only; components are loaded at their first use.

    Args:
        components: Where the components come from.
        steps: Sampling steps; None takes the folder's own (``mmbridge.json``), else the class's.
        guidance: Classifier-free guidance; None takes the folder's own, else the class's. Up to 1 means none.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        offload: Keep components on the CPU and bring each to the device only while it works. In training the denoiser
            stays on the device, since the backward pass needs it.

    Attributes:
        classes: Component names to their classes, as ``Folder`` takes them.
        kind: What errors call a folder of this kind.
        denoiser: Name of the component that denoises.
        encoders: Names of the modules that ``encode`` uses.
        sampling: Names of the modules that ``sample`` uses, in this order.
        rows_at_once: Media that are sampled in one batch; None means all.
    """

    classes: ClassVar[dict[str, str | None]]
    kind: ClassVar[str]
    denoiser: ClassVar[str] = "unet"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    sampling: ClassVar[tuple[str, ...]] = ("unet", "vae")
    default_steps: ClassVar[int] = 50
    default_guidance: ClassVar[float] = 7.5
    rows_at_once: ClassVar[int | None] = None
    cached_components: tuple[str, ...] = ("text_encoder", "tokenizer", "vae")
    _unconditional: Tensor | None

    def __init__(
        self,
        components: Any,
        steps: int | None = None,
        guidance: float | None = None,
        dtype: str | torch.dtype = "float32",
        offload: bool = False,
    ):
        super().__init__(components, dtype, offload)
        self._steps, self._guidance = steps, guidance
        self.register_buffer("_unconditional", None, persistent=False)

    @classmethod
    def from_components(cls, *, settings: dict[str, Any] | None = None, **given: Any) -> Self:
        """Build a decoder of components in memory; they are frozen, in place, when they are first used.

        Args:
            settings: What the ``mmbridge.json`` of a folder would hold.
            given: All components by name, and whatever else the class takes besides source, dtype and revision.

        Raises:
            ConfigError: A component is missing.
        """
        missing = sorted(cls.classes.keys() - given.keys())
        if missing:
            raise ConfigError(f"{cls.__name__} needs the components {', '.join(cls.classes)}; {missing[0]} is missing.")
        parts = {name: given.pop(name) for name in cls.classes}
        decoder = cls("components", dtype=parts[cls.denoiser].dtype, **given)  # type: ignore[arg-type]
        decoder.components = Given(parts, settings)
        return decoder.to(parts[cls.denoiser].device)

    def _read(self, component: str, key: str) -> Any:
        config = self.components.config(component)
        if key not in config:
            raise CheckpointError(
                f"the configuration of {component} in decoder {self.components.source!r} has no {key!r}; this is not a "
                f"{self.kind} folder, or the file is damaged."
            )
        return config[key]

    def _misfit(self, reason: str) -> ShapeError:
        return ShapeError(f"decoder {self.components.source!r} does not fit together: {reason}")

    def _check_latents(self) -> None:
        channels, latents = self._read(self.denoiser, "in_channels"), self._read("vae", "latent_channels")
        if channels != latents:
            raise self._misfit(
                f"its UNet takes {channels} channels but its VAE makes {latents}; take both from the same model "
                "(inpainting models don't serve)."
            )

    @cached_property
    def spec(self) -> ConditionSpec:
        """Shape of one condition: the text encoder's positions by the UNet's cross-attention width.

        Raises:
            CheckpointError: A configuration is missing or incomplete.
            ShapeError: The components do not fit together.
        """
        dim, hidden = self._read("unet", "cross_attention_dim"), self._read("text_encoder", "hidden_size")
        if dim != hidden:
            raise self._misfit(
                f"its UNet attends to conditions of width {dim} but its text encoder gives width {hidden}; take both "
                "from the same model."
            )
        self._check_latents()
        positions = self._read("text_encoder", "max_position_embeddings")
        return ConditionSpec(tokens=self._longest(positions), dim=dim)

    def _longest(self, positions: int, tokenizer: str = "tokenizer") -> int:
        """Return how many tokens of a caption are read: all ``positions``, or fewer where the tokenizer says so."""
        return min(positions, int(self.components.config(tokenizer).get("model_max_length", positions)))

    @property
    def caption_tokens(self) -> int:
        """Positions of a caption that the text encoder reads."""
        return self.spec.tokens

    @cached_property
    def _scale(self) -> int:
        """Pixels (or mel frames) per latent position, along one side."""
        return int(2 ** (len(self._read("vae", "block_out_channels")) - 1))

    @property
    def steps(self) -> int:
        """Sampling steps where ``sample`` is not told another number."""
        own = self.components.settings.get("steps", self.default_steps)
        return int(own if self._steps is None else self._steps)

    @property
    def guidance(self) -> float:
        """Guidance where ``sample`` is not told another."""
        own = self.components.settings.get("guidance", self.default_guidance)
        return float(own if self._guidance is None else self._guidance)

    @property
    @abstractmethod
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of what the VAE encodes for one medium."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one medium's latents, channels first."""

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the text encoder's last hidden states, as diffusers' ``encode_prompt`` does.

        Longer captions are cut at ``spec.tokens``, with a warning in the log.

        Returns:
            Condition (B, tokens, dim); mask (B, tokens), True at the caption's own positions, False at padding.

        Raises:
            ConfigError: There is no caption, or a string in place of a list.
        """
        ids, mask = self._tokenize(captions, self.spec.tokens)
        with self.using("text_encoder"):
            text_encoder = self.component("text_encoder")
            # Few text encoders ask for the mask: Stable Diffusion was trained to see its padding.
            used = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
            return text_encoder(ids, attention_mask=used).last_hidden_state, mask.bool()

    def _tokenize(
        self, captions: Sequence[str], tokens: int, tokenizer: str = "tokenizer", pad: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return ids and mask (B, tokens), on the decoder's device, longer captions being cut."""
        if isinstance(captions, str) or not captions:
            raise ConfigError(f"encode takes a list of one or more captions, not {captions!r}; put it into a list.")
        padding = "max_length" if pad else False
        batch = self.component(tokenizer)(
            list(captions), padding=padding, max_length=tokens, truncation=True, return_tensors="pt"
        )
        cut = sum(bool(encoding.overflowing) for encoding in batch.encodings or ())
        if cut:
            log.warning("%d of %d captions were cut at %d tokens", cut, len(captions), tokens)
        return batch.input_ids.to(self.anchor.device), batch.attention_mask.to(self.anchor.device)

    @torch.no_grad()
    def target(self, media: Sequence[Any]) -> Tensor:
        """Return the moments of the VAE's posterior.

        Returns:
            Mean and log-variance (B, 2 * channels, ...), before the VAE's scaling factor.

        Raises:
            MediaError: There is no medium.
        """
        if not media:
            raise MediaError(f"a denoising target needs one or more {_PLURALS[self.modality]}; none were given.")
        pixels = torch.stack([self._prepare(medium) for medium in media])
        with self.using("vae"):
            return self.moments(pixels.to(self.anchor))

    @abstractmethod
    def _prepare(self, medium: Any) -> Tensor:
        """Return what the VAE encodes for a medium, of ``pixel_shape``."""

    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance (B, 2 * channels, ...) of prepared media (B, *pixel_shape)."""
        return self.component("vae").encode(pixels).latent_dist.parameters  # type: ignore[no-any-return]

    def loss(
        self,
        condition: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        min_snr_gamma: float | None = 5.0,
    ) -> Tensor:
        """Return the denoising loss: how badly ``condition`` helps to undo a random noising of the media.

        Args:
            condition: (B, tokens, dim); gradients flow to it and nowhere else.
            target: What ``target`` returned for the media.
            generator: Draws the latents, then the noise, then the timesteps; None takes torch's global state.
            min_snr_gamma: Cap of the min-SNR weights (arXiv 2303.09556); None weights all timesteps alike.

        Raises:
            ShapeError: Condition or target have another shape, or their batches differ.
        """
        latents, condition = self._draw_latents(condition, target, generator)
        self.component(self.denoiser).to(self.anchor.device)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.denoise(noisy.to(condition.dtype), timesteps, condition)

        return denoising_loss(predict, self._training_schedule, latents, generator, min_snr_gamma)

    def _draw_latents(
        self, condition: Tensor, target: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Check both, draw scaled latents (B, *latent_shape) of the posterior, and bring the condition to the device."""
        self.check_condition(condition)
        channels, *places = self.latent_shape
        wanted = (len(condition), 2 * channels, *places)
        if tuple(target.shape) != wanted:
            raise ShapeError(
                f"the denoising target has shape {tuple(target.shape)} instead of {wanted}; make it with this "
                "decoder's target(), one medium per condition."
            )
        mean, log_variance = target.to(self.anchor.device).float().chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return self.scale_latents(mean + deviation * draw_normal(mean, generator)), condition.to(self.anchor)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return latents in the scale that is denoised."""
        return latents * self.component("vae").config.scaling_factor  # type: ignore[no-any-return]

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Return the denoiser's prediction for noisy latents (B, *latent_shape) at timesteps (B,)."""
        return self.component("unet")(noisy, timesteps, encoder_hidden_states=condition).sample  # type: ignore[no-any-return]

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
        preview: Preview | None = None,
    ) -> list[Any]:
        """Make one medium for each condition.

        Args:
            condition: (B, tokens, dim).
            seed: One seed per row, or one number n: row i is then made with seed n + i. A row's medium depends on its
                condition and its seed, not on its neighbours.
            steps: Sampling steps; None takes the decoder's own.
            guidance: Classifier-free guidance; None takes the decoder's own, up to 1 means none.
            progress: Show diffusers' progress bar.
            preview: Called after each step, where the pipeline lets anyone look: with the row of the first medium that is
                in the making, the step from 1, their number, and a function that returns those media as they are.

        Raises:
            ShapeError: The condition has another shape.
            ConfigError: The number of seeds or of steps can't be used.
            MediaError: The medium came out as NaN.
        """
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
        empty = self.unconditional() if guidance > 1 else None
        with self.using(*self.sampling):
            with quiet_libraries():
                # A new scheduler: it carries state while sampling.
                pipeline = self._pipeline(type(scheduler).from_config(scheduler.config))
            pipeline.set_progress_bar_config(disable=not progress)
            made: list[Any] = []
            size = self.rows_at_once or len(condition)
            for rows, numbers in zip(condition.split(size), _split(seeds, size), strict=True):
                watch = {} if preview is None else self._watch(partial(preview, len(made)), steps)
                output = pipeline(
                    **self._prompt(rows, None if empty is None else empty.expand_as(rows)),
                    **self._output_size(),
                    **watch,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(number) for number in numbers],
                    output_type="pt",
                    return_dict=False,
                )[0]
                if not output.isfinite().all():
                    raise MediaError(
                        f"decoder {self.components.source!r} computed NaN in {self.anchor.dtype}; check that the "
                        "condition is finite, or use dtype 'float32'."
                    )
                made.extend(self._medium(row) for row in output)
        return made

    @abstractmethod
    def _pipeline(self, scheduler: Any) -> Any:
        """Return diffusers' pipeline around the components, without its text encoder."""

    def _prompt(self, condition: Tensor, empty: Tensor | None) -> dict[str, Any]:
        """Return the pipeline's arguments for conditions (B, tokens, dim) and those of the empty caption."""
        return {"prompt_embeds": condition, "negative_prompt_embeds": empty}

    def _output_size(self) -> dict[str, Any]:
        """Return the pipeline's arguments for the size of the media."""
        return {}

    def _watch(self, preview: Callable[[int, int, Callable[[], list[Any]]], None], steps: int) -> dict[str, Any]:
        """Return the pipeline's arguments by which ``preview`` is called; none where it can't be."""

        def step_done(step: int, timestep: Any, latents: Tensor) -> None:
            preview(step + 1, steps, lambda: self._media_of(latents))

        return {"callback": step_done}

    @torch.no_grad()
    def _media_of(self, latents: Tensor) -> list[Any]:
        """Return media as the VAE decodes their latents."""
        return [self._medium(row) for row in self._render(latents)]

    def _render(self, latents: Tensor) -> Tensor:
        """Return what the pipeline would put out for latents: in 0..1 where it is pictures."""
        return (self._decode(latents) / 2 + 0.5).clamp(0, 1)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.component("vae")
        decoded: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return decoded.float()

    @abstractmethod
    def _medium(self, output: Tensor) -> Any:
        """Return one row of the pipeline's output as a medium."""

    def unconditional(self) -> Tensor:
        """Return the condition of the empty caption (tokens, dim), computed once; guidance points away from it.

        Components that were loaded for this alone are let go again, as sampling needs no other caption.
        """
        if self._unconditional is None:
            resident = {name for name, _ in self.named_children()}
            self._unconditional = self.encode([""])[0][0]
            for name in [name for name, _ in self.named_children() if name not in resident]:
                delattr(self, name)
        return self._unconditional


def join_mask(states: Tensor, mask: Tensor) -> Tensor:
    """Return text states (B, T, D) with a last number more, 1 where the mask (B, T) is true and 0 at padding, which is zero.

    A condition holds no mask beside it; models that were trained not to see padding need theirs in it.
    """
    mask = mask.to(states)[..., None]
    return torch.cat([states * mask, mask], dim=-1)


def split_mask(condition: Tensor) -> tuple[Tensor, Tensor]:
    """Undo ``join_mask``: states (B, T, D) and mask (B, T), true where the last number is above a half."""
    return condition[..., :-1], condition[..., -1] > 0.5


def import_pipeline(name: str, tested: str) -> Any:
    """Return one of diffusers' pipelines, which it may drop at any time.

    Args:
        name: Name of the class.
        tested: A version of diffusers that has it.

    Raises:
        MissingExtraError: The installed version lacks it.
    """
    import diffusers

    try:
        return getattr(diffusers, name)
    except (AttributeError, ImportError, RuntimeError) as error:  # RuntimeError: diffusers' own word for the latter
        raise MissingExtraError(
            f"diffusers {diffusers.__version__} has no {name}, which samples here; everything else works without it: "
            f'to sample, run pip install "diffusers=={tested}.*".'
        ) from error


def _split(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
