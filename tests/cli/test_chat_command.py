"""``mmbridge chat`` in a real (pseudo-)terminal, and with lines from a pipe."""

import io
import json
import os
import pty
import select
import signal
import sys
import time

import numpy as np
import pytest
import tiny
from test_generation import ask, give_trigger

from mmbridge.bridge import Bridge
from mmbridge.cli.chat import content_of
from mmbridge.cli.main import main
from mmbridge.errors import MediaError
from mmbridge.media import Audio, Image

DRAW = "Draw a red one."


@pytest.fixture(scope="module")
def bridge(parts, tmp_path_factory):
    """A saved bridge that paints after three words where it is asked to draw, and has room for long replies."""
    folder = tmp_path_factory.mktemp("chat")
    llama = tiny.llama(folder / "llama", max_position_embeddings=4096)
    bridge = Bridge.from_config(tiny.bridge_config({**parts, "llama": llama})).eval()
    give_trigger(bridge, ask(DRAW), 3)
    bridge.save_pretrained(folder / "bridge")
    return str(folder / "bridge")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The current folder, with a picture in it."""
    monkeypatch.chdir(tmp_path)
    tiny.colours_file(tmp_path, 2)
    return tmp_path


def piped(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_lines_of_a_pipe_are_answered_and_what_is_made_is_saved(bridge, pictures, monkeypatch, capsys):
    piped(monkeypatch, DRAW, "", "@0-0.png What colour is it?", "/save")
    assert main(["chat", bridge, "--out", "made", "--max-new-tokens", "4"]) == 0
    text, path, *others, saved = capsys.readouterr().out.splitlines()
    assert path == "made/image-1.png" and Image.load(path).pixels.shape[0] == 3
    assert saved == "made/dialogue/dialogue.json"
    messages = json.loads((pictures / saved).read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"][0] == {"type": "text", "text": text}
    assert [part["type"] for part in messages[2]["content"]] == ["image", "text"]
    (pictures / saved).write_text(json.dumps([*messages, *ask("What is it?")]))
    assert main(["generate", bridge, "--messages", saved, "--out", "reply", "--max-new-tokens", "2"]) == 0


def test_lines_that_cannot_be_answered_are_explained_and_the_rest_is_answered(bridge, pictures, monkeypatch, capsys):
    (pictures / "notes.txt").write_text("no picture")
    lines = [
        "@none.png What is it?",
        "@notes.txt Read it.",
        "/attach none.png",
        "/attach 'x",
        "/sav",
        "/attach 0-1.png",
    ]
    piped(monkeypatch, *lines, "What is it?")
    assert main(["chat", bridge, "--max-new-tokens", "3"]) == 2
    captured = capsys.readouterr()
    *explained, summary = captured.err.splitlines()
    explained = [line for line in explained if line.startswith("mmbridge: ")]
    words = [
        "no file 'none.png'",
        "no picture, sound, video or point cloud",
        "no file 'none.png'",
        "needs the name",
        "did you mean '/save'",
    ]
    assert [word in line for word, line in zip(words, explained, strict=True)] == [True] * 5
    assert summary == "mmbridge: lines that were not answered: 5; each is explained above."
    attached, *reply = captured.out.splitlines()
    assert attached == "[with the next message: 0-1.png]" and reply


def test_files_stand_where_they_are_named(pictures):
    os.rename("0-0.png", "my picture.png")
    Audio.load(np.zeros(1600, dtype=np.float32), sample_rate=16000).save("a.wav")
    content = content_of('Compare @"my picture.png" with @a.wav, @somebody said a@b.png.')
    shown = [part.get("text", part.get("path")) for part in content]
    assert shown == ["Compare", "my picture.png", "with", "a.wav", ", @somebody said a@b.png."]
    assert [part["type"] for part in content] == ["text", "image", "text", "audio", "text"]
    assert content_of("my picture.png") == [{"type": "image", "path": "my picture.png"}]
    with pytest.raises(MediaError, match="there is no file 'folder/none'"):
        content_of("Look at @folder/none")


class Terminal:
    """A program in a terminal of its own: a fork of this process, which has loaded what takes long."""

    def __init__(self, *arguments):
        self.process, self.terminal = pty.fork()
        self.shown = ""
        if self.process == 0:
            code = 70
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                code = main(arguments)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def type(self, keys):
        os.write(self.terminal, keys.encode())

    def expect(self, text, seconds=120):
        """Wait until a text is shown, and return what was shown before it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} was not shown but {self.shown!r}"
            if select.select([self.terminal], [], [], 0.5)[0]:
                try:
                    self.shown += os.read(self.terminal, 4096).decode(errors="replace")
                except OSError:  # the program has ended
                    assert text in self.shown, f"{text!r} was not shown but {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def interrupt(self):
        """Press Ctrl-C until it is answered or the program ends: one in the moment before a line is read waits for the next."""
        shown = len(self.shown.replace("^C", ""))
        for _ in range(24):
            self.type("\x03")
            end = time.monotonic() + 5
            while time.monotonic() < end:
                if select.select([self.terminal], [], [], 0.5)[0]:
                    try:
                        self.shown += os.read(self.terminal, 4096).decode(errors="replace")
                    except OSError:  # the program has ended
                        return
                if len(self.shown.replace("^C", "")) > shown:
                    return
        raise AssertionError(f"Ctrl-C was not answered after {self.shown!r}")

    def wait(self, seconds=120):
        """Return the exit code."""
        end = time.monotonic() + seconds
        while (ended := os.waitpid(self.process, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
                raise AssertionError(f"the program did not end but showed {self.shown!r}")
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(ended[1])


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "dumb")
    return tmp_path / "state" / "mmbridge" / "chat_history"


def test_interrupting_a_reply_keeps_the_session(bridge, pictures, state):
    terminal = Terminal("chat", bridge, "--max-new-tokens", "3000")
    terminal.expect("> ")
    terminal.type("What is it?\n")
    terminal.expect("What is it?\r\n")
    while len(terminal.shown) < 5:  # words come while others are still to come
        assert select.select([terminal.terminal], [], [], 120)[0], "no reply"
        terminal.shown += os.read(terminal.terminal, 64).decode(errors="replace")
    terminal.type("\x03")
    terminal.expect("[stopped; this turn is taken back]\r\n")
    terminal.expect("> ")
    terminal.type("/save kept\n")
    terminal.expect("kept/dialogue.json")
    assert json.loads((pictures / "kept" / "dialogue.json").read_text()) == []
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert state.read_text().splitlines()[-2:] == ["What is it?", "/save kept"]


def test_ctrl_c_twice_at_the_prompt_leaves(bridge, pictures, state):
    terminal = Terminal("chat", bridge, "--max-new-tokens", "4", "--out", "made")
    terminal.expect("> ")
    terminal.type(f"{DRAW}\n")
    terminal.expect("[making: image ...]")
    terminal.expect("made/image-1.png")
    terminal.expect("> ")
    terminal.type("/help\n")
    terminal.expect("/attach FILE")
    terminal.expect("> ")
    terminal.interrupt()
    terminal.expect("(Ctrl-C once more, Ctrl-D or /quit to leave)")
    terminal.expect("> ")
    terminal.interrupt()
    assert terminal.wait() == 0


def test_up_brings_back_what_an_earlier_session_said(bridge, pictures, state):
    state.parent.mkdir(parents=True)
    state.write_text("/attach 0-0.png\n")
    terminal = Terminal("chat", bridge)
    terminal.expect("> ")
    terminal.type("\x10\n")  # Ctrl-P, as the arrow
    terminal.expect("[with the next message: 0-0.png]")
    terminal.expect("> ")
    terminal.type("/quit\n")
    assert terminal.wait() == 0
