"""Point clouds from NPY, PLY, PCD and text, and what encoders get of them."""

import struct

import numpy as np
import pytest
import torch
from media.measured import example, noise

from mmbridge.errors import MediaError
from mmbridge.media import PointCloud, prepare_points
from mmbridge.specs import PointsInput

PLACES = np.array([[0, 0, 0], [1.5, -2, 3], [0.25, 8, -1]], dtype=np.float32)
COLOURS = np.array([[255, 0, 0], [0, 51, 0], [0, 0, 102]], dtype=np.uint8)
WANTED = torch.from_numpy(np.concatenate([PLACES, COLOURS / 255], axis=1)).float()


def ply(form: str, body: bytes, colours: str = "uchar", before: str = "", count: int = 3) -> bytes:
    lines = ["ply", f"format {form} 1.0", "comment made by hand", *filter(None, [before]), f"element vertex {count}"]
    lines += [f"property float {name}" for name in "xyz"]
    lines += [f"property {colours} {name}" for name in ("red", "green", "blue")] if colours else []
    return (
        "\n".join([*lines, "element face 0", "property list uchar int vertex_indices", "end_header", ""]).encode()
        + body
    )


def rows(kind: str = "%g") -> bytes:
    return "".join(
        " ".join([*(f"{value:g}" for value in place), *(kind % value for value in colour)]) + "\n"
        for place, colour in zip(PLACES, COLOURS, strict=True)
    ).encode()


def packed(order: str) -> bytes:
    return b"".join(struct.pack(f"{order}3f3B", *place, *colour) for place, colour in zip(PLACES, COLOURS, strict=True))


def pcd(data: str, body: bytes, fields: str = "x y z rgb", kinds: str = "F F F F", more: str = "") -> bytes:
    count = len(fields.split())
    lines = ["# .PCD v0.7 - Point Cloud Data file format", "VERSION 0.7", f"FIELDS {fields}", f"SIZE {'4 ' * count}"]
    lines += [f"TYPE {kinds}", f"COUNT {'1 ' * count}", "WIDTH 3", "HEIGHT 1", "VIEWPOINT 0 0 0 1 0 0 0", "POINTS 3"]
    return "\n".join([*lines, f"DATA {data}", ""]).encode() + body


BITS = (COLOURS.astype(np.uint32) << np.array([16, 8, 0], dtype=np.uint32)).sum(axis=1).astype(np.uint32)
RECORDS = {
    "ply, text": ply("ascii", rows()),
    "ply, little endian": ply("binary_little_endian", packed("<")),
    "ply, big endian": ply("binary_big_endian", packed(">")),
    "ply, float colours": ply("ascii", rows().replace(b"255", b"1").replace(b" 51 ", b" 0.2 ").replace(b"102", b"0.4"), "float"),
    "ply, something before": ply("ascii", b"7 8\n" + rows(), before="element camera 1\nproperty int a\nproperty int b"),
    "pcd, binary": pcd("binary", b"".join(struct.pack("<3fI", *p, bits) for p, bits in zip(PLACES, BITS, strict=True))),
    "pcd, unsigned": pcd(
        "binary", b"".join(struct.pack("<3fI", *p, bits) for p, bits in zip(PLACES, BITS, strict=True)), kinds="F F F U"
    ),
    "pcd, text": pcd(
        "ascii",
        "".join(f"{p[0]} {p[1]} {p[2]} {bits}\n" for p, bits in zip(PLACES, BITS, strict=True)).encode(),
        kinds="F F F U",
    ),
    "text": rows(),
    "csv with a header": b"x,y,z,r,g,b\n" + rows().replace(b" ", b","),
    "semicolons": rows().replace(b" ", b";"),
    "comments": b"# three points\n" + rows(),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_files_of_others_are_read(kind, tmp_path):
    (tmp_path / "cloud").write_bytes(RECORDS[kind])
    torch.testing.assert_close(PointCloud.load(tmp_path / "cloud").points, WANTED)


def test_clouds_without_colours():
    plain = rows().replace(b" 255 0 0", b"").replace(b" 0 51 0", b"").replace(b" 0 0 102", b"")
    for source in (PLACES, plain, ply("ascii", plain, colours=""), pcd("ascii", plain, "x y z", "F F F")):
        assert torch.equal(PointCloud.load(source).points, WANTED[:, :3])
    assert repr(PointCloud.load(PLACES)) == "PointCloud(3 points)"


def test_ply_keeps_places_to_the_bit_and_colours_to_eight(tmp_path):
    cloud = example("pointcloud")
    cloud.save(tmp_path / "cloud.ply")
    again = PointCloud.load(tmp_path / "cloud.ply").points
    assert torch.equal(again[:, :3], cloud.points[:, :3])
    assert (again[:, 3:] - cloud.points[:, 3:]).abs().max() <= 0.5 / 255 + 1e-6
    PointCloud(cloud.points[:, :3].contiguous()).save(tmp_path / "plain.ply")
    assert PointCloud.load(tmp_path / "plain.ply").points.shape == (50, 3)


def test_colours_of_bytes_become_shares():
    given = np.concatenate([PLACES, COLOURS], axis=1)
    torch.testing.assert_close(PointCloud.load(given).points, WANTED)
    torch.testing.assert_close(PointCloud.load(torch.from_numpy(given)).points, WANTED)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PLACES[:2], r"a point cloud of 2 points can't be used; accepted: 3 to 20000000"),
        (np.ones((9, 4)), r"has shape \(9, 4\); a point cloud is \(N, 3\) or \(N, 6\)\."),
        (np.ones((6, 90)), r"has shape \(6, 90\); a point cloud is \(N, 3\) or \(N, 6\); transpose it"),
        (np.full((9, 6), 1.5), r"colours span 1.5..1.5; accepted: 0..1, or whole numbers in 0..255"),
        (np.full((9, 6), 300.0), r"colours span 300..300"),
        (-np.ones((9, 6)), r"colours span -1..-1"),
        (b"0 0 0\n1 1 nan\n2 2 2\n", r"holds 1 NaN or infinite values"),
        (b"0 0 0\n1 1\n2 2 2\n", r"is not a table of numbers: the number of columns changed"),
        (b"0 0 0\n1 x 1\n2 2 2\n", r"is not a table of numbers: could not convert string 'x'"),
        (b"x,y,z\n", r"holds no row of numbers"),
        (ply("ascii", rows(), count=9), r"damaged or truncated PLY file \(it holds 3 of 9 rows\)"),
        (ply("ascii", rows(), count=10**9), r"announces 1000000000 points; at most 20000000 are read: thin it out"),
        (ply("zip", rows()), r"a PLY is ascii, binary_little_endian, binary_big_endian, not 'zip'"),
        (ply("ascii", rows()).replace(b"float z", b"float w"), r"columns x, y, w, .*a point cloud has x, y and z"),
        (ply("ascii", rows(), before="element face 1\nproperty list uchar int i"), r"vertices are no plain table at its"),
        (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", r"vertices are no plain table"),
        (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", r"damaged or truncated PLY"),
        (b"ply\nformat ascii 1.0\n", r"PLY file \(its header does not end\)"),
        (pcd("binary_compressed", b"...."), r"is a PCD with binary_compressed data; save it as ascii or binary"),
        (pcd("binary", bytes(47)), r"damaged or truncated PCD file \(it holds 47 of 48 bytes\)"),
        (pcd("ascii", rows()), r"PCD file \(its rows have 6 of 4 columns\)"),
    ],
)  # fmt: skip
def test_what_is_no_point_cloud_is_refused(source, message):
    with pytest.raises(MediaError, match=message):
        PointCloud.load(source)


def test_prepared_points_lie_in_the_unit_ball_with_their_colours():
    cloud = example("pointcloud")
    x = prepare_points(
        PointCloud(cloud.points * torch.tensor([9, 9, 9, 1, 1, 1]) + torch.tensor([5, 0, 0, 0, 0, 0])), PointsInput(50)
    )
    torch.testing.assert_close(x[:, :3].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, :3].norm(dim=1).max(), torch.tensor(1.0))
    assert torch.equal(x[:, 3:], cloud.points[:, 3:])
    torch.testing.assert_close(x, prepare_points(cloud, PointsInput(50)))


def test_more_points_are_drawn_and_fewer_repeated():
    cloud = example("pointcloud")
    whole = prepare_points(cloud, PointsInput(50))
    few = prepare_points(cloud, PointsInput(20))
    assert few.shape == (20, 6) and len(few.unique(dim=0)) == 20
    assert all((whole == row).all(dim=1).any() for row in few)
    assert torch.equal(few, prepare_points(cloud, PointsInput(20)))
    assert torch.equal(prepare_points(cloud, PointsInput(120)), torch.cat([whole, whole, whole[:20]]))


def test_colours_are_left_out_or_black():
    cloud = example("pointcloud")
    plain = PointCloud(cloud.points[:, :3].contiguous())
    assert torch.equal(prepare_points(cloud, PointsInput(50, 3)), prepare_points(cloud, PointsInput(50))[:, :3])
    x = prepare_points(plain, PointsInput(50))
    assert x.shape == (50, 6) and not x[:, 3:].any()


def test_what_an_encoder_can_not_group_is_refused():
    one = PointCloud(torch.cat([noise(50, 3), torch.full((50, 3), 0.5)], dim=1))
    assert prepare_points(one, PointsInput(50)).isfinite().all()
    for cloud in (one, PointCloud(noise(50, 3))):
        with pytest.raises(
            MediaError, match=r"is of one colour, and this encoder groups points by channels \(3, 4, 5\), th"
        ):
            prepare_points(cloud, PointsInput(50, coordinates=(3, 4, 5)))
    with pytest.raises(MediaError, match=r"all 4 points of the cloud are at one place"):
        prepare_points(PointCloud(torch.ones(4, 3)), PointsInput(50))


def test_drawings_have_the_colours_of_the_points():
    red = PointCloud(torch.cat([noise(500, 3), torch.tensor([1.0, 0, 0]).expand(500, 3)], dim=1))
    pixels = red.draw().pixels.flatten(1).T
    assert {tuple(pixel) for pixel in pixels.unique(dim=0).tolist()} == {(255, 0, 0), (255, 255, 255)}
    assert 0.05 < (pixels[:, 1] == 0).float().mean() < 0.9
