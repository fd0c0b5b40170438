"""The ablations of two papers in miniature: each choice of the bridge varied alone, on the synthetic world.

benchmarks/ablations.yaml lists the studies of NExT-GPT, onellm.yaml those of OneLLM; recipes/ablations has the stages that they
vary. Runs that studies share are trained once, frozen features are computed once, two runs go on at a time with one thread each.
What a stopped command has finished is kept: the same command goes on. How long it will take is measured before it starts. The
figures go to assets/ and, with those of the other paper where they are there, to results.md.

    python benchmarks/ablations.py                                   all studies of NExT-GPT, two seeds: under an hour
    python benchmarks/ablations.py --studies onellm                  all studies of OneLLM, two seeds: under an hour
    python benchmarks/ablations.py --page docs                       the figures go to docs/assets, the page to docs/results.md
    python benchmarks/ablations.py --only signal_tokens --seeds 1
    python benchmarks/ablations.py run.steps=20 --samples 10         key=value overrides every stage, for a quick look
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from ablations_page import PAPERS, write_page
from tqdm import tqdm

from mmbridge import hub
from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.data.features import FeatureStore
from mmbridge.data.loader import StepBatches, prepare_all
from mmbridge.demo.report import describe_environment
from mmbridge.errors import ConfigError, MMBridgeError
from mmbridge.evaluation.any_to_any import evaluate
from mmbridge.planning import plan
from mmbridge.registry import suggest
from mmbridge.schema import build, mapping, parse_yaml
from mmbridge.training.freezing import freeze
from mmbridge.training.run import build_bridge, build_data, train
from mmbridge.training.stages import Stage

RECIPES = Path(__file__).parents[1] / "recipes" / "ablations"

Change = Literal["lower", "higher"]


@dataclass(kw_only=True)
class Variant:
    """What differs from the shared stages.

    Args:
        stages: Stages in their order; None for those of the study.
        overrides: Values by dotted path, by the name of a stage or "every"; "*" stands for each of its ways in.
        cells: Directions that are measured; None for those of the study.
        figure: Which figure of a cell is the variant's: what the bridge makes, what its decoder makes of the words of its
            replies, or of the right caption.
    """

    stages: list[str] | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[str] | None = None
    figure: Literal["accuracy", "written", "bound"] = "accuracy"


@dataclass(kw_only=True)
class Study:
    """A question and its variants.

    Args:
        title: Heading.
        question: What is varied, and how it is measured.
        paper: What the paper says about it.
        stages: Stages of every variant that names none.
        cells: Directions that are measured.
        reference: Variant that the others are compared with.
        expected: By variant, where the paper would have it, compared with the reference: in all directions, or by direction.
        variants: By name.
    """

    title: str
    question: str
    paper: str
    stages: list[str]
    cells: list[str]
    reference: str
    expected: dict[str, Change | dict[str, Change]] = field(default_factory=dict)
    variants: dict[str, Variant]

    def cells_of(self, label: str) -> list[str]:
        """Return the directions in which a variant is measured."""
        return self.variants[label].cells or self.cells


@dataclass(frozen=True, eq=False)
class Run:
    """One stage of a variant with one seed: what a folder of training holds.

    Args:
        stage: Its recipe in ``RECIPES``.
        overrides: ``key=value`` each.
        seed: Seed of training, and of the requests that measure it.
        parent: The run that it starts from.
    """

    stage: str
    overrides: tuple[str, ...]
    seed: int
    parent: "Run | None" = None

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, without its parent's folder."""
        values = [*self.overrides, f"run.seed={self.seed}", "parent=null"]
        return Recipe.load(RECIPES / f"{self.stage}.yaml", values)

    @cached_property
    def name(self) -> str:
        """Name of its folder, equal for equal runs: it hashes the recipes of the run and of all before it."""
        before = "" if self.parent is None else self.parent.name
        text = json.dumps([self.recipe.to_dict(), before], sort_keys=True)
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def read_studies(paper: str = "ablations", only: Sequence[str] = ()) -> dict[str, Study]:
    """Return the studies of a paper by name.

    Args:
        paper: One of ``PAPERS``, whose file has that name.
        only: Names of studies; none for all.

    Raises:
        ConfigError: There is no such study, or one contradicts itself.
    """
    file = Path(__file__).with_name(f"{paper}.yaml")
    values = mapping(parse_yaml(file.read_text(encoding="utf-8"), str(file)), str(file))
    studies = {name: build(Study, value, name) for name, value in values.items()}
    for name in only:
        if name not in studies:
            raise ConfigError(f"there is no study {name!r}{suggest(name, list(studies))}")
    for name, study in studies.items():
        for variant in (study.reference, *study.expected):
            if variant not in study.variants:
                raise ConfigError(f"{name} has no variant {variant!r}{suggest(variant, list(study.variants))}")
        named = [value for value in study.expected.values() if isinstance(value, dict)]
        for cell in itertools.chain(*map(study.cells_of, study.variants), *named):
            if cell not in study.cells_of(study.reference):
                raise ConfigError(f"{name} does not measure {cell!r} of {study.reference!r}, its reference.")
    return {name: study for name, study in studies.items() if not only or name in only}


def run_of(study: Study, variant: Variant, seed: int, overrides: Sequence[str] = ()) -> Run:
    """Return the last run of a variant; those before it are its parents.

    Args:
        study: The study.
        variant: One of its variants.
        seed: Seed.
        overrides: ``key=value`` for every stage, before those of the variant.
    """
    stages = variant.stages or study.stages
    for name in variant.overrides:
        if name != "every" and name not in stages:
            raise ConfigError(f"overrides of {name!r} change nothing, for the stages are {', '.join(stages)}.")
    run = None
    for stage in stages:
        values = {**variant.overrides.get("every", {}), **variant.overrides.get(stage, {})}
        ways = Recipe.load(RECIPES / f"{stage}.yaml").bridge.inputs
        own = [
            f"{key.replace('*', way)}={json.dumps(value)}"
            for key, value in values.items()
            for way in (ways if "*" in key else [""])
        ]
        run = Run(stage, (*overrides, *own), seed, run)
    assert run is not None
    return run


def work_on(run: Run, out: Path, cells: Sequence[str], samples: int) -> dict[str, Any]:
    """Train a run and measure cells on unseen combinations, unless that is done; returns the record of the run.

    Args:
        run: What to train; its parent is done.
        out: Folder of all runs.
        cells: Directions to measure; none for a run that others only start from.
        samples: Requests per cell.
    """
    folder = out / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    record = read_record(run, out, samples)
    with (folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        if record is None:
            recipe = Recipe.from_dict({**run.recipe.to_dict(), "parent": _folder_of(run.parent, out)})
            again, began = (folder / "recipe.yaml").exists(), time.monotonic()
            train(recipe, folder, resume=True, cache=out / "cache", progress=False)
            seconds = None if again else time.monotonic() - began  # of a run that was stopped nobody knows
            parts = plan(recipe).parts
            sizes = {part.name: part.parameters for part in parts}
            trained = [part.name for part in parts if part.trained]
            record = {"samples": samples, "seconds": seconds, "sizes": sizes, "trained": trained, "cells": {}}
            hub.write_json(folder / "record.json", record)
        missing = [cell for cell in cells if cell not in record["cells"]]
        if missing:
            table = folder / "table"
            found = evaluate(
                folder, table, samples=samples, seed=run.seed, splits=["unseen"], cells=missing, progress=False
            )
            record["cells"].update(zip(missing, found, strict=True))
            hub.write_json(folder / "record.json", record)
    return record


def read_record(run: Run, out: Path, samples: int) -> dict[str, Any] | None:
    """Return what is known of a trained run, or None; cells that were measured with other requests are left out."""
    path = out / "runs" / run.name / "record.json"
    if not path.exists():
        return None
    record: dict[str, Any] = hub.read_json(path)
    return record if record["samples"] == samples else {**record, "samples": samples, "cells": {}}


def _folder_of(run: Run | None, out: Path) -> str | None:
    return None if run is None else str(out / "runs" / run.name)


def measure_pace(recipe: Recipe) -> tuple[float, float, float]:
    """Return the seconds of a step, of tokenising a dialogue, and of rendering and encoding a medium, with one thread."""
    count = 4 * recipe.run.batch_size
    recipe.data.samples = count
    if recipe.data.inputs:
        recipe.data.pool = min(recipe.data.pool or count, 24)
    with contextlib.redirect_stdout(None):  # what starts as what is no news here
        bridge, _ = build_bridge(recipe)
    freeze(bridge, recipe.train)
    store, data = FeatureStore(), build_data(recipe)[0]
    seconds = []
    for _ in range(2):  # the second time everything is in the store
        began = time.monotonic()
        prepared = prepare_all(bridge, data, store, progress=False)
        seconds.append(time.monotonic() - began)
    media = sum(store.computed[name] for name in recipe.data.inputs or ())
    medium = max(seconds[0] - seconds[1], 0.0) / media if media else 0.0
    batches = StepBatches(prepared, recipe.run.batch_size, recipe.run.seed)
    stage = Stage(bridge, recipe.losses, recipe.optimizer, 1)
    optimizer = torch.optim.AdamW(stage.trained, fused=True)
    for step in range(8):
        if step == 2:  # the first ones warm up
            began = time.monotonic()
        stage.weigh(bridge(batches.batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.monotonic() - began) / 6, seconds[1] / count, medium


def measure_reply(out: Path, samples: int) -> tuple[float, float]:
    """Return the seconds of a reply in words and of one with a picture, baselines included, by the shipped bridge."""
    bridge, seconds = Bridge.from_pretrained("mmbridge/tiny"), []
    for cell in ("image:text", "image:image"):
        began = time.monotonic()
        evaluate(bridge, out / "pace", samples=samples, splits=["unseen"], cells=[cell], progress=False)
        seconds.append((time.monotonic() - began) / samples)
    return seconds[0], seconds[1]


def estimate(pool: Executor, runs: Mapping[Run, Sequence[str]], out: Path, samples: int) -> float:
    """Return the seconds that one process would take for runs and their measurements, from a few steps of each kind."""
    alike: dict[tuple[str, tuple[str, ...]], Recipe] = {}
    for run in runs:
        alike.setdefault((run.stage, run.overrides), Recipe.from_dict(run.recipe.to_dict()))
    reply = pool.submit(measure_reply, out, min(samples, 20))
    paces = dict(zip(alike, pool.map(measure_pace, alike.values()), strict=True))
    words, picture = reply.result()
    total = 0.0
    for run, cells in runs.items():
        step, dialogue, _ = paces[run.stage, run.overrides]
        total += run.recipe.run.steps * step + (run.recipe.data.samples or 0) * dialogue
        total += samples * sum(words if cell.endswith(":text") else picture for cell in cells)
    medium = max(pace[2] for pace in paces.values())
    media = {run.seed: run.recipe.data for run in runs if run.recipe.data.inputs}  # encoded once per seed
    return total + sum(len(data.inputs or ()) * (data.pool or 0) * medium for data in media.values())


def execute(pool: Executor, processes: int, runs: Mapping[Run, Sequence[str]], out: Path, samples: int) -> None:
    """Work on runs, each after its parent, as many at a time as there are processes."""
    waiting, active = list(runs), dict[Future[Any], Run]()
    with tqdm(total=sum(run.recipe.run.steps for run in waiting), unit=" steps", desc="ablations") as bar:
        while waiting or active:
            ready = [run for run in waiting if run.parent not in waiting and run.parent not in active.values()]
            for run in ready[: processes - len(active)]:
                waiting.remove(run)
                active[pool.submit(work_on, run, out, runs[run], samples)] = run
            for future in wait(active, return_when=FIRST_COMPLETED).done:
                run, record = active.pop(future), future.result()
                cells = "  ".join(f"{name} {cell['accuracy']:.3f}" for name, cell in record["cells"].items())
                tqdm.write(f"{run.name}  seed {run.seed}  {cells}".rstrip())
                bar.update(run.recipe.run.steps)


def collect(studies: Mapping[str, Study], last: Mapping[tuple[str, str, int], Run], out: Path, samples: int) -> Any:
    """Return all figures as plain data, which the page is made of.

    Args:
        studies: By name.
        last: The last run of each variant and seed.
        out: Folder of the runs.
        samples: Requests per cell.
    """
    found: dict[str, Any] = {}
    for name, study in studies.items():
        variants = {}
        for label, variant in study.variants.items():
            seeds = {seed: run for (one, two, seed), run in last.items() if (one, two) == (name, label)}
            variants[label] = {
                "stages": variant.stages or study.stages,
                "seeds": {
                    str(seed): _figures(run, variant.figure, study.cells_of(label), out) for seed, run in seeds.items()
                },
            }
        texts = {key: getattr(study, key) for key in ("title", "question", "paper", "reference", "cells", "expected")}
        found[name] = {**texts, "variants": variants}
    return {"samples": samples, "environment": describe_environment(), "studies": found}


def _figures(run: Run, figure: str, cells: Sequence[str], out: Path) -> dict[str, Any]:
    """Return what a run and those before it took, and its cells."""
    chain: list[Any] = []
    step: Run | None = run
    while step is not None:
        chain.append((step, hub.read_json(out / "runs" / step.name / "record.json")))
        step = step.parent
    seconds, sizes = [record["seconds"] for _, record in chain], chain[0][1]["sizes"]
    trained = {name for _, record in chain for name in record["trained"]}
    measured = chain[0][1]["cells"]
    return {
        "steps": sum(one.recipe.run.steps for one, _ in chain),
        "seconds": None if None in seconds else sum(seconds),
        "trained": sum(sizes[name] for name in trained),
        "parameters": sum(sizes.values()),
        "cells": {
            cell: {"share": measured[cell][figure], "bound": measured[cell]["bound"], "n": measured[cell]["n"]}
            for cell in cells
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of every stage, by dotted path")
    parser.add_argument(
        "--studies", default="ablations", choices=PAPERS, help="whose: NExT-GPT's (ablations) or OneLLM's"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="(runs/ablations)")
    parser.add_argument("--page", type=Path, metavar="DIR", help="folder of results.md and assets/ (--out)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STUDY", help="studies (all)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds of every variant (2)")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="requests per cell and seed (100)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="runs at a time (2)")
    given = parser.parse_intermixed_args(arguments)
    try:
        _run(given)
    except MMBridgeError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on.") from None


def _run(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for name in ("seeds", "samples", "processes"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(given, name)}.")
    studies = read_studies(given.studies, given.only)
    last = {
        (name, label, seed): run_of(study, variant, seed, given.overrides)
        for name, study in studies.items()
        for label, variant in study.variants.items()
        for seed in range(given.seeds)
    }
    cells: dict[Run, dict[str, None]] = {}
    for (name, label, _), run in last.items():
        chain = [run]
        while (before := chain[-1].parent) is not None:
            chain.append(before)
        for one in reversed(chain):
            one.recipe.validate()
            cells.setdefault(one, {})
        cells[run].update(dict.fromkeys(studies[name].cells_of(label)))
    # Runs without a parent go first, and of those the first of every seed, which fills the cache that the others read.
    ordered = sorted(cells.items(), key=lambda item: item[0].parent is not None)
    left = {run: list(want) for run, want in ordered if not _is_done(run, given.out, want, given.samples)}
    print(f"{len(cells)} runs, {len(left)} of them to do, in {given.out}", flush=True)
    if left:
        given.out.mkdir(parents=True, exist_ok=True)
        with _pool(given.processes) as pool:
            seconds = estimate(pool, left, given.out, given.samples) / given.processes
            print(f"about {seconds / 60:.1f} minutes at the speed of now", flush=True)
            execute(pool, given.processes, left, given.out, given.samples)
    results = collect(studies, last, given.out, given.samples)
    print(write_page(given.studies, results, given.page or given.out))


def _pool(processes: int) -> Executor:
    """Return processes to work in, or a thread where one is enough."""
    if processes == 1:
        return ThreadPoolExecutor(1)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))


def _is_done(run: Run, out: Path, cells: Mapping[str, None], samples: int) -> bool:
    record = read_record(run, out, samples)
    return record is not None and set(cells) <= set(record["cells"])


if __name__ == "__main__":
    main()
