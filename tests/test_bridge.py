"""The composition: losses by name, gradients where they belong, and a folder that opens again or says why not."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmbridge.bridge import Bridge
from mmbridge.errors import CheckpointError, ConfigError, DataError, ShapeError
from mmbridge.media import Image
from mmbridge.projections import balance_loss
from mmbridge.sequence import collate

PICTURE = {"type": "image", "data": Image(torch.arange(768, dtype=torch.uint8).view(3, 16, 16))}
SEEN = [
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "What colour is it?"}]},
    {"role": "assistant", "content": "It is red."},
]
DRAWN = [
    {"role": "user", "content": "Draw a red one."},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "It is red."}, {"type": "image", "caption": "a red one"}],
    },
]
WORDS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is blue."}]


def build(parts, **options):
    torch.manual_seed(0)
    return Bridge.from_config(tiny.bridge_config(parts, **options))


@pytest.fixture
def bridge(parts):
    return build(parts)


def batch_of(bridge, *dialogues):
    return collate(bridge.prepare(dialogues, targets=True))


def test_losses_are_named_by_what_they_are_about(bridge):
    losses = bridge(batch_of(bridge, SEEN, DRAWN, WORDS))
    assert list(losses) == ["text", "image.alignment"]
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    assert list(bridge(batch_of(bridge, WORDS))) == ["text"]


def test_losses_of_ways_in_stand_beside_the_others(parts):
    config = tiny.bridge_config(parts)
    config["inputs"]["image"]["projection"] = {**tiny.MIXTURE, "balance": True}
    bridge = Bridge.from_config(config)
    losses = bridge(batch_of(bridge, SEEN, DRAWN, SEEN))
    assert list(losses) == ["text", "image.alignment", "image.balance"]
    torch.testing.assert_close(losses["image.balance"], balance_loss(bridge.inputs["image"].projection.routing))
    assert list(bridge(batch_of(bridge, WORDS))) == ["text"]


def test_text_loss_is_that_of_the_model_itself(parts):
    bridge = build(parts, out=False)
    (sequence,) = bridge.prepare([WORDS])
    ids, labels = (torch.tensor([values]) for values in (sequence.ids, sequence.labels))
    wanted = bridge.backbone.model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(bridge(batch_of(bridge, WORDS))["text"], wanted)


def test_padding_and_neighbours_change_no_loss(bridge):
    bridge.eval()
    dialogues = [SEEN, DRAWN, WORDS]
    batches = [batch_of(bridge, dialogue) for dialogue in dialogues]
    counts = torch.tensor([float(len(batch.answers)) for batch in batches])
    alone = torch.stack([bridge(batch)["text"] for batch in batches])
    together = bridge(batch_of(bridge, *dialogues))
    torch.testing.assert_close(together["text"], (alone * counts).sum() / counts.sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together["image.alignment"], bridge(batches[1])["image.alignment"], atol=1e-5, rtol=1e-5)


def test_slots_hold_the_projected_features_of_their_own_medium(bridge):
    other = {"type": "image", "data": Image(255 - PICTURE["data"].pixels)}
    pair = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}, other]}, WORDS[1]]
    batch = batch_of(bridge, WORDS, pair, SEEN)
    embeddings = bridge.embed(batch)
    way = bridge.inputs["image"]
    for span, medium in zip(batch.entering["image"], (PICTURE, other, PICTURE), strict=True):
        wanted = way.projection(torch.stack(way.features([medium["data"]])))[0]
        torch.testing.assert_close(embeddings[span.row, span.start : span.start + span.length], wanted)
    words = bridge.backbone.embed(batch.ids[0])
    assert torch.equal(embeddings[0][batch.mask[0]], words[batch.mask[0]])


def test_every_part_gets_a_gradient_even_where_the_batch_lacks_its_modality(parts):
    bridge = build(parts, lora=True)
    for dialogues in ([SEEN, DRAWN], [SEEN], [DRAWN], [WORDS]):
        bridge.zero_grad()
        torch.stack(list(bridge(batch_of(bridge, *dialogues)).values())).sum().backward()
        for name, parameters in bridge.parts().items():
            touched = [value.grad is not None for value in parameters.values()]
            assert any(touched), f"{name} with {len(dialogues)} dialogues"
        frozen = {id(value) for values in bridge.parts().values() for value in values.values()}
        assert all(value.grad is None for value in bridge.parameters() if id(value) not in frozen)


def test_gradients_of_a_lacking_modality_are_zero(bridge):
    bridge(batch_of(bridge, WORDS))["text"].backward()
    assert all(
        value.grad is None or not value.grad.any() for value in bridge.parts()["inputs.image.projection"].values()
    )


def test_the_base_vocabulary_and_new_rows_make_one_score(bridge):
    hidden = torch.randn(2, 32)
    scores = bridge.logits(hidden)
    size = bridge.backbone.vocabulary_size
    assert scores.shape == (2, size + 1)
    torch.testing.assert_close(scores[:, :size], bridge.backbone.logits(hidden))
    torch.testing.assert_close(scores[:, size:], F.linear(hidden, bridge.outputs["image"].rows.head))
    assert bridge.token_of(size) == bridge.first_ids["image"] == size
    assert [bridge.column_of(bridge.token_of(column)) for column in (0, size - 1, size)] == [0, size - 1, size]


def test_targets_are_asked_for_in_training(bridge):
    with pytest.raises(DataError, match="prepare it with targets=True"):
        bridge(collate(bridge.prepare([DRAWN])))


def test_a_saved_bridge_opens_with_the_same_replies_and_losses(parts, tmp_path):
    bridge = build(parts, lora=True).eval()
    with torch.no_grad():
        for parameters in bridge.parts().values():
            for value in parameters.values():
                value += 0.01 * torch.randn_like(value)
    bridge.lineage = [{"stage": "encoder_alignment", "steps": 3, "parent": None}]
    bridge.save_pretrained(tmp_path / "bridge")
    again = Bridge.from_pretrained(tmp_path / "bridge")
    first, second = (opened(batch_of(opened, SEEN, DRAWN)) for opened in (bridge, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.lineage == bridge.lineage
    assert not again.training
    assert "encoder_alignment: 3 steps" in (tmp_path / "bridge" / "README.md").read_text()
    size = sum(path.stat().st_size for path in (tmp_path / "bridge").rglob("*") if path.is_file())
    assert size < 200_000  # the frozen parts are not in it


def test_a_bridge_opens_from_the_run_that_made_it(bridge, tmp_path):
    bridge.save_pretrained(tmp_path / "run" / "bridge")
    assert Bridge.from_pretrained(tmp_path / "run").parts().keys() == bridge.parts().keys()


def test_configuration_is_plain_data_that_builds_the_same_bridge(bridge):
    config = json.loads(json.dumps(bridge.config()))
    assert Bridge.from_config(config).config() == config


def test_a_bridge_is_planned_without_weights(parts):
    with torch.device("meta"):
        bridge = Bridge.from_config(tiny.bridge_config(parts, lora=True))
    assert all(value.is_meta for value in bridge.parameters())
    real = build(parts, lora=True)
    shapes = {name: tuple(value.shape) for name, value in real.named_parameters()}
    assert {name: tuple(value.shape) for name, value in bridge.named_parameters()} == shapes


def spoil(folder, how):
    part = folder / "parts" / "inputs.image.projection.safetensors"
    manifest = json.loads((folder / "manifest.json").read_text())
    match how:
        case "altered":
            content = bytearray(part.read_bytes())
            content[-1] ^= 1
            part.write_bytes(content)
        case "missing":
            part.unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "unknown part":
            manifest["parts"]["outputs.audio.rows"] = {"sha256": "0", "parameters": 1}
        case "other frozen":
            manifest["frozen"]["backbone"]["sha256"] = "0" * 64
        case "other shape":
            tensors = load_file(part)
            save_file({name: value[:1].contiguous() for name, value in tensors.items()}, part)
            from mmbridge.hub import file_sha256

            manifest["parts"]["inputs.image.projection"]["sha256"] = file_sha256(part)
    if how != "no manifest":
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("altered", r"inputs\.image\.projection\.safetensors was altered: its hash is .* the manifest wants"),
        ("missing", r"inputs\.image\.projection\.safetensors is missing \(its hash should be"),
        ("no manifest", r"manifest\.json is missing"),
        ("unknown part", r"does not fit this bridge: it lacks nothing and has \['outputs\.audio\.rows'\] more"),
        (
            "other frozen",
            r"the frozen part 'backbone' .* is not the one it was trained with: .* the manifest wants 0000",
        ),
        ("other shape", r"does not fit part 'inputs\.image\.projection'"),
    ],
)
def test_damage_is_named(bridge, tmp_path, how, words):
    bridge.save_pretrained(tmp_path / "bridge")
    spoil(tmp_path / "bridge", how)
    with pytest.raises(CheckpointError, match=words):
        Bridge.from_pretrained(tmp_path / "bridge")


def test_parts_in_common_are_taken_from_a_parent(parts, tmp_path):
    parent = build(parts, out=False)
    parent.save_pretrained(tmp_path / "parent")
    torch.manual_seed(1)
    child = Bridge.from_config(tiny.bridge_config(parts, lora=True))
    assert child.load_parts(tmp_path / "parent", strict=False) == ["inputs.image.projection"]
    ours, theirs = (opened.parts()["inputs.image.projection"] for opened in (child, parent))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with pytest.raises(CheckpointError, match="does not fit this bridge"):
        child.load_parts(tmp_path / "parent")


def test_a_failed_save_keeps_the_earlier_one(bridge, tmp_path, monkeypatch):
    bridge.save_pretrained(tmp_path / "bridge")
    before = {path: path.read_bytes() for path in (tmp_path / "bridge").rglob("*") if path.is_file()}
    from mmbridge import hub

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "write_json", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        bridge.save_pretrained(tmp_path / "bridge")
    assert {path: path.read_bytes() for path in (tmp_path / "bridge").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bridge"]


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        (("outputs", "image", "projection", "dim_out"), 768, (ShapeError, ConfigError), "output 'image'"),
        (("inputs", "image", "projection", "name"), "grupping", ConfigError, "unknown projection 'grupping'"),
        (("backbone", "name"), "causal", ConfigError, "unknown backbone 'causal'; did you mean 'causal_lm'"),
        (
            ("inputs", "image", "encoder", "modality"),
            "video",
            ConfigError,
            "input 'image' was given an encoder for 'video'",
        ),
        (("outputs", "image", "num_signals"), 0, ConfigError, "num_signals must be a positive integer"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_built(parts, place, value, error, words):
    config = tiny.bridge_config(parts)
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    if place[-1] == "dim_out":
        section.update(dim_in=32, num_queries=12)
    with pytest.raises(error, match=words):
        Bridge.from_config(config)
