"""Projections that map each token by itself, so that a medium fills as many slots as its encoder gives tokens.

``Linear`` on a pooled ImageBind embedding is the released NExT-GPT model's way in (arXiv 2309.05519); ``MLP`` is
LLaVA-1.5's (arXiv 2310.03744).
"""

from torch import Tensor, nn

from mmbridge.projections.base import InputProjection, feed_forward, require_positive
from mmbridge.registry import projections as registry

register = registry.register


@register("linear", tiny={})
class Linear(InputProjection):
    """One linear map per token.

    Args:
        dim_in: Width of the encoder's tokens; None to be built later.
        dim_out: Width of the backbone's embeddings; None to be built later.

    Shape: (B, T, dim_in) -> (B, T, dim_out).

    Examples:
        >>> import torch
        >>> Linear(dim_in=24, dim_out=32)(torch.randn(2, 5, 24)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, dim_in: int | None = None, dim_out: int | None = None):
        super().__init__()
        self._build_if_given(dim_in=dim_in, dim_out=dim_out)

    def num_tokens(self, tokens_in: int) -> int:
        return tokens_in

    def _create(self, dim_in: int, dim_out: int) -> None:
        self.layer = nn.Linear(dim_in, dim_out)

    def _project(self, x: Tensor) -> Tensor:
        return self.layer(x)


@register("mlp", tiny={"dim_hidden": 16})
class MLP(InputProjection):
    """Linear-GELU-Linear per token.

    Args:
        dim_in: Width of the encoder's tokens; None to be built later.
        dim_out: Width of the backbone's embeddings; None to be built later.
        dim_hidden: Width between the two layers; None for ``dim_out``.

    Shape: (B, T, dim_in) -> (B, T, dim_out).

    Examples:
        >>> import torch
        >>> MLP(dim_hidden=64).build(dim_in=24, dim_out=32)(torch.randn(2, 5, 24)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, dim_in: int | None = None, dim_out: int | None = None, *, dim_hidden: int | None = None):
        super().__init__()
        if dim_hidden is not None:
            require_positive(self.name, dim_hidden=dim_hidden)
        self.dim_hidden = dim_hidden
        self._build_if_given(dim_in=dim_in, dim_out=dim_out)

    def num_tokens(self, tokens_in: int) -> int:
        return tokens_in

    def _create(self, dim_in: int, dim_out: int) -> None:
        self.layers = feed_forward(dim_in, self.dim_hidden or dim_out, dim_out)

    def _project(self, x: Tensor) -> Tensor:
        return self.layers(x)
