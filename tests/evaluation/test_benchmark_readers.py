"""Official layouts, each as a few small files: what is read, and what is said where something is not there."""

import csv
import json

import pytest

from mmbridge.errors import DataError, MediaError
from mmbridge.evaluation.benchmarks import BENCHMARKS, read_requests
from mmbridge.evaluation.benchmarks.scoring import SCORERS

COCO = {
    "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 7, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 42, "id": 5, "caption": "A red shoe.\n"},
        {"image_id": 7, "id": 6, "caption": "Two dogs."},
        {"image_id": 42, "id": 4, "caption": "Shoes."},
    ],
}
KARPATHY = {
    "images": [
        {
            "filename": "t.jpg",
            "filepath": "val2014",
            "split": "test",
            "sentences": [{"raw": "A cat."}, {"raw": "Cat."}],
        },
        {"filename": "r.jpg", "filepath": "val2014", "split": "restval", "sentences": [{"raw": "No."}]},
    ]
}
QUESTIONS = {"questions": [{"question_id": 420, "image_id": 42, "question": "What is it?"}]}
PEOPLE = {"annotations": [{"question_id": 420, "image_id": 42, "answers": [{"answer": "shoe"}, {"answer": "a boot"}]}]}
MSRVTT = {
    "videos": [{"video_id": "video7010", "split": "test"}],
    "sentences": [{"video_id": "video7010", "caption": "a man cooks"}, {"video_id": "video7010", "caption": "cooking"}],
}
AUDIOCAPS = [
    {"audiocap_id": "1", "youtube_id": "-abc", "start_time": "30", "caption": "A dog barks"},
    {"audiocap_id": "2", "youtube_id": "xyz", "start_time": "0", "caption": "Rain"},
    {"audiocap_id": "3", "youtube_id": "-abc", "start_time": "30", "caption": "Barking, then wind"},
]
CLOTHO = [{"file_name": "Big river.wav", **{f"caption_{number}": f"water {number}" for number in range(1, 6)}}]
GQA = {"2062325": {"imageId": "n289", "question": "Is it red?", "answer": "yes"}}
MSRVTT_QA = [{"answer": "couch", "category_id": 14, "id": 158581, "question": "what is there?", "video_id": 7010}]
SHORT = "What is it?"


def spoken(kind, ending):
    """Lines of test.jsonl: two captions of one file and one of another, and a dialogue about none."""
    said = (
        ("a", "A hand."),
        ("b", "Rain."),
        ("a", [{"type": "text", "text": "It waves."}, {"type": "text", "text": "It stops."}]),
    )
    asked = [{"type": "text", "text": "What is it?"}]
    lines = [
        [
            {"role": "user", "content": [{"type": kind, "path": f"{name}.{ending}"}, *asked]},
            {"role": "assistant", "content": words},
        ]
        for name, words in said
    ]
    return [
        {"messages": line}
        for line in [*lines, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]
    ]


# Name, its files, its media, and the requests: id, text, medium, references, real.
LAYOUTS = [
    ("coco-caption", {"annotations/captions_val2014.json": COCO},
     ["val2014/COCO_val2014_000000000042.jpg", "val2014/b.jpg"],
     [("42", "", "val2014/COCO_val2014_000000000042.jpg", ("Shoes.", "A red shoe."), None),
      ("7", "", "val2014/b.jpg", ("Two dogs.",), None)]),
    ("coco-caption", {"annotations/captions_val2014.json": COCO, "dataset_coco.json": KARPATHY}, ["val2014/t.jpg"],
     [("t.jpg", "", "val2014/t.jpg", ("A cat.", "Cat."), None)]),
    ("nocaps", {"nocaps_val_4500_captions.json": COCO},
     ["images/COCO_val2014_000000000042.jpg", "images/b.jpg"],
     [("42", "", "images/COCO_val2014_000000000042.jpg", ("Shoes.", "A red shoe."), None),
      ("7", "", "images/b.jpg", ("Two dogs.",), None)]),
    ("flickr30k", {"dataset_flickr30k.json": KARPATHY}, ["flickr30k-images/t.jpg"],
     [("t.jpg", "", "flickr30k-images/t.jpg", ("A cat.", "Cat."), None)]),
    ("vqa-v2", {"v2_OpenEnded_mscoco_val2014_questions.json": QUESTIONS, "v2_mscoco_val2014_annotations.json": PEOPLE},
     ["val2014/COCO_val2014_000000000042.jpg"],
     [("420", SHORT, "val2014/COCO_val2014_000000000042.jpg", ("shoe", "a boot"), None)]),
    ("ok-vqa", {"OpenEnded_mscoco_val2014_questions.json": QUESTIONS, "mscoco_val2014_annotations.json": PEOPLE},
     ["val2014/COCO_val2014_000000000042.jpg"],
     [("420", SHORT, "val2014/COCO_val2014_000000000042.jpg", ("shoe", "a boot"), None)]),
    ("gqa", {"testdev_balanced_questions.json": GQA}, ["images/n289.jpg"],
     [("2062325", "Is it red?", "images/n289.jpg", ("yes",), None)]),
    ("audiocaps", {"test.csv": AUDIOCAPS}, ["audio/Y-abc.wav", "audio/xyz.wav"],
     [("-abc", "", "audio/Y-abc.wav", ("A dog barks", "Barking, then wind"), None),
      ("xyz", "", "audio/xyz.wav", ("Rain",), None)]),
    ("clotho", {"clotho_captions_evaluation.csv": CLOTHO}, ["evaluation/Big river.wav"],
     [("Big river.wav", "", "evaluation/Big river.wav", tuple(f"water {number}" for number in range(1, 6)), None)]),
    ("msrvtt", {"test_videodatainfo.json": MSRVTT}, ["TestVideo/video7010.mp4"],
     [("video7010", "", "TestVideo/video7010.mp4", ("a man cooks", "cooking"), None)]),
    ("msrvtt-qa", {"test_qa.json": MSRVTT_QA}, ["TestVideo/video7010.mp4"],
     [("158581", "what is there?", "TestVideo/video7010.mp4", ("couch",), None)]),
    *((name, {"test.jsonl": spoken(kind, ending)}, [f"a.{ending}", f"b.{ending}"],
       [(f"a.{ending}", "", f"a.{ending}", ("A hand.", "It waves. It stops."), None),
        (f"b.{ending}", "", f"b.{ending}", ("Rain.",), None)])
      for name, kind, ending in (("objaverse", "pointcloud", "npy"), ("ego4d-imu", "imu", "csv"), ("nsd", "fmri", "npy"))),
    ("coco-text-to-image", {"annotations/captions_val2014.json": COCO},
     ["val2014/COCO_val2014_000000000042.jpg", "val2014/b.jpg"],
     [("42", "Shoes.", None, ("Shoes.", "A red shoe."), "val2014/COCO_val2014_000000000042.jpg"),
      ("7", "Two dogs.", None, ("Two dogs.",), "val2014/b.jpg")]),
    ("audiocaps-text-to-audio", {"test.csv": AUDIOCAPS[:1]}, ["audio/-abc.wav"],
     [("-abc", "A dog barks", None, ("A dog barks",), "audio/-abc.wav")]),
    ("msrvtt-text-to-video", {"test_videodatainfo.json": MSRVTT}, [],
     [("video7010", "a man cooks", None, ("a man cooks", "cooking"), None)]),
]  # fmt: skip


def write(root, files, media=()):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".csv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(content[0]))
                writer.writeheader()
                writer.writerows(content)
        elif name.endswith(".jsonl"):
            path.write_text("\n".join(map(json.dumps, content)))
        else:
            path.write_text(json.dumps(content))
    for name in media:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize("name, files, media, wanted", LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_official_layouts_are_read(name, files, media, wanted, tmp_path):
    write(tmp_path, files, media)
    requests, missing = read_requests(name, BENCHMARKS[name], tmp_path)
    assert [(each.id, each.text, each.medium, each.references, each.real) for each in requests] == wanted
    assert missing == 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_what_to_download(name, tmp_path):
    assert name in [layout[0] for layout in LAYOUTS]
    assert set(BENCHMARKS[name].metrics) <= set(SCORERS)
    with pytest.raises(DataError) as said:
        read_requests(name, BENCHMARKS[name], tmp_path)
    for file in BENCHMARKS[name].files:
        assert file in str(said.value)
    assert BENCHMARKS[name].download in str(said.value)
    with pytest.raises(DataError, match="there is no folder"):
        read_requests(name, BENCHMARKS[name], tmp_path / "absent")


def test_a_collection_that_can_be_whole_must_be(tmp_path):
    write(tmp_path, {"annotations/captions_val2014.json": COCO}, ["val2014/b.jpg"])
    with pytest.raises(DataError, match=r"1 of 2 media of coco-caption are not below .*000042.jpg; download"):
        read_requests("coco-caption", BENCHMARKS["coco-caption"], tmp_path)


def test_clips_that_vanished_are_counted(tmp_path):
    write(tmp_path, {"test.csv": AUDIOCAPS})
    with pytest.raises(DataError, match="2 of 2 media of audiocaps are not below"):
        read_requests("audiocaps", BENCHMARKS["audiocaps"], tmp_path)
    write(tmp_path, {}, ["audio/xyz.wav"])
    requests, missing = read_requests("audiocaps", BENCHMARKS["audiocaps"], tmp_path)
    assert ([each.id for each in requests], missing) == (["xyz"], 1)


def test_a_limit_draws_by_the_seed_and_keeps_the_order(tmp_path):
    entries = [{**QUESTIONS["questions"][0], "question_id": number} for number in range(20)]
    people = [{**PEOPLE["annotations"][0], "question_id": number} for number in range(20)]
    benchmark = BENCHMARKS["ok-vqa"]
    files = dict(zip(benchmark.files, ({"questions": entries}, {"annotations": people}), strict=True))
    write(tmp_path, files, ["val2014/COCO_val2014_000000000042.jpg"])

    def draw(limit, seed):
        return [int(each.id) for each in read_requests("ok-vqa", benchmark, tmp_path, limit, seed)[0]]

    assert draw(None, 0) == draw(20, 3) == list(range(20))
    assert draw(5, 0) == sorted(draw(5, 0)) != draw(5, 1)
    assert len(set(draw(5, 0))) == 5


@pytest.mark.parametrize("content", ["[1, 2]", '{"images": [{"id": 1}], "annotations": []}', '{"images": 3}', "{"])
def test_files_that_are_not_as_published(content, tmp_path):
    write(tmp_path, {"annotations/captions_val2014.json": {}})
    (tmp_path / "annotations" / "captions_val2014.json").write_text(content)
    with pytest.raises(DataError, match=r"captions_val2014.json.*download it again"):
        read_requests("coco-caption", BENCHMARKS["coco-caption"], tmp_path)


def test_an_image_without_a_caption_is_not_as_published(tmp_path):
    write(tmp_path, {"annotations/captions_val2014.json": {**COCO, "annotations": COCO["annotations"][:1]}})
    with pytest.raises(DataError, match="without a reference"):
        read_requests("coco-caption", BENCHMARKS["coco-caption"], tmp_path)


def test_nothing_outside_of_the_folder_is_read(tmp_path):
    (tmp_path / "secret.jpg").touch()
    outside = {**COCO, "images": [{"id": 42, "file_name": "../../secret.jpg"}]}
    write(tmp_path / "data", {"annotations/captions_val2014.json": outside})
    with pytest.raises(MediaError, match="leads out of the data root"):
        read_requests("coco-caption", BENCHMARKS["coco-caption"], tmp_path / "data")
    write(tmp_path, {"captions.json": COCO})
    link = tmp_path / "data" / "annotations" / "captions_val2014.json"
    link.unlink()
    link.symlink_to(tmp_path / "captions.json")
    with pytest.raises(MediaError, match="leads out of the data root"):
        read_requests("coco-caption", BENCHMARKS["coco-caption"], tmp_path / "data")
