"""Talk with a bridge in the terminal.

A line is a message. @FILE in it sends a picture, a sound or a video along, at that place; what the bridge makes is saved in
DIR. Ctrl-C stops a reply and takes its turn back; Ctrl-D, /quit, or Ctrl-C twice ends the session. Where the input is not a
terminal, each of its lines is a message, and only replies are printed. /help lists the commands.
"""

import argparse
import os
import re
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from mmbridge.errors import ConfigError, MediaError, MMBridgeError
from mmbridge.registry import suggest

EXAMPLES = """\
  mmbridge chat                                                the shipped bridge
  mmbridge chat runs/tiny/instruction_tuning --out pictures --temperature 0.7
  echo "Draw a large red star." | mmbridge chat mmbridge/tiny

in the chat:
  > @photo.png What colour is it?
  > Describe @"my sound.wav"
  > /attach photo.png             with the next message
"""
HELP = """\
  @FILE          send a picture, a sound or a video at this place of the message
  /attach FILE   send a file at the start of the next message
  /clear         start anew
  /save [DIR]    write the dialogue and its media, for `mmbridge generate` (DIR/dialogue below --out)
  /help          this
  /quit          leave; Ctrl-D does the same, Ctrl-C stops a reply"""
COMMANDS = ("/attach", "/clear", "/help", "/quit", "/save")
_SENT = re.compile(r"""(?<!\S)@(?:"([^"]+)"|'([^']+)'|(\S+))""")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    name = "folder, shipped name or hub id of a saved bridge (mmbridge/tiny)"
    parser.add_argument("bridge", nargs="?", default="mmbridge/tiny", metavar="BRIDGE", help=name)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for what is made (mmbridge-chat/DATE)")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the dialogue")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of words and media")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 for the likeliest words, more for variety")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest reply, in tokens")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    import logging

    from mmbridge import Bridge, Chat

    given = {name: getattr(arguments, name) for name in ("seed", "temperature", "max_new_tokens")}
    sampling = {name: value for name, value in given.items() if value is not None}
    logging.getLogger("mmbridge.chat").setLevel(logging.ERROR)  # notices are printed
    chat = Chat(Bridge.from_pretrained(arguments.bridge), arguments.system, **sampling)
    out = arguments.out or Path("mmbridge-chat") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    Session(chat, out, interactive=sys.stdin.isatty()).run()


class Session:
    """A chat in the terminal.

    Args:
        chat: A ``Chat``.
        out: Folder for media that are made; created with the first of them.
        interactive: Whether a person types.
    """

    def __init__(self, chat: Any, out: Path, *, interactive: bool):
        self.chat, self.out, self.interactive = chat, out, interactive
        self.attached: list[dict[str, Any]] = []
        self.at_start = True  # of a line of the output
        self.failed = 0

    def run(self) -> None:
        """Read and answer lines until the end.

        Raises:
            MessageError: The input is not a terminal, and some of its lines were not answered.
        """
        if self.interactive:
            print("Type a message, /help for help, /quit to leave.")
        elif hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        with History(enabled=self.interactive):
            leaving = False
            while True:
                try:
                    line = input("> " if self.interactive else "").strip()
                except EOFError:
                    break
                except KeyboardInterrupt:
                    if leaving or not self.interactive:
                        break
                    leaving = True
                    print("\n(Ctrl-C once more, Ctrl-D or /quit to leave)")
                    continue
                leaving = False
                if line == "/quit":
                    return
                self.take(line)
        if self.interactive:
            print()
        if self.failed and not self.interactive:
            raise MMBridgeError(f"lines that were not answered: {self.failed}; each is explained above.")

    def take(self, line: str) -> None:
        """Act on a line: a command, or a message to answer. Whatever is wrong is said, and the session goes on."""
        try:
            command, _, rest = line.partition(" ")
            if command.startswith("/") and not Path(line).is_file():
                self.command(command, rest.strip())
            elif line:
                content, self.attached = [*self.attached, *content_of(line)], []
                self.answer(content)
        except KeyboardInterrupt:
            self.say("[stopped; this turn is taken back]")
        except (MMBridgeError, OSError) as error:
            self.failed += 1
            self.end_line()
            print(f"mmbridge: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

    def command(self, name: str, rest: str) -> None:
        """Do what a line that starts with a slash says.

        Raises:
            ConfigError: There is no such command, or it lacks its file.
        """
        if name == "/help":
            self.say(HELP)
        elif name == "/attach":
            try:
                files = shlex.split(rest)
            except ValueError:
                files = []
            if not files:
                raise ConfigError("/attach needs the name of a file; quote a name with spaces or quotes in it.")
            self.attached += [part_of(Path(file).expanduser()) for file in files]
            self.say(f"[with the next message: {', '.join(part['path'] for part in self.attached)}]")
        elif name == "/clear":
            self.chat.clear()
            self.attached = []
            self.say("[the chat starts anew]")
        elif name == "/save":
            self.say(str(self.chat.save(Path(rest).expanduser() if rest else self.out / "dialogue")))
        else:
            raise ConfigError(f"there is no command {name!r}{suggest(name, list(COMMANDS))}")

    def answer(self, content: list[dict[str, Any]]) -> None:
        """Send a message and show the reply as it comes."""
        from mmbridge.replies import MediumDone, MediumStarted, Notice, ReplyDone, TextDelta

        events = self.chat.stream(content)
        try:
            for event in events:
                if isinstance(event, TextDelta):
                    text = event.text.lstrip() if self.at_start else event.text
                    print(text, end="", flush=True)
                    self.at_start = False
                elif isinstance(event, Notice):
                    self.say(f"[{event.text}]")
                elif isinstance(event, MediumStarted) and self.interactive:
                    self.say(f"[making: {event.modality} ...]")
                elif isinstance(event, MediumDone):
                    self.say(str(self.keep(event.medium)))
                elif isinstance(event, ReplyDone):
                    self.end_line()
                    if not event.reply.complete:
                        self.say("[cut off: the reply reached its longest length or the end of the context]")
        finally:
            events.close()

    def keep(self, medium: Any) -> Path:
        """Save a medium that was made under a name that is free."""
        self.out.mkdir(parents=True, exist_ok=True)
        number = 1
        while (path := self.out / f"{medium.modality}-{number}{medium.suffix}").exists():
            number += 1
        medium.save(path)
        return path

    def say(self, text: str) -> None:
        """Print whole lines."""
        self.end_line()
        print(text, flush=True)

    def end_line(self) -> None:
        """End the line that text has begun."""
        if not self.at_start:
            print(flush=True)
        self.at_start = True


def content_of(line: str) -> list[dict[str, Any]]:
    """Return a line as content parts: words, and the files that it names by @FILE; a line that is a file's name is that file.

    Raises:
        MediaError: A file is missing or of no known format.
    """
    if Path(line).is_file():
        return [part_of(Path(line))]
    content: list[dict[str, Any]] = []
    words = 0
    for match in _SENT.finditer(line):
        name = next(group for group in match.groups() if group)
        path, end = Path(name).expanduser(), match.end()
        bare = name.rstrip(".,;:!?")
        if match[3] and not path.is_file() and Path(bare).expanduser().is_file():
            path, end = Path(bare).expanduser(), end - (len(name) - len(bare))
        if match[3] and not path.is_file() and not Path(bare).suffix and os.sep not in name:
            continue  # a name such as @somebody
        content += text_part(line[words : match.start()])
        content.append(part_of(path))
        words = end
    return [*content, *text_part(line[words:])]


def text_part(text: str) -> list[dict[str, Any]]:
    """Return text as content parts, none for white space."""
    return [{"type": "text", "text": text.strip()}] if text.strip() else []


def part_of(path: Path) -> dict[str, Any]:
    """Return a file as a content part, by what its first bytes say.

    Raises:
        MediaError: There is no such file, or it is of no known format.
    """
    from mmbridge.media.base import sniff

    try:
        with path.open("rb") as file:
            found = sniff(file.read(512))
    except FileNotFoundError:
        raise MediaError(f"there is no file {str(path)!r}; check the path.") from None
    formats = {
        "image": ("PNG", "JPEG", "WebP"),
        "audio": ("WAV", "FLAC", "OGG", "MP3"),
        "video": ("MP4", "WebM", "GIF"),
        "pointcloud": ("PLY", "PCD"),
    }
    modality = next((name for name, known in formats.items() if found in known), None)
    if modality is None:
        raise MediaError(
            f"{str(path)!r} is no picture, sound, video or point cloud that can be read ({found or 'its format is not known'}); "
            f"accepted: {', '.join(name for known in formats.values() for name in known)}."
        )
    if path.suffix.lower() in (".m4a", ".weba"):
        modality = "audio"
    return {"type": modality, "path": str(path)}


class History:
    """Lines typed before, over sessions, where the terminal has readline.

    Args:
        enabled: Whether to use it at all.
    """

    def __init__(self, *, enabled: bool):
        self.readline: Any = None
        if enabled:
            try:
                import readline
            except ImportError:  # not on Windows
                return
            self.readline = readline
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self.file = Path(state) / "mmbridge" / "chat_history"

    def __enter__(self) -> None:
        if self.readline:
            self.readline.set_history_length(1000)
            if self.file.is_file():
                self.readline.read_history_file(self.file)

    def __exit__(self, *exception: object) -> None:
        if self.readline:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.readline.write_history_file(self.file)
            except OSError as error:
                print(f"mmbridge: the history can't be kept in {self.file} ({error.strerror}).", file=sys.stderr)
