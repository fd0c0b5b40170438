"""What every decoder is: a frozen module from a condition (B, T, D) to media, with a spec and a fingerprint.

A decoder is steered by what its own text encoder would give for a caption, so its ``encode`` makes the targets that an
output projection learns to match, and its ``loss`` asks how well a condition explains a given medium.
"""

import contextlib
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmbridge.decoders.components import Folder, Given
from mmbridge.errors import ConfigError, ShapeError
from mmbridge.specs import ConditionSpec

_DTYPES = ("float32", "bfloat16", "float16")


class Decoder(nn.Module):
    """A frozen decoder: (B, T, D) -> B media.

    Components are loaded when they are first used, onto the device and in the dtype that the decoder has then, and
    become submodules at that moment: before, ``parameters()`` does not list them. Two decoders that read equal weights
    share one module, so moving one moves the other.

    Args:
        components: Where the components come from.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        offload: Keep components on the CPU and bring each to the decoder's device only while it works (``using``).

    Attributes:
        modality: What it makes: "image", "audio", "video", ...
        cached_components: The components that ``encode`` and ``target`` depend on, and so the fingerprint.
    """

    modality: str
    registry_name: str = ""
    cached_components: tuple[str, ...]
    anchor: Tensor

    def __init__(self, components: Folder | Given, dtype: str | torch.dtype = "float32", offload: bool = False):
        super().__init__()
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise ConfigError(f"the dtype of a decoder is {name!r} but must be one of {', '.join(_DTYPES)}.")
        self.components, self.offload = components, offload
        # An empty tensor that .to() moves and casts, so that a component loaded later knows where to go.
        self.register_buffer("anchor", torch.empty(0, dtype=getattr(torch, name)), persistent=False)

    @property
    @abstractmethod
    def spec(self) -> ConditionSpec:
        """Shape of one condition, read from the components' configurations; loads no weights.

        Raises:
            CheckpointError: A configuration is missing or incomplete.
            ShapeError: The components do not fit together.
        """

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the conditions that captions give, without gradients: what an output projection learns to match.

        Returns:
            Condition (B, T, D); mask (B, T), True at the caption's own positions, False at padding.
        """

    @abstractmethod
    def target(self, media: Sequence[Any]) -> Tensor:
        """Return what ``loss`` compares with, without gradients: constant for a medium, so worth caching."""

    @abstractmethod
    def loss(
        self,
        condition: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        min_snr_gamma: float | None = 5.0,
    ) -> Tensor:
        """Return a scalar: how badly ``condition`` (B, T, D) explains ``target``; differentiable in the condition."""

    @abstractmethod
    def sample(
        self,
        condition: Tensor,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        progress: bool = False,
    ) -> list[Any]:
        """Return one medium for each row of ``condition`` (B, T, D); equal seeds give equal media."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Whatever changes ``encode`` and ``target`` besides weights; part of the fingerprint."""

    def component(self, name: str) -> Any:
        """Return a component, loading it at first use; modules among them are frozen submodules from then on.

        Raises:
            CheckpointError: It can't be loaded.
        """
        if not self.is_loaded(name):
            # Weights made inside inference mode could never take part in a gradient later.
            with torch.inference_mode(False):
                device = torch.device("cpu") if self.offload else self.anchor.device
                part = self.components.load(name, self.anchor.dtype, device)
            if isinstance(part, nn.Module):
                part.requires_grad_(False).train(False)
            setattr(self, name, part)
        return getattr(self, name)

    def is_loaded(self, name: str) -> bool:
        """Tell whether a component is in memory."""
        return hasattr(self, name)

    @contextlib.contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Have components loaded, and on the decoder's device when they are called.

        With ``offload`` each comes to the device when it is first called, which sends the one named before it back to
        the CPU; afterwards all are there.
        """
        parts = [self.component(name) for name in names]
        if not self.offload:
            yield
            return
        from accelerate import cpu_offload_with_hook
        from accelerate.hooks import remove_hook_from_module

        before = None
        for part in parts:
            _, before = cpu_offload_with_hook(part, self.anchor.device, before)
        try:
            yield
        finally:
            for part in parts:
                remove_hook_from_module(part)
                part.to("cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse and not self.offload)
        if self.offload:
            for part in self.children():
                part._apply(fn).to("cpu")
        return self

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the mode: a frozen decoder has no training behaviour."""
        return super().train(False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that ``encode`` and ``target`` depend on: the key of what is cached from them."""
        facts = {"class": type(self).__qualname__, "dtype": str(self.anchor.dtype), "options": self.options()}
        facts["weights"] = self.components.sha256(*self.cached_components)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, str | None]:
        """Return what a manifest records of these weights: name, source, hash, licence and hub revision."""
        return {
            "name": self.registry_name or type(self).__name__,
            "source": self.components.source,
            "sha256": self.components.sha256(*self.components.names),
            "licence": self.components.licence,
            "revision": self.components.revision,
        }

    def check_condition(self, condition: Tensor) -> None:
        """Check that a condition is a batch of what ``spec`` says.

        Raises:
            ShapeError: It is not.
        """
        wanted = (self.spec.tokens, self.spec.dim)
        if condition.ndim != 3 or tuple(condition.shape[1:]) != wanted or not len(condition):
            raise ShapeError(
                f"decoder {self.components.source or type(self).__name__!r} takes conditions of shape (B, {wanted[0]}, "
                f"{wanted[1]}) with B >= 1 but was given {tuple(condition.shape)}; build the output projection from "
                "the decoder's spec."
            )
