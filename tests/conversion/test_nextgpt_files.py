"""Whole files of NExT-GPT: every tensor accounted for at full size, equal numbers and the way back at tiny size, damage told."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmbridge.backbones import Lora, NewRows
from mmbridge.conversion import nextgpt
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.projections import Grouping, Linear, SignalTransformer

SHAPES = json.loads((Path(__file__).parents[1] / "parity" / "nextgpt_checkpoint_keys.json").read_text())
WORDS = 300  # rows of the tiny base model
PREFIX = "llama_model.base_model.model."
OUTPUTS = {"image": "gen_text_hidden_fcs", "video": "gen_text_hidden_fcs_video", "audio": "gen_text_hidden_fcs_audio"}
FIRST = {"image": 2, "video": 6, "audio": 30}  # first signal of each, counted from the first added row
COUNTS = {"image": 4, "video": 24, "audio": 8}
SIZES = {4096: 32, 1024: 16, 768: 16, 512: 16, 1536: 48, 2048: 32, 77: 12, 32: 2}


def meta(file: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, dtype=torch.half, device="meta") for key, shape in SHAPES[file].items()}


def tiny(file: str = "release_7b_tiva_v0", words: int = WORDS, dtype: torch.dtype = torch.half) -> dict[str, Tensor]:
    """Return a file of the published names, with fewer layers and small random tensors."""
    sizes = {**SIZES, 32038: words + 38, 32036: words + 36}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in SHAPES[file].items():
        if re.search(r"(tfm\.\w+\.layers\.[1-9])|(model\.layers\.([2-9]|\d\d)\.)", key):
            continue
        small = [12 if key.startswith("llama_proj.") and size == 1024 else sizes.get(size, size) for size in shape]
        state[key] = (torch.randn(small, generator=generator) * 0.3).to(dtype)
    return state


def shapes_of(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def bridge_shapes(bridge):
    return {part: shapes_of(tensors) for part, tensors in bridge.parts().items()}


# Full size ----------------------------------------------------------------------------------------------------------------


def test_every_published_tensor_is_used_and_fills_modules_of_full_size():
    state = meta("release_7b_tiva_v0")
    parts = nextgpt.released(state)
    report = nextgpt.keymap(state).report()
    assert {name for names in report["used"].values() for name in names} == state.keys() and len(state) == 647
    embedding = torch.empty(32000, 4096, device="meta")
    with torch.device("meta"):
        for modality, (tokens, dim) in {"image": (77, 768), "video": (77, 1024), "audio": (1, 512)}.items():
            modules = {
                f"inputs.{modality}.projection": Linear(1024, 4096),
                f"outputs.{modality}.projection": SignalTransformer(4096, dim, tokens),
                f"outputs.{modality}.rows": NewRows(embedding, COUNTS[modality]),
            }
            for name, module in modules.items():
                assert dict(module.named_parameters()).keys() == parts[name].keys()
                module.load_state_dict(parts[name], strict=True, assign=True)
            assert shapes_of(parts[f"inputs.{modality}.tags"]) == {"start": (1, 4096), "end": (1, 4096)}
    assert len(parts) == 3 * 4 + 1 and len(parts["backbone.lora"]) == 256


def test_rows_that_are_left_out_are_named_with_the_reason():
    unused = nextgpt.keymap(meta("release_7b_tiva_v0")).report()["unused"]
    embedding, head = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
    assert unused.keys() == {
        f"{embedding}[0:32000]", f"{head}[0:32000]", f"{head}[32000:32002]", f"{head}[32003:32006]",
        f"{head}[32007:32030]", f"{head}[32031:32038]",
    }  # fmt: skip
    assert "keeps its own" in unused[f"{head}[0:32000]"] and "forced" in unused[f"{head}[32003:32006]"]


def test_the_bridge_of_the_released_file_has_its_parts_at_full_size():
    from mmbridge.bridge import Bridge

    state = meta("release_7b_tiva_v0")
    config = nextgpt.bridge_config(state, {"backbone": "lmsys/vicuna-7b-v1.5"})
    assert config["backbone"]["lora"] == Lora().__dict__ | {"targets": list(Lora().targets)}
    assert (config["backbone"]["template"], config["inputs"]["video"]["encoder"]["tokens"]) == ("vicuna_v0", "pooled")
    assert config["backbone"]["stop"] == "###"  # it was trained without an end-of-sequence token
    with torch.device("meta"):
        bridge = Bridge.from_config(config)
    assert bridge_shapes(bridge) == {part: shapes_of(tensors) for part, tensors in nextgpt.released(state).items()}
    assert [bridge.first_ids[modality] for modality in bridge.outputs] == [32000, 32004, 32028]


def test_files_of_the_newer_code_are_used_whole():
    state = meta("new_mm_input_projector_bin")
    found = nextgpt.keymap(state)
    with torch.device("meta"):
        module = Grouping(1024, 4096, 8, variant="published")
    for modality in COUNTS:
        module.load_state_dict(found.apply(state)[f"inputs.{modality}.projection"], strict=True, assign=True)
    assert len(found.parts) == 3 and {"model.embed_tokens.weight", "lm_head.weight"} <= found.unused.keys()
    config = nextgpt.bridge_config(state)["inputs"]["audio"]
    assert (config["encoder"]["tokens"], config["tags"], config["projection"]["name"]) == ("patch", False, "grouping")

    state = meta("new_mm_output_projector_bin")
    parts = nextgpt.released(state)
    rows = {modality: tuple(parts[f"outputs.{modality}.rows"]["embedding"].shape) for modality in COUNTS}
    assert rows == {"image": (7, 4096), "video": (47, 4096), "audio": (15, 4096)}
    with torch.device("meta"):
        SignalTransformer(4096, 1024, 77).load_state_dict(parts["outputs.image.projection"], strict=True, assign=True)
    assert nextgpt.bridge_config(state)["outputs"]["video"]["spaces"]


# Tiny size: what goes where -------------------------------------------------------------------------------------------------


def test_one_projection_and_one_pair_of_tags_serve_all_ways_in():
    state = tiny()
    parts = nextgpt.released(state)
    for modality in COUNTS:
        assert torch.equal(parts[f"inputs.{modality}.projection"]["layer.weight"], state["llama_proj.weight"])
        tags = parts[f"inputs.{modality}.tags"]
        wanted = state[f"{PREFIX}model.embed_tokens.weight"][WORDS : WORDS + 2]
        assert torch.equal(torch.cat([tags["start"], tags["end"]]), wanted)


@pytest.mark.parametrize("modality", COUNTS)
def test_rows_are_those_of_the_published_ids(modality):
    state = tiny()
    rows = nextgpt.released(state)[f"outputs.{modality}.rows"]
    first = WORDS + FIRST[modality]
    assert torch.equal(rows["embedding"], state[f"{PREFIX}model.embed_tokens.weight"][first : first + COUNTS[modality]])
    assert torch.equal(rows["head"], state[f"{PREFIX}lm_head.weight"][first : first + 1])


def test_rows_of_the_newer_code_have_the_space_between_signals():
    state = tiny("new_mm_output_projector_bin")
    embedding = state["model.embed_tokens.weight"]
    rows = nextgpt.keymap(state, space=7).apply(state)["outputs.image.rows"]
    assert torch.equal(rows["embedding"], embedding[[WORDS, 7, WORDS + 1, 7, WORDS + 2, 7, WORDS + 3]])
    assert torch.equal(rows["head"], state["lm_head.weight"][WORDS : WORDS + 1])
    with pytest.raises(CheckpointError, match="has 300 rows of the base model, so the space can't be number 29871"):
        nextgpt.keymap(state)


def test_names_of_adapters_with_and_without_default_are_the_same():
    state = tiny()
    plain = {key.replace(".default.", "."): value for key, value in state.items()}
    one, other = nextgpt.released(state)["backbone.lora"], nextgpt.released(plain)["backbone.lora"]
    assert one.keys() == other.keys() and "model.layers.1.self_attn.o_proj.lora_B.default.weight" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_files_of_the_first_stages_have_no_adapters_and_shorter_names():
    state = {key.replace(PREFIX, "llama_model."): value for key, value in tiny().items() if ".lora_" not in key}
    assert "llama_model.model.embed_tokens.weight" in state and "llama_model.lm_head.weight" in state
    parts = nextgpt.released(state)
    assert "backbone.lora" not in parts and len(parts) == 12
    assert nextgpt.bridge_config(state)["backbone"]["lora"] is None
    encoder = {key: value for key, value in state.items() if "gen_text" not in key}
    assert nextgpt.released(encoder).keys() == {f"inputs.{m}.{part}" for m in COUNTS for part in ("projection", "tags")}
    assert not nextgpt.bridge_config(encoder)["outputs"]


def test_rows_that_differ_from_the_base_models_are_told(caplog):
    state = tiny()
    base = {name: state[PREFIX + name][:WORDS].float() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    with caplog.at_level(logging.WARNING, "mmbridge"):
        nextgpt.released(state, base)
    assert not caplog.records
    base["lm_head.weight"] = base["lm_head.weight"].clone()
    base["lm_head.weight"][[3, 5]] += 0.5
    with caplog.at_level(logging.WARNING, "mmbridge"):
        nextgpt.released(state, base)
    assert [record.message for record in caplog.records] == [
        "2 of 300 rows of lm_head.weight differ from the base model's, by 0.5 at most; the base model's are used."
    ]
    caplog.clear()
    nextgpt.released(state, {name: state[PREFIX + name][:290] for name in base})
    assert caplog.records[0].message == "10 rows of model.embed_tokens.weight are in one of file and base model only."
    with pytest.raises(CheckpointError, match="the base model is 8 wide, the NExT-GPT checkpoint 32"):
        nextgpt.released(state, {**base, "lm_head.weight": torch.zeros(300, 8)})


def test_an_unknown_frozen_part_is_refused():
    with pytest.raises(
        ConfigError, match="no frozen part 'outputs.image.decodr'; did you mean 'outputs.image.decoder'"
    ):
        nextgpt.bridge_config(tiny(), {"outputs.image.decodr": "x"})


# Damage -------------------------------------------------------------------------------------------------------------------

SOME = [*list(tiny())[::9], "llama_proj.bias", f"{PREFIX}lm_head.weight", f"{PREFIX}model.embed_tokens.weight"]


@pytest.mark.parametrize("key", SOME)
def test_a_missing_tensor_is_named(key):
    state = tiny()
    del state[key]
    with pytest.raises(CheckpointError, match=rf"NExT-GPT checkpoint .*{re.escape(key)}"):
        nextgpt.released(state)


@pytest.mark.parametrize("key", SOME)
def test_a_wrong_shape_is_named(key):
    state = tiny()
    for wrong in (state[key][None], torch.zeros(())):
        with pytest.raises(CheckpointError, match=rf"NExT-GPT checkpoint .*{re.escape(key)}.* \("):
            nextgpt.released(state | {key: wrong})


@pytest.mark.parametrize("key", SOME)
def test_numbers_that_are_not_finite_are_named(key):
    state = tiny()
    state[key].view(-1)[-1] = torch.nan
    if key.endswith("lm_head.weight"):  # its last row is none that is kept
        state[key][WORDS + FIRST["video"]] = torch.inf
    with pytest.raises(
        CheckpointError, match="NExT-GPT checkpoint has numbers that are not finite in (inputs|outputs|back)"
    ):
        nextgpt.released(state)


@pytest.mark.parametrize(
    "key", ["llama_model.extra", "gen_text_hidden_fcs.1.fc.weight", "llama_proj.scale", "optimizer"]
)
def test_an_unexpected_tensor_is_named(key):
    with pytest.raises(CheckpointError, match=rf"1 unexpected: {re.escape(key)}"):
        nextgpt.released(tiny() | {key: torch.zeros(1)})


def test_a_file_of_something_else_is_refused():
    with pytest.raises(CheckpointError, match="no checkpoint of NExT-GPT: it has a.b. Give pytorch_model.pt"):
        nextgpt.released({"a.b": torch.zeros(1)})


# Back -----------------------------------------------------------------------------------------------------------------------


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def test_published_to_ours_and_back_is_the_same_file():
    state = tiny()
    assert_same(nextgpt.export(nextgpt.released(state), state), state)


def test_with_only_the_base_model_what_is_kept_comes_back():
    state = tiny()
    base = {name: state[PREFIX + name][:WORDS] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    back = nextgpt.export(nextgpt.released(state), base)
    head = back.pop(f"{PREFIX}lm_head.weight")
    kept = [*range(WORDS), *(WORDS + first for first in FIRST.values())]
    assert torch.equal(head[kept], state[f"{PREFIX}lm_head.weight"][kept])
    head[kept] = 0
    assert head.shape == (WORDS + 38, 32) and not head.any()
    assert_same(back, {key: value for key, value in state.items() if not key.endswith("lm_head.weight")})


@pytest.mark.parametrize("lora", [True, False])
def test_ours_to_published_and_back_are_the_same_parts(lora):
    parts = {
        part: {name: value.float() + 1e-5 for name, value in tensors.items()}
        for part, tensors in nextgpt.released(tiny()).items()
        if lora or part != "backbone.lora"
    }
    base = {"model.embed_tokens.weight": torch.randn(WORDS, 32), "lm_head.weight": torch.randn(WORDS, 32)}
    again = nextgpt.released(nextgpt.export(parts, base))
    assert again.keys() == parts.keys()
    for part in parts:
        assert_same(again[part], parts[part])
    halves = nextgpt.export(parts, base, torch.half)
    assert {value.dtype for value in halves.values()} == {torch.half}


def test_what_the_released_layout_can_not_hold_is_refused():
    state = tiny()
    parts = nextgpt.released(state)
    other = {name: value + 1 for name, value in parts["inputs.audio.projection"].items()}
    with pytest.raises(CheckpointError, match="one projection for image, video and audio, but this bridge's differ"):
        nextgpt.export({**parts, "inputs.audio.projection": other}, state)
    with pytest.raises(CheckpointError, match="1 missing: inputs.image.tags; 1 unexpected: inputs.depth.projection"):
        nextgpt.export(
            {
                **{name: part for name, part in parts.items() if name != "inputs.image.tags"},
                "inputs.depth.projection": {},
            },
            state,
        )
    rows = {"embedding": torch.zeros(7, 32), "head": torch.zeros(1, 32)}
    with pytest.raises(CheckpointError, match=r"outputs.image.rows has the shape \(7, 32\), but .* has 4 signals"):
        nextgpt.export({**parts, "outputs.image.rows": rows}, state)
    with pytest.raises(CheckpointError, match="the base model lacks model.embed_tokens.weight or lm_head.weight"):
        nextgpt.export(parts, {})


# Numbers ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny LLaMA, an ImageBind that sees and hears, and three decoders."""
    import tiny as factories
    from decoders import tiny_decoders

    from mmbridge.encoders.imagebind import ImageBindModel
    from mmbridge.encoders.imagebind_modules import ImageBindConfig

    root = tmp_path_factory.mktemp("nextgpt")
    audio = {"dim": 16, "depth": 1, "heads": 2, "patch": 8, "stride": 6, "mel_bins": 20, "frames": 26}
    torch.manual_seed(1)
    model = ImageBindModel(ImageBindConfig.from_dict({**factories.IMAGEBIND, "audio": audio}), ("image", "audio"))
    model.save_pretrained(root / "imagebind")
    made = {
        "image": tiny_decoders.stable_diffusion, "video": tiny_decoders.modelscope, "audio": tiny_decoders.audioldm,
    }  # fmt: skip
    return {
        "backbone": factories.llama(root / "llama"),
        **{f"inputs.{modality}.encoder": str(root / "imagebind") for modality in COUNTS},
        **{f"outputs.{modality}.decoder": str(make(root / modality)["source"]) for modality, make in made.items()},
    }


@pytest.fixture(scope="module")
def base(folders):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folders["backbone"]).eval()


@pytest.fixture(scope="module")
def state(base):
    return tiny(words=base.config.vocab_size)


@pytest.fixture(scope="module")
def opened(folders, state, tmp_path_factory):
    """The bridge of the converted file, opened from its folder."""
    from mmbridge import hub
    from mmbridge.bridge import Bridge

    config = nextgpt.bridge_config(state, folders)
    del config["outputs"]["video"]["decoder"]["resolution"]
    folder = tmp_path_factory.mktemp("converted") / "bridge"
    built = Bridge.from_config(config)
    parts = nextgpt.released(state)
    assert bridge_shapes(built) == {part: shapes_of(tensors) for part, tensors in parts.items()}
    built.save_pretrained(folder)
    manifest = hub.read_json(folder / "manifest.json")
    for part, tensors in parts.items():
        file = folder / "parts" / f"{part}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        manifest["parts"][part]["sha256"] = hub.file_sha256(file)
    hub.write_json(folder / "manifest.json", manifest)
    return Bridge.from_pretrained(folder)


def merged(base, state):
    """The base model with the published adapters added to its matrices; alpha over rank is 1."""
    import copy

    model = copy.deepcopy(base)
    for number, layer in enumerate(model.model.layers):
        for place in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"{PREFIX}model.layers.{number}.self_attn.{place}.lora_"
            down, up = (state[f"{stem}{side}.default.weight"].float() for side in "AB")
            getattr(layer.self_attn, place).weight.data += up @ down
    return model


def condition(state, modality, states):
    """The published output projection, from torch's own layers."""
    own = {
        key.removeprefix(f"{OUTPUTS[modality]}.0."): value.float()
        for key, value in state.items()
        if key.startswith(f"{OUTPUTS[modality]}.0.")
    }
    transformer = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True, norm_first=True).eval()
    transformer.load_state_dict(
        {key.removeprefix("tfm."): value for key, value in own.items() if key.startswith("tfm.")}
    )
    x = F.linear(states, own["fc.weight"], own["fc.bias"])
    return F.linear(transformer(x, own["query_embs"].expand(len(x), -1, -1)), own["model.weight"], own["model.bias"])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("modality", COUNTS)
@torch.no_grad()
def test_conditions_and_scores_are_those_of_the_published_formula(modality, base, state, opened):
    from mmbridge.media import Image
    from mmbridge.sequence import collate

    picture = Image(torch.arange(768, dtype=torch.uint8).view(3, 16, 16))
    dialogue = [
        {"role": "user", "content": [{"type": "image", "data": picture}, {"type": "text", "text": "What is it?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "It is red."}, {"type": modality, "caption": "red"}],
        },
    ]
    (sequence,) = opened.prepare([dialogue])
    way = opened.outputs[modality]
    (entering,), (leaving,) = sequence.entering, sequence.leaving
    assert (entering.length, leaving.length) == (3, COUNTS[modality])
    block = slice(leaving.start, leaving.start + leaving.length)

    # Published ids: the base model's, <Img>, </Img>, then signals. Words keep the base model's rows.
    words = base.config.vocab_size
    rows = state[f"{PREFIX}model.embed_tokens.weight"].float()
    rows[:words] = base.model.embed_tokens.weight
    ids = [word + 2 if word >= words else word for word in sequence.ids]
    assert ids[block] == [words + FIRST[modality] + index for index in range(COUNTS[modality])]
    embeddings = rows[ids]
    feature = opened.inputs["image"].features([picture])[0].mean(0)
    medium = F.linear(feature, state["llama_proj.weight"].float(), state["llama_proj.bias"].float())
    embeddings[entering.start : entering.start + 3] = torch.stack([rows[words], medium, rows[words + 1]])
    hidden = merged(base, state).model(inputs_embeds=embeddings[None]).last_hidden_state
    wanted = condition(state, modality, hidden[:, block] + embeddings[None, block])

    batch = collate([sequence])
    ours = opened.embed(batch)
    torch.testing.assert_close(ours[0], embeddings, rtol=0, atol=1e-5)
    found = opened.backbone(ours, batch.mask.long())
    torch.testing.assert_close(found, hidden, rtol=0, atol=1e-5)
    projected = way.condition(found[:, block], ours[:, block])
    torch.testing.assert_close(
        projected, F.normalize(wanted, dim=-1) if modality == "audio" else wanted, rtol=0, atol=1e-5
    )
    way.normalize = False  # the published code's audio condition
    torch.testing.assert_close(way.condition(found[:, block], ours[:, block]), wanted, rtol=0, atol=1e-5)
    way.normalize = True
    head = state[f"{PREFIX}lm_head.weight"].float()[words + FIRST[modality]]
    scores = opened.logits(found)[..., opened.column_of(opened.first_ids[modality])]
    torch.testing.assert_close(scores, hidden @ head, rtol=0, atol=1e-5)


@torch.no_grad()
def test_adapters_open_in_peft(base, state, opened, folders, tmp_path):
    import copy

    from peft import PeftModel

    adapters = {name: value.detach() for name, value in opened.parts()["backbone.lora"].items()}
    tensors, config = nextgpt.peft_adapter(adapters, opened.backbone.lora, folders["backbone"])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids = torch.tensor([[1, 5, 9, 20]])
    wanted = merged(base, state)(ids).logits
    torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, base(ids).logits, atol=1e-3)


def test_the_saved_bridge_goes_back_to_the_published_file(state, opened):
    parts = {part: dict(tensors) for part, tensors in opened.parts().items()}
    assert_same(nextgpt.export(parts, state, torch.half), state)
