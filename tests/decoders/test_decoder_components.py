"""Folders of components: sharing, fingerprints, manifests, and every kind of damage as one sentence."""

import gc
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mmbridge.decoders import StableDiffusion
from mmbridge.errors import CheckpointError
from mmbridge.media import Image

CAPTIONS = ["a red blob", "red"]
UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


def use_everything(decoder):
    condition, _ = decoder.encode(CAPTIONS)
    target = decoder.target([Image(torch.zeros(3, 16, 16, dtype=torch.uint8))] * 2)
    return decoder.loss(condition, target, torch.Generator().manual_seed(0))


def change_weights(file, change):
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def first(state):
    return min(state)


def test_decoders_of_equal_weights_share_their_modules(shipped, folder):
    one, two = StableDiffusion(shipped), StableDiffusion(folder)
    assert_close(use_everything(one), use_everything(two), rtol=0, atol=0)
    assert one.text_encoder is two.text_encoder and one.unet is two.unet and one.vae is two.vae
    half = StableDiffusion(shipped, dtype="bfloat16")
    half.encode(CAPTIONS)
    assert half.text_encoder is not one.text_encoder and one.text_encoder.dtype == torch.float32


def test_a_shared_module_that_was_cast_is_not_handed_out_again(shipped):
    one = StableDiffusion(shipped)
    one.encode(CAPTIONS)
    one.to(torch.bfloat16)
    two = StableDiffusion(shipped)
    assert two.encode(CAPTIONS)[0].dtype == torch.float32


def test_only_equal_weights_are_shared(shipped, folder):
    change_weights(folder / f"{TEXT}.safetensors", lambda state: state[first(state)].mul_(-9))
    one, two = StableDiffusion(shipped), StableDiffusion(folder)
    assert (one.encode(CAPTIONS)[0] - two.encode(CAPTIONS)[0]).abs().max() > 1e-3
    assert one.text_encoder is not two.text_encoder


def test_modules_are_let_go_with_their_last_decoder(folder):
    from mmbridge.decoders import components

    change_weights(folder / f"{TEXT}.safetensors", lambda state: state[first(state)].add_(2))
    before = len(components._shared)
    decoder = StableDiffusion(folder)
    decoder.encode(CAPTIONS)
    assert len(components._shared) == before + 1
    del decoder
    gc.collect()
    assert len(components._shared) == before


def test_sharded_weights_and_other_variants_in_the_folder(shipped, folder):
    """diffusers writes large models as several files and an index; hubs keep half-precision variants beside them."""
    wanted = use_everything(StableDiffusion(shipped))
    whole = folder / f"{UNET}.safetensors"
    state = load_file(whole)
    names = sorted(state)
    shards = {"00001": names[:40], "00002": names[40:]}
    index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": {}}
    for number, keys in shards.items():
        file = f"diffusion_pytorch_model-{number}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / "unet" / file, metadata={"format": "pt"})
        index["weight_map"].update(dict.fromkeys(keys, file))
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    whole.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    decoder = StableDiffusion(folder)
    assert_close(use_everything(decoder), wanted, rtol=0, atol=0)
    before = decoder.describe()["sha256"]
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert decoder.describe()["sha256"] == before

    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"unet can't be loaded: its files are damaged, incomplete"):
        use_everything(StableDiffusion(folder))


def test_fingerprint_follows_what_is_cached(shipped, folder):
    def fingerprint(**arguments):
        return StableDiffusion(folder, **arguments).fingerprint

    whole = fingerprint()
    assert whole == StableDiffusion(shipped).fingerprint, "of content, not of place"
    assert whole == fingerprint(steps=9, guidance=1.0), "sampling changes nothing that is cached"
    assert len({whole, fingerprint(resolution=24), fingerprint(dtype="bfloat16")}) == 3
    change_weights(folder / f"{UNET}.safetensors", lambda state: state[first(state)].add_(1))
    assert fingerprint() == whole, "the UNet makes neither conditions nor targets"
    seen = {whole}
    for file in (VAE, TEXT):
        change_weights(folder / f"{file}.safetensors", lambda state: state[first(state)].add_(1))
        seen.add(fingerprint())
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "a"}))
    assert len(seen | {fingerprint()}) == 4


def test_fingerprint_of_components_in_memory(components):
    decoder = StableDiffusion.from_components(**components)
    before = decoder.fingerprint
    use_everything(decoder)
    assert decoder.fingerprint == before
    with torch.no_grad():
        components["vae"].quant_conv.weight.add_(1)
    assert decoder.fingerprint != before


def test_the_manifest_names_the_weights(shipped, folder):
    entry = StableDiffusion(shipped).describe()
    assert {key: entry[key] for key in ("name", "source", "licence", "revision")} == {
        "name": "stable_diffusion",
        "source": str(shipped),
        "licence": "Apache-2.0",
        "revision": None,
    }
    assert len(entry["sha256"]) == 64
    change_weights(folder / f"{UNET}.safetensors", lambda state: state[first(state)].add_(1))
    assert StableDiffusion(folder).describe()["sha256"] != entry["sha256"]


def test_the_revision_of_a_hub_snapshot_is_its_commit(shipped, tmp_path):
    snapshot = shutil.copytree(shipped, tmp_path / "models--org--repo" / "snapshots" / "0123abc")
    assert StableDiffusion(snapshot).describe()["revision"] == "0123abc"


def delete(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def reweigh(name, change):
    return lambda folder: change_weights(folder / name, change)


def drop_one(state):
    del state[first(state)]


def widen_one(state):
    state[first(state)] = state[first(state)].repeat(2, *[1] * (state[first(state)].ndim - 1))


def add_one(state):
    state["foreign.weight"] = torch.zeros(1)


DAMAGE = {
    "no weights": (delete(f"{UNET}.safetensors"), r"no weights for its unet.*safetensors.*restore the file"),
    "no text weights": (delete(f"{TEXT}.safetensors"), r"no weights for its text_encoder"),
    "no configuration": (delete("vae/config.json"), r"vae/config\.json is missing"),
    "broken configuration": (truncate("unet/config.json"), r"unet/config\.json is not valid JSON"),
    "no tokenizer": (delete("tokenizer/tokenizer_config.json"), r"tokenizer_config\.json is missing"),
    "broken tokenizer": (truncate("tokenizer/tokenizer.json"), r"tokenizer can't be loaded.*damaged"),
    "no scheduler": (delete("scheduler/scheduler_config.json"), r"scheduler_config\.json is missing"),
    "truncated weights": (truncate(f"{VAE}.safetensors"), r"vae can't be loaded.*damaged.*restore"),
    "truncated text weights": (truncate(f"{TEXT}.safetensors"), r"text_encoder can't be loaded.*damaged"),
    "missing tensor": (
        reweigh(f"{UNET}.safetensors", drop_one),
        r"unet .* do not fit its config\.json: \S+ is missing;",
    ),
    "missing text tensor": (reweigh(f"{TEXT}.safetensors", drop_one), r"text_encoder .* do not fit .* is missing"),
    "wrong width": (
        reweigh(f"{VAE}.safetensors", widen_one),
        r"vae .* do not fit .* has shape \(16\S*.* instead of \(8",
    ),
    "wrong text width": (reweigh(f"{TEXT}.safetensors", widen_one), r"text_encoder .* has shape .* instead of \("),
    "foreign tensor": (reweigh(f"{UNET}.safetensors", add_one), r"foreign\.weight is not part of the model"),
}


@pytest.fixture
def reports(caplog):
    """What diffusers and transformers log themselves; their loggers don't pass it on to the root."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(folder, damage, reports):
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        use_everything(StableDiffusion(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not [record for record in reports.records if record.name != "mmbridge"], "their own reports are kept away"


def test_a_scheduler_that_diffusers_lacks_is_named(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CheckpointError, match="is a 'UNet2DConditionModel', which is not a scheduler of diffusers"):
        use_everything(StableDiffusion(folder))


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is a file; a decoder is loaded from a diffusers folder"
    ):
        _ = StableDiffusion(tmp_path / "model.safetensors").spec
    with pytest.raises(CheckpointError, match="no file or folder at"):
        _ = StableDiffusion(tmp_path / "nowhere").spec
