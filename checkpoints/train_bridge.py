"""Rebuild the shipped bridges, by the shipped recipes, with their tables.

    python checkpoints/train_bridge.py tiny                 # checkpoints/tiny, three stages
    python checkpoints/train_bridge.py tiny-onellm          # checkpoints/tiny-onellm, four stages; its ways out are those of tiny

The frozen parts beside them must exist: the other scripts of this folder make them. The shipped weights of tiny had 700 steps of
stage 3 more (checkpoints/tiny/README.md), and its table holds fewer cells than this measures, since videos take long.
"""

import argparse
from pathlib import Path

from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.evaluation.any_to_any import evaluate, format_table
from mmbridge.evaluation.forgetting import format_forgetting, measure_forgetting
from mmbridge.training.run import train

HERE = Path(__file__).parent
RUNS = Path("runs")
STAGES = {
    "tiny": ("encoder_alignment", "decoder_alignment", "instruction_tuning"),
    "tiny-onellm": (
        "onellm-image", "onellm-video_audio_pointcloud", "onellm-depth_normal_imu_fmri", "onellm-instruction_tuning",
    ),
}  # fmt: skip
EIGHT = ("image", "video", "audio", "pointcloud", "depth", "normal", "imu", "fmri")
CELLS = {
    "tiny": None,
    "tiny-onellm": [
        *(f"{source}:text" for source in (*EIGHT, "image+audio", "audio+video")),
        *(f"{source}:image" for source in ("text", *EIGHT)),
        *(f"{source}:audio" for source in ("text", "video", "imu", "fmri")),
        "fmri:video",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bridge", choices=tuple(STAGES))
    parser.add_argument("--samples", type=int, default=40, help="requests per cell of the table")
    parser.add_argument("--measure", action="store_true", help="only measure what is there")
    options = parser.parse_args()
    target, runs = HERE / options.bridge, [RUNS / "tiny" / stage for stage in STAGES[options.bridge]]
    if not options.measure:
        for stage, run in zip(STAGES[options.bridge], runs, strict=True):
            trained = train(Recipe.load(f"tiny/{stage}"), run, resume=run.exists(), cache=RUNS / "tiny" / "cache")
        bridge = Bridge.from_pretrained(trained)
        for parameters in bridge.parts().values():
            for parameter in parameters.values():
                parameter.data = parameter.data.half()
        bridge.save_pretrained(target)
    if options.bridge == "tiny-onellm":
        text = CELLS["tiny-onellm"][: len(EIGHT)]
        result = measure_forgetting(runs, RUNS / "tiny" / "forgetting", samples=100, cells=text)
        print(format_forgetting(result))
        (target / "forgetting.json").write_text((RUNS / "tiny" / "forgetting" / "forgetting.json").read_text())
    cells, samples = CELLS[options.bridge], options.samples
    print(format_table(evaluate(target, target, samples=samples, splits=("unseen",), cells=cells)))


if __name__ == "__main__":
    main()
