"""The demo: prompts from files, the three stages trained before the user's eyes, and one page that shows it all.

``run`` is what ``mmbridge demo`` calls. The page holds everything it shows, media included, so that the one file can be
sent to somebody and opened without a server or a network.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmbridge import Bridge, hub
from mmbridge.config import Recipe
from mmbridge.data.tasks import MAX_NEW_TOKENS, is_right
from mmbridge.demo.page import write_page
from mmbridge.demo.prompts import EIGHT, FOUR, Entry, Prompt, below, write_prompts
from mmbridge.demo.report import BridgeReport, Exchange, Report, StageReport, describe_parts, describe_stage
from mmbridge.demo.terminal import heading, say, style
from mmbridge.evaluation.any_to_any import directions, evaluate, format_table, name_of
from mmbridge.messages import Message

BRIDGE = "mmbridge/tiny"
ONELLM = "mmbridge/tiny-onellm"
RECIPES = ("tiny/encoder_alignment", "tiny/decoder_alignment", "tiny/instruction_tuning")
SAMPLES = 20
"""Requests per cell of the table, which has one medium in, one out and one turn; `mmbridge evaluate` measures the rest."""


def run(out: str | Path, train: bool = True) -> Path:
    """Answer the prompts, train, evaluate, and write the page; an interrupted run goes on when it is called again.

    Args:
        out: Folder to write into: ``index.html``, ``media/``, ``replies/``, and of training ``runs/``, ``cache/``,
            ``evaluation/``.
        train: Whether to train and evaluate; otherwise only the shipped bridges answer.

    Returns:
        The page.

    Raises:
        CheckpointError: Shipped weights are missing or altered, or saving failed.
        MediaError: A file can't be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    heading("The shipped bridge answers")
    bridge, prompts, seconds = open_bridge(BRIDGE, FOUR, out)
    exchanges = list(answer(bridge, prompts, out, "replies/shipped"))
    report = Report(BRIDGE, seconds, exchanges, describe_parts(bridge, BRIDGE), recorded(BRIDGE, "any_to_any.json"))
    heading("The shipped bridge of eight modalities answers")
    bridge, eight, seconds = open_bridge(ONELLM, EIGHT, out)
    exchanges = list(answer(bridge, eight, out, "replies/onellm"))
    table, forgetting = recorded(ONELLM, "any_to_any.json"), recorded(ONELLM, "forgetting.json")
    report.eight = BridgeReport(ONELLM, seconds, exchanges, table, forgetting)
    page = write_page(report, out)
    if train:
        recipes = [Recipe.load(name) for name in RECIPES]
        for stage in train_stages(recipes, out):
            report.stages.append(stage)
            write_page(report, out)  # so that an interrupted demo leaves a page
        evaluate_trained(out / "runs" / recipes[-1].stage, prompts, report, out)
        write_page(report, out)
    heading("Done")
    say(f"see {style(str(page.resolve()), 'accent')}")
    return page


def open_bridge(name: str, entries: Sequence[Entry], out: Path) -> tuple[Bridge, list[Prompt], float]:
    """Open a shipped bridge and write its prompts' media into ``out/media``; return both, and how long the opening took."""
    began = time.monotonic()
    bridge = Bridge.from_pretrained(name)
    seconds = time.monotonic() - began
    prompts = write_prompts(out / "media", bridge.outputs, entries)
    say(f"{name} is open after {seconds:.1f} s; {len(prompts)} prompts, whose files are in {out / 'media'}")
    return bridge, prompts, seconds


def recorded(name: str, file: str) -> Any:
    """Return what was measured when a shipped bridge was made."""
    return hub.read_json(hub.resolve(name) / file)


def answer(bridge: Bridge, prompts: Sequence[Prompt], out: Path, folder: str) -> Iterator[Exchange]:
    """Answer prompts turn by turn and print them.

    Args:
        bridge: The bridge.
        prompts: Prompts whose media are in ``out/media``.
        out: The demo's folder.
        folder: Where replies are saved, relative to ``out``.
    """
    for number, prompt in enumerate(prompts, start=1):
        dialogue: list[Message] = []
        shown: list[Message] = []
        right, seconds = True, 0.0
        say(f"\n{style(f'{number:>2}/{len(prompts)}', 'faint')}  {style(prompt.title, 'bold')}")
        for index, task in enumerate(prompt.turns, start=1):
            (message,) = task.messages
            asked = below("media", message)
            say(f"       {style('you', 'faint')}     {in_words(asked)}")
            dialogue.append(below(str(out / "media"), message))
            began = time.monotonic()
            reply = bridge.generate(dialogue, max_new_tokens=MAX_NEW_TOKENS)
            taken = time.monotonic() - began
            place = f"{folder}/{number:02}-{index}"
            given = below(place, reply.save(out / place))
            dialogue.append(reply.message)
            shown += [asked, given]
            seconds += taken
            turn_right = is_right(task, reply)
            right = right and turn_right
            mark = style("right", "good") if turn_right else style("wrong", "poor")
            say(f"       {style('bridge', 'accent')}  {in_words(given)}  [{mark}, {taken:.1f} s]")
        last = prompt.turns[-1]
        measured = list(dict.fromkeys(factor for task in prompt.turns for factor in task.measured))
        yield Exchange(prompt.title, "+".join(last.sources), last.wanted, shown, prompt.truth, measured, right, seconds)


def train_stages(recipes: Sequence[Recipe], out: Path) -> Iterator[StageReport]:
    """Train stages one upon the other, each in ``out/runs/<stage>``; finished ones are only read.

    Args:
        recipes: The stages in order; each but the first gets the one before it as its parent.
        out: The demo's folder. ``out/seconds.json`` keeps how long each stage took, over interruptions.
    """
    from mmbridge.training.run import train

    clock = out / "seconds.json"
    seconds: dict[str, float] = hub.read_json(clock) if clock.exists() else {}
    parent: Path | None = None
    for number, recipe in enumerate(recipes, start=1):
        heading(f"Stage {number} of {len(recipes)}: {recipe.stage}")
        folder = out / "runs" / recipe.stage
        if parent is not None:
            recipe.parent = str(parent.resolve())
        began = time.monotonic()
        try:
            parent = train(recipe, folder, resume=True, cache=out / "cache")
        except SystemExit:
            say("run the same command again to go on")
            raise
        finally:
            seconds[recipe.stage] = seconds.get(recipe.stage, 0.0) + time.monotonic() - began
            hub.write_json(clock, seconds)
        yield describe_stage(folder, seconds[recipe.stage])


def evaluate_trained(folder: Path, prompts: Sequence[Prompt], report: Report, out: Path) -> None:
    """Measure the bridge of a run on combinations it has never seen, and let it answer some prompts again."""
    heading("The bridge just trained, on combinations that no stage has seen")
    bridge = Bridge.from_pretrained(folder)
    cells = [name_of(way) for way in directions(bridge) if way[2] == 1 and "+" not in f"{way[0]}{way[1]}"]
    report.table = evaluate(bridge, out / "evaluation", samples=SAMPLES, splits=("unseen",), cells=cells)
    report.measured = "the bridge just trained"
    say(format_table(report.table))
    report.again = list(answer(bridge, [prompt for prompt in prompts if prompt.again], out, "replies/trained"))
    report.parts = describe_parts(bridge, folder)


def in_words(message: Message) -> str:
    """Return a message as words for a terminal."""
    return " ".join(part["text"] if part["type"] == "text" else f"<{part['path']}>" for part in message["content"])
