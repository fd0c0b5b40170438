"""NExT-GPT's grouping projection: learned concept tokens gather encoder tokens, stage by stage.

The mechanism is NExT-GPT's (arXiv 2309.05519, section 3), after GroupViT (arXiv 2202.11094): each stage runs
transformer blocks over [tokens; concepts], assigns every token to one concept and replaces the tokens by the concepts,
updated with what they were assigned. ``variant="published"`` is the projection of the published code, which differs
from the paper. There is no positional encoding: order is only in the encoder's tokens.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbridge.errors import ConfigError
from mmbridge.projections.base import Attention, InputProjection, feed_forward, require_heads, require_positive
from mmbridge.registry import projections as registry

register = registry.register

INITIAL_TEMPERATURE = 0.07


@register(
    "grouping", tiny={"num_tokens": 2, "num_concepts": (4,), "depths": (1, 1, 1), "dim_hidden": 16, "num_heads": 2}
)
class Grouping(InputProjection):
    """Condense encoder tokens into ``num_tokens`` slots by grouping them around learned concepts.

    While training, assignments are sampled (Gumbel-softmax with a straight-through gradient, arXiv 1611.01144) from
    torch's global random state; in evaluation each token goes to its most similar concept.

    Args:
        dim_in: Width of the encoder's tokens; None to be built later.
        dim_out: Width of the backbone's embeddings; None to be built later.
        num_tokens: Concepts of the last stage, which are the slots produced for each medium.
        num_concepts: Concepts of each stage before the last.
        depths: Transformer blocks before each grouping and after the last one: ``len(num_concepts) + 2`` numbers.
        dim_hidden: Width inside.
        num_heads: Attention heads; must divide ``dim_hidden``.
        variant: "paper": cosine similarity with a learned temperature, X' = C + MLP(A X). "published": the newer
            published code's block, which adds token-mixing MLPs, a cross-attention and projected dot products with a
            fixed temperature.

    Shape: (B, T, dim_in) -> (B, num_tokens, dim_out), for any T >= 1. The order of the T tokens makes no difference.

    Raises:
        ConfigError: A size that is not a positive integer, heads that do not divide the width, depths that do not
            match the stages, or an unknown variant.

    Examples:
        >>> import torch
        >>> projection = Grouping(num_tokens=2, num_concepts=(4,), depths=(1, 1, 1), dim_hidden=16, num_heads=2)
        >>> projection.build(dim_in=24, dim_out=32)(torch.randn(3, 9, 24)).shape
        torch.Size([3, 2, 32])
        >>> [tuple(index.shape) for index in projection.assignments(torch.randn(3, 9, 24))]
        [(3, 9), (3, 4)]
    """

    def __init__(
        self,
        dim_in: int | None = None,
        dim_out: int | None = None,
        num_tokens: int = 8,
        *,
        num_concepts: Sequence[int] = (64,),
        depths: Sequence[int] = (6, 3, 3),
        dim_hidden: int = 512,
        num_heads: int = 8,
        variant: Literal["paper", "published"] = "paper",
    ):
        super().__init__()
        self.groups, self.depths = (*num_concepts, num_tokens), tuple(depths)
        if len(self.depths) != len(self.groups) + 1:
            raise ConfigError(
                f"projection {self.name!r} has {len(self.groups)} grouping stages {self.groups} but depths="
                f"{self.depths}; give {len(self.groups) + 1} depths, one before each grouping and one after the last."
            )
        for groups, depth in zip((*self.groups, 1), self.depths, strict=True):
            require_positive(self.name, num_concepts=groups, depths=depth)
        require_heads(self.name, dim_hidden, num_heads)
        if variant not in ("paper", "published"):
            raise ConfigError(f"projection {self.name!r} has no variant {variant!r}; choose 'paper' or 'published'.")
        self.dim_hidden, self.num_heads, self.variant = dim_hidden, num_heads, variant
        self._build_if_given(dim_in=dim_in, dim_out=dim_out)

    def num_tokens(self, tokens_in: int) -> int:
        return self.groups[-1]

    def assignments(self, x: Tensor) -> list[Tensor]:
        """Return, for each stage, the concept that each token goes to in evaluation, without noise.

        Args:
            x: (B, T, dim_in).

        Returns:
            Indices (B, T), then (B, concepts of the stage before) for each later stage.

        Raises:
            ShapeError: Called before ``build``, or ``x`` has another shape.
        """
        self._check(x)
        with torch.no_grad():
            return self._group(x, sample=False)[1]

    def _create(self, dim_in: int, dim_out: int) -> None:
        dim, heads, groups = self.dim_hidden, self.num_heads, self.groups
        self.project_in = nn.Linear(dim_in, dim)
        if self.variant == "paper":
            self.stages = nn.ModuleList(
                GroupingStage(dim, heads, depth, count, ConceptGrouping(dim))
                for count, depth in zip(groups, self.depths[:-1], strict=True)
            )
        else:
            self.stages = nn.ModuleList(
                GroupingStage(dim, heads, depth, count, PublishedGrouping(dim, heads, count), carried)
                for count, depth, carried in zip(groups, self.depths[:-1], (None, *groups[:-1]), strict=True)
            )
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(self.depths[-1]))
        self.norm = nn.LayerNorm(dim)
        self.project_out = nn.Linear(dim, dim_out)

    def _project(self, x: Tensor) -> Tensor:
        return self._group(x, sample=self.training)[0]

    def _group(self, x: Tensor, sample: bool) -> tuple[Tensor, list[Tensor]]:
        tokens, concepts, indices = self.project_in(x), None, []
        for stage in self.stages:
            tokens, concepts, index = stage(tokens, concepts, sample)  # (B, G, dim), (B, G, dim), (B, tokens before)
            indices.append(index)
        for block in self.blocks:
            tokens = block(tokens)
        return self.project_out(self.norm(tokens)), indices


class Block(nn.Module):
    """Pre-norm transformer block; queries, keys and values have no bias. Shape: (B, T, dim) -> (B, T, dim)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = feed_forward(dim, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        x = x + self.attention(normed, normed)
        return x + self.mlp(self.norm_mlp(x))


class GroupingStage(nn.Module):
    """Blocks over [tokens; concepts], then one grouping.

    Args:
        dim: Width.
        num_heads: Attention heads of the blocks.
        depth: Blocks.
        num_concepts: Learned concepts of this stage, G.
        grouping: Module that turns tokens and concepts into new tokens and assignments.
        num_carried: Concepts of the stage before, where they are mixed into this stage's; None where they are not.

    Shape: (B, T, dim) and the concepts of the stage before -> (B, G, dim), this stage's concepts (B, G, dim) and the
    assignments (B, T).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int,
        num_concepts: int,
        grouping: nn.Module,
        num_carried: int | None = None,
    ):
        super().__init__()
        # Concepts that start alike attend alike and are updated alike: they start well apart.
        self.concepts = nn.Parameter(torch.randn(1, num_concepts, dim))
        self.carry = None if num_carried is None else TokenMixer(dim, num_carried, num_concepts)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.grouping = grouping

    def forward(self, tokens: Tensor, carried: Tensor | None, sample: bool) -> tuple[Tensor, Tensor, Tensor]:
        concepts = self.concepts.expand(len(tokens), -1, -1)
        if self.carry is not None:
            concepts = concepts + self.carry(carried)
        joint = torch.cat([tokens, concepts], dim=1)
        for block in self.blocks:
            joint = block(joint)
        tokens, concepts = joint.split([tokens.shape[1], concepts.shape[1]], dim=1)
        grouped, index = self.grouping(tokens, concepts, sample)
        return grouped, concepts, index


class ConceptGrouping(nn.Module):
    """The paper's grouping: cosine similarity, learned temperature, X' = C + MLP(A X).

    A X is the mean of a concept's tokens, zero for a concept that received none. The temperature divides the cosines
    before the noise is added: added before, noise would outweigh cosines, which lie in -1..1, at any temperature.

    Shape: (B, T, dim), (B, G, dim) -> (B, G, dim) and assignments (B, T).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(dim)
        self.norm_concepts = nn.LayerNorm(dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
        self.mlp = feed_forward(dim, 4 * dim, dim)

    def forward(self, tokens: Tensor, concepts: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
        tokens = self.norm_tokens(tokens)
        cosines = F.normalize(self.norm_concepts(concepts), dim=-1) @ F.normalize(tokens, dim=-1).mT  # (B, G, T)
        assignment, index = assign(cosines / self.log_temperature.exp(), sample)
        sums = assignment.to(tokens.dtype) @ tokens  # (B, G, dim)
        means = sums / assignment.sum(dim=-1, keepdim=True).clamp(min=1.0).to(tokens.dtype)
        return concepts + self.mlp(means), index


class PublishedGrouping(nn.Module):
    """The published code's grouping: mixed concepts read the tokens, then projected dot products assign them.

    A concept's sum of tokens is divided by their number plus one.

    Shape: (B, T, dim), (B, G, dim) -> (B, G, dim) and assignments (B, T).
    """

    def __init__(self, dim: int, num_heads: int, num_concepts: int):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(dim)
        self.mixer = TokenMixer(dim, num_concepts, num_concepts)
        self.norm_mixed = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads, bias=True)
        self.norm_cross_mlp = nn.LayerNorm(dim)
        self.cross_mlp = feed_forward(dim, 4 * dim, dim)
        self.norm_cross = nn.LayerNorm(dim)
        self.assign_query = nn.Linear(dim, dim)
        self.assign_key = nn.Linear(dim, dim)
        self.assign_value = nn.Linear(dim, dim)
        self.assign_out = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = feed_forward(dim, 4 * dim, dim)

    def forward(self, tokens: Tensor, concepts: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
        tokens = self.norm_tokens(tokens)
        concepts = self.norm_mixed(self.mixer(concepts))
        concepts = concepts + self.cross_attention(concepts, tokens)
        concepts = self.norm_cross(concepts + self.cross_mlp(self.norm_cross_mlp(concepts)))
        logits = self.assign_query(concepts) @ self.assign_key(tokens).mT * concepts.shape[-1] ** -0.5  # (B, G, T)
        assignment, index = assign(logits, sample)
        weights = (assignment / (assignment.sum(dim=-1, keepdim=True) + 1.0)).to(tokens.dtype)
        grouped = concepts + self.assign_out(weights @ self.assign_value(tokens))
        return grouped + self.mlp(self.norm_mlp(grouped)), index


class TokenMixer(nn.Module):
    """LayerNorm, then a feed-forward over the token axis (MLP-Mixer, arXiv 2105.01601).

    Shape: (B, T, dim) -> (B, S, dim).
    """

    def __init__(self, dim: int, tokens_in: int, tokens_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = feed_forward(tokens_in, dim // 2, tokens_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x).mT).mT


def assign(logits: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
    """Assign each token to one concept, hard in value and soft in gradient.

    Args:
        logits: (B, G, T), tokens' log-odds over the G concepts.
        sample: Draw from the softmax over concepts by Gumbel noise instead of taking its maximum.

    Returns:
        One-hot over G in at least float32, (B, G, T), with the softmax's gradient; and indices, (B, T).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sample:
        logits = logits - torch.empty_like(logits).exponential_().log()
    soft = logits.softmax(dim=1)
    index = logits.argmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, index.unsqueeze(1), 1.0)
    return hard + (soft - soft.detach()), index  # in this order the bracket is exactly zero
