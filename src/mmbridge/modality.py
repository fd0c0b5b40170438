"""The names of the media that a message may hold, and the classes that hold them.

Another package adds a medium by its class, decorated by ``register``, and an entry point in ``mmbridge.media``.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self, TypeVar

from mmbridge.registry import Table


class Medium(Protocol):
    """What every class of media has.

    Attributes:
        modality: The name of the medium: "image", "audio", ...
        noun: How errors call one, with its article.
        suffix: How files end that are written of what has no name yet; all but pictures', sounds' and videos' hold every bit.
    """

    modality: ClassVar[str]
    noun: ClassVar[str]
    suffix: ClassVar[str]

    @classmethod
    def load(cls, source: Any, *, root: Any = None) -> Self:
        """Read one from a file below ``root``, or from whatever else the class reads; one of itself is returned as it is."""
        ...

    def save(self, path: Any) -> None:
        """Write a file whose name ends in ``suffix``, or as others that the class writes."""
        ...

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of all that an encoder may read."""
        ...


_C = TypeVar("_C", bound=type)

MEDIA: Table[Any] = Table(
    "medium",
    "mmbridge.media",
    {
        "image": "mmbridge.media.image",
        "audio": "mmbridge.media.audio",
        "video": "mmbridge.media.video",
        "depth": "mmbridge.media.maps",
        "normal": "mmbridge.media.maps",
        "pointcloud": "mmbridge.media.pointcloud",
        "imu": "mmbridge.media.imu",
        "fmri": "mmbridge.media.fmri",
    },
)
"""Classes of media, each a ``Medium``, in the order in which tables list them; looking one up imports it."""

PAIRED = ("depth", "normal")
"""Maps, which may come with the picture of the same view."""


def register(name: str) -> Callable[[_C], _C]:
    """Decorate the class of a medium, a ``Medium``.

    Args:
        name: What messages and recipes call it, snake case.

    Raises:
        ConfigError: The name is taken.
    """

    def decorate(medium: _C) -> _C:
        MEDIA.register(name, medium)
        return medium

    return decorate
