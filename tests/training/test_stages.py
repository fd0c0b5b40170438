"""Stages as declarations, and the schedule."""

import itertools
import math

import pytest
import torch
from lightning.pytorch import Trainer

from mmbridge.config import OptimizerConfig
from mmbridge.errors import ConfigError
from mmbridge.training.stages import STAGES, Stage, check_stage, rate


def test_learning_rate_rises_then_falls_to_almost_nothing():
    linear = [rate(step, 100, 0.1, "linear") for step in range(100)]
    assert linear[:11] == pytest.approx([(step + 1) / 10 for step in range(10)] + [1.0])
    assert linear[55] == pytest.approx(0.5)
    assert 0 < linear[-1] < 0.02
    assert all(later < earlier for earlier, later in itertools.pairwise(linear[10:]))


def test_cosine_and_constant_schedules():
    assert rate(10, 100, 0.1, "cosine") == 1.0
    assert rate(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert rate(32, 100, 0.1, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert {rate(step, 100, 0.1, "constant") for step in range(10, 200)} == {1.0}
    assert rate(0, 100, 0.0, "linear") == 1.0
    assert rate(0, 1, 1.0, "linear") == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_ends_at_its_floor(schedule):
    shares = [rate(step, 100, 0.1, schedule, 0.2) for step in range(101)]
    assert shares[:10] == [rate(step, 100, 0.1, schedule) for step in range(10)]
    assert (shares[10], shares[55], shares[100]) == pytest.approx((1.0, 0.6, 0.2))
    assert all(later < earlier for earlier, later in itertools.pairwise(shares[10:]))
    assert rate(70, 100, 0.1, "constant", 0.2) == 1.0


def test_the_optimiser_follows_the_schedule_to_its_floor():
    settings = OptimizerConfig(lr=0.5, warmup=0.0, schedule="linear", floor=0.2)
    stage = Stage(torch.nn.Linear(1, 1), {"text": 1.0}, settings, 2)
    stage.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    made = stage.configure_optimizers()
    rates = []
    for _ in range(3):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.5, 0.3, 0.1])


@pytest.mark.parametrize(
    ("stage", "parts", "losses"),
    [
        ("encoder_alignment", ["inputs.image.projection"], {"text": 1.0, "image.alignment": 0.0}),
        (
            "decoder_alignment",
            ["outputs.image.projection", "outputs.image.rows"],
            {"image.alignment": 1.0, "text": 0.1},
        ),
        ("encoder_alignment", ["inputs.image.projection"], {"text": 1.0, "image.balance": 0.01}),
        ("decoder_alignment", ["outputs.image.projection"], {"image.denoising": 1.0}),
        ("instruction_tuning", ["backbone.lora", "inputs.image.projection"], {"text": 1.0}),
    ],
)
def test_recipes_that_follow_their_stage_pass(stage, parts, losses):
    check_stage(stage, parts, losses)


@pytest.mark.parametrize(
    ("stage", "parts", "losses", "words"),
    [
        ("encoder_alignment", ["backbone.lora"], {"text": 1.0}, "names 'backbone.lora'; remove it or choose"),
        ("encoder_alignment", ["inputs.image.projection"], {"text": 0.0}, "needs the loss text with a weight above 0"),
        ("decoder_alignment", ["inputs.image.projection"], {"image.alignment": 1.0}, "trains outputs.* only"),
        ("decoder_alignment", ["outputs.image.rows"], {"text": 1.0}, "needs the loss *.alignment or *.denoising"),
        ("pretraining", [], {}, "unknown stage 'pretraining'; known: encoder_alignment"),
    ],
)
def test_recipes_that_contradict_their_stage_are_refused(stage, parts, losses, words):
    with pytest.raises(ConfigError) as error:
        check_stage(stage, parts, losses)
    assert words in str(error.value)


def test_the_stages_are_those_of_recipes():
    from typing import get_args, get_type_hints

    from mmbridge.config import Recipe

    assert list(STAGES) == list(get_args(get_type_hints(Recipe)["stage"]))
