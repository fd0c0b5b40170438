"""Convert published weights of ImageBind, NExT-GPT or OneLLM, or write a bridge in their layout.

SRC is a file (safetensors, or .pt, .pth and .bin of torch.save) or a folder of shards; DST the folder to write: for ImageBind
weights that recipes name, else a bridge. Every tensor is used or named as left out, everything else is an error; pickles
that ask to run code are refused. One tensor is in memory at a time, and a run that was stopped goes on when it is started
again. With --to, SRC is a bridge and DST a file in the published layout: .safetensors, or by any other ending one of
torch.save, which is in memory as a whole.
"""

import argparse
from pathlib import Path

from mmbridge.errors import ConfigError

EXAMPLES = """\
  mmbridge convert imagebind imagebind_huge.pth weights/imagebind
  mmbridge convert nextgpt 7b_tiva_v0 weights/nextgpt --base models --report report.json
  mmbridge convert onellm consolidated.00-of-01.pth weights/onellm --dtype bfloat16
  mmbridge convert --to nextgpt weights/nextgpt pytorch_model.safetensors --base models/vicuna-7b-v0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("system", nargs="?", metavar="SYSTEM", help="imagebind | nextgpt | onellm; not with --to")
    parser.add_argument("source", type=Path, metavar="SRC", help="published file or folder; with --to a bridge")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write, or with --to a file")
    parser.add_argument("--to", metavar="SYSTEM", help="write the published layout of nextgpt or onellm")
    parser.add_argument(
        "--dtype", default="keep", metavar="NAME", help="floats become float16 | bfloat16 | float32 | keep (keep)"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="folder of the frozen models; with --to the base language model"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write which tensor went where")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    if (arguments.system is None) == (arguments.to is None):
        raise ConfigError(
            "name the system, and then SRC and DST: `mmbridge convert nextgpt SRC DST`, or --to for the way back."
        )
    if arguments.to is not None and arguments.report is not None:
        raise ConfigError("--report tells of published weights that are converted; leave it out with --to.")
    from mmbridge import hub, published

    if arguments.to is not None:
        published.export(arguments.to, arguments.source, arguments.target, arguments.dtype, arguments.base)
        print(arguments.target)
        return
    licence = hub.licence_line(arguments.system)
    if licence:
        print(f"licence: {licence}")
    published.convert(
        arguments.system, arguments.source, arguments.target, arguments.dtype, arguments.base, arguments.report
    )
    print(arguments.target)
