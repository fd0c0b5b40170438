"""A dialogue turn by turn over one key-value cache: a turn reads its new positions only, and each medium is encoded once.

What the model has read is always a prefix of what a fresh pass over the whole dialogue would read: every turn is rendered and
tokenised whole, and where that differs from the cache (a tokenizer that merges across turns, a reply spelt in unusual tokens,
media that had to be forgotten) the cache is cropped to what they share.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmbridge import hub
from mmbridge.bridge import load_part
from mmbridge.data.features import FeatureStore
from mmbridge.errors import MessageError
from mmbridge.generation import Decoding, Sampling, block_size, check_room, decode, evaluating
from mmbridge.messages import Message, TextPart, parse_messages, store_media
from mmbridge.replies import Event, Notice, Reply, ReplyDone
from mmbridge.sequence import TokenSequence, check_supported

log = logging.getLogger("mmbridge.chat")


@dataclass(frozen=True)
class KnownMedium:
    """What is kept in place of a medium whose features are stored: the hash of its content, by which they are found."""

    content_hash: str


class Chat:
    """A dialogue with a bridge.

    A turn is whole or not at all: after an error, or where a stream is left before its end, the chat is as it was before.

    Args:
        bridge: A ``Bridge``.
        system: What a system message says, before the dialogue.
        root: Folder below which paths of media must lie; None allows any path.
        **sampling: Fields of ``mmbridge.generation.Sampling``. Turn number i, counted from 0, takes seed + i.

    Attributes:
        messages: The whole dialogue in the message schema, also what the model no longer has in memory.
        store: Features of the media, each computed once.

    Raises:
        ConfigError: A field of ``sampling`` is out of range.

    Example:
        >>> chat = Chat(Bridge.from_pretrained("mmbridge/tiny"))
        >>> chat.send("Draw a large red star.").media[0].save("star.png")
        >>> chat.send([{"type": "image", "path": "star.png"}, {"type": "text", "text": "What colour is it?"}]).text
    """

    def __init__(self, bridge: Any, system: str | None = None, root: str | Path | None = None, **sampling: Any):
        self.bridge, self.root, self.sampling = bridge, root, Sampling(**sampling)
        self.store = FeatureStore()
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._streaming: Iterator[Event] = iter(())
        self.clear()

    def clear(self) -> None:
        """Forget the dialogue, but not the system message."""
        self._stop()
        self.messages = list(self._start)
        self._memory = list(self._start)  # what the model reads, with features in place of media
        self._decoding: Decoding | None = None

    def send(self, content: str | Sequence[dict[str, Any]]) -> Reply:
        """Say something and wait for the reply; arguments and errors are those of ``stream``."""
        *_, last = self._begin(content, pieces=False)
        assert isinstance(last, ReplyDone)
        return last.reply

    def stream(self, content: str | Sequence[dict[str, Any]]) -> Iterator[Event]:
        """Say something and follow the reply as it is made.

        A stream that is left before ``ReplyDone`` takes its turn back, at the latest when the next turn begins.

        Args:
            content: A string, or the content parts of a message of the user.

        Returns:
            Events, of which the last is ``ReplyDone``; the pieces of text joined are the reply's text.

        Raises:
            MessageError: The content breaks the schema or holds a medium that the bridge can't read.
            MediaError: A medium can't be read.
            ContextError: The message alone leaves no room for a reply.
        """
        return self._begin(content, pieces=True)

    def save(self, folder: str | Path) -> Path:
        """Write the dialogue as ``dialogue.json``, with its media beside it, in place of what stands in ``folder``.

        Returns:
            The JSON file, which ``mmbridge generate`` reads.

        Raises:
            MediaError: A file that was sent is gone.
            CheckpointError: The folder can't be written; what was there is unchanged.
        """
        with hub.atomic_folder(Path(folder)) as draft:
            text = json.dumps(
                store_media(self.messages, draft, self.root) if self.messages else [], indent=2, ensure_ascii=False
            )
            (draft / "dialogue.json").write_text(text + "\n", encoding="utf-8")
        return Path(folder) / "dialogue.json"

    def _stop(self) -> None:
        close = getattr(self._streaming, "close", None)
        if close is not None:
            close()

    def _begin(self, content: Any, pieces: bool) -> Iterator[Event]:
        self._stop()
        message = {"role": "user", "content": list(content) if isinstance(content, tuple) else content}
        with torch.no_grad(), evaluating(self.bridge):
            dialogue, sequence, notices = self._fit([*self._memory, self._loaded(message)])
        self._streaming = self._reply(message, dialogue, sequence, notices, pieces)
        return self._streaming

    def _loaded(self, message: Message) -> Message:
        """Return a message with its media in memory, so that a file that changes later changes nothing that was said."""
        (turn,) = parse_messages([message])
        content: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            check_supported(part, False, self.bridge.inputs, self.bridge.outputs)
            medium = load_part(part, self.root)
            if medium is None:
                raise MessageError(
                    f"a medium of type {part.type!r} has no 'path' or 'data'; give the file or the medium."
                )
            content.append({"type": part.type, "data": medium})
        return {"role": "user", "content": content}

    def _prepare(self, dialogue: Sequence[Message]) -> TokenSequence:
        (sequence,) = self.bridge.prepare([dialogue], reply=True, store=self.store)
        return sequence

    def _fit(self, dialogue: list[Message]) -> tuple[list[Message], TokenSequence, list[Notice]]:
        """Return the dialogue without what has to be forgotten, oldest media first, then oldest turns; and how to say so."""
        context = self.bridge.backbone.context
        room = min(self.sampling.max_new_tokens + block_size(self.bridge), context // 2)
        sequence = self._prepare(dialogue)
        notices: list[Notice] = []
        if len(sequence.ids) + room > context:
            # Some more than needed, since every forgetting reads the rest anew.
            limit = context - room - context // 8
            media = 0
            while len(sequence.ids) > limit and (options := without_medium(dialogue)) is not None:
                longest = len(sequence.ids)
                for dialogue in options:
                    sequence = self._prepare(dialogue)
                    if len(sequence.ids) < longest:
                        break
                media += 1
            turns = 0
            while len(sequence.ids) > limit and (rest := without_turn(dialogue)) is not None:
                dialogue, sequence = rest, self._prepare(rest)
                turns += 1
            lost = [f"{count} {name}" for count, name in ((media, "oldest media"), (turns, "oldest turns")) if count]
            if lost:
                notice = f"the context of {context} positions is full: {' and '.join(lost)} are no longer in memory."
                log.warning("%s", notice)
                notices.append(Notice(notice))
        check_room(self.bridge, len(sequence.ids))
        return dialogue, sequence, notices

    @torch.no_grad()
    def _reply(
        self, message: Message, dialogue: list[Message], sequence: TokenSequence, notices: list[Notice], pieces: bool
    ) -> Iterator[Event]:
        yield from notices
        # An error may strike while layers are written, one of them longer than the others: then the cache is given up.
        decoding, self._decoding = self._decoding or Decoding(self.bridge), None
        turn = sum(said["role"] == "user" for said in self.messages)
        try:
            with evaluating(self.bridge):
                decoding.prefill([sequence])
                for _, event in decode(
                    self.bridge, decoding, self.sampling, pieces=pieces, seed=self.sampling.seed + turn
                ):
                    if isinstance(event, ReplyDone):
                        said = event.reply.message
                        self._memory = [*(remembered(known) for known in dialogue), said]
                        self.messages += [message, said]
                        self._decoding = decoding
                    yield event
        except GeneratorExit:
            self._decoding = decoding
            raise


def remembered(message: Message) -> Message:
    """Return a message of the user with hashes in place of loaded media; others as they are."""
    if message["role"] != "user" or isinstance(message["content"], str):
        return message
    content = [
        part
        if part["type"] == "text" or isinstance(part["data"], KnownMedium)
        else {"type": part["type"], "data": KnownMedium(part["data"].content_hash)}
        for part in message["content"]
    ]
    return {**message, "content": content}


def without_medium(dialogue: Sequence[Message]) -> list[list[Message]] | None:
    """Return the dialogue with a few words in place of its oldest medium, and with nothing there; None if it has none.

    The last message is left as it is: it has not been read yet.
    """
    for number, message in enumerate(dialogue[:-1]):
        content = message["content"]
        for index, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] != "text":
                note = {"type": "text", "text": f"[{part['type']} no longer in memory]"}
                return [
                    [
                        *dialogue[:number],
                        {**message, "content": [*content[:index], *replacement, *content[index + 1 :]]},
                        *dialogue[number + 1 :],
                    ]
                    for replacement in ([note], [])
                ]
    return None


def without_turn(dialogue: Sequence[Message]) -> list[Message] | None:
    """Return the dialogue without its oldest turn (what the user said and the reply), None if only the last message is left."""
    asked = [number for number, message in enumerate(dialogue) if message["role"] == "user"]
    return [*dialogue[: asked[0]], *dialogue[asked[1] :]] if len(asked) > 1 else None
