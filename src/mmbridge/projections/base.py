"""What every projection shares: widths that are given at once or derived later, checked shapes, attention.

A projection that is created without widths holds no parameters until ``build`` is called; a bridge calls it with the
widths that its neighbours publish. A projection that already has widths compares them and refuses a clash.
"""

from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from mmbridge.errors import ConfigError, ShapeError


class Projection(nn.Module):
    """Base of ``InputProjection`` and ``OutputProjection``.

    A subclass sets its options in ``__init__``, ends it with ``self._build_if_given(...)``, creates its layers in
    ``_create`` and applies them in ``_project``, which receives a checked tensor (B, T >= 1, dim_in).
    """

    direction: ClassVar[Literal["in", "out"]]
    _neighbours: ClassVar[dict[str, str]]

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, int] = {}

    @property
    def name(self) -> str:
        """Registry name, or the class name of a projection that is not registered."""
        return getattr(type(self), "registry_name", type(self).__name__)

    @property
    def is_built(self) -> bool:
        """Whether the widths are known and the layers exist."""
        return bool(self._sizes)

    @property
    def dim_in(self) -> int | None:
        """Width of the tokens that come in; None before ``build``."""
        return self._sizes.get("dim_in")

    @property
    def dim_out(self) -> int | None:
        """Width of the tokens that go out; None before ``build``."""
        return self._sizes.get("dim_out")

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens.

        Args:
            x: (B, T, dim_in), T >= 1.

        Returns:
            (B, slots, dim_out) for an input projection, (B, num_queries, dim_out) for an output projection.

        Raises:
            ShapeError: Called before ``build``, or ``x`` has another shape.
        """
        self._check(x)
        return self._project(x)

    def extra_repr(self) -> str:
        return self._described(self._sizes) if self.is_built else "not built"

    def _check(self, x: Tensor) -> None:
        if not self.is_built:
            names = ", ".join(self._neighbours)
            raise ShapeError(
                f"projection {self.name!r} has no widths yet; give {names} when creating it, or call "
                f"build({names}) first."
            )
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.dim_in:
            raise ShapeError(
                f"projection {self.name!r} takes tokens of shape (batch, at least 1, {self.dim_in}), but got "
                f"{tuple(x.shape)}; feed it the part whose width it was built for, or build another one."
            )

    def _create(self, *args: Any, **sizes: Any) -> None:
        raise NotImplementedError

    def _project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _build_if_given(self, **sizes: int | None) -> None:
        given = {key: size for key, size in sizes.items() if size is not None}
        if given and len(given) < len(sizes):
            absent = ", ".join(key for key in sizes if key not in given)
            raise ConfigError(
                f"projection {self.name!r} was given {', '.join(given)} without {absent}; give all of them, or none "
                "to have them derived from the neighbours."
            )
        if given:
            self._build(given)

    def _build(self, sizes: dict[str, int]) -> None:
        if not self.is_built:
            require_positive(self.name, **sizes)
            self._create(**sizes)
            self._sizes = sizes
            return
        clashes = {key: size for key, size in sizes.items() if size != self._sizes[key]}
        if clashes:
            wanted = " and ".join(self._neighbours[key].format(size) for key, size in clashes.items())
            arguments = ", ".join(f"{key}={size}" for key, size in clashes.items())
            raise ShapeError(
                f"projection {self.name!r} was built for {self._described(self._sizes)}, but {wanted}; create it with "
                f"{arguments}, or without sizes to have them derived."
            )

    @staticmethod
    def _described(sizes: dict[str, int]) -> str:
        queries = f"{sizes['num_queries']} x " if "num_queries" in sizes else ""
        return f"{sizes['dim_in']} -> {queries}{sizes['dim_out']}"


class InputProjection(Projection):
    """Encoder tokens to slots in the backbone's sequence: (B, T, dim_in) -> (B, num_tokens(T), dim_out)."""

    direction = "in"
    loss_names: ClassVar[tuple[str, ...]] = ()
    """Losses that ``losses`` may give; an option of the same name switches each on."""
    routing: Tensor | None = None
    """Weights by which the last call mixed its experts, (..., num_experts); None of a projection without experts."""
    _neighbours = {"dim_in": "the encoder gives width {}", "dim_out": "the backbone takes width {}"}

    def build(self, dim_in: int, dim_out: int) -> Self:
        """Create the layers, or check the widths where they exist already.

        Args:
            dim_in: Width of the encoder's tokens.
            dim_out: Width of the backbone's embeddings.

        Raises:
            ShapeError: The projection was built for other widths.
            ConfigError: A width is not a positive integer.
        """
        self._build({"dim_in": dim_in, "dim_out": dim_out})
        return self

    def num_tokens(self, tokens_in: int) -> int:
        """Return how many slots ``tokens_in`` encoder tokens fill."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Return losses of the last call beside those of the bridge, by name, each a scalar."""
        return {}


class OutputProjection(Projection):
    """Signal states to a decoder's condition: (B, K, dim_in) -> (B, num_queries, dim_out)."""

    direction = "out"
    _neighbours = {
        "dim_in": "the backbone gives width {}",
        "dim_out": "the decoder takes width {}",
        "num_queries": "the decoder takes {} condition tokens",
    }

    @property
    def num_queries(self) -> int | None:
        """Condition tokens that go out; None before ``build``."""
        return self._sizes.get("num_queries")

    def build(self, dim_in: int, dim_out: int, num_queries: int) -> Self:
        """Create the layers, or check the sizes where they exist already.

        Args:
            dim_in: Width of the backbone's hidden states.
            dim_out: Width of the decoder's condition (``ConditionSpec.dim``).
            num_queries: Tokens of the decoder's condition (``ConditionSpec.tokens``).

        Raises:
            ShapeError: The projection was built for other sizes.
            ConfigError: A size is not a positive integer.
        """
        self._build({"dim_in": dim_in, "dim_out": dim_out, "num_queries": num_queries})
        return self


def require_positive(part: str, **sizes: int) -> None:
    """Raise ConfigError unless every size is a positive integer."""
    for key, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"projection {part!r} needs a positive integer for {key}, but got {size!r}; correct it.")


def require_heads(part: str, dim_hidden: int, num_heads: int) -> None:
    """Raise ConfigError unless ``num_heads`` divides ``dim_hidden``."""
    require_positive(part, dim_hidden=dim_hidden, num_heads=num_heads)
    if dim_hidden % num_heads:
        raise ConfigError(
            f"projection {part!r} got num_heads={num_heads}, which does not divide dim_hidden={dim_hidden}; choose a "
            "divisor."
        )


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (arXiv 1706.03762, section 3.2.2) of queries to a context.

    Shape: (B, Q, dim), (B, T, dim) -> (B, Q, dim).
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        heads = (
            layer.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query(x), self.key(context), self.value(context))
        )  # 3 x (B, heads, T, dim / heads)
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def feed_forward(dim_in: int, dim_hidden: int, dim_out: int) -> nn.Sequential:
    """Return Linear-GELU-Linear over the last dimension."""
    return nn.Sequential(nn.Linear(dim_in, dim_hidden), nn.GELU(), nn.Linear(dim_hidden, dim_out))
