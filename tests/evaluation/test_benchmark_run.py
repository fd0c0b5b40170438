"""Benchmarks through the shipped bridge, on tiny folders of the official layouts made of the synthetic world."""

import json

import numpy as np
import pytest
import tiny
import torch
from scipy.linalg import sqrtm
from torchmetrics.text import BLEUScore

from mmbridge.bridge import Bridge
from mmbridge.cli.main import main, parse_arguments
from mmbridge.data.tasks import render_medium
from mmbridge.encoders.imagebind import ImageBind, ImageBindModel
from mmbridge.errors import ConfigError
from mmbridge.evaluation import run_benchmark
from mmbridge.evaluation.benchmarks import Request, score
from mmbridge.evaluation.benchmarks.scoring import Answered, Judges
from mmbridge.media import Audio, Image, Video
from mmbridge.synthetic import Scene, caption

SCENES = [Scene.random(np.random.default_rng(seed), "seen") for seed in range(6)]
WEIGHTS = "mmbridge/tiny-imagebind"


def coco(root, count):
    """Write COCO's captions of ``count`` scenes, two per picture, and the pictures."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    images, annotations = [], []
    for number, scene in enumerate(SCENES[:count], start=1):
        name = f"COCO_val2014_{number:012d}.jpg"
        render_medium("image", scene, 1).save(root / "val2014" / name)
        images.append({"id": number, "file_name": name})
        said = (caption(scene, "image"), f"There is a {scene.colour} {scene.shape}.")
        annotations += [
            {"image_id": number, "id": len(annotations) + n, "caption": text} for n, text in enumerate(said)
        ]
    path = root / "annotations" / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return [root / "val2014" / image["file_name"] for image in images]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_captions_of_a_run_that_was_interrupted(tmp_path):
    pictures = coco(tmp_path / "coco", 4)
    whole = pictures[1].read_bytes()
    pictures[1].write_bytes(whole[: len(whole) // 2])
    said = []

    def run(**options):
        out = tmp_path / "out"
        return run_benchmark(
            "mmbridge/tiny", "coco-caption", tmp_path / "coco", out, report=said.append, progress=False, **options
        )

    result = run(batch_size=3)
    assert result["n"] == 3
    assert list(result["skipped"]) == ["2"]
    assert pictures[1].name in result["skipped"]["2"]
    assert any(pictures[1].name in sentence for sentence in said)
    first = lines_of(tmp_path / "out")
    assert [line["index"] for line in first] == [0, 1, 2, 3]
    for line, scene in zip(first, SCENES[:4], strict=True):
        assert "skipped" in line or (scene.colour in line["text"] and scene.shape in line["text"])
    parse_arguments(result["command"].split()[1:])
    assert result == json.loads((tmp_path / "out" / "metrics.json").read_text())

    with pytest.raises(
        ConfigError, match=r"another prompt \('Describe the image.', now 'What is it\?'\); give another"
    ):
        run(prompt="What is it?")
    with pytest.raises(ConfigError, match="another requests .*, seed"):
        run(limit=2, seed=1)

    # killed in the middle of the second line, and the damaged picture was fetched again
    pictures[1].write_bytes(whole)
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_text(json.dumps(first[0]) + "\n" + json.dumps(first[1]) + "\n" + json.dumps(first[2])[:25])
    result = run()
    again = lines_of(tmp_path / "out")
    assert (result["n"], result["skipped"]) == (4, {})
    assert sorted(line["index"] for line in again) == [0, 1, 2, 3]
    replies = {line["index"]: line["text"] for line in again}
    assert all(replies[line["index"]] == line["text"] for line in first if "text" in line)

    # BLEU by another implementation, which splits at spaces
    def plain(text):
        return text.lower().replace(".", "")

    made = [plain(replies[index]) for index in range(4)]
    wanted = [[f"there is a {each.colour} {each.shape}", plain(caption(each, "image"))] for each in SCENES[:4]]
    figures = result["figures"]
    assert figures["bleu_4"] == pytest.approx(BLEUScore(n_gram=4)(made, wanted).item(), abs=1e-5)
    assert figures["rouge_l"] > 0.9
    assert figures["cider_d"] > 1


def test_vqa_from_the_command_line(tmp_path, capsys):
    root = tmp_path / "vqa"
    coco(root, 2)
    asked = [{"question_id": 10 + n, "image_id": n, "question": "What colour is it?"} for n in (1, 2)]
    # four of ten say it of the first picture and one of the second: 1 and 0.3, see test_answer_metrics.py
    people = [
        [f"It is {SCENES[0].colour}"] * 4 + ["no"] * 6,
        [f"it is {SCENES[1].colour}."] + ["no"] * 9,
    ]
    answers = [
        {"question_id": 10 + n, "image_id": n, "answers": [{"answer": each} for each in said]}
        for n, said in enumerate(people, start=1)
    ]
    (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    (root / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": answers}))
    words = ["evaluate", "mmbridge/tiny", "--benchmark", "vqa-v2", "--data", str(root), "--out", str(tmp_path / "out")]
    assert main([*words, "--prompt", "{}"]) == 0
    printed = capsys.readouterr().out
    texts = [line["text"] for line in lines_of(tmp_path / "out")]
    assert texts == [f"It is {scene.colour}." for scene in SCENES[:2]]
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["figures"] == {"vqa_accuracy": pytest.approx(0.65)}
    assert "vqa_accuracy" in printed and "0.6500" in printed


def embeddings(modality, media):
    """Unit vectors by ImageBind's encoder and text tower themselves."""
    if modality == "text":
        model = ImageBindModel.from_pretrained(WEIGHTS, ("text",))
        with torch.no_grad():
            vectors = model.embed("text", model.tokenize(media))
    else:
        encoder = ImageBind(modality, WEIGHTS, tokens="pooled")
        vectors = torch.cat([encoder(encoder.prepare(medium).unsqueeze(0)) for medium in media]).squeeze(1)
    return torch.nn.functional.normalize(vectors, dim=-1).double().numpy()


def frechet(first, second):
    """The distance by scipy's root of a matrix; the ridge is for its sake, because few samples make singular matrices."""
    ridge = 1e-9 * np.eye(first.shape[1])
    a, b = np.cov(first.T) + ridge, np.cov(second.T) + ridge
    apart = first.mean(0) - second.mean(0)
    return apart @ apart + np.trace(a + b - 2 * sqrtm(a @ b).real)


def test_pictures_from_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    pictures = coco(tmp_path / "coco", 3)
    result = run_benchmark(
        "mmbridge/tiny", "coco-text-to-image", tmp_path / "coco", tmp_path / "out", embedder=WEIGHTS, progress=False
    )
    assert result["figures"]["made"] == 1
    assert list(result["left_out"]) == ["fid"]
    assert "weights-inception-2015-12-05-6726825d.pth" in result["left_out"]["fid"]
    lines = lines_of(tmp_path / "out")
    made = embeddings("image", [Image.load(tmp_path / "out" / line["file"]) for line in lines])
    real = embeddings("image", [Image.load(path) for path in pictures])
    texts = embeddings("text", [f"A photo depicts {caption(scene, 'image')}" for scene in SCENES[:3]])
    assert result["figures"]["clip_score"] == pytest.approx(2.5 * (made * texts).sum(1).clip(0).mean(), abs=1e-5)
    assert result["figures"]["frechet_embedder"] == pytest.approx(frechet(made, real), abs=2e-3)
    # all replies are there, so nothing is loaded and the other figures are the same without the embedder
    again = run_benchmark("mmbridge/tiny", "coco-text-to-image", tmp_path / "coco", tmp_path / "out", progress=False)
    assert set(again["left_out"]) == {"fid", "frechet_embedder", "clip_score"}
    assert "--embedder" in again["left_out"]["clip_score"]


def test_sounds_and_videos_that_were_made(tmp_path):
    said = []
    judges = Judges(WEIGHTS, tmp_path, said.append)
    texts = [caption(scene, "audio") for scene in SCENES[:4]]
    items = []
    for number, scene in enumerate(SCENES[:4]):
        render_medium("audio", scene, 100 + number).save(tmp_path / f"real-{number}.wav")
        made = tmp_path / f"made-{number}.wav"
        if number < 3:  # the last reply has no sound
            render_medium("audio", scene, 200 + number).save(made)
        request = Request(str(number), texts[number], None, (texts[number],), f"real-{number}.wav")
        items.append(Answered(request, "", made if number < 3 else None))
    (tmp_path / "real-3.wav").write_bytes((tmp_path / "real-3.wav").read_bytes()[:100])
    figures, left_out = score(("fad", "clap_score"), items, judges)
    assert left_out == {}
    sounds = {name: [Audio.load(tmp_path / f"{name}-{n}.wav") for n in range(3)] for name in ("made", "real")}
    made, real = embeddings("audio", sounds["made"]), embeddings("audio", sounds["real"])
    words = embeddings("text", texts)
    assert figures["fad"] == pytest.approx(frechet(made, real), abs=2e-3)
    assert figures["clap_score"] == pytest.approx((made * words[:3]).sum() / 4, abs=1e-5)
    assert list(judges.damaged) == ["real-3.wav"] and "real-3.wav" in said[0]

    videos = [render_medium("video", scene, 1) for scene in SCENES[:2]]
    items = []
    for number, video in enumerate(videos):
        video.save(tmp_path / f"{number}.mp4", crf=0)
        request = Request(str(number), texts[number], None, (texts[number],))
        items.append(Answered(request, "", tmp_path / f"{number}.mp4"))
    figures, _ = score(("clipsim",), items, judges)
    frames = [[Image(frame) for frame in Video.load(tmp_path / f"{n}.mp4").frames] for n in (0, 1)]
    wanted = np.mean([(embeddings("image", each) @ words[n]).mean() for n, each in enumerate(frames)])
    assert figures["clipsim"] == pytest.approx(wanted, abs=1e-5)


def test_what_does_not_fit_is_said_before_the_work(tmp_path, capsys):
    coco(tmp_path / "coco", 1)
    words = ["evaluate", "mmbridge/tiny", "--out", str(tmp_path / "out")]
    data = ["--data", str(tmp_path / "coco")]
    for given, said in (
        ([*data, "--benchmark", "coco-captions"], "did you mean 'coco-caption'"),
        (["--benchmark", "coco-caption"], "--benchmark needs --data"),
        ([*data, "--benchmark", "coco-caption", "--samples", "3"], "takes --limit"),
        (["--limit", "3"], "--limit is for a benchmark; name it with --benchmark: coco-caption"),
        (data, "--data is for a benchmark"),
        ([*data, "--benchmark", "coco-caption", "--limit", "0"], "limit is 0"),
        ([*data, "--benchmark", "coco-caption", "--prompt", "Say {}"], "coco-caption takes no {}"),
        ([*data, "--benchmark", "vqa-v2"], "vqa-v2 needs v2_OpenEnded"),
        (
            [*data, "--benchmark", "coco-text-to-image", "--embedder", "no/such/place"],
            "no file or folder at 'no/such/place'",
        ),
    ):
        assert main([*words, *given]) == 2
        assert said in capsys.readouterr().err


def test_a_bridge_without_the_way_is_refused(parts, tmp_path):
    Bridge.from_config(tiny.bridge_config(parts, out=False)).save_pretrained(tmp_path / "reader")
    info = {"videos": [{"video_id": "video1"}], "sentences": [{"video_id": "video1", "caption": "a man cooks"}]}
    (tmp_path / "test_videodatainfo.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="needs a bridge that can make video; this one can make text"):
        run_benchmark(tmp_path / "reader", "msrvtt-text-to-video", tmp_path, tmp_path / "out", progress=False)
