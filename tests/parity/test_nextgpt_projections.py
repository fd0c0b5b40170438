"""Projections against numbers that NExT-GPT's published code computed (commit in each file's metadata).

Inputs, weights (``w.*``) and outputs are float32 from eval mode with random weights. Tolerance 1e-5, absolute: outputs
have unit scale, and the published code differs from itself by up to 3e-6 between its code paths.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbridge.conversion import nextgpt
from mmbridge.errors import CheckpointError

HERE = Path(__file__).parent
CONVERTERS = {
    "new_inproj_linear": nextgpt.linear,
    "new_inproj_mlp": nextgpt.mlp,
    "new_inproj_group": lambda state: nextgpt.grouping(state, num_heads=4),
    "legacy_outproj": nextgpt.signal_transformer,
    "new_outproj": nextgpt.signal_transformer,
}

SOME = slice(None, None, 7)  # enough that each kind of tensor occurs, few enough to be quick
FIRST_LAYERS = {"weight", "layer.0.weight", "fc.weight", "in_fc.weight"}


def oracle(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the published weights and the other tensors of one file."""
    tensors = load_file(HERE / f"nextgpt_{name}_mini.safetensors")
    state = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    return state, {key: value for key, value in tensors.items() if not key.startswith("w.")}


@pytest.mark.parametrize("name", CONVERTERS)
def test_outputs_match(name):
    state, data = oracle(name)
    projection = CONVERTERS[name](state).eval()
    x = data["x"] + data["input_embs"] if "input_embs" in data else data["x"]
    torch.testing.assert_close(projection(x), data["y"], rtol=0, atol=1e-5)
    with torch.no_grad():  # torch takes another path through nn.Transformer here
        torch.testing.assert_close(projection(x), data["y"], rtol=0, atol=1e-5)


def test_group_assignments_match():
    state, data = oracle("new_inproj_group")
    first, second = CONVERTERS["new_inproj_group"](state).assignments(data["x"])
    assert torch.equal(first, data["assign0"])
    assert torch.equal(second, data["assign1"])


def test_caption_alignment_distance_matches():
    state, data = oracle("legacy_outproj")
    y = nextgpt.signal_transformer(state).eval()(data["x"] + data["input_embs"])
    distance = (y - data["target"]).norm(dim=-1).mean()
    torch.testing.assert_close(distance, data["caption_align_loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONVERTERS)
def test_half_precision_files_become_float32_modules(name):
    state, data = oracle(name)
    projection = CONVERTERS[name]({key: value.half() for key, value in state.items()})
    assert {p.dtype for p in projection.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in projection.parameters())
    assert projection(data["x"]).isfinite().all()


@pytest.mark.parametrize("name", CONVERTERS)
def test_conversion_leaves_source_and_random_state_alone(name):
    state, _ = oracle(name)
    copies, random_state = {key: value.clone() for key, value in state.items()}, torch.get_rng_state()
    projection = CONVERTERS[name](state)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(state[key], copies[key]) for key in copies)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_missing_tensor_is_named(name):
    state, _ = oracle(name)
    for key in sorted(state)[SOME]:
        rest = {other: value for other, value in state.items() if other != key}
        with pytest.raises(
            CheckpointError, match=rf"NExT-GPT checkpoint (lacks '{key}'|does not fill .* missing: {key})"
        ):
            CONVERTERS[name](rest)


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_damaged_tensor_is_named(name):
    state, _ = oracle(name)
    for key, value in sorted(state.items())[SOME]:
        for spoiled in (torch.nan, torch.inf):
            damaged = value.clone()
            damaged.view(-1)[-1] = spoiled
            with pytest.raises(CheckpointError, match=rf"1 not finite: {key}\. .*undamaged file"):
                CONVERTERS[name](state | {key: damaged})


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_wrong_shape_is_named(name):
    state, _ = oracle(name)
    message = r"NExT-GPT checkpoint .*{} (of the wrong shape: \(|\(.*\) instead of \()"
    for key, value in sorted(state.items())[SOME]:
        for wrong in (value[None], value[..., None]):
            with pytest.raises(CheckpointError, match=message.format(re.escape(key))):
                CONVERTERS[name](state | {key: wrong})
        if key not in FIRST_LAYERS:  # there, a shorter last axis is a narrower encoder or backbone, no damage
            with pytest.raises(CheckpointError, match="shape"):
                CONVERTERS[name](state | {key: value[..., :-1]})


def test_heads_that_do_not_divide_the_width_are_refused():
    state, _ = oracle("new_inproj_group")
    with pytest.raises(CheckpointError, match=r"fit no projection: .*num_heads=5, which does not divide dim_hidden=32"):
        nextgpt.grouping(state, num_heads=5)


@pytest.mark.parametrize("name", CONVERTERS)
def test_unexpected_tensors_are_named(name):
    state, _ = oracle(name)
    extra = {f"extra.{i:02}": torch.zeros(1) for i in range(10)}
    with pytest.raises(CheckpointError, match=r"10 unexpected: extra\.00, .*extra\.07 and 2 more\."):
        CONVERTERS[name](state | extra)


def test_unstripped_prefix_is_explained():
    state, _ = oracle("legacy_outproj")
    prefixed = {f"gen_text_hidden_fcs.0.{key}": value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"lacks 'in_fc.weight'.*gen_text_hidden_fcs\.0.*prefix stripped"):
        nextgpt.signal_transformer(prefixed)


def test_mixed_old_and_new_names_are_refused():
    state, _ = oracle("legacy_outproj")
    state["in_fc.weight"] = state["fc.weight"]
    with pytest.raises(CheckpointError, match=r"1 unexpected: in_fc\.weight"):
        nextgpt.signal_transformer(state)


@pytest.mark.parametrize(
    ("file", "prefix", "convert", "sizes"),
    [
        ("release_7b_tiva_v0", "llama_proj.", nextgpt.linear, (1024, 4096)),
        ("release_7b_tiva_v0", "gen_text_hidden_fcs.0.", nextgpt.signal_transformer, (4096, 768)),
        ("release_7b_tiva_v0", "gen_text_hidden_fcs_video.0.", nextgpt.signal_transformer, (4096, 1024)),
        ("release_7b_tiva_v0", "gen_text_hidden_fcs_audio.0.", nextgpt.signal_transformer, (4096, 512)),
        ("new_mm_input_projector_bin", "model.mm_input_projector.", nextgpt.grouping, (1024, 4096)),
        ("new_mm_output_projector_bin", "model.mm_output_img_projector.", nextgpt.signal_transformer, (4096, 1024)),
    ],
)
def test_every_published_key_at_its_published_shape_is_used(file, prefix, convert, sizes):
    shapes = json.loads((HERE / "nextgpt_checkpoint_keys.json").read_text())[file]
    state = {
        key.removeprefix(prefix): torch.zeros(1, dtype=torch.half).expand(shape)  # expanded: no memory
        for key, shape in shapes.items()
        if key.startswith(prefix)
    }
    projection = convert(state)
    assert (projection.dim_in, projection.dim_out) == sizes
    assert sum(p.numel() for p in projection.parameters()) == sum(value.numel() for value in state.values())
