"""OneLLM's data files: what becomes of each modality's fields, and what is told of a bad record."""

import json

import numpy as np
import pytest

from mmbridge.cli.main import main
from mmbridge.data.check import check
from mmbridge.data.importers import convert
from mmbridge.data.samples import JsonlData
from mmbridge.errors import ConfigError, DataError
from mmbridge.media import Fmri, Imu

RATE = 200.0


@pytest.fixture
def folder(tmp_path):
    """Files of each modality, and 10 s of motion at 200 Hz whose first channel is the time in seconds."""
    for name in ("a.png", "clip.mp4", "points.npy", "cc3m/a.png", "cc3m_depth/a.png", "cc3m_normal/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "ego4d").mkdir()
    times = np.arange(2000) / RATE
    np.save(tmp_path / "ego4d" / "uid-1.npy", np.stack([times, *np.ones((5, 2000))]))
    np.save(tmp_path / "ego4d" / "uid-1_timestamps.npy", 1000 * times)
    np.save(tmp_path / "brain.npy", np.stack([np.zeros(7), np.arange(7.0), 2 * np.arange(7.0)]).astype(np.float32))
    return tmp_path


def converted(folder, format, *records, modality=None):
    """The dialogues that records become, each message as (role, parts), and what is said of the others."""
    source, target, told = folder / "source.json", folder / "target.jsonl", []
    source.write_text(json.dumps(records), encoding="utf-8")
    assert convert(format, source, target, modality=modality, report=told.append) == (
        len(records) - len(told),
        len(told),
    )
    assert check(target).bad == 0
    data = JsonlData(target)
    dialogues = [[(turn["role"], turn["content"]) for turn in data[index]["messages"]] for index in range(len(data))]
    return dialogues, [sentence.removeprefix(f"{source}, ") for sentence in told]


def words(text):
    return {"type": "text", "text": text}


def talk(*values, **fields):
    return {
        "conversations": [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)],
        **fields,
    }


WINDOW = {"imu_path": "ego4d", "video_uid": "uid-1", "window_start": 4, "window_end": 6}


@pytest.mark.parametrize(
    ("modality", "name"),
    [("image", "a.png"), ("video", "clip.mp4"), ("pointcloud", "points.npy"), ("fmri", "brain.npy")],
)
def test_the_medium_comes_first_whatever_it_is(folder, modality, name):
    record = talk("<image>\nWhat is it?", "A star.", "Is <image> it red?", "No.", id="7", image=name)
    (dialogue,), _ = converted(folder, "onellm", record, modality=modality)
    assert dialogue == [
        ("user", [{"type": modality, "path": name}, words("What is it?")]), ("assistant", "A star."),
        ("user", [words("Is it red?")]), ("assistant", "No."),
    ]  # fmt: skip


def test_pictures_are_the_default_and_may_be_absent(folder):
    (first, second), _ = converted(folder, "onellm", talk("What?", "It.", image="a.png"), talk("Hi", "Hello."))
    assert first[0] == ("user", [{"type": "image", "path": "a.png"}, words("What?")])
    assert second[0] == ("user", [words("Hi")])


@pytest.mark.parametrize("modality", ["depth", "normal"])
def test_maps_come_with_their_picture(folder, modality):
    place = f"cc3m_{modality}/a.png"
    part = {"type": modality, "path": place, "picture": "cc3m/a.png"}
    record = talk("What?", "It.", image="cc3m/a.png", **{f"{modality}_image": place})
    (dialogue,), told = converted(folder, "onellm", record, talk("What?", "It.", image="a.png"), modality=modality)
    assert dialogue[0][1][0] == part
    assert told == [f"record 2: needs words as '{modality}_image', not None."]
    (folder / "target.jsonl").unlink()
    pair, none = {"caption": "a dog", "url": "cc3m/a.png"}, {"caption": "a dog", "url": "a.png"}
    ((asked, answer),), told = converted(folder, "onellm-pairs", pair, none, modality=modality)
    assert asked[1][0] == part and answer == ("assistant", [words("a dog")])
    assert f"the picture of a {modality} map must lie in a folder cc3m" in told[0]


@pytest.mark.parametrize("format", ["onellm", "onellm-pairs"])
def test_windows_of_motion_are_cut_out(folder, format):
    later = {**WINDOW, "window_start": 7.5, "window_end": 9.5}
    records = [talk("What moves?", "A hand.", **window) for window in (WINDOW, later)]
    if format == "onellm-pairs":
        for suffix in ("", "_timestamps"):  # without a folder of theirs
            (folder / "ego4d" / f"uid-1{suffix}.npy").rename(folder / f"uid-1{suffix}.npy")
        records = [{"text": "A hand.", **window, "imu_path": None} for window in (WINDOW, later)]
    dialogues, _ = converted(folder, format, *records, modality="imu")
    for dialogue, start in zip(dialogues, (4, 7.5), strict=True):
        part = dialogue[0][1][0]
        assert part == {"type": "imu", "path": f"target_imu/uid-1_{start:.3f}_{start + 2:.3f}.csv"}
        trace = Imu.load(part["path"], root=folder)
        assert (trace.sample_rate, trace.samples.shape) == (RATE, (6, 400))
        assert np.allclose(trace.samples[0], start + np.arange(400) / RATE, atol=1e-4)
    assert [dialogue[1][1] for dialogue in dialogues] in (["A hand."] * 2, [[words("A hand.")]] * 2)
    (folder / "target.jsonl").unlink()
    with pytest.raises(DataError, match="target_imu exists already"):
        convert(format, folder / "source.json", folder / "target.jsonl", modality="imu")


def test_repeats_of_brain_activity_become_their_mean(folder):
    (dialogue,), _ = converted(folder, "onellm", talk("What?", "A dog.", image="brain.npy"), modality="fmri")
    assert Fmri.load(dialogue[0][1][0]["path"], root=folder).voxels.tolist() == list(range(7))


def test_pairs_are_read_from_a_csv_file_with_tabs(folder):
    (folder / "pairs.csv").write_text(
        "caption\turl\na dog, asleep\tclip.mp4\nb\tcluster:s3://bucket/b.mp4\n\tclip.mp4\n"
    )
    told = []
    arguments = ("onellm-pairs", folder / "pairs.csv", folder / "target.jsonl")
    assert convert(*arguments, modality="video", report=told.append) == (1, 2)
    asked, answer = JsonlData(folder / "target.jsonl")[0]["messages"]
    assert asked["content"][0] == {"type": "video", "path": "clip.mp4"}
    assert answer["content"] == [words("a dog, asleep")]
    assert "record 2: has the url 'cluster:s3://bucket/b.mp4'; files are read from the disk alone" in told[0]
    assert "record 3: needs words as 'caption'" in told[1]


@pytest.mark.parametrize(
    ("modality", "fields", "sentence"),
    [
        ("video", {}, "needs words as 'image', not None."),
        ("audio", {"image": "none.wav"}, "there is no file 'none.wav' below"),
        ("audio", {"image": "../a.wav"}, "leads out of the data root"),
        ("depth", {"depth_image": "cc3m_depth/a.png"}, "needs words as 'image', not None."),
        ("imu", {"image": "a.png"}, "needs words as 'video_uid', not None."),
        ("imu", {**WINDOW, "window_start": None}, "needs a number as 'window_start', not None."),
        ("imu", {**WINDOW, "window_end": 4}, "a window that ends after it starts, not 'uid-1', 4.0, 4.0."),
        ("imu", {**WINDOW, "video_uid": "../ego4d/uid-1"}, "needs a name as 'video_uid'"),
        ("imu", {**WINDOW, "video_uid": "uid-2"}, "there is no file 'ego4d/uid-2.npy' below"),
        ("imu", {**WINDOW, "imu_path": "../x"}, "leads out of the data root"),
        ("imu", {**WINDOW, "imu_path": 7}, "needs words as 'imu_path', not 7."),
        ("imu", {**WINDOW, "window_start": 10, "window_end": 12}, "fewer than 2 samples from 10 to 12 s."),
        ("imu", {**WINDOW, "video_uid": "bad"}, "have shapes (5, 9) and (9,), not (6, T) and (T,)."),
    ],
)
def test_bad_records_are_told_by_number_and_skipped(folder, modality, fields, sentence):
    np.save(folder / "ego4d" / "bad.npy", np.zeros((5, 9)))
    np.save(folder / "ego4d" / "bad_timestamps.npy", np.zeros(9))
    good = {"image": "a.png", "depth_image": "cc3m_depth/a.png", **WINDOW}
    dialogues, (told,) = converted(
        folder, "onellm", talk("Q", "A", **good), talk("Q", "A", **fields), modality=modality
    )
    assert len(dialogues) == 1 and told.startswith("record 2: ") and sentence in told and "\n" not in told


def test_a_conversion_that_fails_leaves_no_windows(folder, tmp_path_factory):
    source = folder / "source.json"
    source.write_text(json.dumps([talk("Q", "A", **WINDOW), 1]))
    before = sorted(folder.iterdir())

    def stop(sentence):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("onellm", source, folder / "target.jsonl", modality="imu", report=stop)
    assert sorted(folder.iterdir()) == before
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(DataError, match="which is not below .*; name a target that is"):
        convert("onellm", source, elsewhere / "target.jsonl", folder, modality="imu")
    assert not list(elsewhere.iterdir())


def test_modalities_that_do_not_fit_are_one_sentence(folder, capsys):
    source = folder / "source.json"
    source.write_text(json.dumps([talk("Q", "A", image="clip.mp4")]))
    with pytest.raises(ConfigError, match="no modality 'vidoe'; did you mean 'video'"):
        convert("onellm", source, folder / "target.jsonl", modality="vidoe")
    with pytest.raises(ConfigError, match="llava says in its records what media are; leave out modality='video'"):
        convert("llava", source, folder / "target.jsonl", modality="video")
    assert main(["data", "convert", "onellm", str(source), str(folder / "out.jsonl"), "--modality", "video"]) == 0
    assert "dialogues written 1, records skipped 0" in capsys.readouterr().out
