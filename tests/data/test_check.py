"""Checking a data file: every bad line is told, what is good is counted, and exit codes say which it was."""

import json
import tracemalloc

import numpy as np
import pytest

from mmbridge.cli.main import main
from mmbridge.data.check import check
from mmbridge.data.samples import JsonlData
from mmbridge.errors import DataError
from mmbridge.media import Audio, Image

ANSWER = {"role": "assistant", "content": "Hello."}
GOOD = {"messages": [{"role": "user", "content": "Hi"}, ANSWER]}


def shown(kind="image", **part):
    return {"messages": [{"role": "user", "content": [{"type": kind, **part}]}, ANSWER]}


FAULTS = [
    (b'{"messages": "caf\xe9"}', "not a line of JSON in UTF-8 (byte 0xe9 at column 18); save the file as UTF-8."),
    ('{"messages": [', "not a line of JSON ("),
    ("[" * 100_000, "not a line of JSON ("),
    ([1], 'must be an object with the key "messages"'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
    (shown("smell", path="a.png"), "unknown type 'smell'"),
    (shown(file="a.png"), "unknown key 'file'"),
    (shown(path="a.png", fps=3), "leave out 'sample_rate' and 'fps'"),
    (shown(caption="a star"), "a medium of the user needs a 'path'"),
    (shown(path="none.png"), "there is no file 'none.png'"),
    (shown(path="x" * 5000), "there is no file"),
    (shown(path="a\0.png"), "there is no file"),
    (shown(path="../a.png"), "leads out of the data root"),
    (shown(path="/a.png"), "leads out of the data root"),
]


def write(folder, *lines):
    encoded = [line if isinstance(line, bytes) else line.encode() for line in map(as_text, lines)]
    (folder / "data.jsonl").write_bytes(b"\n".join(encoded))
    return folder / "data.jsonl"


def as_text(line):
    return line if isinstance(line, str | bytes) else json.dumps(line)


@pytest.fixture
def folder(tmp_path):
    Image.load(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Audio.load(np.zeros(800), sample_rate=8000).save(tmp_path / "a.wav")
    return tmp_path


def test_every_bad_line_is_told_with_its_number_and_the_rest_is_counted(folder):
    path = write(folder, GOOD, "", *(line for line, _ in FAULTS), shown(path="a.png"))
    told = []
    summary = check(path, report=told.append)
    assert len(told) == len(FAULTS) == summary.bad
    for number, (sentence, (_, words)) in enumerate(zip(told, FAULTS, strict=True), start=3):
        assert sentence.startswith(f"{path}:{number}: ")
        assert words in sentence and "\n" not in sentence
    assert (summary.dialogues, summary.turns, summary.media_in) == (2, 4, {"image": 1})


@pytest.mark.parametrize(("line", "words"), FAULTS)
def test_what_check_refuses_training_refuses(folder, line, words):
    path = write(folder, GOOD, line)
    with pytest.raises(DataError) as error:
        JsonlData(path)
    told = []
    check(path, report=told.append)
    assert told == [str(error.value)]


def test_media_are_counted_by_side_and_type(folder):
    drawn = {"role": "assistant", "content": [{"type": "image", "caption": "a"}, {"type": "audio", "caption": "b"}]}
    heard = {"role": "user", "content": [{"type": "audio", "path": "a.wav"}, {"type": "image", "path": "a.png"}]}
    summary = check(write(folder, {"messages": [heard, drawn]}, {"messages": [heard, ANSWER, heard, drawn]}))
    assert str(summary).splitlines() == [
        "dialogues 2, turns 6, bad lines 0",
        "  in   image 3, audio 3",
        "  out  image 2, audio 2",
    ]


def test_media_are_read_on_request(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("words")
    files = ["a.png", "cut.png", "text.png", "cut.png"]
    path = write(
        folder, *(shown(path=name) for name in files), shown("audio", path="a.wav"), shown("imu", path="a.wav")
    )
    assert check(path).bad == 0
    told = []
    assert check(path, decode=True, report=told.append).dialogues == 2
    assert [sentence.partition(": ")[0] for sentence in told] == [f"{path}:{number}" for number in (2, 3, 4, 6)]
    assert (
        "damaged or truncated PNG" in told[0]
        and "looks like text" in told[1]
        and "not an IMU trace that can be read: it looks like WAV" in told[3]
    )


def test_files_are_below_the_given_root(folder):
    (folder / "lists").mkdir()
    path = write(folder / "lists", shown(path="a.png"))
    assert check(path, report=[].append).bad == 1
    assert check(path, folder).bad == 0
    with pytest.raises(DataError, match="there is no folder"):
        check(path, folder / "none")


def test_files_that_hold_no_dialogue_are_refused(folder):
    for path, words in (
        (write(folder, "", ""), "holds no dialogue"),
        (folder, "can't be read"),
        (folder / "x", "can't"),
    ):
        with pytest.raises(DataError, match=words):
            check(path)


def test_a_large_file_is_never_held(folder):
    path = folder / "data.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "x" * 100_000}, ANSWER]}) + "\n"
    with path.open("w") as file:
        for _ in range(200):
            file.write(line)
    tracemalloc.start()
    try:
        assert check(path).dialogues == 200
        assert tracemalloc.get_traced_memory()[1] < 2e6 < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_line_that_is_no_dialogue_by_its_length_is_passed_over(folder, monkeypatch):
    monkeypatch.setattr("mmbridge.data.check._LONGEST", 200)
    told = []
    summary = check(write(folder, GOOD, "x" * 1000, GOOD), report=told.append)
    assert (summary.dialogues, summary.bad) == (2, 1)
    assert "data.jsonl:2: the line is longer than 200 bytes" in told[0]


def test_the_command_says_by_its_exit_code_whether_the_file_is_clean(folder, capsys):
    path = write(folder, GOOD, shown(path="a.png"))
    assert main(["data", "check", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "dialogues 2, turns 4, bad lines 0\n  in   image 1\n  out  none\n"
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["data", "check", str(path), "--root", str(folder), "--media"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{path}:2: 'a.png' is a damaged")
    assert captured.out.endswith("dialogues 1, turns 2, bad lines 1\n  in   none\n  out  none\n")
    assert captured.err.splitlines()[-1] == f"mmbridge: {path} has bad lines (1); correct or remove them."


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: ACTION; see `mmbridge data --help`."),
        (["check"], "the following arguments are required: FILE; see `mmbridge data check --help`."),
        (["check", "x", "--medai"], "data does not take '--medai'"),
        (["check", "none.jsonl"], "the data file 'none.jsonl' can't be read"),
    ],
)
def test_bad_command_lines_are_one_sentence(arguments, sentence, capsys):
    assert main(["data", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_maps_are_checked_with_their_pictures_and_traces_with_their_rates(folder):
    np.save(folder / "depth.npy", np.ones((4, 4), dtype=np.float32))
    np.save(folder / "imu.npy", np.zeros((6, 9), dtype=np.float32))
    (folder / "text.png").write_text("words")

    def told_of(*parts):
        told = []
        check(
            write(folder, *({"messages": [{"role": "user", "content": [part]}]} for part in parts)),
            decode=True,
            report=told.append,
        )
        return told

    depth, imu = {"type": "depth", "path": "depth.npy"}, {"type": "imu", "path": "imu.npy"}
    assert told_of(depth, {**depth, "picture": "a.png"}, {**imu, "sample_rate": 50}) == []
    wrong = told_of({**depth, "picture": "no.png"}, {**depth, "picture": "text.png"}, {**depth, "picture": 5}, imu)
    assert [sentence.split(": ", 1)[1][:40] for sentence in wrong] == [
        f"there is no file 'no.png' below '{folder}"[:40],
        "'text.png' is not an image that can be read"[:40],
        "a picture in a file is given by its file name, not by 5"[:40],
        "'imu.npy' does not say its rate; pass sample_rate="[:40],
    ]
