"""Plans: exact where they count, against bridges that are really built and trained; estimates where they say so."""

import json
import weakref

import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmbridge import planning
from mmbridge.bridge import Bridge
from mmbridge.cli.main import main
from mmbridge.cli.plan import format_plan
from mmbridge.config import Part, Recipe
from mmbridge.data.features import FeatureStore
from mmbridge.data.loader import StepBatches, prepare_all
from mmbridge.data.samples import JsonlData
from mmbridge.media import Image
from mmbridge.sequence import attention_of
from mmbridge.synthetic import Scene, caption, render_image
from mmbridge.training.freezing import freeze
from mmbridge.training.stages import Stage

STAGES = ("encoder_alignment", "decoder_alignment", "instruction_tuning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.colours_file(tmp_path_factory.mktemp("colours"), 12)


@pytest.fixture
def load(parts, data):
    def load_recipe(stage="instruction_tuning", dtype="float32", **run):
        values = tiny.recipe(parts, data, stage=stage, **run)
        values["bridge"]["backbone"]["dtype"] = dtype
        return Recipe.from_dict(values)

    return load_recipe


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("stage", STAGES)
def test_parts_have_the_sizes_of_a_bridge_that_is_built(load, stage):
    recipe = load(stage)
    bridge = Bridge.from_config(recipe.bridge.to_dict())
    trained = freeze(bridge, recipe.train)
    decoder = bridge.outputs["image"].decoder
    wanted = {name: sum(value.numel() for value in part.values()) for name, part in bridge.parts().items()}
    wanted["backbone"] = count(bridge.backbone) - wanted.get("backbone.lora", 0)
    wanted["inputs.image.encoder"] = count(bridge.inputs["image"].encoder)
    for name in ("text_encoder", "unet", "vae"):
        wanted[f"outputs.image.decoder.{name}"] = count(decoder.component(name))
    plan = planning.plan(recipe)
    assert {part.name: part.parameters for part in plan.parts} == wanted
    assert [part.name for part in plan.parts if part.trained] == trained


@pytest.mark.parametrize(("stage", "dtype"), [(stage, "float32") for stage in STAGES] + [(STAGES[2], "bfloat16")])
def test_weights_gradients_and_optimiser_states_are_those_of_a_step(load, data, tmp_path, stage, dtype):
    recipe = load(stage, dtype)
    recipe.losses["text"] = 1.0  # without it the trigger's row in the head gets no gradient
    bridge = Bridge.from_config(recipe.bridge.to_dict())
    freeze(bridge, recipe.train)
    # the first six have nothing for the decoder to make, like data of the first stage
    samples = JsonlData(tiny.colours_file(tmp_path, 6) if stage == "encoder_alignment" else data)
    batch = StepBatches(prepare_all(bridge, samples, FeatureStore(), progress=False), 12, 0).batch(0)
    step = Stage(bridge, recipe.losses, recipe.optimizer, 1)
    step.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer = step.configure_optimizers()["optimizer"]
    step.weigh(bridge(batch)).backward()
    optimizer.step()
    plan = planning.plan(recipe)
    assert plan.weights == size(bridge.parameters())
    assert plan.gradients == size(value.grad for value in bridge.parameters() if value.grad is not None)
    assert plan.optimizer == size(value for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_language_model_that_trains_is_counted(load, data, precision):
    recipe = load("instruction_tuning", precision=precision)
    recipe.bridge.backbone.arguments.update(lora=None, dtype=None, trainable=True)
    recipe.train = ["backbone.weights"]
    bridge = Bridge.from_config(recipe.bridge.to_dict())
    freeze(bridge, recipe.train)
    step = Stage(bridge, recipe.losses, recipe.optimizer, 1)
    step.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer = step.configure_optimizers()["optimizer"]
    batch = StepBatches(prepare_all(bridge, JsonlData(data), FeatureStore(), progress=False), 12, 0).batch(0)
    step.weigh(bridge(batch)).backward()
    optimizer.step()
    plan, frozen = planning.plan(recipe), planning.plan(load(precision=precision))
    sizes = {part.name: part for part in plan.parts}
    assert "backbone" not in sizes and not any(part.shares for part in plan.parts)
    assert (sizes["backbone.weights"].parameters, sizes["backbone.weights"].trained) == (count(bridge.backbone), True)
    assert plan.gradients == 4 * count(bridge.backbone) == size(value.grad for value in bridge.backbone.parameters())
    assert plan.optimizer == size(value for state in optimizer.state.values() for value in state.values())
    assert plan.activations > frozen.activations
    matrices = sum(value.numel() for name, value in bridge.backbone.named_parameters() if "embed_tokens" not in name)
    body = 2 * matrices * plan.positions
    assert plan.work.backward > 2 * body * 0.8  # of inputs, and of weights


@pytest.mark.parametrize("stage", STAGES)
def test_cache_has_the_size_of_frozen_results(load, data, stage):
    recipe = load(stage)
    bridge = Bridge.from_config(recipe.bridge.to_dict())
    store = FeatureStore()
    prepare_all(bridge, JsonlData(data), store, progress=False)
    plan = planning.plan(recipe)
    spec = bridge.outputs["image"].decoder.spec
    wanted = {"encoder_alignment": 4 * 12 * 4, "decoder_alignment": spec.tokens * spec.dim * 4}
    wanted["instruction_tuning"] = sum(wanted.values())
    assert plan.cache_per_sample == wanted[stage]
    assert (plan.samples, plan.cache) == (12, 12 * wanted[stage])
    if stage == "instruction_tuning":
        assert store.size <= plan.cache


def kept_bytes(bridge, embeddings) -> int:
    """Return what autograd keeps of the backbone's layers, parameters and masks aside."""
    own = {value.untyped_storage().data_ptr() for value in bridge.backbone.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bridge.backbone(embeddings, attention_of(mask, []))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_layer_formula_is_what_autograd_keeps(load, dtype, width):
    """Two depths are compared, so that only layers count; within 3 %."""
    bridge = Bridge.from_config(load("encoder_alignment", dtype).bridge.to_dict())
    bridge.requires_grad_(False)
    embeddings = torch.randn(2, 64, bridge.backbone.dim, dtype=bridge.backbone.dtype, requires_grad=True)
    both = kept_bytes(bridge, embeddings)
    bridge.backbone.model.model.layers = bridge.backbone.model.model.layers[:1]
    measured = (both - kept_bytes(bridge, embeddings)) / embeddings[..., 0].numel()
    predicted = planning.layer_bytes(bridge.backbone.model.config, width)
    assert predicted == 8 * 32 + width * (4 * 32 + 3 * 64)
    assert measured == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize(("mixed", "width"), [(False, 4), (True, 2)])
def test_layer_formula_is_what_autograd_keeps_of_one_that_trains(load, mixed, width):
    recipe = load("encoder_alignment")
    recipe.bridge.backbone.arguments["trainable"] = True
    bridge = Bridge.from_config(recipe.bridge.to_dict())
    embeddings = torch.randn(2, 64, bridge.backbone.dim, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        both = kept_bytes(bridge, embeddings)
        layers = bridge.backbone.model.model.layers
        bridge.backbone.model.model.layers = layers[:1]
        one = kept_bytes(bridge, embeddings)
    casts = (
        2 * mixed * sum(value.numel() for value in layers[1].parameters() if value.ndim > 1)
    )  # counted by themselves
    measured = (both - one - casts) / embeddings[..., 0].numel()
    config = bridge.backbone.model.config
    assert measured == pytest.approx(planning.layer_bytes(config, width, trained=True), rel=0.03)
    assert planning.layer_bytes(config, width, trained=True) > 1.4 * planning.layer_bytes(config, width)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive."""

    def __init__(self, tensors):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.known and size:
            self.known[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        del self.known[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return made


@pytest.mark.parametrize("stage", STAGES)
def test_peak_of_a_step_is_predicted_within_a_fifth(stage, tmp_path):
    """The shipped recipes, with dialogues as plans take them: one medium in, and one of each way out that has a loss."""
    rng, lines = np.random.default_rng(0), []
    for number in range(16):
        scene = Scene.random(rng)
        Image.load(render_image(scene, number)).save(tmp_path / f"{number}.png")
        shown = [] if stage == "decoder_alignment" else [{"type": "image", "path": f"{number}.png"}]
        made = [{"type": medium, "caption": caption(scene, medium)} for medium in ("image", "video", "audio")]
        reply = [{"type": "text", "text": caption(scene, "text")}, *(made if stage != "encoder_alignment" else [])]
        asked = [*shown, {"type": "text", "text": "Describe it in a sentence, please, and show it to me."}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"messages": messages}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    values = ["parent=null", "bridge.backbone.dtype=float32", "run.batch_size=16", "data.validation_samples=0"]
    recipe = Recipe.load(f"tiny/{stage}", values)
    bridge = Bridge.from_config(recipe.bridge.to_dict())
    freeze(bridge, recipe.train)
    prepared = prepare_all(bridge, JsonlData(tmp_path / "data.jsonl"), FeatureStore(), progress=False)
    batch = StepBatches(prepared, 16, 0).batch(0)
    step = Stage(bridge, recipe.losses, recipe.optimizer, 1)
    step.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer = step.configure_optimizers()["optimizer"]

    def train_step():
        step.weigh(bridge(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    train_step()  # the optimiser's states come with the first
    with Live(
        [*bridge.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    ) as live:
        train_step()
    media = planning.plan(recipe).positions - planning.TEXT
    plan = planning.plan(recipe, batch.ids.shape[1] - media)
    assert plan.total == pytest.approx(live.peak, rel=0.2)


def test_checkpointed_activations_trade_memory_for_work(load):
    kept, recomputed = (planning.plan(load(checkpoint_activations=value)) for value in (False, True))
    assert recomputed.activations < kept.activations
    assert recomputed.work.forward == kept.work.forward
    assert recomputed.work.backward > kept.work.backward
    larger = planning.plan(load(batch_size=8))
    assert larger.activations == 2 * kept.activations
    assert larger.weights == kept.weights


def test_backbone_is_passed_backward_only_where_something_before_it_trains(load):
    recipe = load("decoder_alignment")
    both = planning.plan(recipe)
    recipe.train = ["outputs.*.projection"]
    alone = planning.plan(recipe)
    assert alone.work.forward == both.work.forward
    assert alone.work.backward < both.work.backward
    assert alone.activations < both.activations


def test_a_loss_of_a_way_in_makes_nothing(load):
    plans = []
    for balance in (0.0, 0.1):
        recipe = load("encoder_alignment")
        recipe.bridge.inputs["image"].arguments["projection"] = Part.from_plain(tiny.MIXTURE, "projection")
        recipe.losses["image.balance"] = balance
        plans.append(planning.plan(recipe))
    assert plans[0].positions == plans[1].positions
    assert plans[0].work == plans[1].work


def test_hours_follow_the_work(load):
    plan, longer = planning.plan(load(steps=10)), planning.plan(load(steps=20))
    assert plan.hours("H100", 0.2) == pytest.approx(2 * plan.hours("H100", 0.4))
    frozen = 12 * plan.work.frozen / 67e12 / 0.4 / 3600
    assert longer.hours("H100") - frozen == pytest.approx(2 * (plan.hours("H100") - frozen))


@pytest.fixture(scope="module")
def nextgpt():
    return planning.plan(Recipe.load("nextgpt/instruction_tuning"))


def test_nextgpt_has_the_published_sizes(nextgpt):
    sizes = {part.name: part.parameters for part in nextgpt.parts}
    assert sizes["backbone"] == 6_738_415_616
    assert sizes["backbone.lora"] == 33_554_432
    projections = [sizes[f"outputs.{name}.projection"] for name in ("image", "video", "audio")]
    assert projections == [31_958_784, 32_090_112, 31_788_544]
    assert sizes["outputs.image.decoder.unet"] == 859_520_964
    assert [round(sizes[f"outputs.{name}.decoder.unet"] / 1e6) for name in ("video", "audio")] == [1411, 739]
    assert [part.name for part in nextgpt.parts if part.shares] == ["inputs.video.encoder"]
    ((source, whole, loaded),) = nextgpt.published
    assert (source, round(whole / 1e6, 1)) == ("nielsr/imagebind-huge", 1200.8)
    assert loaded == sizes["inputs.image.encoder"] + sizes["inputs.audio.encoder"] < whole
    assert nextgpt.samples is nextgpt.cache is None
    assert nextgpt.seen == 250_000


def test_nextgpt_work_and_memory_follow_from_its_sizes(nextgpt):
    sizes = {part.name: part for part in nextgpt.parts}
    assert sizes["backbone"].bytes == 2 * 6_738_415_616  # bfloat16 on an accelerator
    assert sizes["outputs.image.projection"].bytes == 4 * 31_958_784
    trained = [part for part in nextgpt.parts if part.trained]
    assert nextgpt.gradients == sum(part.bytes for part in trained)
    layers = 6_738_415_616 - 2 * 32_000 * 4096 + 33_554_432
    assert nextgpt.positions == 128 + 8 + 4 + 24 + 8
    assert nextgpt.work.forward > 2 * layers * nextgpt.positions
    assert nextgpt.work.backward > 4 * layers * nextgpt.positions  # through frozen weights, and once more to recompute
    conditions, latents = 77 * 768 + 77 * 1024 + 512, 2 * 4 * 64 * 64 + 2 * 8 * 128 * 16
    assert nextgpt.cache_per_sample == 4 * (256 * 1024 + conditions + latents)
    assert not nextgpt.fits("RTX 4090")
    assert nextgpt.fits("H200")


def test_onellm_has_the_work_of_its_longest_medium():
    """FLOPs of a sound, counted by hand: 1,213 tokens through CLIP, and 30 more through the experts but for the last block."""
    plan = planning.plan(Recipe.load("onellm/depth_normal_imu_fmri"))
    sizes = {part.name: part.parameters for part in plan.parts}
    assert plan.positions == 128 + 30 + 2
    clip = 24 * (2 * 12 * 1024**2 * 1213 + 4 * 1024 * 1213**2)
    assert plan.work.frozen == pytest.approx(clip, rel=0.01)
    tokens, block = 1213 + 30, 2 * (4 * 1024**2 + 3 * 1024 * 2816)
    last = 2 * 2 * 1024**2 * tokens + 30 * (block - 2 * 2 * 1024**2) + 4 * 1024 * tokens * 30
    experts = 3 * (7 * (block * tokens + 4 * 1024 * tokens**2) + last)
    backbone = 2 * (6_738_415_616 - 2 * 32_000 * 4096) * plan.positions + 2 * 32_000 * 4096 * 64
    assert plan.work.forward - backbone == pytest.approx(experts, rel=0.01)
    assert plan.cache_per_sample == 4 * 1213 * 1024
    assert [part.name for part in plan.parts if part.trained] == [
        name for name in sizes if not name.endswith(("encoder", "backbone"))
    ]
    assert plan.seen == 108_000_000 and plan.fits("H100") and not plan.fits("L40S")


def test_media_come_in_while_instructions_are_learned_through_frozen_projections():
    recipe = Recipe.load("onellm/instruction_tuning")
    frozen = planning.plan(recipe)
    assert frozen.positions == 128 + 30 + 2
    assert frozen.work.frozen > 0 and frozen.cache_per_sample == 4 * 1213 * 1024
    recipe.train = ["inputs.*", "backbone.lora"]
    both = planning.plan(recipe)
    assert both.work.forward == frozen.work.forward
    assert both.work.backward > frozen.work.backward
    assert both.activations > frozen.activations


def test_report_has_the_numbers(nextgpt):
    printed = format_plan(nextgpt, ["H100"], 0.4, planning.TEXT)
    for text in ("6,738,415,616", "33,554,432", "31,958,784", "1,200.8 M", "40% of the published", "250,000 dialogues"):
        assert text in printed
    assert [line.split()[0] for line in printed.splitlines() if " GB  yes" in line or " GB  no" in line] == ["H100"]


def test_command_shows_the_device_that_is_asked_for(capsys):
    assert main(["plan", "tiny/decoder_alignment", "--gpu", "l40s", "run.steps=2"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in planning.GPUS if f"\n{name}" in printed] == ["L40S"]
    assert "64 dialogues" in printed


def test_command_lists_all_devices_without_a_name(capsys):
    assert main(["plan", "tiny/encoder_alignment"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in planning.GPUS if f"\n{name}" in printed] == list(planning.GPUS)
    assert "not used" in printed  # the decoder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "A100-80"], "unknown GPU 'A100-80'; did you mean 'A100-80GB'"),
        (["--gpu", "toaster"], "unknown GPU 'toaster'; known: "),
        (["--mfu", "40"], "--mfu is 40 but must be above 0 and at most 1, such as 0.4."),
        (["--text", "1"], "--text is 1 but must be at least 2"),
        (["train=[inputs.*.encoder]"], "train has 'inputs.*.encoder', which matches no part"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert main(["plan", "tiny/encoder_alignment", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert sentence in line
