"""Published weights to folders and back, through a layout of the tests' own, and what verifying finds."""

import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conversion import fake_system
from safetensors.torch import load_file, save_file

from mmbridge import hub, published, verification
from mmbridge.bridge import Bridge
from mmbridge.conversion import imagebind
from mmbridge.conversion.files import Checkpoint
from mmbridge.conversion.keymap import Target
from mmbridge.encoders import ImageBind, ImageBindConfig, ImageBindModel
from mmbridge.encoders.imagebind_modules import AudioConfig, ImuConfig, TextConfig, VisionConfig
from mmbridge.errors import CheckpointError, ConfigError

PART = "inputs.image.projection"


@pytest.fixture
def system(parts, monkeypatch):
    """A system "onellm" whose file holds a tiny bridge and its encoder."""
    monkeypatch.setitem(sys.modules, "mmbridge.conversion.onellm", fake_system)
    monkeypatch.setattr(fake_system, "CONFIG", tiny.bridge_config(parts, lora=True))
    monkeypatch.setattr(fake_system, "ENCODER", json.loads((Path(parts["imagebind"]) / "config.json").read_text()))
    monkeypatch.setattr(fake_system, "stop", None)


@pytest.fixture
def file(parts, system, tmp_path):
    """That file."""
    torch.manual_seed(5)
    bridge = Bridge.from_config(fake_system.CONFIG)
    state = {f"{part}/{name}": value for part, tensors in bridge.parts().items() for name, value in tensors.items()}
    state |= {
        f"base.vision/{name}": value
        for name, value in load_file(Path(parts["imagebind"]) / "model.safetensors").items()
    }
    state = {name: torch.randn_like(value) * 0.1 if name.startswith(PART) else value for name, value in state.items()}
    torch.save(
        {**{name: value.detach() for name, value in state.items()}, "left/over": torch.zeros(2)}, tmp_path / "in.pt"
    )
    return tmp_path / "in.pt"


@pytest.fixture
def folder(file, tmp_path):
    """The file, converted."""
    published.convert("onellm", file, tmp_path / "out", report=tmp_path / "report.json")
    return tmp_path / "out"


def findings(folder) -> dict[str, tuple[bool | None, str]]:
    return {finding.part: (finding.whole, finding.text) for finding in verification.verify(folder)}


def test_a_converted_file_opens_as_a_bridge(file, folder, tmp_path):
    bridge = Bridge.from_pretrained(folder)
    state = torch.load(file, weights_only=True)
    for part, tensors in bridge.parts().items():
        for name, value in tensors.items():
            assert torch.equal(value, state[f"{part}/{name}"])
    assert bridge.inputs["image"].encoder.source == str(folder / "base/vision")
    manifest = hub.read_json(folder / "manifest.json")
    assert manifest["converted"]["files"] == {"in.pt": hub.file_sha256(file)}
    assert "LLaMA-2" in manifest["converted"]["licence"] and "LLaMA-2" in (folder / "README.md").read_text()
    assert manifest["converted"]["unused"] == {"left/over": "nobody needs it"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["unused"] == {"left/over": "nobody needs it"}
    assert sorted(source for sources in report["used"].values() for source in sources) == sorted(
        state.keys() - {"left/over"}
    )
    assert set(manifest["base"]) == {"base.vision"}
    moved = folder.rename(tmp_path / "moved")
    bridge = Bridge.from_pretrained(moved)
    assert bridge.inputs["image"].encoder.source == str(moved / "base/vision")
    bridge.save_pretrained(tmp_path / "again")
    Bridge.from_pretrained(tmp_path / "again")


def test_floats_become_what_was_asked_for(file, tmp_path):
    published.convert("onellm", file, tmp_path / "half", "float16")
    kept = load_file(tmp_path / "half" / "parts" / f"{PART}.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float16}
    assert all(whole for whole, _ in findings(tmp_path / "half").values() if whole is not None)
    with pytest.raises(ConfigError, match="floats can't become 'float61'; did you mean 'float16'"):
        published.convert("onellm", file, tmp_path / "x", "float61")
    with pytest.raises(ConfigError, match="no published weights of 'onelm' to convert; did you mean 'onellm'"):
        published.convert("onelm", file, tmp_path / "x")


def test_what_exists_is_not_overwritten(file, folder):
    before = hub.weights_sha256(folder)
    with pytest.raises(CheckpointError, match="out exists already and was not overwritten"):
        published.convert("onellm", file, folder)
    with pytest.raises(CheckpointError, match=r"in\.pt exists already and was not overwritten"):
        published.export("onellm", folder, file)
    assert hub.weights_sha256(folder) == before


def test_frozen_models_are_found_below_the_base(file, parts, tmp_path):
    fake_system.CONFIG["backbone"]["source"] = "someone/llama"
    with pytest.raises(
        CheckpointError, match=r"holds none of the frozen models: .*someone/llama.*subfolders of these names"
    ):
        published.convert("onellm", file, tmp_path / "out", base=tmp_path)
    shutil.copytree(parts["llama"], tmp_path / "models" / "llama")
    published.convert("onellm", file, tmp_path / "out", base=tmp_path / "models")
    assert hub.read_json(tmp_path / "out" / "config.json")["backbone"]["source"] == str(tmp_path / "models" / "llama")


def test_the_way_back_is_exact(file, folder, tmp_path):
    state = torch.load(file, weights_only=True)
    published.export("onellm", folder, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys() - {"left/over"}
    assert all(back[name].dtype == state[name].dtype and torch.equal(back[name], state[name]) for name in back)
    published.export("onellm", folder, tmp_path / "back.safetensors", "bfloat16")
    assert {value.dtype for value in Checkpoint(tmp_path / "back.safetensors").meta.values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="no way back to imagebind"):
        published.export("imagebind", folder, tmp_path / "x.pt")


def test_safetensors_are_exported_a_tensor_at_a_time(folder, monkeypatch, tmp_path):
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        if not made.is_meta:
            alive[:] = [other for other in alive if other() is not None] + [weakref.ref(made)]
            most.append(len(alive))
        return made

    plain = fake_system.export_map

    def export_map(*given: Any) -> dict[str, Target]:
        return {name: Target(target.sources, counted) for name, target in plain(*given).items()}

    monkeypatch.setattr(fake_system, "export_map", export_map)
    published.export("onellm", folder, tmp_path / "back.safetensors")
    assert len(most) > 10 and max(most) <= 2
    part = folder / "parts" / f"{PART}.safetensors"
    save_file({**load_file(part), "layer.bias": torch.full((32,), torch.nan)}, part)
    with pytest.raises(CheckpointError, match=r"layer\.bias .* holds 32 values that are not finite"):
        published.export("onellm", folder, tmp_path / "broken.safetensors")
    assert not [path for path in tmp_path.iterdir() if "broken" in path.name]


def test_damage_leaves_nothing_behind(file, tmp_path):
    state = torch.load(file, weights_only=True)
    state[f"{PART}/layer.bias"][3] = torch.nan
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"layer\.bias \(from .*layer\.bias\) holds 1 values that are not finite"):
        published.convert("onellm", file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt"]


def test_parts_that_do_not_fit_the_frozen_models_are_refused(file, tmp_path):
    state = torch.load(file, weights_only=True)
    state[f"{PART}/layer.weight"] = torch.zeros(32, 99)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=rf"{PART} does not fit the frozen models .* layer\.weight \(32, "):
        published.convert("onellm", file, tmp_path / "out")


def test_a_stopped_run_goes_on(file, folder, monkeypatch, tmp_path):
    wanted, made = hub.read_json(folder / "manifest.json"), []

    def interrupt(name: str) -> None:
        made.append(name.partition("/")[0])
        if len(set(made)) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(fake_system, "stop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        published.convert("onellm", file, tmp_path / "second")
    finished = set(made[:-1])
    made.clear()
    monkeypatch.setattr(fake_system, "stop", lambda name: made.append(name.partition("/")[0]))
    published.convert("onellm", file, tmp_path / "second")
    assert hub.read_json(tmp_path / "second" / "manifest.json") == wanted
    assert made and not finished & set(made)
    assert not (tmp_path / ".second.unfinished").exists()


def test_verify_finds_a_whole_folder_whole(folder):
    found = findings(folder)
    assert found[PART][0] and found[PART][1].endswith("hash, finite, shapes, self-check of projection")
    assert found["outputs.image.projection"][1].endswith("self-check of projection")
    assert found["backbone.lora"][1].endswith("hash, finite, shapes")
    assert found["base.vision"][1].endswith("hash, finite, self-check of image")
    assert found["backbone"][0] is None and "compared when the bridge is opened" in found["backbone"][1]
    assert "inputs.image.encoder" not in found  # that is base.vision


def test_verify_finds_what_is_wrong(folder, parts):
    part = folder / "parts" / f"{PART}.safetensors"
    good = part.read_bytes()
    part.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert findings(folder)[PART] == (
        False,
        f"{part} was altered: its hash is not that of the manifest; convert again, or restore it",
    )
    part.unlink()
    assert findings(folder)[PART][1] == f"{part} is missing; convert again, or restore it"

    def replace(**tensors: torch.Tensor) -> tuple[bool | None, str]:
        part.write_bytes(good)
        save_file({**load_file(part), **{name.replace("_", "."): value for name, value in tensors.items()}}, part)
        manifest = hub.read_json(folder / "manifest.json")
        manifest["parts"][PART]["sha256"] = hub.file_sha256(part)
        hub.write_json(folder / "manifest.json", manifest)
        return findings(folder)[PART]

    whole = load_file(folder / "parts" / "outputs.image.rows.safetensors")
    assert whole and replace()[0]
    assert replace(layer_bias=torch.full((32,), torch.nan)) == (False, "layer.bias holds values that are not finite")
    assert (
        "names or shapes are not those of the module, first at layer.bias (31,)"
        in replace(layer_bias=torch.ones(31))[1]
    )
    assert replace(layer_bias=torch.ones(32))[1].startswith("self-check of projection is off by")
    # the trap of OneLLM's encoder: the same weights, read as another architecture
    encoder = hub.read_json(folder / "base/vision/config.json")
    encoder["vision"]["heads"] *= 2
    hub.write_json(folder / "base/vision/config.json", encoder)
    assert findings(folder)["base.vision"][1].startswith("self-check of image is off by")


def test_verify_needs_no_frozen_model(folder):
    config = hub.read_json(folder / "config.json")
    config["backbone"]["source"] = "nobody/nothing"
    hub.write_json(folder / "config.json", config)
    manifest = hub.read_json(folder / "manifest.json")
    manifest["frozen"]["backbone"]["weights"] = "nobody/nothing"
    hub.write_json(folder / "manifest.json", manifest)
    found = findings(folder)
    assert found["backbone"] == (None, "unchecked: nobody/nothing, not on this machine")
    assert found[PART][0] and found[PART][1].endswith("shapes, self-check of projection")
    assert found["backbone.lora"][0] and "shapes unchecked: a frozen model is missing" in found["backbone.lora"][1]


def test_verify_takes_bridges_of_our_own(parts, tmp_path):
    Bridge.from_config(tiny.bridge_config(parts, out=False)).save_pretrained(tmp_path / "bridge")
    found = findings(tmp_path / "bridge")
    assert found[PART][0] and found[PART][1].endswith("hash, finite, shapes, self-check of projection")
    assert found["backbone"][0] is None


IMAGEBIND = ImageBindConfig(
    embed_dim=12,
    vision=VisionConfig(16, 2, 2, image_size=16, patch=8),
    text=TextConfig(16, 2, 2, vocabulary=20, context=7, sot=18, eot=19),
    audio=AudioConfig(16, 2, 2, patch=8, stride=6, mel_bins=20, frames=26, clips=2),
    imu=ImuConfig(16, 2, 2, kernel=4, steps=20),
)


@pytest.fixture
def huge(tmp_path) -> Path:
    """A file of ImageBind's layout, with our configuration beside it, since its sizes are not the published ones."""
    torch.save(ImageBindModel(IMAGEBIND).state_dict(), tmp_path / "huge.pth")
    hub.write_json(tmp_path / "config.json", IMAGEBIND.to_dict())
    return tmp_path / "huge.pth"


def test_imagebind_is_one_folder_that_the_encoder_opens(huge, tmp_path):
    published.convert("imagebind", huge, tmp_path / "out")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(ImageBind("image", tmp_path / "out")(x), ImageBind("image", huge)(x))
    (found,) = verification.verify(tmp_path / "out")
    assert found.whole
    assert found.text.endswith(
        "hash, finite, shapes, " + ", ".join(f"self-check of {tower}" for tower in IMAGEBIND.towers)
    )
    sizes = hub.read_json(tmp_path / "out" / "config.json")
    sizes["audio"]["heads"] = 4
    hub.write_json(tmp_path / "out" / "config.json", sizes)
    (found,) = verification.verify(tmp_path / "out")
    assert found.whole is False and found.text.startswith("self-check of audio is off by")


def test_a_stopped_imagebind_goes_on_inside_its_file(tmp_path, monkeypatch):
    config = ImageBindConfig(embed_dim=12, vision=VisionConfig(256, 4, 8, image_size=16, patch=8))
    torch.save(ImageBindModel(config).state_dict(), tmp_path / "huge.pth")
    hub.write_json(tmp_path / "config.json", config.to_dict())
    published.convert("imagebind", tmp_path / "huge.pth", tmp_path / "first")
    read, plain = [], Checkpoint.__getitem__

    def watched(state: Checkpoint, name: str) -> torch.Tensor:
        if state.source.name == "huge.pth":
            read.append(name)
            if stop and len(read) == 50:
                raise KeyboardInterrupt
        return plain(state, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", watched)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        published.convert("imagebind", tmp_path / "huge.pth", tmp_path / "second")
    stop, before = False, read.copy()
    read.clear()
    published.convert("imagebind", tmp_path / "huge.pth", tmp_path / "second")
    assert len(read) < len(Checkpoint(tmp_path / "huge.pth")) - 20 and set(read) >= {before[-1]}
    first, second = (hub.read_json(tmp_path / name / "manifest.json") for name in ("first", "second"))
    assert first == second
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(ImageBind("image", tmp_path / "second")(x), ImageBind("image", tmp_path / "huge.pth")(x))


def test_imagebind_is_strict(huge, tmp_path):
    state = torch.load(huge, weights_only=True)

    def refused(words: str, **changes: torch.Tensor | None) -> None:
        changed = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
        torch.save({name: value for name, value in changed.items() if value is not None}, huge)
        with pytest.raises(CheckpointError, match=words):
            published.convert("imagebind", huge, tmp_path / "out")

    refused(r"1 missing: modality_heads\.imu\.0\.bias", modality_heads__imu__0__bias=None)
    refused(r"1 unexpected: modality_heads\.imu\.9\.bias", modality_heads__imu__9__bias=torch.zeros(1))
    refused(r"1 unexpected: optimizer", optimizer=torch.zeros(1))
    refused(r"modality_heads\.imu\.0\.bias \(3,\) instead of \(16,\)", modality_heads__imu__0__bias=torch.zeros(3))
    torch.save({"x": torch.zeros(1)}, huge)
    with pytest.raises(CheckpointError, match=r"no ImageBind checkpoint; its tensors are x\."):
        published.convert("imagebind", huge, tmp_path / "out")
    torch.save(state, huge)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"heads can't be read .*16 wide instead of 1280, so put a config\.json"):
        published.convert("imagebind", huge, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_published_imagebind_needs_no_help(tmp_path):
    with torch.device("meta"):
        state = ImageBindModel(ImageBindConfig.huge()).state_dict()
    keymap = imagebind.keymap(state)
    keymap.check(state, "imagebind_huge.pth")
    assert len(keymap.parts["model"]) == 1311 and not keymap.unused
    assert imagebind.base_configs(state, **imagebind.beside(tmp_path)) == {"model": ImageBindConfig.huge().to_dict()}
