"""The feature store: computed once, read back exactly, never stale, and proof against damage."""

import logging
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbridge import hub
from mmbridge.data.features import FeatureStore
from mmbridge.errors import CheckpointError, ConfigError, MediaError
from mmbridge.media import Image
from mmbridge.messages import MediumPart


class Work:
    """A frozen computation that counts its calls: the mean colour of a picture and the length of its caption."""

    def __init__(self, root=None):
        self.root, self.parts = root, []

    def __call__(self, parts):
        self.parts += parts
        values = []
        for part in parts:
            source = part.data if part.data is not None else part.path
            colour = (
                torch.zeros(3) if source is None else Image.load(source, root=self.root).pixels.float().mean((1, 2))
            )
            values.append({"colour": colour / 7, "length": torch.tensor([len(part.caption or "")])})
        return values


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    return [MediumPart("image", path=f"{number}.png") for number in range(3)]


def picture(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    Image(torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)).save(path)


def fetch(store, parts, work, fingerprint="f", root=None):
    return store.fetch(fingerprint, parts, work, root if root is not None else work.root)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def equal(first, second):
    return all(torch.equal(one[key], two[key]) for one, two in zip(first, second, strict=True) for key in one)


@pytest.mark.parametrize("stored", [True, False])
def test_values_are_computed_once(tmp_path, pictures, work, stored):
    store = FeatureStore(tmp_path / "cache" if stored else None)
    first = fetch(store, [*pictures, pictures[0]], work)
    assert len(work.parts) == 3
    again = fetch(store, pictures[::-1], work)
    assert len(work.parts) == 3
    assert equal(first[:3], again[::-1])
    assert equal(first[:1], first[3:])
    assert len(store) == 3
    assert store.computed == {"image": 3}


def test_another_process_reads_what_was_written_bit_for_bit(tmp_path, pictures, work):
    store = FeatureStore(tmp_path / "cache")
    first = fetch(store, pictures, work)
    store.flush()
    reopened = FeatureStore(tmp_path / "cache")
    assert len(reopened) == 3
    assert equal(fetch(reopened, pictures, work), first)
    assert len(work.parts) == 3
    assert "3 cached values" in reopened.describe()
    assert reopened.size == sum(path.stat().st_size for path in shards(tmp_path / "cache"))


def test_shards_are_added_and_never_changed(tmp_path, pictures, work):
    store = FeatureStore(tmp_path / "cache")
    fetch(store, pictures[:2], work)
    store.flush()
    (first,) = shards(tmp_path / "cache")
    before = first.read_bytes()
    fetch(store, pictures, work)
    store.flush()
    assert first.read_bytes() == before
    assert len(shards(tmp_path / "cache")) == 2
    assert len(work.parts) == 3


def test_a_changed_weight_setting_caption_or_file_is_computed_anew(tmp_path, pictures, work):
    store = FeatureStore(tmp_path / "cache")
    fetch(store, pictures[:1], work)
    fetch(store, pictures[:1], work, fingerprint="another weight")
    assert len(work.parts) == 2
    fetch(store, [MediumPart("image", path="0.png", caption="a cat")], work)
    assert len(work.parts) == 3
    picture(tmp_path / "0.png", seed=9)
    fetch(store, pictures[:1], work)
    assert len(work.parts) == 4


def test_equal_content_under_another_name_is_the_same_medium(tmp_path, pictures, work):
    store = FeatureStore(tmp_path / "cache")
    fetch(store, pictures[:1], work)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    fetch(store, [MediumPart("image", path="copy.png")], work)
    assert len(work.parts) == 1


def test_media_in_memory_are_found_by_content(tmp_path, work):
    store = FeatureStore(None)
    pixels = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
    for data in (Image(pixels), Image(pixels.clone()), pixels.clone(), pixels.permute(1, 2, 0).numpy()):
        fetch(store, [MediumPart("image", data=data)], work)
    assert len(work.parts) == 1
    fetch(store, [MediumPart("image", data=Image(255 - pixels))], work)
    assert len(work.parts) == 2


def test_unchanged_files_are_not_hashed_again(tmp_path, pictures, work, monkeypatch):
    store = FeatureStore(tmp_path / "cache")
    fetch(store, pictures, work)
    store.flush()
    hashed = []
    sha256 = hub.file_sha256
    monkeypatch.setattr(hub, "file_sha256", lambda path: hashed.append(path) or sha256(path))
    fetch(FeatureStore(tmp_path / "cache"), pictures, work)
    assert hashed == []
    os.utime(tmp_path / "1.png", (1, 1))
    fetch(FeatureStore(tmp_path / "cache"), pictures, work)
    assert [path.name for path in hashed] == ["1.png"]
    assert len(work.parts) == 3


def stored(tmp_path, pictures, work):
    store = FeatureStore(tmp_path / "cache")
    values = fetch(store, pictures, work)
    store.flush()
    (shard,) = shards(tmp_path / "cache")
    return shard, values


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", ["data", "header", "cut", "cut header", "empty"])
def test_damaged_shards_are_noticed_and_computed_anew(tmp_path, pictures, work, damage, caplog):
    shard, values = stored(tmp_path, pictures, work)
    (length,) = struct.unpack("<Q", shard.read_bytes()[:8])
    match damage:
        case "data":
            flip(shard, -1)
        case "header":
            flip(shard, 8)
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-3])
        case "cut header":
            shard.write_bytes(shard.read_bytes()[: length // 2])
        case "empty":
            shard.write_bytes(b"")
    with caplog.at_level(logging.WARNING, "mmbridge"):
        store = FeatureStore(tmp_path / "cache")
        assert equal(fetch(store, pictures, work), values)
    assert "computed again" in caplog.text
    assert len(work.parts) > 3
    store.flush()
    caplog.clear()
    repaired = FeatureStore(tmp_path / "cache")
    count = len(work.parts)
    assert equal(fetch(repaired, pictures, work), values)
    assert len(work.parts) == count
    assert caplog.text == ""


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path, pictures, work):
    shard, values = stored(tmp_path, pictures, work)
    whole = shard.read_bytes()
    for offset in range(0, len(whole), 17):
        shard.write_bytes(whole)
        flip(shard, offset)
        assert equal(fetch(FeatureStore(tmp_path / "cache"), pictures, work), values), f"byte {offset}"


def test_half_precision_takes_half_the_space(tmp_path):
    part = [MediumPart("image", caption="x")]
    value = torch.randn(64, 32)
    for dtype in ("float32", "float16"):
        store = FeatureStore(tmp_path / dtype, dtype)
        (kept,) = store.fetch("f", part, lambda parts: [value])
        store.flush()
        assert kept.dtype == getattr(torch, dtype)
        assert torch.equal(kept, value.to(kept.dtype))
        (read,) = FeatureStore(tmp_path / dtype, dtype).fetch("f", part, None)
        assert torch.equal(read, kept)
    assert FeatureStore(tmp_path / "float16", "float16").size < 0.6 * FeatureStore(tmp_path / "float32").size
    with pytest.raises(ConfigError, match="'float32' or 'float16', not 'int8'"):
        FeatureStore(None, "int8")


def test_a_value_does_not_keep_its_batch_alive():
    batch = torch.randn(100, 50)
    (row,) = FeatureStore(None).fetch("f", [MediumPart("image", caption="x")], lambda parts: [batch[3]])
    assert row.untyped_storage().nbytes() == 50 * 4


def test_reading_does_not_change_the_shard_even_if_a_reader_writes(tmp_path, pictures, work):
    shard, values = stored(tmp_path, pictures, work)
    before = shard.read_bytes()
    fetch(FeatureStore(tmp_path / "cache"), pictures, work)[0]["colour"].zero_()
    assert shard.read_bytes() == before


def test_faulty_files_are_named(tmp_path, pictures, work):
    store = FeatureStore(tmp_path / "cache")
    with pytest.raises(MediaError, match=r"no file 'none\.png'"):
        fetch(store, [MediumPart("image", path="none.png")], work)
    with pytest.raises(MediaError, match="leads out of the data root"):
        fetch(store, [MediumPart("image", path="../0.png")], work)


def test_full_disk_is_one_error_and_leaves_no_draft(tmp_path, pictures, work, monkeypatch):
    store = FeatureStore(tmp_path / "cache")
    fetch(store, pictures, work)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free some space"):
        store.flush()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cache folder .* can't be made"):
        FeatureStore(tmp_path / "file" / "cache")


def test_another_picture_of_the_same_map_is_another_medium(tmp_path, pictures):
    np.save(tmp_path / "depth.npy", np.ones((4, 4), dtype=np.float32))
    store, seen = FeatureStore(None), []

    def compute(parts):
        seen.extend(part.picture for part in parts)
        return [torch.zeros(1)] * len(parts)

    image = Image.load(tmp_path / "0.png")
    for picture in ("0.png", "1.png", None, image, "0.png"):
        store.fetch("f", [MediumPart("depth", path="depth.npy", picture=picture)], compute, tmp_path)
    assert seen == ["0.png", "1.png", None, image]  # the last is known
    store.fetch("f", [MediumPart("depth", data=np.ones((4, 4)), picture="0.png")], compute, tmp_path)
    with pytest.raises(MediaError, match=r"no file 'none\.png'"):
        store.fetch("f", [MediumPart("depth", path="depth.npy", picture="none.png")], compute, tmp_path)
