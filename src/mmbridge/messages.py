"""Chat messages to rendered pieces: the one schema that Python, JSONL data, the command line and the server share.

A message is ``{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "Why?"}]}``;
content may also be a plain string. A medium is given by ``path`` or, from Python, by ``data`` (a loaded medium, an
array, a PIL image, bytes); a depth or normal map may come with the ``picture`` of the same view. A medium of the
assistant may carry the ``caption`` that a decoder is aligned to. Templates are Jinja files in ``templates/``; positions
of media and of supervised text are tracked through rendering, never searched for afterwards.
"""

import functools
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmbridge.errors import ConfigError, MediaError, MessageError
from mmbridge.modality import MEDIA, PAIRED
from mmbridge.registry import suggest

ROLES = ("system", "user", "assistant")
Message = dict[str, Any]

# Private-use characters that mark media and the assistant's text while a template is rendered.
_MEDIUM, _OPEN, _CLOSE = "\ue000", "\ue001", "\ue002"


@dataclass
class TextPart:
    """Words of a turn."""

    text: str


@dataclass
class MediumPart:
    """A medium of a turn: its type, where it is (``path``) or what it is (``data``), and its caption if known.

    A depth or normal map may have the ``picture`` of the same view, a path or whatever ``Image.load`` reads.
    """

    type: str
    path: str | None = None
    data: Any = None
    caption: str | None = None
    sample_rate: float | None = None
    fps: float | None = None
    picture: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``media.load`` is told besides the source."""
        named = (("sample_rate", self.sample_rate), ("fps", self.fps), ("picture", self.picture))
        return {key: value for key, value in named if value is not None}


Part = TextPart | MediumPart


@dataclass
class Turn:
    """One message: who speaks, and the parts in order."""

    role: str
    parts: list[Part] = field(default_factory=list)


@dataclass
class TextPiece:
    """A stretch of the rendered dialogue between media.

    ``supervised`` holds character ranges (start, end) that the assistant says, with the end-of-turn token.
    """

    text: str
    supervised: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class MediumPiece:
    """A medium in the rendered dialogue; ``supervised`` where the assistant says it."""

    part: MediumPart
    supervised: bool


Piece = TextPiece | MediumPiece


def _part(value: Any, where: str) -> Part:
    known = ["text", *MEDIA]
    if not isinstance(value, dict) or "type" not in value:
        raise MessageError(f"{where} must be an object with a 'type' ({' | '.join(known)}), not {value!r:.60}.")
    kind = value["type"]
    if kind not in known:
        raise MessageError(f"{where} has the unknown type {kind!r}{suggest(str(kind), known)}")
    if kind == "text":
        if not isinstance(value.get("text"), str) or len(value) != 2:
            raise MessageError(f"{where} of type 'text' needs exactly one other key, 'text', that holds a string.")
        return TextPart(value["text"])
    allowed = ["type", "path", "data", "caption", "sample_rate", "fps", *(["picture"] if kind in PAIRED else [])]
    for key in value:
        if key == "picture" and kind not in PAIRED:
            raise MessageError(
                f"{where} of type {kind!r} has a 'picture', which only {' and '.join(PAIRED)} parts may have."
            )
        if key not in allowed:
            raise MessageError(f"{where} of type {kind!r} has the unknown key {key!r}{suggest(str(key), allowed[1:])}")
    has_path, has_data = value.get("path") is not None, value.get("data") is not None
    if has_path and has_data:
        raise MessageError(f"{where} of type {kind!r} has both 'path' and 'data'; give one.")
    if not (has_path or has_data or value.get("caption") is not None):
        raise MessageError(f"{where} of type {kind!r} has neither 'path' nor 'data'; give the file or the medium.")
    if has_path and not isinstance(value["path"], str | Path):
        raise MessageError(f"{where} of type {kind!r} needs a file name as 'path', not {value['path']!r:.60}.")
    path = str(value["path"]) if has_path else None
    caption = value.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise MessageError(f"{where} of type {kind!r} needs a string as 'caption', not {caption!r:.60}.")
    for key in ("sample_rate", "fps"):
        rate = value.get(key)
        if rate is not None and (not isinstance(rate, int | float) or isinstance(rate, bool)):
            raise MessageError(f"{where} of type {kind!r} needs a number as {key!r}, not {rate!r:.60}.")
    picture = value.get("picture")
    if isinstance(picture, Path):
        picture = str(picture)
    return MediumPart(kind, path, value.get("data"), caption, value.get("sample_rate"), value.get("fps"), picture)


def parse_messages(messages: Sequence[Message]) -> list[Turn]:
    """Check a dialogue against the schema.

    Raises:
        MessageError: What is wrong, and in which message and part.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise MessageError("a dialogue is a non-empty list of messages ({'role': ..., 'content': ...}).")
    turns = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise MessageError(f"{where} must be an object with 'role' and 'content', not {message!r:.60}.")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise MessageError(f"{where} has the unknown role {role!r}{suggest(str(role), list(ROLES))}")
        if isinstance(content, str):
            parts: list[Part] = [TextPart(content)]
        elif isinstance(content, list):
            parts = [_part(value, f"message {number}, part {index}") for index, value in enumerate(content)]
        else:
            raise MessageError(f"{where} needs a string or a list of parts as 'content', not {content!r:.60}.")
        turns.append(Turn(role, parts))
    return turns


def read_messages(path: Path) -> list[Message]:
    """Read a dialogue from a JSON file (a list of messages, or an object with the key "messages").

    Raises:
        MessageError: The file is missing, not JSON, or not a dialogue.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MessageError(f"no file {path}; give a JSON file with a list of messages.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise MessageError(f"{path} can't be read as JSON ({error}); it must hold a list of messages.") from None
    if isinstance(value, dict):
        value = value.get("messages")
    parse_messages(value)
    return list(value)


def store_media(messages: Sequence[Message], folder: Path, root: str | Path | None = None) -> list[Message]:
    """Write the media of a dialogue into a folder; files (below ``root``) are copied, what is in memory is saved.

    Returns:
        The dialogue with names of files in ``folder`` (``image-0.png``, ...) as paths.

    Raises:
        MediaError: A file can't be read, or a medium can't be written.
    """
    count = 0
    stored = []
    for message, turn in zip(messages, parse_messages(messages), strict=True):
        content: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            entry: dict[str, Any] = {"type": part.type}
            if part.path is not None or part.data is not None:
                entry |= _store_medium(part, folder, root, f"{part.type}-{count}")
                count += 1
            if part.caption is not None:
                entry["caption"] = part.caption
            content.append(entry)
        stored.append({**message, "content": message["content"] if isinstance(message["content"], str) else content})
    return stored


def _store_medium(part: MediumPart, folder: Path, root: str | Path | None, stem: str) -> dict[str, Any]:
    """Write a medium and the picture of a map; returns what a part needs to name them."""
    from mmbridge import media

    if part.path is not None:
        entry: dict[str, Any] = {"path": _copy(part.path, folder, root, stem)}
        if part.sample_rate is not None:
            entry["sample_rate"] = part.sample_rate
        picture = part.picture
    else:
        medium = media.load(part.type, part.data, root, **part.options)
        entry = {"path": stem + medium.suffix}
        medium.save(folder / entry["path"])
        picture = part.picture if isinstance(part.picture, str) else getattr(medium, "picture", None)
    if isinstance(picture, str):
        entry["picture"] = _copy(picture, folder, root, f"{stem}-picture")
    elif picture is not None:
        entry["picture"] = f"{stem}-picture{media.Image.suffix}"
        media.Image.load(picture).save(folder / entry["picture"])
    return entry


def _copy(path: str, folder: Path, root: str | Path | None, stem: str) -> str:
    from mmbridge.media.base import within_root

    name = stem + Path(path).suffix.lower()
    try:
        shutil.copyfile(within_root(path, root), folder / name)
    except OSError as error:
        raise MediaError(f"{path!r} can't be copied to {str(folder)!r} ({error.strerror}).") from error
    return name


def template_names() -> list[str]:
    """Return the names of the shipped templates."""
    return sorted(file.stem for file in (Path(__file__).parent / "templates").glob("*.jinja"))


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> Any:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if "{" not in template:
        if template not in template_names():
            raise ConfigError(f"unknown chat template {template!r}{suggest(template, template_names())}")
        template = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse  # templates of the Hugging Face dialect call it
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}.") from None


def _refuse(reason: str) -> None:
    raise MessageError(f"the chat template refuses this dialogue: {reason}")


def render(
    turns: Sequence[Turn], template: str, *, bos: str, eos: str, specials: Iterable[str] = (), reply: bool = False
) -> list[Piece]:
    """Render a dialogue to pieces, with the positions of media and supervised text.

    Args:
        turns: A parsed dialogue.
        template: Name of a file in ``templates/``, or Jinja source in the Hugging Face chat-template dialect.
        bos: The backbone's begin-of-sequence string, "" for none.
        eos: Its end-of-sequence string; supervised where it follows the assistant's words.
        specials: Strings that must not act as control tokens when a person types them; they are broken by a space.
        reply: Whether to end with the prompt for the assistant's reply.

    Returns:
        Text and media pieces in order; text pieces are never empty.

    Raises:
        ConfigError: The template is unknown, not valid, or leaves out or repeats what the messages hold.
        MessageError: The template refuses the dialogue.
    """
    from jinja2 import TemplateError

    media: list[MediumPiece] = []
    rendered = []
    for turn in turns:
        content = ""
        for part in turn.parts:
            if isinstance(part, MediumPart):
                content += _MEDIUM
                media.append(MediumPiece(part, turn.role == "assistant"))
            else:
                text = part.text
                for mark in (_MEDIUM, _OPEN, _CLOSE):
                    text = text.replace(mark, "")
                for special in specials:
                    text = text.replace(special, special[0] + " " + special[1:])
                content += text
        if turn.role == "assistant":
            content = _OPEN + content + _CLOSE
        rendered.append({"role": turn.role, "content": content})
    compiled = _compile(template)
    try:
        text = compiled.render(messages=rendered, bos_token=bos, eos_token=eos, add_generation_prompt=reply)
    except TemplateError as error:
        raise ConfigError(f"the chat template fails on this dialogue ({error}); name a shipped one.") from None
    if text.count(_MEDIUM) != len(media):
        raise ConfigError(
            f"the chat template shows {text.count(_MEDIUM)} media but the dialogue has {len(media)}; "
            "a template must show every message once."
        )

    pieces: list[Piece] = []
    current = TextPiece("")
    opened: int | None = None
    upcoming = iter(media)
    position = 0

    def close_range() -> None:
        if opened is not None and len(current.text) > opened:
            current.supervised.append((opened, len(current.text)))

    while position < len(text):
        character = text[position]
        position += 1
        if character == _MEDIUM:
            close_range()
            if current.text:
                pieces.append(current)
            pieces.append(next(upcoming))
            current = TextPiece("")
            opened = None if opened is None else 0
        elif character == _OPEN:
            opened = len(current.text)
        elif character == _CLOSE:
            if eos and text.startswith(eos, position):
                current.text += eos
                position += len(eos)
            close_range()
            opened = None
        else:
            current.text += character
    if current.text:
        pieces.append(current)
    return pieces
