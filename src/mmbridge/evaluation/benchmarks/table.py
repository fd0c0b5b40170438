"""The benchmarks. Adding one is adding an entry, and a reader where its files have a form of their own."""

from functools import partial

from mmbridge.evaluation.benchmarks import readers
from mmbridge.evaluation.benchmarks.base import Benchmark

_COCO_IMAGES = "http://images.cocodataset.org/zips/val2014.zip (unpack to val2014/)"
_COCO_CAPTIONS = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip (unpack to annotations/)"
_SHORT = "{} Answer the question using a single word or phrase."
_CAPTIONS = ("captions", "meteor")

_CONVERTED = (
    "and convert its held-out list in the form of OneLLM's training data, which has no official layout: mmbridge data convert "
    "onellm LIST.json test.jsonl --modality"
)

_coco = partial(readers.coco_captions, file="annotations/captions_val2014.json", folder="val2014")

BENCHMARKS: dict[str, Benchmark] = {
    "coco-caption": Benchmark(
        takes="image", gives="text", prompt="Describe the image.",
        files=("annotations/captions_val2014.json",), optional=("dataset_coco.json",), read=readers.coco_or_karpathy,
        metrics=_CAPTIONS, max_new_tokens=64,
        download=f"download {_COCO_IMAGES}, {_COCO_CAPTIONS} and, for Karpathy's test images, dataset_coco.json from "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip.",
    ),
    "nocaps": Benchmark(
        takes="image", gives="text", prompt="Describe the image.",
        files=("nocaps_val_4500_captions.json",),
        read=partial(readers.coco_captions, file="nocaps_val_4500_captions.json", folder="images"),
        metrics=_CAPTIONS, max_new_tokens=64,
        download="download https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json and the images that its coco_url "
        "fields name (into images/).",
    ),
    "flickr30k": Benchmark(
        takes="image", gives="text", prompt="Describe the image.",
        files=("dataset_flickr30k.json",),
        read=partial(readers.karpathy, file="dataset_flickr30k.json", folder="flickr30k-images"),
        metrics=_CAPTIONS, max_new_tokens=64,
        download="download dataset_flickr30k.json from https://cs.stanford.edu/people/karpathy/deepimagesent/"
        "caption_datasets.zip, and ask for the images at https://shannon.cs.illinois.edu/DenotationGraph/ (unpack to "
        "flickr30k-images/).",
    ),
    "vqa-v2": Benchmark(
        takes="image", gives="text", prompt=_SHORT,
        files=("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
        read=partial(
            readers.vqa,
            questions="v2_OpenEnded_mscoco_val2014_questions.json",
            annotations="v2_mscoco_val2014_annotations.json",
        ),
        metrics=("vqa_accuracy",), max_new_tokens=16,
        download=f"download the validation questions and annotations from https://visualqa.org/download.html and "
        f"{_COCO_IMAGES}.",
    ),
    "ok-vqa": Benchmark(
        takes="image", gives="text", prompt=_SHORT,
        files=("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
        read=partial(
            readers.vqa,
            questions="OpenEnded_mscoco_val2014_questions.json",
            annotations="mscoco_val2014_annotations.json",
        ),
        metrics=("vqa_accuracy",), max_new_tokens=16,
        download=f"download the testing questions and annotations from https://okvqa.allenai.org/download.html and "
        f"{_COCO_IMAGES}.",
    ),
    "gqa": Benchmark(
        takes="image", gives="text", prompt=_SHORT,
        files=("testdev_balanced_questions.json",), read=readers.gqa,
        metrics=("accuracy",), max_new_tokens=16,
        download="download questions1.2.zip and images.zip (unpack to images/) from "
        "https://cs.stanford.edu/people/dorarad/gqa/download.html.",
    ),
    "audiocaps": Benchmark(
        takes="audio", gives="text", prompt="Describe the sound.",
        files=("test.csv",), read=readers.audiocaps, metrics=_CAPTIONS, max_new_tokens=64, complete=False,
        download="download https://raw.githubusercontent.com/cdjkim/audiocaps/master/dataset/test.csv and put the clips "
        "that you have of its youtube_id column into audio/, as <youtube_id>.wav.",
    ),
    "clotho": Benchmark(
        takes="audio", gives="text", prompt="Describe the sound.",
        files=("clotho_captions_evaluation.csv",), read=readers.clotho, metrics=_CAPTIONS, max_new_tokens=64,
        download="download clotho_captions_evaluation.csv and clotho_audio_evaluation.7z (unpack to evaluation/) from "
        "https://zenodo.org/records/4783391.",
    ),
    "msrvtt": Benchmark(
        takes="video", gives="text", prompt="Describe the video.",
        files=("test_videodatainfo.json",), read=readers.msrvtt, metrics=_CAPTIONS, max_new_tokens=64, complete=False,
        download="get MSR-VTT's test_videodatainfo.json and test_videos.zip (unpack to TestVideo/); its authors no longer "
        "host them, so ask for a copy.",
    ),
    "msrvtt-qa": Benchmark(
        takes="video", gives="text", prompt=_SHORT,
        files=("test_qa.json",), read=readers.msrvtt_qa, metrics=("accuracy",), max_new_tokens=16, complete=False,
        download="get MSRVTT-QA's test_qa.json from https://github.com/xudejing/video-question-answering and MSR-VTT's "
        "test videos (TestVideo/).",
    ),
    "objaverse": Benchmark(
        takes="pointcloud", gives="text", prompt="Provide a one-sentence caption for the provided point cloud.",
        files=("test.jsonl",), read=partial(readers.converted, kind="pointcloud"), metrics=_CAPTIONS, max_new_tokens=128,
        download=f"get captioned point clouds of Objaverse {_CONVERTED} pointcloud.",
    ),
    "ego4d-imu": Benchmark(
        takes="imu", gives="text", prompt="Describe the motion.",
        files=("test.jsonl",), read=partial(readers.converted, kind="imu"), metrics=_CAPTIONS, max_new_tokens=128,
        download=f"ask for the IMU data of Ego4D {_CONVERTED} imu.",
    ),
    "nsd": Benchmark(
        takes="fmri", gives="text", prompt="Describe the scene based on fMRI data.",
        files=("test.jsonl",), read=partial(readers.converted, kind="fmri"), metrics=_CAPTIONS, max_new_tokens=128,
        download=f"ask for the Natural Scenes Dataset {_CONVERTED} fmri.",
    ),
    "coco-text-to-image": Benchmark(
        takes="text", gives="image", prompt="Draw this: {}",
        files=("annotations/captions_val2014.json",), read=readers.reverse(_coco),
        metrics=("fid", "frechet_embedder", "clip_score"), max_new_tokens=64,
        download=f"download {_COCO_IMAGES} and {_COCO_CAPTIONS}.",
    ),
    "audiocaps-text-to-audio": Benchmark(
        takes="text", gives="audio", prompt="Make this sound: {}",
        files=("test.csv",), read=readers.reverse(readers.audiocaps), metrics=("fad", "clap_score"), max_new_tokens=64,
        complete=False,
        download="download https://raw.githubusercontent.com/cdjkim/audiocaps/master/dataset/test.csv and put the clips "
        "that you have of its youtube_id column into audio/, as <youtube_id>.wav.",
    ),
    "msrvtt-text-to-video": Benchmark(
        takes="text", gives="video", prompt="Make a video of this: {}",
        files=("test_videodatainfo.json",), read=readers.reverse(readers.msrvtt, real=False), metrics=("clipsim",),
        max_new_tokens=64,
        download="get MSR-VTT's test_videodatainfo.json; its authors no longer host it, so ask for a copy.",
    ),
}  # fmt: skip
