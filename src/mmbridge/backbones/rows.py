"""New vocabulary rows beside a frozen embedding and head: the only rows that train."""

import torch
from torch import Tensor, nn


class NewRows(nn.Module):
    """Embedding and head rows of added tokens.

    The base model's matrices are never resized or unfrozen. Only the first ``emitted`` tokens can be chosen by the
    language model and so have a row in the head; the rest are forced by a grammar and never compete for a logit.

    Args:
        embedding: The base embedding matrix (V, D), from whose statistics the new rows start.
        count: Tokens to add.
        emitted: How many of them the model may choose.
        seed: Seed of the initial noise.
    """

    def __init__(self, embedding: Tensor, count: int, *, emitted: int = 1, seed: int = 0):
        super().__init__()
        dim = embedding.shape[1]
        if embedding.is_meta:
            start = torch.empty(count, dim, device="meta")
        else:
            base = embedding.detach().float()
            generator = torch.Generator().manual_seed(seed)
            # The mean row, as usual for added tokens, with the old rows' spread so that no two start alike.
            start = base.mean(0) + base.std(0) * torch.randn(count, dim, generator=generator).to(base.device)
        self.embedding = nn.Parameter(start)  # (count, D)
        self.head = nn.Parameter(torch.zeros(emitted, dim, device=start.device))  # (emitted, D)

    @property
    def count(self) -> int:
        """Number of added tokens."""
        return self.embedding.shape[0]
