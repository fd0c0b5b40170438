"""Official files of data sets to requests; written from their published field names.

A missing key or a value of another type ends in one DataError, in ``base.read_requests``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from mmbridge.evaluation.benchmarks.base import Request, exists, locate, read_csv, read_json


def coco_captions(root: Path, file: str, folder: str) -> Iterator[Request]:
    """COCO's captions, and nocaps' in the same form: ``images`` (id, file_name), ``annotations`` (image_id, caption)."""
    data = read_json(root, file)
    captions: dict[int, list[str]] = {}
    for entry in sorted(data["annotations"], key=lambda entry: entry["id"]):
        captions.setdefault(entry["image_id"], []).append(entry["caption"].strip())
    for image in data["images"]:
        yield Request(str(image["id"]), "", f"{folder}/{image['file_name']}", tuple(captions.get(image["id"], ())))


def karpathy(root: Path, file: str, folder: str) -> Iterator[Request]:
    """The test images of Karpathy and Fei-Fei's splits (arXiv 1412.2306): ``images`` (filename, split, sentences)."""
    for image in read_json(root, file)["images"]:
        if image["split"] == "test":
            captions = tuple(sentence["raw"].strip() for sentence in image["sentences"])
            yield Request(image["filename"], "", f"{folder}/{image['filename']}", captions)


def coco_or_karpathy(root: Path) -> Iterator[Request]:
    """Karpathy's 5,000 test images of COCO where their list is there, else all of val2014."""
    if exists("dataset_coco.json", root):
        return karpathy(root, "dataset_coco.json", "val2014")
    return coco_captions(root, "annotations/captions_val2014.json", "val2014")


def vqa(root: Path, questions: str, annotations: str) -> Iterator[Request]:
    """VQA's ``questions`` (question_id, image_id, question) and ``annotations`` (question_id, answers), over COCO's images."""
    people = {
        entry["question_id"]: tuple(each["answer"] for each in entry["answers"])
        for entry in read_json(root, annotations)["annotations"]
    }
    for entry in read_json(root, questions)["questions"]:
        number = entry["question_id"]
        image = f"val2014/COCO_val2014_{entry['image_id']:012d}.jpg"
        yield Request(str(number), entry["question"].strip(), image, people.get(number, ()))


def gqa(root: Path) -> Iterator[Request]:
    """GQA's questions by id: imageId, question, answer."""
    for number, entry in read_json(root, "testdev_balanced_questions.json").items():
        yield Request(number, entry["question"].strip(), f"images/{entry['imageId']}.jpg", (entry["answer"],))


def audiocaps(root: Path) -> Iterator[Request]:
    """AudioCaps' test.csv (youtube_id, caption), whose clips have five rows; sounds by id, with or without a leading Y."""
    captions: dict[str, list[str]] = {}
    for row in read_csv(root, "test.csv"):
        captions.setdefault(row["youtube_id"], []).append(row["caption"].strip())
    for clip, listed in captions.items():
        names = (f"audio/{clip}.wav", f"audio/Y{clip}.wav")
        yield Request(clip, "", next((name for name in names if exists(name, root)), names[0]), tuple(listed))


def clotho(root: Path) -> Iterator[Request]:
    """Clotho's evaluation captions: file_name, caption_1 to caption_5."""
    for row in read_csv(root, "clotho_captions_evaluation.csv"):
        captions = tuple(row[f"caption_{number}"].strip() for number in range(1, 6))
        yield Request(row["file_name"], "", f"evaluation/{row['file_name']}", captions)


def msrvtt(root: Path) -> Iterator[Request]:
    """MSR-VTT's test captions: ``videos`` (video_id), ``sentences`` (video_id, caption)."""
    data = read_json(root, "test_videodatainfo.json")
    captions: dict[str, list[str]] = {}
    for entry in data["sentences"]:
        captions.setdefault(entry["video_id"], []).append(entry["caption"].strip())
    for video in data["videos"]:
        name = video["video_id"]
        yield Request(name, "", f"TestVideo/{name}.mp4", tuple(captions.get(name, ())))


def msrvtt_qa(root: Path) -> Iterator[Request]:
    """MSRVTT-QA's list of id, video_id, question, answer."""
    for entry in read_json(root, "test_qa.json"):
        video = f"TestVideo/video{entry['video_id']}.mp4"
        yield Request(str(entry["id"]), entry["question"].strip(), video, (entry["answer"],))


def converted(root: Path, kind: str) -> Iterator[Request]:
    """test.jsonl, a data file of this library's: what the assistant says first of the medium of a kind in each dialogue."""
    from mmbridge.data.samples import media_of, read_samples
    from mmbridge.messages import TextPart, parse_messages

    captions: dict[str, list[str]] = {}
    for messages in read_samples(locate("test.jsonl", root), root):
        turns = parse_messages(messages)
        medium = next((part.path for part in media_of(turns) if part.type == kind), None)
        said = next((turn.parts for turn in turns if turn.role == "assistant"), [])
        if medium is not None:
            words = " ".join(part.text for part in said if isinstance(part, TextPart))
            captions.setdefault(medium, []).append(words.strip())
    for medium, listed in captions.items():
        yield Request(medium, "", medium, tuple(listed))


def reverse(read: Callable[[Path], Iterator[Request]], real: bool = True) -> Callable[[Path], Iterator[Request]]:
    """Turn captioning around: each medium's first caption is asked for; with ``real`` its medium is compared with."""

    def requests(root: Path) -> Iterator[Request]:
        for request in read(root):
            medium = request.medium if real else None
            yield Request(request.id, request.references[0], None, request.references, medium)

    return requests
