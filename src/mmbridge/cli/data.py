"""Check data files, and convert those of other projects.

`check` reports every bad line of a JSONL file of dialogues and counts what the file holds. `convert` writes such a file
from a FORMAT: pairs (a medium and its caption; the assistant describes the medium), pairs-out (the assistant makes it),
llava (LLaVA's conversations), t2m (NExT-GPT's text to media), mosit (NExT-GPT's dialogues with media on both sides),
onellm (OneLLM's conversations about one medium), onellm-pairs (its media and captions).
"""

import argparse
from pathlib import Path

EXAMPLES = """\
  mmbridge data check dialogues.jsonl
  mmbridge data check dialogues.jsonl --root media --media             read every medium too
  mmbridge data convert pairs cc3m/cc3m.json cc3m/train.jsonl          files are in cc3m/images
  mmbridge data convert llava llava_150k.json llava.jsonl --root coco/train2017
  mmbridge data convert onellm imu.json data/imu.jsonl --modality imu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="report every bad line of a data file", description=__doc__)
    check.add_argument("file", type=Path, metavar="FILE", help="JSONL file of dialogues")
    check.add_argument("--media", action="store_true", help="read every medium too")
    convert = actions.add_parser("convert", help="write a data file from another format", description=__doc__)
    convert.add_argument(
        "format", metavar="FORMAT", help="pairs | pairs-out | llava | t2m | mosit | onellm | onellm-pairs"
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="JSON file, for pairs also CSV")
    convert.add_argument("target", type=Path, metavar="TARGET.jsonl", help="file to write")
    convert.add_argument("--modality", metavar="NAME", help="what the media of onellm and onellm-pairs are (image)")
    for action, file in ((check, "FILE"), (convert, "TARGET")):
        action.add_argument("--root", type=Path, metavar="DIR", help=f"folder that media are below (that of {file})")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    if arguments.action == "check":
        from mmbridge.data.check import check
        from mmbridge.errors import DataError

        summary = check(arguments.file, arguments.root, decode=arguments.media, progress=True)
        print(summary)
        if summary.bad:
            raise DataError(f"{arguments.file} has bad lines ({summary.bad}); correct or remove them.")
    else:
        from mmbridge.data.importers import convert

        paths = (arguments.source, arguments.target, arguments.root)
        written, skipped = convert(arguments.format, *paths, modality=arguments.modality, progress=True)
        print(f"{arguments.target}: dialogues written {written}, records skipped {skipped}")
