"""Data files of other projects: what becomes of each field, what is skipped, and that training takes the result."""

import json

import numpy as np
import pytest

from mmbridge.cli.main import main
from mmbridge.data.check import check
from mmbridge.data.importers import FORMATS, convert
from mmbridge.data.samples import JsonlData
from mmbridge.errors import CheckpointError, ConfigError, DataError
from mmbridge.media import Image

KINDS = {"image": "png", "video": "mp4", "audio": "wav"}


@pytest.fixture
def folder(tmp_path):
    """Files where NExT-GPT's data have them, and one beside the data file."""
    for kind, suffix in KINDS.items():
        (tmp_path / f"{kind}s").mkdir()
        for number in (1, 2):
            (tmp_path / f"{kind}s" / f"{number}.{suffix}").write_bytes(b"x")
    Image.load(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path


def converted(folder, format, *records, root=None):
    """The dialogues that records become, each message as (role, parts), and what is said of the others."""
    source, target, told = folder / "source.json", folder / "target.jsonl", []
    source.write_text(json.dumps(records), encoding="utf-8")
    target.unlink(missing_ok=True)
    written, skipped = convert(format, source, target, root, report=told.append)
    assert skipped == len(told) == len(records) - written
    assert check(target, root).dialogues == written and check(target, root).bad == 0
    data = JsonlData(target, root)
    dialogues = [[(turn["role"], turn["content"]) for turn in data[index]["messages"]] for index in range(len(data))]
    return dialogues, [sentence.removeprefix(f"{source}, ") for sentence in told]


def words(text):
    return {"type": "text", "text": text}


def talk(*values, key="conversations", **fields):
    return {key: [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)], **fields}


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_described_or_made(folder, kind):
    record = {f"{kind}_name": f"1.{KINDS[kind]}", "caption": " A cat, asleep {} "}
    path = f"{kind}s/1.{KINDS[kind]}"
    ((asked, answer),), told = converted(folder, "pairs", record)
    assert asked[1][0] == {"type": kind, "path": path} and asked[1][1]["text"]
    assert answer == ("assistant", [words("A cat, asleep {}")])
    assert told == []
    ((asked, answer),), _ = converted(folder, "pairs-out", record)
    assert "A cat, asleep {}" in asked[1][0]["text"]
    assert answer[1][1] == {"type": kind, "path": path, "caption": "A cat, asleep {}"}
    ((_, answer),), _ = converted(folder, "pairs-out", {**record, f"{kind}_name": "none.x"})
    assert answer[1][1] == {"type": kind, "caption": "A cat, asleep {}"}


def test_pairs_of_other_media_are_described(folder):
    for name in ("map.npy", "trace.npy"):
        (folder / name).write_bytes(b"x")
    (pair, trace, alone), told = converted(
        folder,
        "pairs",
        {"depth": "map.npy", "picture": "a.png", "caption": "a cat"},
        {"imu": "trace.npy", "sample_rate": "50", "caption": "walking"},
        {"pointcloud": "map.npy", "picture": "a.png", "caption": "a chair"},
        {"imu": "trace.npy", "sample_rate": "fast", "caption": "walking"},
        {"normal": "map.npy", "picture": "none.png", "caption": "a cat"},
    )
    assert pair[0][1][0] == {"type": "depth", "path": "map.npy", "picture": "a.png"}
    assert trace[0][1][0] == {"type": "imu", "path": "trace.npy", "sample_rate": 50.0}
    assert alone[0][1][0] == {"type": "pointcloud", "path": "map.npy"}
    assert "record 4: needs a number as 'sample_rate', not 'fast'." in told[0] and "no file 'none.png'" in told[1]
    _, (sentence,) = converted(
        folder, "pairs-out", {"depth": "map.npy", "caption": "a cat"}, {"image": "a.png", "caption": "a"}
    )
    assert "type 'depth', which nothing makes; the assistant makes image, video, audio." in sentence


def test_pairs_are_read_from_csv(folder):
    (folder / "pairs.csv").write_text('\ufeffimage,caption\na.png,"a ä, b"\nnone.png,c\na.png\n', encoding="utf-8")
    told = []
    assert convert("pairs", folder / "pairs.csv", folder / "out.jsonl", report=told.append) == (1, 2)
    assert JsonlData(folder / "out.jsonl")[0]["messages"][1]["content"] == [words("a ä, b")]
    assert "record 2: there is no file 'none.png'" in told[0] and "record 3: needs words as 'caption'" in told[1]


def test_llava_puts_files_where_the_placeholders_are(folder):
    record = talk("<image>\nWhat is it?", "A star.", "And this: <image>?", "A ring.", image=["a.png", "1.png"])
    (first, second), _ = converted(folder, "llava", record, talk("Hi", "Hello."))
    assert first == [
        ("user", [{"type": "image", "path": "a.png"}, words("What is it?")]),
        ("assistant", "A star."),
        ("user", [words("And this:"), {"type": "image", "path": "images/1.png"}, words("?")]),
        ("assistant", "A ring."),
    ]
    assert second == [("user", [words("Hi")]), ("assistant", "Hello.")]


def test_llava_puts_files_first_without_placeholders(folder):
    (dialogue,), _ = converted(folder, "llava", talk("What is it?", "A star.", "Why?", "So.", image="a.png"))
    assert dialogue[0][1] == [{"type": "image", "path": "a.png"}, words("What is it?")]
    assert dialogue[2][1] == [words("Why?")]


@pytest.mark.parametrize("kind", KINDS)
def test_llava_reads_the_comprehension_pairs(folder, kind):
    record = talk(f"<{kind}>\nDescribe it.", "A dog.", **{f"input_{kind}": f"1.{KINDS[kind]}"})
    (dialogue,), _ = converted(folder, "llava", record)
    assert dialogue[0][1][0] == {"type": kind, "path": f"{kind}s/1.{KINDS[kind]}"}


@pytest.mark.parametrize("kind", KINDS)
def test_t2m_gives_placeholders_their_captions(folder, kind):
    captions = {f"{kind}_captions": ["a wolf"], f"{kind}_caption_embeddings": ["it_0.npy"]}
    (dialogue,), _ = converted(folder, "t2m", talk("Show me a wolf.", f"Sure! <{kind}> Enjoy.", **captions))
    assert dialogue == [
        ("user", [words("Show me a wolf.")]),
        ("assistant", [words("Sure!"), {"type": kind, "caption": "a wolf"}, words("Enjoy.")]),
    ]


def test_t2m_reads_the_generation_pairs(folder):
    record = talk("Draw a wolf", "Sure. <image>", output_image="1.png", image_captions="a wolf")
    (dialogue,), _ = converted(folder, "t2m", record)
    assert dialogue[1][1][1] == {"type": "image", "path": "images/1.png", "caption": "a wolf"}


def test_t2m_reads_the_older_sets(folder):
    record = talk("Play rain.", "Listen.", key="conversation", mm_name="1.wav")
    record["conversation"][1] |= {"caption": "rain on a roof", "output_modality": "audio"}
    (dialogue,), _ = converted(folder, "t2m", record)
    assert dialogue[1][1] == [words("Listen."), {"type": "audio", "caption": "rain on a roof"}]


def test_mosit_keeps_what_the_user_gives(folder):
    entries = [{"image_name": "1.png", "caption": "a cat"}, {"image_name": "m_0.jpg", "caption": "a dog"}]
    record = talk(
        "What is <Image>1.png</Image> and <audio>2.wav</audio>?",
        "A cat that purrs. <Image>m_0.jpg</Image>",
        "A clip!",
        "<Video>a cat runs</Video>Here.<Image>1.png</Image>",
        key="conversation",
        image_list=entries,
        video_list=[],
    )
    (dialogue,), _ = converted(folder, "mosit", record)
    image, sound = {"type": "image", "path": "images/1.png"}, {"type": "audio", "path": "audios/2.wav"}
    assert dialogue == [
        ("user", [words("What is"), image, words("and"), sound, words("?")]),
        ("assistant", [words("A cat that purrs."), {"type": "image", "caption": "a dog"}]),
        ("user", [words("A clip!")]),
        ("assistant", [{"type": "video", "caption": "a cat runs"}, words("Here."), {**image, "caption": "a cat"}]),
    ]


@pytest.mark.parametrize(
    ("format", "record", "sentence"),
    [
        ("pairs", [1], "must be an object, not [1]."),
        ("pairs", {"image_name": "a.png"}, "needs words as 'caption', not None."),
        ("pairs", {"caption": "a"}, "needs one of image_name, video_name, audio_name or another medium, and has 0."),
        ("pairs", {"caption": "a", "image": "none.png"}, "there is no file 'none.png' below"),
        ("pairs", {"caption": "a", "image": "../a.png"}, "leads out of the data root"),
        ("pairs", {"caption": "a", "image": 7}, "needs words as 'image', not 7."),
        ("pairs", {"caption": "\ud800", "image": "a.png"}, "which is no character"),
        ("pairs-out", {"caption": "a", "image": "/a.png"}, "leads out of the data root"),
        ("llava", {}, "needs a list of turns as 'conversations'."),
        ("llava", {"conversations": ["Hi"]}, "has a turn from None; known: human, "),
        ("llava", talk("Hi"), "needs turns of 'human' and of 'gpt'."),
        ("llava", talk("Hi", ""), "needs words as 'value', not ''."),
        ("llava", talk("<image>", "A star."), "has more <image> than files."),
        ("llava", talk("<image>", "A star.", image=["a.png", "1.png"]), "has more files than placeholders; '1.png'"),
        ("llava", talk("Hi", "<image>", image="a.png"), "are read by t2m."),
        ("t2m", talk("<image>", "Hi", image_captions="a"), "are read by llava and mosit."),
        ("t2m", talk("Hi", "<image>"), "has more <image> than image_captions."),
        ("t2m", talk("Hi", "<image>", image_captions=["a", "b"]), "has more captions than placeholders; 'b'"),
        ("mosit", talk("<Image>none.png</Image>", "Hi"), "there is no file 'none.png' below"),
        ("mosit", talk("Hi", "<Image>1.png</Image>"), "the image '1.png' of the assistant is not in image_list"),
        ("mosit", talk("Hi", "Ho", audio_list=7), "needs a list of objects as 'audio_list'."),
    ],
)
def test_bad_records_are_told_by_number_and_skipped(folder, format, record, sentence):
    good = (
        {**talk("Hi", "Ho"), "caption": "a", "image_name": "a.png"} if format.startswith("pairs") else talk("Hi", "Ho")
    )
    dialogues, (told,) = converted(folder, format, good, record, good)
    assert len(dialogues) == 2
    assert told.startswith("record 2: ") and sentence in told and "\n" not in told


def test_files_are_below_the_given_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    ((asked, _),), _ = converted(elsewhere, "pairs", {"image_name": "1.png", "caption": "a"}, root=folder / "images")
    assert asked[1][0]["path"] == "1.png"


def test_nothing_is_written_where_nothing_can_be(folder):
    source, target = folder / "source.json", folder / "target.jsonl"
    before = sorted(folder.iterdir())
    for content, complaint in (
        (None, "can't be read"), (b"[", "can't be read as JSON"), (b"\xff[]", "can't be read as JSON"),
        (b"{}", "must hold a list"), (b"[]", "holds no record that llava can use"), (b"[1]", "holds no record"),
    ):  # fmt: skip
        if content is not None:
            source.write_bytes(content)
        with pytest.raises(DataError, match=complaint):
            convert("llava", source, target, report=[].append)
        source.unlink(missing_ok=True)
        assert sorted(folder.iterdir()) == before
    source.write_text(json.dumps([talk("Hi", "Ho")]))
    with pytest.raises(CheckpointError, match="could not write"):
        convert("llava", source, folder / "none" / "target.jsonl", folder)
    with pytest.raises(DataError, match="there is no folder"):
        convert("llava", source, target, folder / "none")
    with pytest.raises(ConfigError, match="no format 'lava' to convert from; did you mean 'llava'"):
        convert("lava", source, target)


def test_an_interruption_leaves_nothing(folder):
    (folder / "source.json").write_text(json.dumps([talk("Hi", "Ho"), 1]))
    before = sorted(folder.iterdir())

    def stop(sentence):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("llava", folder / "source.json", folder / "target.jsonl", report=stop)
    assert sorted(folder.iterdir()) == before


def test_the_command_converts_and_never_overwrites(folder, capsys):
    source, target = folder / "source.json", folder / "target.jsonl"
    source.write_text(json.dumps([{"image_name": "a.png", "caption": "a"}, {}]))
    assert main(["data", "convert", "pairs", str(source), str(target)]) == 0
    told, counted = capsys.readouterr().out.splitlines()
    assert told == f"{source}, record 2: needs words as 'caption', not None."
    assert counted == f"{target}: dialogues written 1, records skipped 1"
    assert main(["data", "check", str(target), "--media"]) == 0
    before = target.read_bytes()
    assert main(["data", "convert", "pairs", str(source), str(target)]) == 2
    assert "exists already and was not overwritten" in capsys.readouterr().err
    assert target.read_bytes() == before


def test_the_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["data", "convert", "--help"])
    assert f"FORMAT{'|'.join(FORMATS)}SOURCE" in "".join(capsys.readouterr().out.split())
