"""How another package brings a modality into the world: its renderer, its words and its judge in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmbridge.errors import ConfigError
from mmbridge.synthetic.conversation import DESCRIBE
from mmbridge.synthetic.judges import JUDGES
from mmbridge.synthetic.language import TEMPLATES
from mmbridge.synthetic.requests import GIVEN, INPUTS
from mmbridge.synthetic.scene import CARRIES, FACTORS, HELD_OUT, Scene, lookup
from mmbridge.synthetic.segmentation import Verdict

Renderer = Callable[[Scene, int], Any]
_R = TypeVar("_R", bound=Renderer)

RENDERERS: dict[str, Renderer] = {}
"""Scene and seed to medium, of the modalities that other packages bring."""


def register_renderer(
    name: str,
    *,
    carries: Sequence[str],
    captions: Sequence[str],
    requests: Sequence[str],
    mentions: Sequence[str],
    judge: Callable[[Any], Verdict],
    held_out: Callable[[Scene], bool] | None = None,
) -> Callable[[_R], _R]:
    """Decorate a renderer: a function of a scene and a seed that returns a medium, the same one each time.

    Args:
        name: The modality.
        carries: The factors that it shows.
        captions: Templates (see ``fill``) that name all these and no others; the first one is canonical.
        requests: Ways to ask what such a medium contains, which ask for no medium.
        mentions: What requests for other media call it, such as "what the thermal map shows".
        judge: Reads the factors from a medium, None for one that it does not show; learned nothing.
        held_out: The scenes that no such medium shows in training; one that carries shape, colour, size and place, or shape, size
            and motion, needs no rule of its own.

    Raises:
        ConfigError: The world has this modality, a factor is not known, or there are no words.
    """
    for factor in carries:
        lookup("factor", factor, tuple(FACTORS))
    if not (carries and captions and requests and mentions):
        raise ConfigError(f"the modality {name!r} needs at least one of carries, captions, requests and mentions.")

    def decorate(render: _R) -> _R:
        origin = f"{render.__module__}.{render.__qualname__}"
        present = RENDERERS.get(name)
        if name in CARRIES and (present is None or f"{present.__module__}.{present.__qualname__}" != origin):
            raise ConfigError(f"the world has a modality {name!r} already; give {origin} another name.")
        if present is None:
            INPUTS.append(name)
        CARRIES[name] = tuple(carries)
        TEMPLATES[name], DESCRIBE[name], GIVEN[name] = tuple(captions), tuple(requests), tuple(mentions)
        RENDERERS[name], JUDGES[name] = render, judge
        if held_out is not None:
            HELD_OUT[name] = held_out
        return render

    return decorate
