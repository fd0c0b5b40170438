"""Signal states to one vector, for decoders that are steered by a single embedding, such as AudioLDM's CLAP vector.

Attention pooling with one learned query (the head of Set Transformer, arXiv 1810.00825, section 3.2), then a
feed-forward. The published NExT-GPT projection leaves the vector's length free although CLAP embeddings have length 1;
``normalize`` gives it the length that the decoder was trained with.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbridge.errors import ShapeError
from mmbridge.projections.base import Attention, OutputProjection, feed_forward, require_heads
from mmbridge.registry import projections as registry

register = registry.register


@register("pooled", tiny={"dim_hidden": 16, "num_heads": 2})
class Pooled(OutputProjection):
    """Pool signal states into one condition vector.

    Args:
        dim_in: Width of the backbone's hidden states; None to be built later.
        dim_out: Width of the decoder's condition; None to be built later.
        dim_hidden: Width inside.
        num_heads: Attention heads; must divide ``dim_hidden``.
        normalize: Scale the vector to unit L2 norm; choose it where ``ConditionSpec.normalized`` is true.

    Shape: (B, K, dim_in) -> (B, 1, dim_out), for any K >= 1.

    Raises:
        ConfigError: A size that is not a positive integer, or heads that do not divide the width.

    Examples:
        >>> import torch
        >>> vector = Pooled(64, 48, dim_hidden=32, normalize=True)(torch.randn(2, 4, 64))
        >>> vector.shape, bool((vector.norm(dim=-1) - 1).abs().max() < 1e-5)
        (torch.Size([2, 1, 48]), True)
    """

    def __init__(
        self,
        dim_in: int | None = None,
        dim_out: int | None = None,
        *,
        dim_hidden: int = 512,
        num_heads: int = 8,
        normalize: bool = False,
    ):
        super().__init__()
        require_heads(self.name, dim_hidden, num_heads)
        self.dim_hidden, self.num_heads, self.normalize = dim_hidden, num_heads, normalize
        num_queries = None if dim_in is None and dim_out is None else 1
        self._build_if_given(dim_in=dim_in, dim_out=dim_out, num_queries=num_queries)

    def build(self, dim_in: int, dim_out: int, num_queries: int = 1) -> Self:
        if num_queries != 1:
            raise ShapeError(
                f"projection {self.name!r} gives 1 vector, but the decoder takes {num_queries} condition tokens; "
                "use 'signal_transformer' for it."
            )
        return super().build(dim_in, dim_out, num_queries)

    def _create(self, dim_in: int, dim_out: int, num_queries: int) -> None:
        self.project_in = nn.Linear(dim_in, self.dim_hidden)
        self.norm = nn.LayerNorm(self.dim_hidden)
        self.query = nn.Parameter(torch.randn(1, 1, self.dim_hidden) * 0.02)
        self.attention = Attention(self.dim_hidden, self.num_heads)
        self.norm_mlp = nn.LayerNorm(self.dim_hidden)
        self.mlp = feed_forward(self.dim_hidden, 4 * self.dim_hidden, dim_out)

    def _project(self, x: Tensor) -> Tensor:
        states = self.norm(self.project_in(x))  # (B, K, dim_hidden)
        vector = self.mlp(self.norm_mlp(self.attention(self.query.expand(len(x), -1, -1), states)))  # (B, 1, dim_out)
        return F.normalize(vector, dim=-1) if self.normalize else vector
