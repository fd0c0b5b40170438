"""Answer a dialogue from a file.

FILE.json holds a list of messages in the chat schema; media are named by "path", relative to the file and inside its
folder. The reply is printed, and written to DIR/reply.json with its media beside it.
"""

import argparse
from pathlib import Path

EXAMPLES = """\
  mmbridge generate mmbridge/tiny --messages dialogue.json --out reply
  mmbridge generate runs/tiny/instruction_tuning --messages dialogue.json --out reply --seed 7 --temperature 0.8

a dialogue:
  [{"role": "user", "content": [{"type": "audio", "path": "rain.wav"},
                                {"type": "text", "text": "Paint what you hear."}]}]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bridge", metavar="BRIDGE", help="folder, shipped name or hub id of a saved bridge")
    parser.add_argument("--messages", type=Path, required=True, metavar="FILE.json", help="the dialogue to answer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the reply")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of words and media")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 for the likeliest words, more for variety")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest reply, in tokens")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge.messages import read_messages

    messages = read_messages(arguments.messages)  # before torch is loaded, so that a typing error is told at once

    from mmbridge import Bridge

    given = {name: getattr(arguments, name) for name in ("seed", "temperature", "max_new_tokens")}
    options = {name: value for name, value in given.items() if value is not None}
    bridge = Bridge.from_pretrained(arguments.bridge)
    reply = bridge.generate(messages, root=arguments.messages.parent, **options)
    for part in reply.save(arguments.out)["content"]:
        print(part["text"] if part["type"] == "text" else arguments.out / part["path"])
