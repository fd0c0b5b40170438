"""Depth and normal maps: what numbers in files mean, pairs with pictures, and what encoders get."""

from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import PIL.Image
import pytest
import torch
from media.measured import example, picture

from mmbridge.errors import MediaError
from mmbridge.media import Depth, Image, Normal, prepare_disparity, prepare_image, prepare_map
from mmbridge.specs import DisparityInput, ImageInput, MapInput

CLIP = ImageInput(16, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))


def png(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def still(codec: str, array: np.ndarray, form: str) -> bytes:
    """A picture as FFmpeg writes it."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = array.shape[1], array.shape[0], form
    context.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(array, format=form)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in context.encode(frame) + context.encode(None))


def test_sixteen_bits_are_millimetres_and_eight_are_shares():
    stored = np.array([[0, 1500], [65535, 20]], dtype=np.uint16)
    for source in (png(stored), stored, torch.from_numpy(stored), PIL.Image.open(BytesIO(png(stored)))):
        assert torch.equal(Depth.load(source).map, torch.from_numpy(stored).float() * 0.001)
    assert torch.allclose(Depth.load(png(stored), scale=0.01).map, torch.tensor([[0, 15], [655.35, 0.2]]))
    coarse = np.array([[0, 255], [51, 102]], dtype=np.uint8)
    wanted = torch.tensor([[0, 1], [0.2, 0.4]])
    for source in (coarse, png(coarse), png(np.stack([coarse] * 3, axis=2)), coarse[..., None], coarse[None]):
        torch.testing.assert_close(Depth.load(source).map, wanted)
    assert torch.equal(Depth.load(np.array([[1.0, 7.5]])).map, torch.tensor([[1, 7.5]]))


def test_depth_survives_a_png_to_the_millimetre(tmp_path):
    depth = example("depth")
    depth.save(tmp_path / "depth.png")
    assert (Depth.load(tmp_path / "depth.png").map - depth.map).abs().max() <= 0.0005 + 1e-6
    far = Depth(depth.map * 1000)
    with pytest.raises(
        MediaError, match=r"do not fit into 16 bits with scale=0.001; pass scale=\d.* or more, or write NPY"
    ):
        far.save(tmp_path / "far.png")
    far.save(tmp_path / "far.png", scale=1.0)
    assert (Depth.load(tmp_path / "far.png", scale=1.0).map - far.map).abs().max() <= 0.5 + 1e-3


def test_open_exr_is_read_as_it_is():
    depth, normal = example("depth"), example("normal")
    exr = still("exr", depth.map.numpy(), "grayf32le")
    assert torch.equal(Depth.load(exr).map, depth.map)
    wide = still("exr", np.ascontiguousarray(normal.map.permute(1, 2, 0).numpy()), "gbrpf32le")
    torch.testing.assert_close(Normal.load(wide).map, normal.map)
    with pytest.raises(MediaError, match=r"holds colours; a depth map has one channel"):
        Depth.load(wide)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(
            MediaError, match=r"EXR file \(.+; of EXR files the channels Y, or R, G and B, are read: sav"
        ):
            Depth.load(exr[: int(len(exr) * share)])


def test_normals_from_pictures_of_eight_and_sixteen_bits(tmp_path):
    normal = example("normal")
    normal.save(tmp_path / "normal.png")
    again = Normal.load(tmp_path / "normal.png").map
    assert (again - normal.map).abs().max() < 0.01
    torch.testing.assert_close(again.norm(dim=0), torch.ones(24, 32))
    stored = ((normal.map.permute(1, 2, 0) + 1) / 2 * 65535).round().numpy().astype(np.uint16)
    for source in (still("png", stored, "rgb48be"), stored, torch.from_numpy(stored)):
        assert (Normal.load(source).map - normal.map).abs().max() < 1e-4
    transparent = png(np.concatenate([(stored >> 8).astype(np.uint8), np.full((24, 32, 1), 9, np.uint8)], axis=2))
    assert (Normal.load(transparent).map - normal.map).abs().max() < 0.02


def test_normals_are_made_unit_vectors_where_they_are_known():
    given = torch.zeros(3, 2, 2)
    given[:, 0, 0], given[:, 0, 1], given[:, 1, 0] = torch.tensor([0, 0, 7.0]), torch.tensor([0.6, 0.8, 0]), 0.01
    normal = Normal.load(given)
    assert normal.map[:, 0, 0].tolist() == [0, 0, 1] and normal.map[:, 1, 0].tolist() == [0, 0, 0]
    assert torch.equal(Normal.load(normal.map.permute(1, 2, 0).numpy()[:, :, :]).map, normal.map)
    with pytest.raises(MediaError, match=r"normals have length 1, or 0 where they are not known, not 0..7"):
        Normal(given)
    with pytest.raises(MediaError, match=r"holds no direction: all vectors are shorter than 0.1; is it a normal map\?"):
        Normal.load(torch.zeros(3, 4, 4))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (torch.full((4, 4), -1.0), {}, r"the depth map reaches -1; distances are not negative, and 0 where nothing"),
        (torch.zeros(2, 4, 4), {}, r"has shape \(2, 4, 4\); a depth map is \(H, W\), \(1, H, W\) or \(H, W, 1\)"),
        (np.zeros((4, 4, 2)), {}, r"has shape \(4, 4, 2\); a depth map is"),
        (np.zeros((4, 4), dtype=np.int64), {}, r"has dtype int64, whose unit is not known; pass scale=, in metres"),
        (np.ones((4, 4)), {"scale": 0.0}, r"can't have scale=0; a unit in metres is positive"),
        (Depth(torch.ones(4, 4)), {"scale": 2.0}, r"scale=2 is for files and arrays"),
        (png(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), {}, r"holds colours; a depth map has one channel"),
        (PIL.Image.new("P", (4, 4)), {}, r"picture of mode 'P'; maps have 8 or 16 bits a channel, no palette"),
        (PIL.Image.new("I", (4, 4), 70000), {}, r"the PIL image spans 70000..70000; accepted: 0..65535"),
        (torch.ones(0, 4), {}, r"the depth map has no pixels \(4x0\)"),
        (torch.ones(1).expand(9000, 9000), {}, r"the depth map has 9000x9000 = 81 megapixels; at most 64"),
    ],
)  # fmt: skip
def test_what_is_no_depth_map_is_refused(source, options, message):
    with pytest.raises(MediaError, match=message):
        Depth.load(source, **options)


@pytest.mark.parametrize("shape", [(4, 4), (4, 5, 6), (1, 3, 4, 4)])
def test_what_is_no_normal_map_is_refused(shape):
    with pytest.raises(MediaError, match=r"a normal map is \(3, H, W\) or \(H, W, 3\)"):
        Normal.load(np.ones(shape))


@pytest.mark.parametrize("kind", [Depth, Normal])
def test_pictures_come_from_files_arrays_or_media(kind, tmp_path):
    bare, photo = example(kind.modality), picture()
    photo.save(tmp_path / "photo.png")
    bare.save(tmp_path / "map.npy")
    pair = kind.load("map.npy", picture="photo.png", root=tmp_path)
    assert pair.picture.content_hash == photo.content_hash and pair.content_hash != bare.content_hash
    for given in (photo, photo.pixels, (tmp_path / "photo.png").read_bytes()):
        assert kind.load(bare, picture=given).content_hash == pair.content_hash
    assert kind.load(pair) is pair and "picture" in repr(pair) and "picture" not in repr(bare)
    with pytest.raises(MediaError, match=r"leads out of the data root"):
        kind.load("map.npy", picture="../photo.png", root=tmp_path)


def test_a_prepared_pair_is_two_pictures_of_the_same_crop():
    photo = picture()
    depth = Depth(torch.arange(24 * 32).view(24, 32).float() + 5, photo)
    pair = prepare_map(depth, MapInput(CLIP))
    assert pair.shape == (2, 3, 16, 16)
    assert torch.equal(pair[0], prepare_image(photo, CLIP))
    grey = (depth.map - 5) / (24 * 32 - 1)
    drawn = prepare_image(Image.load(grey.expand(3, -1, -1)), CLIP)
    assert (pair[1] - drawn).abs().max() < 0.02 / 0.26  # that of 8 bits
    other = prepare_map(Depth(depth.map * 30, photo), MapInput(CLIP))
    torch.testing.assert_close(other, pair)  # whatever the unit


def test_a_map_is_resized_to_its_picture():
    normal = example("normal")
    large = Normal(normal.map, picture(48, 64))
    pair = prepare_map(large, MapInput(CLIP))
    wanted = prepare_image(Image(normal.draw().pixels), CLIP)
    assert (pair[1] - wanted).abs().mean() < 0.1
    assert (
        prepare_map(Normal(torch.tensor([0.0, 0, 1])[:, None, None].expand(3, 9, 9), picture(9, 9)), MapInput(CLIP))[1]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("modality", ["depth", "normal"])
def test_a_map_without_its_picture_is_refused_by_name(modality):
    with pytest.raises(
        MediaError, match=rf"a {modality} map can't be encoded without the picture of the same view; give it as "
    ):
        prepare_map(example(modality), MapInput(CLIP))
    wrong = type(example(modality))(example(modality).map, picture(24, 64))
    with pytest.raises(MediaError, match=rf"a {modality} map of 32x24 does not fit its picture of 64x24"):
        prepare_map(wrong, MapInput(CLIP))


def test_disparity_is_free_of_units():
    depth = Depth(torch.tensor([[0.0, 2.0], [4.0, 8.0]]))
    wanted = torch.tensor([[[0, 1], [0.5, 0.25]]])
    torch.testing.assert_close(prepare_disparity(depth, DisparityInput(2)), wanted)
    torch.testing.assert_close(prepare_disparity(Depth(depth.map * 9), DisparityInput(2)), wanted)
    assert prepare_disparity(example("depth"), DisparityInput(16)).shape == (1, 16, 16)
    with pytest.raises(MediaError, match=r"0 everywhere, which means that nothing was measured"):
        prepare_disparity(Depth(torch.zeros(4, 4)), DisparityInput(2))


def test_near_is_bright_and_what_was_not_measured_black():
    drawn = Depth(torch.tensor([[0.0, 1.0, 9.0]])).draw().pixels.float().mean(0)[0]
    assert drawn[0] == 0 < drawn[2] < drawn[1]
