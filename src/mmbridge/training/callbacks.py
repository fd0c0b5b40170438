"""What happens between steps: logs, progress, validation with samples, checkpoints, a clean stop."""

import csv
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tqdm import tqdm

from mmbridge.data.loader import PreparedData, held_batches
from mmbridge.errors import CheckpointError, ConfigError, MMBridgeError
from mmbridge.messages import TextPart, parse_messages
from mmbridge.training.checkpoint import checkpoints_in
from mmbridge.training.freezing import set_modes
from mmbridge.training.stages import rate

log = logging.getLogger("mmbridge")


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint; its argument is the step."""


class MetricsFile(Logger):
    """A CSV file with one row per logged step; a killed run loses nothing that was logged.

    Args:
        path: The file.
        start: Rows of later steps are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path, start: int):
        super().__init__()
        self.path = path
        self.columns: list[str] = ["step"]
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if row["step"].isdigit() and int(row["step"]) <= start]
                self.columns = list(reader.fieldnames or self.columns)
        self._rewrite(rows)

    @property
    def name(self) -> str:
        """What Lightning calls this log."""
        return "metrics"

    @property
    def version(self) -> int:
        """There is one per run."""
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the recipe stands beside the log."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a new name adds a column."""
        row = {"step": step, **metrics}
        fresh = [name for name in row if name not in self.columns]
        try:
            if fresh:
                with self.path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
                self.columns += fresh
                self._rewrite(rows)
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            raise CheckpointError(f"the log {self.path} can't be written ({error.strerror}).") from error

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        draft = self.path.with_name(f".{self.path.name}.draft-{os.getpid()}")
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(self.path)


class StepCallback(Callback):
    """Calls ``on_step`` after each optimiser step, however many batches it took."""

    def __init__(self) -> None:
        self._last: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note where the run starts."""
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Find out whether the optimiser made a step."""
        if trainer.global_step != self._last:
            self._last = trainer.global_step
            self.on_step(trainer, pl_module, trainer.global_step)

    def on_step(self, trainer: Any, stage: Any, step: int) -> None:
        """Act after ``step``, counted from 1."""
        raise NotImplementedError


class Metrics(StepCallback):
    """Logs losses, learning rate and gradient norm, and shows the progress."""

    def __init__(self, steps: int, start: int, progress: bool):
        super().__init__()
        self.bar = tqdm(total=steps, initial=start, desc="training", unit=" steps", disable=not progress, miniters=10)

    def on_step(self, trainer: Any, stage: Any, step: int) -> None:
        """Log every few steps; refuse to go on with numbers that are none."""
        self.bar.update(1)
        if not stage.is_logged(step):
            return
        check_finite(stage, step)
        values = stage.take_recent()
        settings = stage.settings
        values["train/lr"] = settings.lr * rate(
            step - 1, stage.steps, settings.warmup, settings.schedule, settings.floor
        )
        values["train/gradient_norm"] = float(stage.norm)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        self.bar.set_postfix_str(f"loss {values['train/loss/total']:.4f}", refresh=False)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the bar."""
        self.bar.close()


class Validation(StepCallback):
    """Losses on held data, answers to a few of its prompts, and the judges' verdicts where the data has judges.

    Args:
        held: Prepared validation data.
        folder: Where samples are written.
        every: Steps between validations; the last step is always validated.
        batch_size: Dialogues per batch.
        prompts: How many prompts are answered.
    """

    def __init__(self, held: PreparedData, folder: Path, every: int, batch_size: int, prompts: int = 4):
        super().__init__()
        self.held, self.folder, self.every, self.batch_size = held, folder, every, batch_size
        dialogues = (held.data[index]["messages"] for index in range(min(prompts, len(held))))
        self.prompts = [cut for messages in dialogues if (cut := cut_reply(messages)) is not None]

    def on_step(self, trainer: Any, stage: Any, step: int) -> None:
        """Validate, if it is time."""
        if step % self.every and step != stage.steps:
            return
        bridge = stage.bridge
        bridge.eval()
        values = {f"val/loss/{name}": value for name, value in self.losses(trainer, stage).items()}
        with trainer.precision_plugin.val_step_context():
            judge = getattr(self.held.data, "judge", None)
            if judge is not None:
                values.update({f"val/accuracy/{name}": value for name, value in judge(bridge).items()})
            if self.prompts:
                self.sample(trainer, bridge, step)
        set_modes(bridge)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        shown = "  ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in values.items())
        tqdm.write(f"step {step}  {shown}")

    @torch.no_grad()
    def losses(self, trainer: Any, stage: Any) -> dict[str, float]:
        """Return the means of the losses over the held data."""
        sums: dict[str, list[Any]] = {}
        for index, batch in enumerate(held_batches(self.held, self.batch_size)):
            for name, value in trainer.strategy.validation_step(batch.to(stage.device), index).items():
                sums.setdefault(name, []).append(value.float())
        return {name: float(torch.stack(values).mean()) for name, values in sums.items()}

    def sample(self, trainer: Any, bridge: Any, step: int) -> None:
        """Answer the prompts, and write prompts and replies, media included."""
        folder = self.folder / f"step-{step}"
        try:
            root = getattr(self.held.data, "root", None)
            replies = bridge.generate([prompt for prompt, _ in self.prompts], root=root, max_new_tokens=64)
        except MMBridgeError as error:  # such as a prompt that fills the context: no reason to lose a run
            log.warning("no samples at step %d: %s", step, error)
            return
        for number, ((prompt, wanted), reply) in enumerate(zip(self.prompts, replies, strict=True)):
            reply.save(folder / str(number))
            asked = describe_messages(prompt)
            record = {"prompt": asked, "wanted": describe_messages([wanted]), "reply": reply.text}
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            (folder / str(number) / "prompt.json").write_text(text, encoding="utf-8")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(f"sample {number}", f"{asked}\n\n{reply.text}", step)
                    for index, medium in enumerate(reply.media):
                        if medium.modality == "image":
                            logger.experiment.add_image(f"sample {number}/{index}", medium.pixels, step)


class Checkpoints(StepCallback):
    """Saves every few steps and keeps the last two.

    Args:
        folder: Where checkpoints are.
        every: Steps between them.
    """

    def __init__(self, folder: Path, every: int, kept: int = 2):
        super().__init__()
        self.folder, self.every, self.kept = folder, every, kept

    def on_step(self, trainer: Any, stage: Any, step: int) -> None:
        """Save, if it is time."""
        if step % self.every == 0:
            self.save(trainer, stage, step)

    def save(self, trainer: Any, stage: Any, step: int) -> None:
        """Save now."""
        check_finite(stage, step)
        trainer.save_checkpoint(self.folder / f"step-{step}")
        for old in checkpoints_in(self.folder)[self.kept :]:
            trainer.strategy.remove_checkpoint(old)


class Stop(StepCallback):
    """Turns Ctrl-C into a checkpoint after the step that is under way; a second Ctrl-C stops at once."""

    def __init__(self, checkpoints: Checkpoints):
        super().__init__()
        self.checkpoints = checkpoints
        self.requested = False
        self._previous: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, *_: Any) -> None:
        if self.requested:
            raise Interrupted(-1)
        self.requested = True

    def on_step(self, trainer: Any, stage: Any, step: int) -> None:
        """Save and stop, if asked to."""
        if self.requested:
            self.checkpoints.save(trainer, stage, step)
            raise Interrupted(step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Listen no more."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


def check_finite(stage: Any, step: int) -> None:
    """Stop a run whose numbers are lost.

    Raises:
        ConfigError: A loss or a gradient was NaN or infinite.
    """
    if not stage.is_finite():
        raise ConfigError(
            f"the loss or its gradient was not a finite number at or before step {step}, so training stopped; the last good "
            "checkpoint is kept: lower optimizer.lr or set optimizer.clip, and start anew with overwrite."
        )


def cut_reply(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], Any] | None:
    """Split a dialogue before the assistant's first turn: what is asked, and what was answered; None if nothing is."""
    index = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), 0)
    return (list(messages[:index]), messages[index]) if index else None


def describe_messages(messages: Sequence[Any]) -> str:
    """Return a dialogue as words, with media by type and file name or caption."""
    words = []
    for turn in parse_messages(messages):
        for part in turn.parts:
            if isinstance(part, TextPart):
                words.append(part.text)
            else:
                words.append(f"<{part.type} {part.path or part.caption or ''}>".replace(" >", ">"))
    return " ".join(words)
