"""One training stage from a recipe to a saved bridge."""

import contextlib
import fnmatch
import importlib.util
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmbridge import hub
from mmbridge.bridge import Bridge, find_bridge
from mmbridge.config import Recipe
from mmbridge.data.features import FeatureStore
from mmbridge.data.loader import StepBatches, prepare_all
from mmbridge.data.mixing import read_files
from mmbridge.data.samples import Data
from mmbridge.errors import ConfigError
from mmbridge.training.callbacks import Checkpoints, Interrupted, Metrics, MetricsFile, Stop, Validation
from mmbridge.training.checkpoint import SafeCheckpointIO, checkpoints_in, latest_checkpoint, step_of
from mmbridge.training.freezing import freeze, trainable_table
from mmbridge.training.parents import load_parents
from mmbridge.training.stages import Stage, check_stage

log = logging.getLogger("mmbridge")

_VALIDATION_SAMPLES = 200
_WRITTEN = ("bridge", "checkpoints", "logs", "samples", "recipe.yaml")


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Train what a recipe declares.

    Args:
        recipe: The stage.
        out: Folder of the run: ``bridge/``, ``checkpoints/``, ``logs/``, ``samples/``, ``cache/``, ``recipe.yaml``.
        resume: Go on from the last checkpoint in ``out``; the result is that of a run without interruption.
        overwrite: Delete an earlier run in ``out`` first; its cache stays.
        cache: Folder of frozen results, which several runs may share; None for ``out/cache``.
        progress: Whether to show progress bars.

    Returns:
        Folder of the trained bridge, ``out/bridge``.

    Raises:
        ConfigError: The recipe contradicts its stage or the run in ``out``, or the loss is no longer a number.
        DataError: A sample can't be used, or no sample shows a medium whose way in trains.
        CheckpointError: Weights are missing or altered, or saving failed; the last good checkpoint stays.
        SystemExit: With code 130 after Ctrl-C, when a checkpoint has been saved.
    """
    recipe.validate()
    out = Path(out)
    finished = _claim(recipe, out, resume, overwrite)
    if finished is not None:
        return finished
    try:
        return _train(recipe, out, Path(cache) if cache else out / "cache", progress)
    except (KeyboardInterrupt, Interrupted):
        found = checkpoints_in(out / "checkpoints")
        reached = f"step {step_of(found[0])} is saved" if found else "no step was saved yet"
        print(f"stopped: {reached}; go on with --resume.", flush=True)
        raise SystemExit(130) from None


def _claim(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> Path | None:
    """Make the folder of a run ready; returns its bridge where a resumed run is already finished."""
    if resume and overwrite:
        raise ConfigError("resume goes on with an earlier run and overwrite deletes it; give one of them.")
    present = [name for name in _WRITTEN if (out / name).exists()]
    if overwrite:
        for name in present:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif present and not resume:
        raise ConfigError(
            f"{out} already holds a run ({', '.join(present)}); give --resume, --overwrite or another folder."
        )
    elif resume and (out / "recipe.yaml").exists():
        before, now = (_flat(entry.to_dict()) for entry in (Recipe.load(out / "recipe.yaml"), recipe))
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                f"{out} was started with another recipe ({changed[0]} was {before.get(changed[0])!r}, now "
                f"{now.get(changed[0])!r}); resume with {out / 'recipe.yaml'}, or give --overwrite or another folder."
            )
        if (out / "bridge" / "manifest.json").exists():
            print(f"{out} is finished already.", flush=True)
            return out / "bridge"
    return None


def _train(recipe: Recipe, out: Path, cache: Path, progress: bool) -> Path:
    run = recipe.run
    torch.manual_seed(run.seed)
    bridge, lineage = build_bridge(recipe)
    if run.checkpoint_activations:
        bridge.backbone.checkpoint_activations()
    trained = freeze(bridge, recipe.train)
    check_stage(recipe.stage, trained, recipe.losses)
    print(trainable_table(bridge), flush=True)
    bridge.to("cuda" if torch.cuda.is_available() else "cpu")
    data, held = build_data(recipe)
    store = FeatureStore(cache)
    prepared = prepare_all(bridge, data, store, progress=progress)
    prepared.check_trained(trained)
    prepared_held = (
        None if held is None else prepare_all(bridge, held, store, label="validation data", progress=progress)
    )
    print(store.describe(), flush=True)

    found = latest_checkpoint(out / "checkpoints")
    start = 0 if found is None else step_of(found)
    stage = Stage(bridge, recipe.losses, recipe.optimizer, run.steps)
    out.mkdir(parents=True, exist_ok=True)
    recipe.save(out / "recipe.yaml")
    began = time.monotonic()
    _fit(
        stage,
        recipe,
        out,
        found,
        StepBatches(prepared, run.batch_size, run.seed, start * run.accumulate),
        prepared_held,
        progress,
    )
    seconds = time.monotonic() - began
    done = run.steps - start
    bridge.eval()
    bridge.lineage = [*lineage, _lineage_entry(recipe, trained)]
    bridge.save_pretrained(out / "bridge")
    dialogues = done * run.batch_size * run.accumulate
    print(
        f"{recipe.stage}: {done} steps in {seconds:.0f} s ({done / seconds:.1f} steps/s, {dialogues / seconds:.0f} "
        f"dialogues/s); the bridge is at {out / 'bridge'}.",
        flush=True,
    )
    return out / "bridge"


def build_bridge(recipe: Recipe) -> tuple[Bridge, list[dict[str, Any]]]:
    """Return the bridge that a recipe starts from, and the stages that its parents went through.

    Raises:
        ConfigError: Unknown parts.
        CheckpointError: The parent is missing, altered or of other shapes.
    """
    config = recipe.bridge.to_dict()
    for name, weight in recipe.losses.items():
        modality, _, loss = name.partition(".")
        if loss == "denoising" and weight > 0 and modality in config["outputs"]:
            config["outputs"][modality]["denoising"] = True
        if loss == "balance" and weight > 0:
            config["inputs"][modality]["projection"]["balance"] = True
    bridge = Bridge.from_config(config)
    load_parents(bridge, recipe.parents, recipe.bridge.inputs)
    lineage: list[dict[str, Any]] = []
    for parent, patterns in recipe.parents.items():
        manifest = hub.read_json(find_bridge(parent) / "manifest.json")
        lineage += [entry for entry in manifest["lineage"] if entry not in lineage]
        for name in manifest["parts"].keys() - bridge.parts():
            if name.startswith("backbone.") and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                log.warning("parent %s has the part %r, which this recipe's backbone lacks: it is lost", parent, name)
        for name, entry in bridge.frozen().items():
            before = manifest["frozen"].get(name)
            if before is not None and before["sha256"] != entry["sha256"]:
                log.warning("parent %s was trained with other weights of the frozen part %r", parent, name)
    return bridge, lineage


def build_data(recipe: Recipe) -> tuple[Data, Data | None]:
    """Return training data and validation data, None where there is none.

    Raises:
        ConfigError: The settings name what the data has not.
        DataError: A file can't be used.
    """
    settings = recipe.data.to_dict()
    if "path" in settings:
        root, held = settings.get("root"), settings.get("validation")
        mixing = {key: settings[key] for key in ("weights", "temperature", "replay") if key in settings}
        return read_files(settings["path"], root, **mixing), read_files(held, root) if held else None
    from mmbridge.data.synthetic import SyntheticData

    settings.pop("name")
    count = settings.pop("validation_samples", _VALIDATION_SAMPLES)
    train_data = SyntheticData(**settings, split="seen", seed=recipe.run.seed)
    if not count:
        return train_data, None
    settings.update(samples=count, pool=count)
    return train_data, SyntheticData(**settings, split="unseen", seed=recipe.run.seed + 1)


def _fit(
    stage: Stage, recipe: Recipe, out: Path, found: Path | None, batches: StepBatches, held: Any, progress: bool
) -> None:
    run, start = recipe.run, 0 if found is None else step_of(found)
    with _quiet():
        from lightning.pytorch import Trainer
        from lightning.pytorch.loggers import Logger, TensorBoardLogger

        loggers: list[Logger] = [MetricsFile(out / "logs" / "metrics.csv", start)]
        if importlib.util.find_spec("tensorboard"):
            loggers.append(TensorBoardLogger(out, name=None, version="logs", purge_step=start + 1 if found else None))
        checkpoints = Checkpoints(out / "checkpoints", run.save_every)
        validation = [] if held is None else [Validation(held, out / "samples", run.validate_every, run.batch_size)]
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=run.precision,
            max_steps=run.steps,
            max_epochs=-1,
            accumulate_grad_batches=run.accumulate,
            logger=loggers,
            callbacks=[Metrics(run.steps, start, progress), *validation, checkpoints, Stop(checkpoints)],
            plugins=[SafeCheckpointIO()],
            default_root_dir=out,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(stage, batches.loader(run.workers), ckpt_path=found)


def _lineage_entry(recipe: Recipe, trained: list[str]) -> dict[str, Any]:
    hashes = [hub.file_sha256(find_bridge(parent) / "manifest.json") for parent in recipe.parents]
    return {
        "stage": recipe.stage,
        "parent": recipe.parent,
        "parent_sha256": hashes if len(hashes) > 1 else hashes[0] if hashes else None,
        "steps": recipe.run.steps,
        "seed": recipe.run.seed,
        "trained": trained,
        "data": recipe.data.to_dict(),
        "recipe": recipe.to_dict(),
    }


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    return {
        key: leaf for name, value in values.items() for key, leaf in _flat(value, f"{path}.{name}".strip(".")).items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's banners and hints, which are about choices that this module has made."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
