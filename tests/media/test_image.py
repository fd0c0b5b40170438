"""Pictures: every kind of file, array and tensor that is read, and every error."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch

from mmbridge.errors import MediaError
from mmbridge.media import Image, prepare_image
from mmbridge.specs import ImageInput

CLIP = {"mean": (0.481, 0.458, 0.408), "std": (0.269, 0.261, 0.276)}


def photo(height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth colours with a few edges, uint8 (3, height, width)."""
    generator = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    picture = np.array(coarse)
    picture[height // 4 : height // 2, width // 4 : width // 2] = (250, 10, 30)
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def encode(picture: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("suffix", "error"), [("png", 0.0), ("PNG", 0.0), ("webp", 4.0), ("jpg", 4.0), ("jpeg", 4.0)])
def test_save_and_load(tmp_path, suffix, error):
    image = Image(photo())
    image.save(tmp_path / f"picture.{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"picture.{suffix}"]
    again = Image.load(tmp_path / f"picture.{suffix}")
    assert again.pixels.shape == (3, 48, 64) and again.pixels.dtype == torch.uint8
    assert (again.pixels.float() - image.pixels.float()).abs().mean() <= error
    assert torch.equal(Image.load((tmp_path / f"picture.{suffix}").read_bytes()).pixels, again.pixels)


def test_quality_trades_size_for_closeness(tmp_path):
    Image(photo()).save(tmp_path / "good.jpg")
    Image(photo()).save(tmp_path / "small.jpg", quality=20)
    assert (tmp_path / "small.jpg").stat().st_size < (tmp_path / "good.jpg").stat().st_size / 2


TURNS = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: x.transpose(1, 2).flip(1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(to_pil(photo()), "JPEG", exif=exif, quality=95)
    expected = TURNS[orientation](photo())
    pixels = Image.load(data).pixels
    assert pixels.shape == expected.shape
    assert (pixels.float() - expected.float()).abs().mean() < 4


def test_alpha_is_composited_on_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 100, 128)
    expected = [[200, 0, 0], [255, 255, 255], [127, 127, 177]]
    picture = PIL.Image.fromarray(rgba)
    webp = encode(picture, "WEBP", lossless=True, exact=True)
    for source in (encode(picture), webp, picture, rgba, torch.from_numpy(rgba).permute(2, 0, 1)):
        pixels = Image.load(source).pixels
        assert [pixels[:, 0, 0].tolist(), pixels[:, 0, 1].tolist(), pixels[:, 1, 0].tolist()] == expected
    grey = np.array([[[80, 255], [80, 0]]], dtype=np.uint8)
    assert Image.load(encode(PIL.Image.fromarray(grey))).pixels.tolist() == [[[80, 255]]] * 3


def test_transparent_colours_are_white():
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert Image.load(encode(palette)).pixels[:, 0].tolist() == [[10, 40], [20, 50], [30, 60]]
    assert Image.load(encode(palette, transparency=1)).pixels[:, 0].tolist() == [[10, 255], [20, 255], [30, 255]]
    rgb = PIL.Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert Image.load(encode(rgb, transparency=(4, 5, 6))).pixels[:, 0].tolist() == [[1, 255], [2, 255], [3, 255]]
    deep = PIL.Image.fromarray(np.array([[257, 514]], dtype=np.uint16))
    assert Image.load(encode(deep, transparency=514)).pixels[0].tolist() == [[1, 255]]


def test_grey_one_bit_and_16_bit_files():
    ramp = np.arange(256, dtype=np.uint8)[None]
    assert torch.equal(Image.load(encode(PIL.Image.fromarray(ramp))).pixels, torch.from_numpy(ramp).expand(3, 1, 256))
    bits = PIL.Image.fromarray(ramp > 127).convert("1")
    assert Image.load(encode(bits)).pixels[0, 0, [0, 127, 128, 255]].tolist() == [0, 0, 255, 255]
    deep = np.array([[0, 128, 129, 257 * 100, 32768, 65535]], dtype=np.uint16)
    pictures = PIL.Image.fromarray(deep), PIL.Image.fromarray(deep.astype(np.int32))
    for source in (encode(pictures[0]), *pictures, deep, deep.astype(">u2"), torch.from_numpy(deep)):
        assert Image.load(source).pixels.tolist() == [[[0, 0, 1, 100, 128, 255]]] * 3


def test_cmyk_jpeg():
    cmyk = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = Image.load(encode(cmyk, "JPEG", quality=100)).pixels.float().mean(dim=(1, 2))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("kind", ["uint8", "float64", "float16", "longdouble", "bool"])
def test_arrays_and_tensors_agree(channels, kind):
    shape = (5, 7) if channels is None else (5, 7, channels)
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    if channels == 4:
        values[..., 3] = 255
    array = values > 127 if kind == "bool" else values if kind == "uint8" else (values / 255).astype(kind)
    tensor = torch.from_numpy(array.astype("float64") if kind == "longdouble" else array)
    image = Image.load(array)
    assert torch.equal(Image.load(tensor if channels is None else tensor.permute(2, 0, 1)).pixels, image.pixels)
    expected = torch.from_numpy(np.where(values > 127, 255, 0) if kind == "bool" else values)
    expected = expected[None] if channels is None else expected.permute(2, 0, 1)[:3]
    assert (image.pixels.int() - expected.expand(3, 5, 7)).abs().max() <= 1


def test_an_image_is_itself_and_half_precision_is_read():
    image = Image(photo())
    assert Image.load(image) is image
    assert repr(image) == "Image(64x48)"
    assert (Image.load((photo() / 255).bfloat16()).pixels.int() - photo().int()).abs().max() <= 1


def test_content_hash_is_that_of_the_pixels(tmp_path):
    image = Image(photo())
    image.save(tmp_path / "a.png")
    assert Image.load(tmp_path / "a.png").content_hash == image.content_hash
    assert len(image.content_hash) == 64
    others = [image.pixels ^ 1, image.pixels.reshape(3, 64, 48), image.pixels.transpose(1, 2)]
    assert len({image.content_hash, *(Image(pixels.contiguous()).content_hash for pixels in others)}) == 4


def normalised(pixels: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    return (values - torch.tensor(CLIP["mean"])[:, None, None]) / torch.tensor(CLIP["std"])[:, None, None]


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (500, 300), (31, 47), (224, 224), (40, 224)])
def test_prepare_image_crops_as_pil_does(size):
    pixels, short = photo(*size), min(size)
    width, height = (224 * side // short for side in (size[1], size[0]))
    resized = np.array(to_pil(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC))
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    expected = normalised(resized[top : top + 224, left : left + 224])
    actual = prepare_image(Image(pixels), ImageInput(224, **CLIP))
    assert actual.shape == (3, 224, 224) and actual.dtype == torch.float32
    assert (actual - expected).abs().mean() * 0.27 < 1.5 / 255


def test_prepare_image_squashes_and_pads():
    pixels = photo(60, 30)
    squashed = np.array(to_pil(pixels).resize((32, 32), PIL.Image.Resampling.BICUBIC))
    actual = prepare_image(Image(pixels), ImageInput(32, **CLIP, resize="squash"))
    assert (actual - normalised(squashed)).abs().mean() * 0.27 < 1.5 / 255
    padded = prepare_image(Image(pixels), ImageInput(32, **CLIP, resize="pad"))
    assert padded[:, :, :6].abs().max() < 0.01 and padded[:, :, 26:].abs().max() < 0.01  # the mean colour
    assert padded[:, :, 9:23].std() > 0.5
    turned = prepare_image(Image(pixels.transpose(1, 2).contiguous()), ImageInput(32, **CLIP, resize="pad"))
    torch.testing.assert_close(turned, padded.transpose(1, 2), atol=0.05, rtol=0)


def test_a_picture_of_the_right_size_is_only_normalised():
    torch.testing.assert_close(
        prepare_image(Image(photo(32, 32)), ImageInput(32, **CLIP)), normalised(photo(32, 32).permute(1, 2, 0).numpy())
    )


@pytest.mark.parametrize("data", [png_header(10_000, 10_000), png_header(60_000, 60_000)], ids=["100 MP", "3600 MP"])
def test_large_pictures_are_refused_by_their_header(tmp_path, data):
    (tmp_path / "huge.png").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            MediaError, match=r"huge.png' has \d+x\d+ = \d+ megapixels; at most 64 are read: scale it down"
        ):
            Image.load(tmp_path / "huge.png")


def test_a_large_jpeg_is_refused_by_its_header():
    data = bytearray(encode(to_pil(photo()), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 10_000, 12_000)
    with pytest.raises(MediaError, match=r"12000x10000 = 120 megapixels"):
        Image.load(bytes(data))


GREY = np.zeros((4, 4))
CHANNELS_LAST = r"\(H, W\), \(H, W, 1\), \(H, W, 3\) or \(H, W, 4\)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((4, 4), np.nan), r"the array holds NaN or infinite values; replace them by numbers in 0..1"),
        (torch.full((3, 4, 4), torch.inf), r"the tensor holds NaN or infinite values"),
        (GREY + 200.0, r"the array spans 200..200; floats must lie in 0..1: rescale them, or pass uint8"),
        (torch.zeros(3, 4, 4) - 0.5, r"the tensor spans -0.5..-0.5; floats must lie in 0..1"),
        (GREY.astype(np.int64), r"the array has dtype int64; accepted: uint8, uint16, bool, or floats in 0..1"),
        (GREY.astype(object), r"the array has dtype object; accepted: uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), r"the tensor has dtype torch.int32; accepted: uint8, uint16, bool"),
        (np.zeros((3, 8, 9)), rf"shape \(3, 8, 9\); an image is {CHANNELS_LAST}; transpose it, or pass a torch tensor"),
        (np.zeros((8, 9, 2)), rf"shape \(8, 9, 2\); an image is {CHANNELS_LAST}\."),
        (np.zeros(8), rf"shape \(8,\); an image is {CHANNELS_LAST}"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\); an image is"),
        (torch.zeros(5, 4, 3), r"the tensor has shape \(5, 4, 3\).*\(3, H, W\) or \(4, H, W\)"),
        (torch.zeros(2, 4, 4), r"the tensor has shape \(2, 4, 4\); an image is \(H, W\), \(1, H, W\)"),
        (torch.zeros(1, dtype=torch.uint8).expand(9000, 9000), r"the tensor has 9000x9000 = 81 megapixels"),
        (PIL.Image.new("I", (2, 2), 70000), r"mode 'I' spans 70000..70000; accepted: 0..65535"),
        (PIL.Image.new("F", (2, 2), 7.0), r"spans 7..7; floats must lie in 0..1"),
        (PIL.Image.new("RGB", (0, 2)), r"the PIL image has no pixels \(0x2\)"),
        (3.5, r"can't be loaded from float; accepted: a path, bytes, a PIL image, a NumPy array, a torch tensor"),
        (None, r"an image can't be loaded from NoneType"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(source, message):
    with pytest.raises(MediaError, match=message):
        Image.load(source)


def test_a_pil_image_that_breaks_off_is_refused(tmp_path):
    (tmp_path / "cut.png").write_bytes(encode(to_pil(photo()))[:2000])
    with pytest.raises(MediaError, match=r"a PIL image of mode 'RGB' can't be used: image file is truncated"):
        Image.load(PIL.Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4).byte()]
)
def test_the_class_checks_its_pixels(pixels):
    with pytest.raises(
        MediaError, match=r"an image holds uint8 pixels of shape \(3, H, W\), not .*Image.load converts"
    ):
        Image(pixels)


def test_prepare_image_errors():
    with pytest.raises(MediaError, match=r"can't be resized by 'stretch'; accepted: 'crop', 'pad', 'squash'"):
        prepare_image(Image(photo()), ImageInput(32, **CLIP, resize="stretch"))
    thin = Image(torch.zeros(3, 2, 300, dtype=torch.uint8))
    with pytest.raises(MediaError, match=r"a picture of 300x2 is too long and thin.*at most 100 times.*cut it first"):
        prepare_image(thin, ImageInput(32, **CLIP))


def test_sides_that_a_format_can_not_hold(tmp_path):
    with pytest.raises(MediaError, match=r"wide.webp': a picture of 20000x1 can't be encoded: .*16383"):
        Image(torch.zeros(3, 1, 20000, dtype=torch.uint8)).save(tmp_path / "wide.webp")
    assert not list(tmp_path.iterdir())
