"""NExT-GPT's output projection: an encoder-decoder transformer with learned queries (arXiv 2309.05519, section 3).

Signal states go in, a decoder's condition comes out. There is no positional encoding: what tells signal tokens apart
is in their states, what tells condition tokens apart is in the queries.
"""

import torch
from torch import Tensor, nn

from mmbridge.errors import ConfigError
from mmbridge.projections.base import OutputProjection, require_heads, require_positive
from mmbridge.registry import projections as registry

register = registry.register


@register(
    "signal_transformer",
    tiny={
        "dim_hidden": 16,
        "num_heads": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dim_feedforward": 32,
    },
)
class SignalTransformer(OutputProjection):
    """Map signal states to condition tokens; the layout of the published NExT-GPT weights.

    The reference adds the signal tokens' input embeddings to their hidden states; the caller does that.

    Args:
        dim_in: Width of the backbone's hidden states; None to be built later.
        dim_out: Width of the decoder's condition; None to be built later.
        num_queries: Tokens of the decoder's condition; None to be built later.
        dim_hidden: Width inside.
        num_heads: Attention heads; must divide ``dim_hidden``.
        num_encoder_layers: Layers that read the signal states.
        num_decoder_layers: Layers in which the queries read the encoded states.
        dim_feedforward: Width inside each layer's ReLU feed-forward.
        dropout: Probability in 0..1; 0.0 in the published code, 0.1 in the paper.

    Shape: (B, K, dim_in) -> (B, num_queries, dim_out), for any K >= 1.

    Raises:
        ConfigError: A size that is not a positive integer, or heads that do not divide the width.

    Examples:
        >>> import torch
        >>> projection = SignalTransformer(dim_hidden=32).build(dim_in=64, dim_out=48, num_queries=7)
        >>> projection(torch.randn(2, 4, 64)).shape
        torch.Size([2, 7, 48])
    """

    def __init__(
        self,
        dim_in: int | None = None,
        dim_out: int | None = None,
        num_queries: int | None = None,
        *,
        dim_hidden: int = 512,
        num_heads: int = 4,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 4,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
    ):
        super().__init__()
        require_heads(self.name, dim_hidden, num_heads)
        require_positive(
            self.name,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            dim_feedforward=dim_feedforward,
        )
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(
                f"projection {self.name!r} got dropout={dropout}; choose a probability from 0 to below 1."
            )
        self.dim_hidden, self.num_heads, self.dim_feedforward = dim_hidden, num_heads, dim_feedforward
        self.num_encoder_layers, self.num_decoder_layers = num_encoder_layers, num_decoder_layers
        self.dropout = dropout
        self._build_if_given(dim_in=dim_in, dim_out=dim_out, num_queries=num_queries)

    def _create(self, dim_in: int, dim_out: int, num_queries: int) -> None:
        self.project_in = nn.Linear(dim_in, self.dim_hidden)
        # Not zeros, as in the newer published code: equal queries give equal outputs, and the LayerNorm at zero
        # variance makes their first gradient many times that of every other layer.
        self.queries = nn.Parameter(torch.randn(1, num_queries, self.dim_hidden) * 0.02)
        # torch would build the encoder itself, with a warning that pre-norm rules out its nested tensors.
        layer = nn.TransformerEncoderLayer(
            self.dim_hidden, self.num_heads, self.dim_feedforward, self.dropout, batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(
            layer, self.num_encoder_layers, nn.LayerNorm(self.dim_hidden), enable_nested_tensor=False
        )
        self.transformer = nn.Transformer(
            self.dim_hidden,
            self.num_heads,
            num_decoder_layers=self.num_decoder_layers,
            dim_feedforward=self.dim_feedforward,
            dropout=self.dropout,
            custom_encoder=encoder,
            batch_first=True,
            norm_first=True,
        )
        self.project_out = nn.Linear(self.dim_hidden, dim_out)

    def _project(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)  # (B, num_queries, dim_hidden)
        return self.project_out(self.transformer(self.project_in(x), queries))
