"""What the assistant answers: the whole reply, and the events that tell of it while it is made."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmbridge.messages import Message, store_media


@dataclass
class Reply:
    """What the assistant answers: strings and media in order.

    Attributes:
        parts: Strings and media (``Image``, ``Audio``, ``Video``).
        complete: False where ``max_new_tokens`` or the context ended the reply.
    """

    parts: list[Any] = field(default_factory=list)
    complete: bool = True

    @property
    def text(self) -> str:
        """The words, joined."""
        return " ".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> list[Any]:
        """The media, in order."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def message(self) -> Message:
        """The reply as a message, with media under ``data``; append it to the dialogue to go on."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality, "data": part}
            for part in self.parts
        ]
        return {"role": "assistant", "content": content}

    def save(self, folder: str | Path) -> Message:
        """Write ``reply.json`` and the media beside it; returns the message with file names.

        Raises:
            MediaError: A medium can't be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (message,) = store_media([self.message], folder)
        draft = folder / ".reply.json.draft"
        draft.write_text(json.dumps(message, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(folder / "reply.json")
        return message


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the reply's text; all pieces joined are ``Reply.text``."""

    text: str


@dataclass(frozen=True)
class MediumStarted:
    """The assistant has begun to make its medium number ``index``, counted from 0 in the reply."""

    modality: str
    index: int


@dataclass(frozen=True)
class MediumPreview:
    """What a medium looks like after ``step`` of ``steps`` sampling steps."""

    modality: str
    index: int
    medium: Any
    step: int
    steps: int


@dataclass(frozen=True)
class MediumDone:
    """A medium is made."""

    modality: str
    index: int
    medium: Any


@dataclass(frozen=True)
class Notice:
    """Something that the person should know, in a sentence: what had to be forgotten, for example."""

    text: str


@dataclass(frozen=True)
class ReplyDone:
    """The whole reply; always the last event."""

    reply: Reply


Event = TextDelta | MediumStarted | MediumPreview | MediumDone | Notice | ReplyDone


class Writing:
    """The reply of one row while it is written: tokens become text, also piece by piece.

    Args:
        tokenizer: The backbone's.
        stop: Text that ends the reply and is not part of it; "" for none.
    """

    def __init__(self, tokenizer: Any, stop: str = ""):
        self.tokenizer, self.stop = tokenizer, stop
        self.reply = Reply()
        self.tokens: list[int] = []  # since the last medium
        self.told = ""  # what pieces have told of them

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _text(self) -> str:
        text = self._decode(self.tokens)
        return text.partition(self.stop)[0] if self.stop else text

    def write(self, token: int) -> bool:
        """Add a token; tells whether the reply stops with it."""
        self.tokens.append(token)
        return bool(self.stop) and self.stop in self._decode(self.tokens[-len(self.stop) :])

    def _tell(self, text: str) -> str:
        new = text[len(self.told) :]
        lead = " " if new and not self.told and self.reply.text else ""
        self.told += new
        return lead + new

    def piece(self) -> str:
        """Return the text that the last token settles.

        Held back are an unfinished character (half of its bytes read as U+FFFD), bytes that a tokenizer spells one by one, which
        are only read together, and white space or the beginning of the stop, which may turn out to end the text.
        """
        if re.fullmatch("<0x[0-9A-F]{2}>", self.tokenizer.convert_ids_to_tokens(self.tokens[-1])):
            return ""
        text = self._text().rstrip("\ufffd")
        begun = next((size for size in range(len(self.stop) - 1, 0, -1) if text.endswith(self.stop[:size])), 0)
        return self._tell(text[: len(text) - begun].strip())

    def close(self) -> str:
        """End the stretch of text and put it into the reply; returns what pieces have not told of it."""
        text = self._text().strip()
        rest = self._tell(text)
        if text:
            self.reply.parts.append(text)
        self.tokens, self.told = [], ""
        return rest
