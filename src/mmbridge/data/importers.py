"""Other projects' data files to the message schema; written from their published field names and sample files.

The formats are those of NExT-GPT (arXiv 2309.05519), LLaVA (arXiv 2304.08485) and OneLLM (arXiv 2312.03700). A record becomes
one dialogue. A file is looked for by its name below the root, then in the folders that NExT-GPT's data lie in (``images/``,
``videos/``, ``audios/``). What the user gives must be there; what the assistant gives goes by its caption alone where no file is.
"""

import contextlib
import csv
import functools
import io
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmbridge.data.samples import check_line, is_file
from mmbridge.errors import ConfigError, DataError, MMBridgeError
from mmbridge.hub import atomic_file
from mmbridge.messages import Message
from mmbridge.modality import MEDIA, PAIRED
from mmbridge.registry import suggest

Record = dict[str, Any]
Part = dict[str, Any]

_MEDIA = ("image", "video", "audio")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = re.compile(r"<(image|video|audio)>", re.IGNORECASE)
_TAG = re.compile(r"<(image|video|audio)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_DESCRIBE = {
    "image": ("Describe the image.", "What does the picture show?", "What do you see in this image?"),
    "video": ("Describe the video.", "What happens in the clip?", "What does this video show?"),
    "audio": ("Describe the sound.", "What do you hear?", "What is in this recording?"),
    "depth": ("Describe the depth map.", "What does this depth map show?", "What do you see in this depth map?"),
    "normal": ("Describe the normal map.", "What does this normal map show?", "What do you see in this normal map?"),
    "pointcloud": ("Describe the point cloud.", "What do the points show?", "What object is this?"),
    "imu": ("Describe the motion.", "How does it move?", "What do the motion sensors tell?"),
    "fmri": ("Describe the scene based on fMRI data.", "What does the person see?", "What is the brain looking at?"),
}
_DESCRIBE_ANY = ("Describe it.", "What does it show?", "What is it?")
_MAKE = {
    "image": ("Draw this: {}", "Make a picture of this: {}", "Show me an image of this: {}"),
    "video": ("Make a video of this: {}", "Show me a clip of this: {}", "Film this: {}"),
    "audio": ("Make this sound: {}", "Let me hear this: {}", "Record this: {}"),
}


def pairs(record: Record, root: Path, *, out: bool = False) -> list[Message]:
    """A medium and its caption, from a JSON list or a CSV file with a header.

    Fields: ``caption``; one of ``image_name``, ``video_name``, ``audio_name``, or ``image``, ``video``, ``audio``, ``depth``,
    ``normal``, ``pointcloud``, ``imu``, ``fmri`` or another registered medium; ``picture``,
    the picture of a depth or normal map; ``sample_rate``, that of an IMU trace without times.

    Args:
        record: One pair.
        root: Folder of the files.
        out: Whether the assistant makes the medium from the caption; else it describes the medium that the user gives.

    Raises:
        DataError: A field is missing, or the file is; or the assistant is to make what no decoder makes.
    """
    caption = _text(record.get("caption"), "caption")
    names = [(kind, name) for kind in MEDIA if (name := record.get(f"{kind}_name") or record.get(kind))]
    if len(names) != 1:
        raise DataError(f"needs one of image_name, video_name, audio_name or another medium, and has {len(names)}.")
    kind, name = names[0]
    if out and kind not in _MAKE:
        raise DataError(f"has a medium of type {kind!r}, which nothing makes; the assistant makes {', '.join(_MAKE)}.")
    choice = zlib.crc32(caption.encode()) % 3  # the same words for the same caption, whatever its place in the file
    if out:
        asked: list[Part] = [{"type": "text", "text": _MAKE[kind][choice].format(caption)}]
        answer: list[Part] = [{"type": "text", "text": "Here it is."}, _made(kind, caption, name, root)]
    else:
        asked = [_given(kind, name, root), {"type": "text", "text": _DESCRIBE.get(kind, _DESCRIBE_ANY)[choice]}]
        if kind in PAIRED and record.get("picture"):
            asked[0]["picture"] = _given("image", record["picture"], root)["path"]
        if kind == "imu" and record.get("sample_rate"):
            asked[0]["sample_rate"] = _number(record["sample_rate"], "sample_rate")
        answer = [{"type": "text", "text": caption}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def llava(record: Record, root: Path) -> list[Message]:
    """Conversations about media that the user gives.

    Fields: ``conversations``, a list of ``from`` ("human" or "gpt") and ``value``; the files, a name or a list of names,
    in ``image``, ``video``, ``audio``, or in NExT-GPT's ``input_image``, ``input_video``, ``input_audio``.
    ``<image>``, ``<video>`` and ``<audio>`` in the user's words stand for the files in order; without them the files
    come first. The record may have no file.

    Raises:
        DataError: A field or a file is missing, or placeholders and files differ in number.
    """
    turns = _turns(record)
    given = {kind: _list(record.get(kind) or record.get(f"input_{kind}"), kind) for kind in _MEDIA}
    said = " ".join(words for role, words, _ in turns if role == "user")
    fronted = [
        _given(kind, given[kind].pop(0), root)
        for kind in _MEDIA
        if f"<{kind}>" not in said.lower()
        for _ in range(len(given[kind]))
    ]
    messages: list[Message] = []
    for role, words, _ in turns:
        if role != "user":
            if _PLACEHOLDER.search(words):
                raise DataError(f"the {role} says {words!r:.60}; media of the assistant are read by t2m.")
            messages.append({"role": role, "content": words})
            continue
        content, fronted = fronted, []
        for kind, text in _split(_PLACEHOLDER, words):
            if kind is None:
                content.append({"type": "text", "text": text})
            elif not given[kind]:
                raise DataError(f"has more <{kind}> than files.")
            else:
                content.append(_given(kind, given[kind].pop(0), root))
        messages.append({"role": role, "content": content})
    left = [name for names in given.values() for name in names]
    if left:
        raise DataError(f"has more files than placeholders; {left[0]!r} has no place.")
    return messages


def t2m(record: Record, root: Path) -> list[Message]:
    """Requests in words, answers with media (NExT-GPT's T-T+X sets and its generation pairs).

    Fields: ``conversations`` (or ``conversation``), a list of ``from`` and ``value``, with ``caption`` and
    ``output_modality`` in turns of the assistant; ``image_captions``, ``video_captions``, ``audio_captions``, a caption
    or a list of them; ``output_image``, ``output_video``, ``output_audio``, the file, used where it is there.
    ``<image>``, ``<video>`` and ``<audio>`` in the assistant's words stand for the captions in order; without them the
    medium of the turn's ``caption`` comes last. Not read: ``image_name``, ``mm_name`` (their files do not
    match the captions) and ``*_caption_embeddings`` (decoders make their own).

    Raises:
        DataError: A field is missing, or placeholders and captions differ in number.
    """
    captions = {kind: _list(record.get(f"{kind}_captions"), f"{kind}_captions") for kind in _MEDIA}
    files = {kind: _list(record.get(f"output_{kind}"), f"output_{kind}") for kind in _MEDIA}
    listed = any(captions.values())
    messages: list[Message] = []
    for role, words, turn in _turns(record):
        content: list[Part] = []
        for kind, text in _split(_PLACEHOLDER, words):
            if kind is None:
                content.append({"type": "text", "text": text})
                continue
            if role != "assistant":
                raise DataError(f"the {role} says {words!r:.60}; media of the user are read by llava and mosit.")
            if not captions[kind] and (listed or not turn.get("caption")):
                raise DataError(f"has more <{kind}> than {kind}_captions.")
            caption = captions[kind].pop(0) if captions[kind] else _text(turn["caption"], "caption")
            content.append(_made(kind, caption, files[kind].pop(0) if files[kind] else None, root))
        last = turn.get("output_modality")
        if role == "assistant" and last in _MEDIA and not any(part["type"] == last for part in content):
            caption = captions[last].pop(0) if captions[last] else _text(turn.get("caption"), "caption")
            content.append(_made(last, caption, files[last].pop(0) if files[last] else None, root))
        messages.append({"role": role, "content": content})
    left = [caption for rest in captions.values() for caption in rest]
    if left:
        raise DataError(f"has more captions than placeholders; {left[0]!r:.60} has no place.")
    return messages


def mosit(record: Record, root: Path) -> list[Message]:
    """Dialogues with media on both sides (NExT-GPT's MosIT), which keep what the user gives.

    Fields: ``conversation`` (or ``conversations``), a list of ``from`` and ``value``; ``image_list``, ``video_list``,
    ``audio_list``, lists of ``image_name`` (``video_name``, ``audio_name``) and ``caption``. In the words,
    ``<Image>name</Image>``, ``<Video>name</Video>`` and ``<Audio>name</Audio>`` name the media; a tag of the assistant
    may hold a caption in place of a name.

    Raises:
        DataError: A field is missing, a file of the user is, or a medium of the assistant has no caption.
    """
    captions: dict[tuple[str, str], Any] = {}
    for listed in _MEDIA:
        entries = record.get(f"{listed}_list") or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"needs a list of objects as '{listed}_list'.")
        captions |= {(listed, str(entry.get(f"{listed}_name"))): entry.get("caption") for entry in entries}
    messages: list[Message] = []
    for role, words, _ in _turns(record):
        content: list[Part] = []
        for kind, text in _split(_TAG, words):
            if kind is None:
                content.append({"type": "text", "text": text})
            elif role != "assistant":
                content.append(_given(kind, text, root))
            elif (kind, text) in captions:
                content.append(_made(kind, _text(captions[kind, text], f"caption of {text!r}"), text, root))
            elif not re.fullmatch(r"\S+\.\w{2,4}", text):
                content.append(_made(kind, text, None, root))
            else:
                raise DataError(f"the {kind} {text!r} of the assistant is not in {kind}_list and has no caption.")
        messages.append({"role": role, "content": content})
    return messages


def onellm(record: Record, root: Path, *, modality: str, windows: Path) -> list[Message]:
    """OneLLM's instruction tuning: conversations about one medium, which comes first.

    Fields: ``conversations``, a list of ``from`` and ``value``, where ``<image>`` is left out whatever the medium; ``image``, the
    file of any modality, or of the picture beside ``depth_image`` or ``normal_image``; for motion ``imu_path`` (a folder),
    ``video_uid``, ``window_start`` and ``window_end``. A record about pictures may have no file.

    Args:
        record: One conversation.
        root: Folder of the files.
        modality: What ``image`` holds, which the files do not say.
        windows: Folder for the windows that are cut out of motion.

    Raises:
        DataError: A field or a file is missing, or there is no motion in the window.
    """
    turns = _turns(record)
    content: list[Part] = []
    if modality == "imu":
        content.append(_cut(record, root, windows))
    elif modality in PAIRED:
        content.append(_given(modality, _text(record.get(f"{modality}_image"), f"{modality}_image"), root))
        content[0]["picture"] = _given("image", record.get("image"), root)["path"]
    elif modality != "image" or record.get("image"):
        content.append(_given(modality, _text(record.get("image"), "image"), root))
    messages: list[Message] = []
    for role, words, _ in turns:
        if role != "user":
            messages.append({"role": role, "content": words})
            continue
        words = re.sub(r"\s*<image>\s*", " ", words).strip()
        content, asked = [], [*content, *([{"type": "text", "text": words}] if words else [])]
        messages.append({"role": role, "content": asked})
    return messages


def onellm_pairs(record: Record, root: Path, *, modality: str, windows: Path) -> list[Message]:
    """OneLLM's pretraining: a medium that the user gives, and its caption.

    Fields: ``caption`` and ``url``, a local path, from a CSV file with tabs; depth and normal maps lie where ``/cc3m/`` in the
    picture's path is ``/cc3m_depth/`` or ``/cc3m_normal/``. For motion, from a JSON list: ``text``, ``video_uid``,
    ``window_start`` and ``window_end``.

    Args:
        record: One pair.
        root: Folder of the files.
        modality: What ``url`` holds, which the files do not say.
        windows: Folder for the windows that are cut out of motion.

    Raises:
        DataError: A field or a file is missing, the url is no path, or there is no motion in the window.
    """
    if modality == "imu":
        return pairs({"imu": _cut(record, root, windows)["path"], "caption": record.get("text")}, root)
    url = _text(record.get("url"), "url")
    if "://" in url:
        raise DataError(
            f"has the url {url!r:.60}; files are read from the disk alone: fetch them, and give their paths."
        )
    if modality not in PAIRED:
        return pairs({modality: url, "caption": record.get("caption")}, root)
    place = f"/{url}".replace("/cc3m/", f"/cc3m_{modality}/")[1:]
    if place == url:
        raise DataError(f"has the url {url!r:.60}; the picture of a {modality} map must lie in a folder cc3m.")
    return pairs({modality: place, "picture": url, "caption": record.get("caption")}, root)


def _cut(record: Record, root: Path, windows: Path) -> Part:
    """Write a window of a trace as CSV, and return it: ``<video_uid>.npy`` (6, T) at ``<video_uid>_timestamps.npy`` ms."""
    import numpy as np

    from mmbridge.media import Imu

    uid = _text(record.get("video_uid"), "video_uid")
    start, end = (_number(record.get(name), name) for name in ("window_start", "window_end"))
    if not re.fullmatch(r"[\w.-]+", uid) or not start < end:
        raise DataError(
            f"needs a name as 'video_uid' and a window that ends after it starts, not {uid!r:.60}, {start}, {end}."
        )
    below = Path(_text(record.get("imu_path") or ".", "imu_path"))
    places = [_given("imu", str(below / f"{uid}{ending}.npy"), root)["path"] for ending in ("", "_timestamps")]
    trace, times = _trace(root, *places)
    if trace.ndim != 2 or len(trace) != 6 or times.shape != trace.shape[1:]:
        raise DataError(
            f"{places[0]!r} and its times have shapes {trace.shape} and {times.shape}, not (6, T) and (T,)."
        )
    inside = (times >= 1000 * start) & (times < 1000 * end)
    if inside.sum() < 2:
        raise DataError(f"{places[0]!r} holds fewer than 2 samples from {start:g} to {end:g} s.")
    table = io.BytesIO()
    rows = np.vstack([times[inside] / 1000 - start, trace[:, inside]]).T.astype(np.float64)
    np.savetxt(table, rows, fmt="%.9g", delimiter=",", header="time,ax,ay,az,gx,gy,gz", comments="")
    windows.mkdir(exist_ok=True)
    file = windows / f"{uid}_{start:.3f}_{end:.3f}.csv"
    Imu.load(table.getvalue()).save(file)
    return {"type": "imu", "path": file.resolve().relative_to(root.resolve()).as_posix()}


@functools.lru_cache(maxsize=2)
def _trace(root: Path, trace: str, times: str) -> tuple[Any, Any]:
    """Return a trace and its times; many windows are of one."""
    from mmbridge.media.arrays import read_npy
    from mmbridge.media.base import find_file

    found = [read_npy(find_file(name, "imu", {"NumPy": "NPY"}, root)) for name in (trace, times)]
    return found[0], found[1].squeeze()


FORMATS: dict[str, Callable[..., list[Message]]] = {
    "pairs": pairs,
    "pairs-out": partial(pairs, out=True),
    "llava": llava,
    "t2m": t2m,
    "mosit": mosit,
    "onellm": onellm,
    "onellm-pairs": onellm_pairs,
}
_OF_ONE_MODALITY = ("onellm", "onellm-pairs")


def convert(
    format: str,
    source: str | Path,
    target: str | Path,
    root: str | Path | None = None,
    *,
    modality: str | None = None,
    report: Callable[[str], None] = tqdm.write,
    progress: bool = False,
) -> tuple[int, int]:
    """Write a JSONL file of dialogues from another project's data file, whole or not at all.

    Args:
        format: A key of ``FORMATS``.
        source: A JSON list of records; for pairs also a CSV file with a header, with commas or tabs.
        target: The file to write; never one that exists.
        root: Folder that the files are below, which the written paths are relative to; None for the target's own.
        modality: What the media of OneLLM's formats are, None for "image"; windows of motion are written into a folder beside the
            target, ``<its name>_imu``.
        report: Called for every record that is skipped with "source, record n: why"; records count from 1.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        How many records were written, and how many were skipped.

    Raises:
        ConfigError: No such format or modality, or one that the format has in its records.
        DataError: The source can't be read, no record of it can be used, or the target exists.
        CheckpointError: The target can't be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"there is no format {format!r} to convert from{suggest(format, list(FORMATS))}")
    if modality not in (None, *MEDIA):
        raise ConfigError(f"there is no modality {modality!r}{suggest(str(modality), list(MEDIA))}")
    if modality is not None and format not in _OF_ONE_MODALITY:
        raise ConfigError(f"{format} says in its records what media are; leave out modality={modality!r}.")
    source, target = Path(source), Path(target)
    root = Path(root) if root is not None else target.parent
    if target.exists():
        raise DataError(f"{target} exists already and was not overwritten; name another file.")
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}; give the folder that the files are below.")
    written = skipped = 0
    bar = tqdm(_records(source), desc="converting", unit=" records", leave=False, disable=None if progress else True)
    read = FORMATS[format]
    windows = target.with_name(f"{target.stem}_imu")
    if format in _OF_ONE_MODALITY:
        read = partial(read, modality=modality or "image", windows=windows)
    with _new_folder(windows, root, modality == "imu"), atomic_file(target) as file:
        for number, record in enumerate(bar, start=1):
            try:
                if not isinstance(record, dict):
                    raise DataError(f"must be an object, not {record!r:.60}.")
                line = json.dumps({"messages": read(record, root)}, ensure_ascii=False)
                check_line(line.encode(), root)
            except MMBridgeError as error:
                skipped += 1
                report(f"{source}, record {number}: {' '.join(str(error).split())}")
            except UnicodeEncodeError as error:
                skipped += 1
                report(f"{source}, record {number}: holds {error.object[error.start]!r}, which is no character.")
            else:
                written += 1
                file.write(line + "\n")
        if not written:
            raise DataError(f"{source} holds no record that {format} can use; nothing was written.")
    return written, skipped


@contextlib.contextmanager
def _new_folder(folder: Path, root: Path, wanted: bool) -> Iterator[None]:
    """Keep a place for a folder below the root, and remove it if not all of it is written."""
    if not wanted:
        yield
        return
    if folder.exists():
        raise DataError(f"{folder} exists already and was not overwritten; name another target.")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise DataError(f"windows of motion go to {folder}, which is not below {str(root)!r}; name a target that is.")
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _records(source: Path) -> Iterator[Any]:
    kind = "CSV" if source.suffix.lower() == ".csv" else "JSON"
    try:
        if kind == "CSV":
            with source.open(encoding="utf-8-sig", newline="") as file:
                tabs = "\t" in file.readline()
                file.seek(0)
                yield from csv.DictReader(file, delimiter="\t" if tabs else ",")
            return
        records = json.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{str(source)!r} can't be read ({error.strerror}); give a data file.") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{source} can't be read as {kind} ({error}).") from None
    if not isinstance(records, list):
        raise DataError(f"{source} must hold a list of records, not {type(records).__name__}.")
    yield from records


def _turns(record: Record) -> list[tuple[str, str, Record]]:
    """Return role, words and the turn itself for each turn of a record, in which both sides speak."""
    turns = record.get("conversations") or record.get("conversation")
    if not isinstance(turns, list):
        raise DataError("needs a list of turns as 'conversations'.")
    found = []
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or str(speaker).lower() not in _ROLES:
            raise DataError(f"has a turn from {speaker!r:.60}; known: {', '.join(_ROLES)}.")
        found.append((_ROLES[str(speaker).lower()], _text(turn.get("value"), "value"), turn))
    if not {"user", "assistant"} <= {role for role, _, _ in found}:
        raise DataError("needs turns of 'human' and of 'gpt'.")
    return found


def _split(pattern: re.Pattern[str], words: str) -> Iterator[tuple[str | None, str]]:
    """Yield (None, text) and (type of a medium, what its tag holds) in order; text is stripped and never empty."""
    end = 0
    for found in pattern.finditer(words):
        if text := words[end : found.start()].strip():
            yield None, text
        yield found[1].lower(), found[2].strip() if pattern.groups > 1 else ""
        end = found.end()
    if text := words[end:].strip():
        yield None, text


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"needs words as {name!r}, not {value!r:.60}.")
    return value.strip()


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"needs a number as {name!r}, not {value!r:.60}.") from None


def _list(value: Any, name: str) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [_text(item, name) for item in values]


def _find(kind: str, name: Any, root: Path) -> str | None:
    name = _text(name, kind)
    return next((path for path in (name, f"{kind}s/{name}") if is_file(path, root)), None)


def _given(kind: str, name: Any, root: Path) -> Part:
    path = _find(kind, name, root)
    if path is None:
        raise DataError(
            f"there is no file {name!r} below {str(root)!r}, nor in {kind}s/ there; give its folder as root."
        )
    return {"type": kind, "path": path}


def _made(kind: str, caption: str, name: Any, root: Path) -> Part:
    path = _find(kind, name, root) if name else None
    return {"type": kind, **({"path": path} if path else {}), "caption": caption}
