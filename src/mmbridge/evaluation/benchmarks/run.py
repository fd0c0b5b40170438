"""A bridge through a benchmark: replies are written as they come, so that an interrupted run goes on."""

import contextlib
import importlib.metadata
import json
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmbridge import hub
from mmbridge.bridge import Bridge, find_bridge
from mmbridge.errors import CheckpointError, ConfigError, ContextError, DataError, MediaError
from mmbridge.evaluation.benchmarks.base import Benchmark, Request, exists, locate, read_requests
from mmbridge.evaluation.benchmarks.scoring import Answered, Judges, find_left_out, score
from mmbridge.evaluation.benchmarks.table import BENCHMARKS
from mmbridge.registry import suggest

_PACKAGES = ("mmbridge", "torch", "transformers", "diffusers")
Line = dict[str, Any]


def run_benchmark(
    bridge: str | Path,
    name: str,
    data: str | Path,
    out: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    prompt: str | None = None,
    embedder: str | Path | None = None,
    batch_size: int = 8,
    report: Callable[[str], None] = tqdm.write,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer a benchmark's requests and measure the replies.

    Replies go to ``predictions.jsonl`` in ``out`` as they come, media beside it. A run that finds replies of the same
    settings there goes on after them, tries again what was skipped, and measures anew.

    Args:
        bridge: Folder, shipped name or hub id of a saved bridge.
        name: A key of ``BENCHMARKS``.
        data: Folder with the official files; nothing outside is read, and nothing is downloaded.
        out: Folder for ``settings.json``, ``predictions.jsonl`` and ``metrics.json``.
        limit: Draw so many requests; None for all.
        seed: Seed of the draw and of the decoders; request i is answered with ``seed + i``, whatever the batch.
        prompt: What the user says in place of the benchmark's own words; ``{}`` stands for the question or caption.
        embedder: CLIP, CLAP or ImageBind, which similarities and some distances are measured through.
        batch_size: Requests that are answered together.
        report: Called with a sentence for what is skipped or left out.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        What ``metrics.json`` holds: ``figures`` by metric, ``left_out`` (metrics that could not be had, and why), ``n``
        (replies measured), ``skipped`` (damaged files), ``missing`` (media that are not there), ``settings``, ``command``
        and ``versions``.

    Raises:
        ConfigError: No such benchmark, a bridge without a way for it, or a folder with replies of other settings.
        DataError: The data are not there; the message says what to download, and where to put it.
        CheckpointError: The bridge or the embedder can't be loaded.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}{suggest(name, list(BENCHMARKS))}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit} but must be at least 1 request.")
    benchmark, root, folder = BENCHMARKS[name], Path(data), Path(out)
    words = benchmark.prompt if prompt is None else prompt
    if ("{}" in benchmark.prompt) != ("{}" in words):
        kind = "needs {} where the question or caption goes" if "{}" in benchmark.prompt else "takes no {}"
        raise ConfigError(f"the prompt {words!r} does not fit: {name} {kind}.")
    manifest = find_bridge(bridge) / "manifest.json"
    hub.read_json(manifest)
    requests, missing = read_requests(name, benchmark, root, limit, seed)
    if missing:
        report(f"{missing} requests of {name} are passed over because their media are not below {root}")
    judges = Judges(embedder, root, report, progress)
    unavailable = find_left_out(benchmark.metrics, judges)
    for metric, reason in unavailable.items():
        report(f"{metric} is left out: {reason}")

    settings = {
        "benchmark": name,
        "bridge": hub.file_sha256(manifest),
        "data": {
            file: hub.file_sha256(locate(file, root))
            for file in (*benchmark.files, *benchmark.optional)
            if exists(file, root)
        },
        "prompt": words,
        "max_new_tokens": benchmark.max_new_tokens,
        "requests": len(requests),
        "seed": seed,
    }
    lines = _resume(folder, settings, requests)
    pending = [index for index in range(len(requests)) if index not in lines]
    if pending:
        loaded = Bridge.from_pretrained(bridge)
        _check_ways(loaded, name, benchmark)
        (folder / "media").mkdir(exist_ok=True)
        bar = tqdm(
            total=len(requests), initial=len(lines), desc=name, unit="request", disable=None if progress else True
        )
        with bar, (folder / "predictions.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            for batch in _batches(pending, batch_size):
                for line in _answer(loaded, benchmark, requests, batch, words, root, folder, seed):
                    if "skipped" in line:
                        report(f"skipped {line['id']}: {line['skipped']}")
                    lines[line["index"]] = line
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(batch))
        del loaded

    answered = [
        Answered(requests[index], line["text"], folder / line["file"] if line.get("file") else None)
        for index, line in sorted(lines.items())
        if "skipped" not in line
    ]
    if not answered:
        raise DataError(f"every medium of {name} was skipped; the first: {next(iter(lines.values()))['skipped']}")
    usable = [metric for metric in benchmark.metrics if metric not in unavailable]
    figures, failed = score(usable, answered, judges)
    if benchmark.gives != "text":
        figures["made"] = sum(item.file is not None for item in answered) / len(answered)
    result = {
        "benchmark": name,
        "figures": figures,
        "left_out": unavailable | failed,
        "n": len(answered),
        "missing": missing,
        "skipped": {line["id"]: line["skipped"] for line in lines.values() if "skipped" in line} | judges.damaged,
        "embedder": None if embedder is None else str(embedder),
        "settings": settings,
        "command": _command(bridge, name, data, out, limit, seed, prompt, embedder),
        "versions": {"python": platform.python_version()} | _versions(),
    }
    hub.write_json(folder / "metrics.json", result)
    return result


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as text for a terminal."""
    counts = [f"{result['n']} requests"]
    counts += [f"{len(result['skipped'])} files skipped as damaged"] if result["skipped"] else []
    counts += [f"{result['missing']} media not there"] if result["missing"] else []
    lines = [f"{result['benchmark']}: {', '.join(counts)}"]
    lines += [f"  {name:<18}{value:>10.4f}" for name, value in result["figures"].items()]
    lines += [f"  {name:<18}{'left out':>10}  {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def _check_ways(bridge: Bridge, name: str, benchmark: Benchmark) -> None:
    for wanted, ways, verb in ((benchmark.takes, bridge.inputs, "read"), (benchmark.gives, bridge.outputs, "make")):
        if wanted != "text" and wanted not in ways:
            known = ", ".join(["text", *ways])
            raise ConfigError(f"{name} needs a bridge that can {verb} {wanted}; this one can {verb} {known}.")


def _resume(folder: Path, settings: dict[str, Any], requests: Sequence[Request]) -> dict[int, Line]:
    """Return the replies of an earlier run of the same settings by index; without those that are to be tried again."""
    path = folder / "predictions.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        hub.write_json(folder / "settings.json", settings)
        return {}
    before = hub.read_json(folder / "settings.json")
    if before != settings:
        changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        shown = ", ".join(f"{key} ({before.get(key)!r:.60}, now {settings.get(key)!r:.60})" for key in changed)
        raise ConfigError(
            f"{folder} holds a run with another {shown}; give another folder as --out, or delete this one to start anew."
        )
    lines: dict[int, Line] = {}
    raw = path.read_bytes().splitlines(keepends=True)
    for number, content in enumerate(raw, start=1):
        try:
            line = json.loads(content)
            known = requests[line["index"]].id == line["id"] and isinstance(line.get("text", ""), str)
        except (ValueError, KeyError, TypeError, IndexError):
            known = False
        if not known and number == len(raw):
            continue  # the run was killed while it wrote this
        if not known:
            raise CheckpointError(f"{path}:{number} is no reply of this run; delete {folder} to start anew.")
        if "skipped" not in line and not (line.get("file") and not (folder / line["file"]).is_file()):
            lines[line["index"]] = line
    if len(lines) < len(raw) or (raw and not raw[-1].endswith(b"\n")):
        with hub.atomic_file(path) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
    return lines


def _batches(pending: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield runs of consecutive indices, because row r of a batch is answered with the batch's seed + r."""
    batch: list[int] = []
    for index in pending:
        if batch and (len(batch) == size or index != batch[-1] + 1):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _answer(
    bridge: Bridge,
    benchmark: Benchmark,
    requests: Sequence[Request],
    batch: Sequence[int],
    words: str,
    root: Path,
    folder: Path,
    seed: int,
) -> Iterator[Line]:
    """Yield one line per request of a batch; where a medium can't be read, the others are answered one by one."""
    dialogues = []
    for index in batch:
        request = requests[index]
        content: list[dict[str, Any]] = [{"type": "text", "text": words.replace("{}", request.text)}]
        if request.medium is not None:
            content.insert(0, {"type": benchmark.takes, "path": request.medium})
        dialogues.append([{"role": "user", "content": content}])
    try:
        replies = bridge.generate(dialogues, root=root, max_new_tokens=benchmark.max_new_tokens, seed=seed + batch[0])
    except (MediaError, ContextError) as error:
        if len(batch) == 1:
            yield {"index": batch[0], "id": requests[batch[0]].id, "skipped": " ".join(str(error).split())}
            return
        for index in batch:
            yield from _answer(bridge, benchmark, requests, [index], words, root, folder, seed)
        return
    for index, reply in zip(batch, replies, strict=True):
        line: Line = {"index": index, "id": requests[index].id, "text": reply.text}
        made = next((medium for medium in reply.media if medium.modality == benchmark.gives), None)
        if made is not None:
            line["file"] = f"media/{index:06d}{made.suffix}"
            made.save(folder / line["file"])
        yield line


def _command(
    bridge: str | Path,
    name: str,
    data: str | Path,
    out: str | Path,
    limit: int | None,
    seed: int,
    prompt: str | None,
    embedder: str | Path | None,
) -> str:
    words = ["mmbridge", "evaluate", str(bridge), "--benchmark", name, "--data", str(data), "--out", str(out)]
    words += ["--seed", str(seed)]
    for option, value in (("--limit", limit), ("--prompt", prompt), ("--embedder", embedder)):
        words += [] if value is None else [option, str(value)]
    return shlex.join(words)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
