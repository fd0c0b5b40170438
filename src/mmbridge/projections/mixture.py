"""OneLLM's universal projection: a mixture of projection experts that learned tokens are read out of.

Source: Han et al., "OneLLM: One Framework to Align All Modalities with Language", arXiv 2312.03700, section 3.1.

Learned tokens stand before the encoder's, every expert (a stack of transformer blocks) works on both, and a router says how
much of each expert's states of the learned tokens goes on. Experts are one computation: their weights are stacked.
"""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbridge.errors import ConfigError, ShapeError
from mmbridge.projections.base import InputProjection, feed_forward, require_heads, require_positive
from mmbridge.registry import projections as registry
from mmbridge.registry import suggest

register = registry.register

ROUTERS = ("tokens", "features", "constant")
NORMALIZERS = ("softmax", "sigmoid")
ROUTING = ("router", "normalize", "top_k", "experts")
"""Options that ``upcycle`` may change: how experts are weighed, and the name under which they are shared."""


class Load(NamedTuple):
    """How a router weighs its experts.

    Attributes:
        share: Mean weight of each expert, (num_experts,).
        entropy: Mean entropy of the weights of a slot, in nats: from 0, one expert has all, to log(num_experts), all have as much.
    """

    share: Tensor
    entropy: Tensor


@register(
    "mixture_of_experts",
    tiny={"num_tokens": 3, "dim_hidden": 16, "num_experts": 2, "depth": 2, "num_heads": 2, "dim_feedforward": 32},
)
class MixtureOfExperts(InputProjection):
    """Condense encoder tokens into ``num_tokens`` slots by several experts and a router.

    The published router reads nothing but the learned tokens, so that its weights are the same for every input
    (``router="tokens"``); "features" adds the mean of what comes in, and "constant" gives every expert the same weight. The paper
    normalises by a softmax (equation 2), the published code by a sigmoid over the sum.

    Args:
        dim_in: Width of the encoder's tokens; None to be built later.
        dim_out: Width of the backbone's embeddings; None to be built later.
        num_tokens: Slots produced for each medium.
        dim_hidden: Width inside.
        num_experts: Experts.
        depth: Transformer blocks of an expert.
        num_heads: Attention heads; must divide ``dim_hidden``.
        dim_feedforward: Width inside each block's SwiGLU; None takes LLaMA's rule, 8/3 of the width, rounded
            up to a multiple of 256.
        router: "tokens", "features" or "constant".
        normalize: "softmax" or "sigmoid".
        top_k: Experts with a weight, for every slot; the others' is 0. None for all.
        experts: Name under which projections of one bridge share their experts, as all published ones do; None for own ones.
        upcycle: Whether a training run may start the experts from a parent's single one: null refuses such a parent, 0 makes them
            copies of it, and more is the ``noise`` of ``upcycle``.
        balance: Whether ``losses`` gives the balance loss; recipes set it where the loss ``<modality>.balance`` has a weight.

    Shape: (B, T, dim_in) -> (B, num_tokens, dim_out), for any T >= 1.

    Attributes:
        routing: What the router gave in the last call, as ``weights`` does, with its gradients; None before the first. A way in
            (``inputs.Encoded``) joins its calls for one batch.

    Raises:
        ConfigError: A size that is not a positive integer, heads that do not divide the width, an unknown router.

    Examples:
        >>> import torch
        >>> mixture = MixtureOfExperts(24, 32, num_tokens=4, dim_hidden=16, depth=2, num_heads=2)
        >>> mixture(torch.randn(2, 9, 24)).shape
        torch.Size([2, 4, 32])
        >>> mixture.weights(torch.randn(2, 9, 24)).shape  # of every slot and expert
        torch.Size([1, 4, 3])
        >>> mixture.load().share.shape  # of the last call
        torch.Size([3])
    """

    loss_names = ("balance",)
    experts: "Experts"

    def __init__(
        self,
        dim_in: int | None = None,
        dim_out: int | None = None,
        num_tokens: int = 30,
        *,
        dim_hidden: int = 1024,
        num_experts: int = 3,
        depth: int = 8,
        num_heads: int = 16,
        dim_feedforward: int | None = None,
        router: Literal["tokens", "features", "constant"] = "tokens",
        normalize: Literal["softmax", "sigmoid"] = "softmax",
        top_k: int | None = None,
        experts: str | None = None,
        upcycle: float | None = None,
        balance: bool = False,
    ):
        super().__init__()
        if dim_feedforward is None:
            dim_feedforward = 256 * math.ceil(8 * dim_hidden / 3 / 256)
        require_positive(
            self.name, num_tokens=num_tokens, num_experts=num_experts, depth=depth, dim_feedforward=dim_feedforward
        )
        require_heads(self.name, dim_hidden, num_heads)
        for option, value, known in (("router", router, ROUTERS), ("normalize", normalize, NORMALIZERS)):
            if value not in known:
                raise ConfigError(f"projection {self.name!r} got {option}={value!r}; choose one of {', '.join(known)}.")
        if upcycle is not None and upcycle < 0:
            raise ConfigError(f"projection {self.name!r} got upcycle={upcycle}, but it must be 0 or more.")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ConfigError(f"projection {self.name!r} got top_k={top_k}, which is not in 1..{num_experts}.")
        sizes = (num_experts, depth, dim_hidden, num_heads, dim_feedforward)
        self.tokens_out, self.dim_hidden, self.num_experts = num_tokens, dim_hidden, num_experts
        self.router_kind, self.normalize, self.top_k, self.balance = router, normalize, top_k, balance
        self._sizes_of_experts, self._shared_as = sizes, experts
        self._pool: dict[str, Experts] = {}  # a plain dict, so that torch sees them once
        self._build_if_given(dim_in=dim_in, dim_out=dim_out)

    def num_tokens(self, tokens_in: int) -> int:
        return self.tokens_out

    def share(self, pool: dict[str, "Experts"]) -> None:
        """Take part in sharing: the first projection of a name gives its experts, the others take them.

        Args:
            pool: Experts by name; those of this projection's name are added if they are not there.

        Raises:
            ConfigError: The experts of that name have other sizes.
        """
        self._pool = pool
        if self.is_built:
            self.experts = self._find_experts(self.experts)

    def _find_experts(self, own: "Experts | None" = None) -> "Experts":
        if self._shared_as is None or self._shared_as not in self._pool:
            own = own or Experts(*self._sizes_of_experts)
            return own if self._shared_as is None else self._pool.setdefault(self._shared_as, own)
        found = self._pool[self._shared_as]
        if found.sizes != self._sizes_of_experts:
            raise ConfigError(
                f"projection {self.name!r} is to share experts of the sizes {found.sizes} (number, depth, width, heads, "
                f"feed-forward), but is of the sizes {self._sizes_of_experts}; make them equal."
            )
        return found

    def _create(self, dim_in: int, dim_out: int) -> None:
        self.project_in = nn.Sequential(nn.Linear(dim_in, self.dim_hidden), nn.LayerNorm(self.dim_hidden))
        self.tokens = nn.Parameter(torch.randn(1, self.tokens_out, self.dim_hidden) * 0.02)
        if self.router_kind != "constant":
            self.router = feed_forward(self.dim_hidden, 4 * self.dim_hidden, self.num_experts)
        self.experts = self._find_experts()
        self.project_out = nn.Sequential(nn.Linear(self.dim_hidden, dim_out), nn.LayerNorm(dim_out))

    def weights(self, x: Tensor) -> Tensor:
        """Return how much each slot takes of each expert: (1, num_tokens, num_experts), (B, ...) of a router that reads features.

        Args:
            x: (B, T, dim_in).
        """
        self._check(x)
        return self._route(self.project_in(x))

    def _route(self, features: Tensor) -> Tensor:
        if self.router_kind == "constant":
            return self.tokens.new_full((1, self.tokens_out, self.num_experts), 1 / self.num_experts)
        read = self.tokens + features.mean(1, keepdim=True) if self.router_kind == "features" else self.tokens
        scores = self.router(read)  # (1 or B, num_tokens, num_experts)
        if self.normalize == "softmax":
            weights = scores.softmax(-1)
        else:
            weights = scores.sigmoid()
            weights = weights / weights.sum(-1, keepdim=True)
        if self.top_k is not None:
            chosen = weights.topk(self.top_k, dim=-1).indices
            weights = weights * torch.zeros_like(weights).scatter(-1, chosen, 1.0)
        return weights

    def load(self) -> Load:
        """Return how the last call weighed the experts, without gradients; computed now, so that it costs nothing before.

        Raises:
            ShapeError: There was no call yet.
        """
        if self.routing is None:
            raise ShapeError(f"projection {self.name!r} has weighed nothing yet; call it on tokens first.")
        weights = self.routing.detach().flatten(0, 1)  # (slots, num_experts)
        entropy = torch.special.entr(weights / weights.sum(-1, keepdim=True)).sum(-1)
        return Load(weights.mean(0), entropy.mean())

    def losses(self) -> dict[str, Tensor]:
        """Return ``balance``, the ``balance_loss`` of the last call, where it is switched on and there was a call."""
        return {"balance": balance_loss(self.routing.float())} if self.balance and self.routing is not None else {}

    def _project(self, x: Tensor) -> Tensor:
        features = self.project_in(x)  # (B, T, dim_hidden)
        both = torch.cat([self.tokens.expand(len(x), -1, -1), features], dim=1)
        states = self.experts(both, self.tokens_out)  # (K, B, num_tokens, dim_hidden)
        self.routing = self._route(features)
        mixed = torch.einsum("kbnd,bnk->bnd", states, self.routing.expand(len(x), -1, -1))
        return self.project_out(mixed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routing": None}  # a copy is of the module, not of its last call


def balance_loss(weights: Tensor) -> Tensor:
    """Return how unevenly experts are weighed: the squared coefficient of variation of their total weights.

    0 where all have the same total, num_experts - 1 where one has all. To be added to a loss, times a small number. This is the
    importance loss of Shazeer et al., arXiv 1701.06538, equations 6 and 7.

    Args:
        weights: ``MixtureOfExperts.routing`` after a call, or any other weights (..., num_experts).
    """
    totals = weights.flatten(0, -2).sum(0)  # (num_experts,)
    return totals.var(correction=0) / totals.mean().square()


def upcycle(projection: MixtureOfExperts, num_experts: int, noise: float = 0.0, **options: Any) -> MixtureOfExperts:
    """Return a mixture whose experts all start as the one of a trained projection (arXiv 2212.05055, section 3).

    Tokens and the layers in and out are copies, the router is new. As long as nothing is trained, it gives what the given
    projection gives, unless there is noise or ``top_k`` leaves weights out.

    Args:
        projection: A projection with one expert; it stays as it is.
        num_experts: Experts of the new one.
        noise: Standard deviation of what is added to every matrix of an expert, as a share of the matrix's own.
        **options: Of ``MixtureOfExperts`` those in ``ROUTING``, where they shall differ.

    Raises:
        ConfigError: More experts than one, negative noise, an option that ``upcycle`` does not change.
        ShapeError: The projection has no widths yet.
    """
    _require_built(projection)
    if projection.num_experts != 1:
        raise ConfigError(
            f"upcycle starts from one expert, but the projection has {projection.num_experts}; give another."
        )
    if noise < 0:
        raise ConfigError(f"upcycle got noise={noise}, but it must be 0 or more.")
    for option in options:
        if option not in ROUTING:
            raise ConfigError(f"upcycle can't change {option!r}{suggest(option, list(ROUTING))}")
    made = _like(projection, num_experts=num_experts, **options)
    made.build(*projection._sizes.values())
    made.load_state_dict(upcycled(projection.state_dict(), made.state_dict(), noise))
    return _placed(made, projection)


def upcycled(one: Mapping[str, Tensor], fresh: Mapping[str, Tensor], noise: float = 0.0) -> dict[str, Tensor]:
    """Return the tensors of a mixture, or of its experts alone, whose experts start as the one of another.

    Args:
        one: Tensors by name of the one with a single expert.
        fresh: Those of the new one; its router stays, and it gives the number of experts.
        noise: As of ``upcycle``.
    """
    made = {name: value for name, value in one.items() if not name.startswith("router.")}
    for name, value in made.items():
        if name in fresh and name.startswith(("experts.", "blocks.")):
            made[name] = value.expand(len(fresh[name]), *value.shape[1:])  # one expert's to all
            if noise:
                made[name] = made[name] + noise * value.std() * torch.randn_like(made[name])
    return made | {name: value for name, value in fresh.items() if name.startswith("router.")}


def add_modality(
    projections: MutableMapping[str, Any] | nn.ModuleDict, name: str, like: str = "image"
) -> MixtureOfExperts:
    """Add a projection for a new modality that shares its experts with another, and starts as it.

    Tokens, the router and the layers in and out are copies of the other's, the experts are the same module. For a bridge, put what
    is returned into a way in (``inputs.Encoded``).

    Args:
        projections: Projections by modality; the new one is added.
        name: The new modality.
        like: The modality whose projection it starts as; its experts must have a name (``experts``).

    Raises:
        ConfigError: The new modality is there already, or the other is not, or is no mixture with named experts.
        ShapeError: The other projection has no widths yet.
    """
    if name in projections:
        raise ConfigError(f"there is a projection for {name!r} already; choose another name.")
    if like not in projections:
        raise ConfigError(f"there is no projection for {like!r}{suggest(like, list(projections))}")
    source = projections[like]
    if not isinstance(source, MixtureOfExperts) or source._shared_as is None:
        raise ConfigError(
            f"the projection of {like!r} has no experts to share; give it as MixtureOfExperts(..., experts='experts')."
        )
    _require_built(source)
    made = _like(source)
    made.share({source._shared_as: source.experts})
    made.build(*source._sizes.values())
    made.load_state_dict(source.state_dict())
    projections[name] = _placed(made, source)
    return made


def _require_built(projection: MixtureOfExperts) -> None:
    if not projection.is_built:
        raise ShapeError(f"projection {projection.name!r} has no widths yet; call build(dim_in, dim_out) first.")


def _like(projection: MixtureOfExperts, **changed: Any) -> MixtureOfExperts:
    """Return a projection with the same options but without widths."""
    options = {**projection.arguments, **changed}  # type: ignore[attr-defined]
    return MixtureOfExperts(**{key: value for key, value in options.items() if key not in ("dim_in", "dim_out")})


def _placed(made: MixtureOfExperts, projection: MixtureOfExperts) -> MixtureOfExperts:
    """Move a projection to where another is."""
    return made.to(projection.tokens.device, projection.tokens.dtype).train(projection.training)


class Experts(nn.Module):
    """Stacks of pre-norm transformer blocks that see in both directions, without positions, as one computation.

    Shape: (B, T, dim) -> (num_experts, B, queries, dim).

    Args:
        num_experts: Experts.
        depth: Blocks of each.
        dim: Width.
        num_heads: Attention heads.
        dim_feedforward: Width inside each block's SwiGLU.
    """

    def __init__(self, num_experts: int, depth: int, dim: int, num_heads: int, dim_feedforward: int):
        super().__init__()
        self.sizes = (num_experts, depth, dim, num_heads, dim_feedforward)
        self.blocks = nn.ModuleList(ExpertBlock(num_experts, dim, num_heads, dim_feedforward) for _ in range(depth))

    def forward(self, x: Tensor, queries: int) -> Tensor:
        """Return each expert's states of the first tokens.

        Args:
            x: (B, T, dim).
            queries: How many tokens are wanted; the last block computes no others, which changes nothing.

        Raises:
            ShapeError: There are fewer tokens.
        """
        if not 1 <= queries <= x.shape[1]:
            raise ShapeError(
                f"{queries} states were asked for, but there are {x.shape[1]} tokens; ask for 1 to as many."
            )
        batch, length = x.shape[:2]
        states = x.flatten(0, 1).expand(self.sizes[0], -1, -1)  # (K, B * T, dim)
        for block in self.blocks[:-1]:
            states = block(states, batch, length, length)
        return self.blocks[-1](states, batch, length, queries).unflatten(1, (batch, queries))


class ExpertBlock(nn.Module):
    """A LLaMA block (arXiv 2302.13971, section 2.2) without rotary positions, of several experts.

    Shape: (K, B * T, dim) -> (K, B * Q, dim).
    """

    def __init__(self, num_experts: int, dim: int, num_heads: int, dim_feedforward: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.Parameter(torch.ones(num_experts, 1, dim))
        self.norm_mlp = nn.Parameter(torch.ones(num_experts, 1, dim))
        self.query, self.key, self.value, self.out = (_stacked(num_experts, dim, dim) for _ in range(4))
        self.gate, self.up = (_stacked(num_experts, dim_feedforward, dim) for _ in range(2))
        self.down = _stacked(num_experts, dim, dim_feedforward)

    def forward(self, x: Tensor, batch: int, length: int, queries: int) -> Tensor:
        """Return the states of the first ``queries`` tokens of each row.

        Args:
            x: (K, B * T, dim).
            batch: B.
            length: T.
            queries: Q, at most T.
        """
        rows, dim = (batch, length), x.shape[-1]
        normed = _rms_norm(x, self.norm_attention)
        asked = normed.unflatten(1, rows)[:, :, :queries].flatten(1, 2)  # (K, B * Q, dim)
        heads = (
            (tokens @ weight.mT).view(len(x) * batch, count, self.num_heads, dim // self.num_heads).transpose(1, 2)
            for tokens, weight, count in (
                (asked, self.query, queries), (normed, self.key, length), (normed, self.value, length)
            )
        )  # 3 x (K * B, heads, Q or T, dim / heads)  # fmt: skip
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(asked.shape)
        x = x.unflatten(1, rows)[:, :, :queries].flatten(1, 2) + attended @ self.out.mT
        normed = _rms_norm(x, self.norm_mlp)
        return x + (F.silu(normed @ self.gate.mT) * (normed @ self.up.mT)) @ self.down.mT


def _stacked(num_experts: int, rows: int, columns: int) -> nn.Parameter:
    """Return matrices of equal sizes, each started by itself."""
    return nn.Parameter(torch.stack([nn.init.xavier_uniform_(torch.empty(rows, columns)) for _ in range(num_experts)]))


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5) * weight
