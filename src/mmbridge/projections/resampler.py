"""Perceiver resampler (arXiv 2204.14198, appendix A.1.1): learned queries read any number of tokens into a fixed one.

Flamingo's time embeddings are left out: an encoder that wants order among its tokens has put it into them.
"""

import torch
from torch import Tensor, nn

from mmbridge.projections.base import Attention, InputProjection, feed_forward, require_heads, require_positive
from mmbridge.registry import projections as registry

register = registry.register


@register("resampler", tiny={"num_tokens": 3, "dim_hidden": 16, "depth": 2, "num_heads": 2})
class Resampler(InputProjection):
    """Condense encoder tokens into ``num_tokens`` slots by cross-attention from learned queries.

    Args:
        dim_in: Width of the encoder's tokens; None to be built later.
        dim_out: Width of the backbone's embeddings; None to be built later.
        num_tokens: Slots produced for each medium.
        dim_hidden: Width inside.
        depth: Layers, each one cross-attention and one feed-forward of four times the width.
        num_heads: Attention heads; must divide ``dim_hidden``.

    Shape: (B, T, dim_in) -> (B, num_tokens, dim_out), for any T >= 1. The order of the T tokens makes no difference.

    Raises:
        ConfigError: A size that is not a positive integer, or heads that do not divide the width.

    Examples:
        >>> import torch
        >>> Resampler(24, 32, num_tokens=4, dim_hidden=16, depth=1, num_heads=2)(torch.randn(2, 9, 24)).shape
        torch.Size([2, 4, 32])
    """

    def __init__(
        self,
        dim_in: int | None = None,
        dim_out: int | None = None,
        num_tokens: int = 64,
        *,
        dim_hidden: int = 512,
        depth: int = 6,
        num_heads: int = 8,
    ):
        super().__init__()
        require_positive(self.name, num_tokens=num_tokens, depth=depth)
        require_heads(self.name, dim_hidden, num_heads)
        self.tokens_out, self.dim_hidden, self.depth, self.num_heads = num_tokens, dim_hidden, depth, num_heads
        self._build_if_given(dim_in=dim_in, dim_out=dim_out)

    def num_tokens(self, tokens_in: int) -> int:
        return self.tokens_out

    def _create(self, dim_in: int, dim_out: int) -> None:
        self.project_in = nn.Linear(dim_in, self.dim_hidden)
        self.queries = nn.Parameter(torch.randn(1, self.tokens_out, self.dim_hidden) * 0.02)
        self.layers = nn.ModuleList(ResamplerLayer(self.dim_hidden, self.num_heads) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.dim_hidden)
        self.project_out = nn.Linear(self.dim_hidden, dim_out)

    def _project(self, x: Tensor) -> Tensor:
        tokens = self.project_in(x)  # (B, T, dim_hidden)
        queries = self.queries.expand(len(x), -1, -1)  # (B, num_tokens, dim_hidden)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return self.project_out(self.norm(queries))


class ResamplerLayer(nn.Module):
    """Queries attend to [tokens; queries], then a feed-forward; pre-norm residuals.

    Shape: (B, Q, dim), (B, T, dim) -> (B, Q, dim).
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(dim)
        self.norm_queries = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = feed_forward(dim, 4 * dim, dim)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        normed = self.norm_queries(queries)
        queries = queries + self.attention(normed, torch.cat([self.norm_tokens(tokens), normed], dim=1))
        return queries + self.mlp(self.norm_mlp(queries))
