"""Freezing: exactly what is declared trains, and the table says so."""

import pytest
import tiny
import torch

from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.errors import ConfigError
from mmbridge.training.freezing import freeze, frozen_digests, trainable_table
from mmbridge.training.run import build_bridge


@pytest.fixture
def bridge(parts):
    config = tiny.bridge_config(parts, lora=True)
    config["inputs"]["image"]["projection"] = {
        "name": "grouping", "num_tokens": 2, "num_concepts": [4], "depths": [1, 1, 1], "dim_hidden": 16, "num_heads": 2
    }  # fmt: skip
    torch.manual_seed(0)
    return Bridge.from_config(config)


def training(bridge):
    return {name for name, parameter in bridge.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["inputs.*"], ["inputs.image.projection"]),
        (["outputs.image.rows", "backbone.*"], ["outputs.image.rows", "backbone.lora"]),
        (["*.projection"], ["inputs.image.projection", "outputs.image.projection"]),
    ],
)
def test_exactly_the_matching_parts_train(bridge, patterns, chosen):
    freeze(bridge, ["*"])
    assert freeze(bridge, patterns) == chosen
    parts = bridge.parts()
    declared = {id(value) for name in chosen for value in parts[name].values()}
    assert {id(value) for value in bridge.parameters() if value.requires_grad} == declared


def test_a_pattern_without_a_part_is_refused_with_a_suggestion(bridge):
    with pytest.raises(ConfigError, match=r"'inputs\.image\.projektion'.* did you mean 'inputs\.image\.projection'"):
        freeze(bridge, ["*", "inputs.image.projektion"])
    with pytest.raises(ConfigError, match="train is empty"):
        freeze(bridge, [])


def test_parameters_shared_with_a_frozen_part_are_refused(bridge):
    bridge.outputs["image"].rows.embedding = next(iter(bridge.inputs["image"].projection.parameters()))
    with pytest.raises(ConfigError, match=r"'outputs\.image\.rows' shares parameters"):
        freeze(bridge, ["inputs.*"])


def test_frozen_parts_stay_in_evaluation_mode(bridge):
    freeze(bridge, ["outputs.*"])
    features = torch.randn(1, 4, 12)
    projection = bridge.inputs["image"].projection
    assert not projection.training
    assert torch.equal(projection(features), projection(features))
    assert bridge.outputs["image"].projection.training
    assert not any(module.training for name, module in bridge.backbone.named_modules() if "lora_dropout" in name)
    freeze(bridge, ["*"])
    assert projection.training
    assert any(module.training for name, module in bridge.backbone.named_modules() if "lora_dropout" in name)
    assert not bridge.inputs["image"].encoder.training


def test_table_lists_every_part_with_counts(bridge):
    freeze(bridge, ["inputs.*", "backbone.lora"])
    rows = {line.split()[0]: line.split()[1:] for line in trainable_table(bridge).splitlines()[1:-1]}
    for name, parameters in bridge.parts().items():
        count = sum(value.numel() for value in parameters.values())
        assert rows[name] == [f"{count:,}", "yes" if name in ("inputs.image.projection", "backbone.lora") else "no"]
    frozen = sum(value.numel() for value in bridge.backbone.parameters()) - int(
        rows["backbone.lora"][0].replace(",", "")
    )
    assert rows["backbone"] == [f"{frozen:,}", "no"]
    assert rows["outputs.image.decoder"] == ["not", "loaded", "yet", "no"]
    total = trainable_table(bridge).splitlines()[-1]
    assert f"{sum(value.numel() for value in bridge.parameters()):,}" in total
    assert f"{sum(value.numel() for value in bridge.parameters() if value.requires_grad):,} (" in total


def test_a_language_model_that_trains_stands_in_the_table_once(parts):
    config = tiny.bridge_config(parts)
    config["backbone"]["trainable"] = True
    bridge = Bridge.from_config(config)
    assert freeze(bridge, ["backbone.weights"]) == ["backbone.weights"]
    rows = [line.split() for line in trainable_table(bridge).splitlines()[1:-1]]
    count = f"{sum(value.numel() for value in bridge.backbone.parameters()):,}"
    assert [row for row in rows if row[0].startswith("backbone")] == [["backbone.weights", count, "yes"]]
    assert f"{sum(value.numel() for value in bridge.parameters()):,}" in trainable_table(bridge).splitlines()[-1]
    assert bridge.backbone.training and not bridge.inputs["image"].projection.training


def test_digests_show_any_change_of_a_frozen_weight(bridge):
    freeze(bridge, ["inputs.*"])
    before = frozen_digests(bridge)
    with torch.no_grad():
        next(bridge.inputs["image"].projection.parameters()).add_(1)
    assert frozen_digests(bridge) == before
    bridge.outputs["image"].decoder.encode(["red"])  # loads a component
    later = frozen_digests(bridge)
    assert {name: later[name] for name in before} == before
    assert "outputs.image.decoder.text_encoder" in later
    with torch.no_grad():
        bridge.inputs["image"].encoder.model.modality_trunks.vision.requires_grad_(False)
        next(bridge.inputs["image"].encoder.parameters()).view(-1)[0] += 1e-7 + 1
    changed = frozen_digests(bridge)
    assert [name for name in later if changed[name] != later[name]] == ["inputs.image.encoder.model"]


@pytest.mark.parametrize(
    "stage, trained",
    [("encoder_alignment", 970_467), ("decoder_alignment", 2_151_200), ("instruction_tuning", 3_162_627)],
)
def test_shipped_stages_train_so_many_parameters(stage, trained):
    recipe = Recipe.load(f"tiny/{stage}", ["parent=null"])
    bridge, _ = build_bridge(recipe)
    freeze(bridge, recipe.train)
    assert sum(parameter.numel() for parameter in bridge.parameters() if parameter.requires_grad) == trained
    assert f"{trained:,} (" in trainable_table(bridge).splitlines()[-1]
