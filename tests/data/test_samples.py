"""A user's JSONL: read by line, checked at once, every fault named by file and line."""

import json
from pathlib import Path

import pytest

from mmbridge.data.samples import JsonlData, read_samples
from mmbridge.errors import DataError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def write(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def seen(path: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [{"type": "image", "path": path, **more}]}, TURNS[1]]}


def test_samples_are_read_by_number_past_empty_lines(tmp_path):
    (tmp_path / "ä.png").write_bytes(b"x")
    data = JsonlData(write(tmp_path, {"messages": TURNS}, "", seen("ä.png"), {"messages": TURNS[:1], "id": 7}))
    assert len(data) == 3
    assert data[1]["messages"][0]["content"][0]["path"] == "ä.png"
    assert data[2]["id"] == 7
    assert data.where(1).endswith("data.jsonl:3")
    assert [messages[0]["role"] for messages in read_samples(tmp_path / "data.jsonl")] == ["user"] * 3


def test_paths_are_below_the_given_root(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(b"x")
    path = write(tmp_path, seen("a.png"))
    assert len(JsonlData(path, tmp_path / "media")) == 1
    with pytest.raises(DataError, match=r"data\.jsonl:1: there is no file 'a\.png' below"):
        JsonlData(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', "not a line of JSON"),
        ("[1, 2]", 'an object with the key "messages"'),
        ({"message": []}, 'an object with the key "messages"'),
        ({"messages": []}, "a non-empty list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        (seen("../a.png"), "leads out of the data root"),
        (seen("/etc/passwd"), "leads out of the data root"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "data": "aGk="}]}]}, "by 'path', not by 'data'"),
        ({"messages": [{"role": "user", "content": [{"type": "smell", "path": "a"}]}]}, "unknown type 'smell'"),
    ],
)
def test_bad_lines_are_named_by_file_and_line(tmp_path, line, words):
    path = write(tmp_path, {"messages": TURNS}, line)
    with pytest.raises(DataError) as error:
        JsonlData(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert words in str(error.value)


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"data\.jsonl:1: not a line of JSON"):
        JsonlData(tmp_path / "data.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_files_are_refused(tmp_path, content):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no dialogue"):
        JsonlData(tmp_path / "data.jsonl")


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="can't be read"):
            JsonlData(path)


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    data = JsonlData(write(tmp_path, {"messages": TURNS}, {"messages": TURNS}))
    write(tmp_path, {"messages": TURNS, "more": "x" * 9}, {"messages": TURNS})
    with pytest.raises(DataError, match=r":2: "):
        data[1]
