"""Brain activity: vectors, repeats, volumes with masks, and NIfTI where nibabel is installed."""

import gzip
import sys

import numpy as np
import pytest
import torch
from media.measured import noise

from mmbridge.errors import MediaError, MissingExtraError
from mmbridge.media import Fmri, prepare_fmri
from mmbridge.specs import FmriInput

VOLUME = noise(3, 4, 5).numpy()
MASK = (noise(3, 4, 5, seed=1) > 0).numpy()


def nifti(values: np.ndarray, version: int = 1) -> bytes:
    nibabel = pytest.importorskip("nibabel")
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    return kind(values, np.eye(4)).to_bytes()


def test_repeats_become_their_mean():
    runs = noise(3, 20)
    for source in (runs, runs.numpy()):
        torch.testing.assert_close(Fmri.load(source).voxels, runs.mean(0))
    assert torch.equal(Fmri.load(runs[:1]).voxels, runs[0])
    assert torch.equal(Fmri.load(runs[0]).voxels, runs[0])


def test_a_mask_chooses_voxels_of_a_volume(tmp_path):
    wanted = torch.from_numpy(VOLUME[MASK])
    np.save(tmp_path / "mask.npy", MASK.astype(np.uint8))
    np.save(tmp_path / "volume.npy", VOLUME)
    assert torch.equal(Fmri.load(VOLUME, mask=MASK).voxels, wanted)
    assert torch.equal(Fmri.load("volume.npy", mask="mask.npy", root=tmp_path).voxels, wanted)
    repeated = np.stack([VOLUME, VOLUME + 2], axis=3)
    torch.testing.assert_close(Fmri.load(repeated, mask=MASK).voxels, wanted + 1)
    around = np.where(MASK, VOLUME, np.nan)
    assert torch.equal(Fmri.load(around, mask=MASK).voxels, wanted)
    with pytest.raises(MediaError, match=r"leads out of the data root"):
        Fmri.load("volume.npy", mask="../mask.npy", root=tmp_path)


@pytest.mark.parametrize(
    ("source", "mask", "message"),
    [
        (VOLUME, None, r"is a volume of shape \(3, 4, 5\); pass mask=, which says which voxels to read, and save"),
        (VOLUME, MASK[:2], r"the array has shape \(2, 4, 5\), and the volume \(3, 4, 5\); they must be of one space"),
        (VOLUME, MASK & False, r"chooses no voxel; it must be other than 0 where voxels are read"),
        (VOLUME, 3.5, r"a mask of voxels can't be loaded from float"),
        (VOLUME[0], MASK, r"has shape \(4, 5\); a mask is for volumes"),
        (np.zeros((2, 2, 2, 2, 2)), None, r"fMRI is \(V,\), \(repeats, V\) or \(X, Y, Z\[, repeats\]\)"),
        (np.zeros((3, 0)), None, r"holds no voxels: its shape is \(3, 0\)"),
        (np.array(3.0), None, r"has shape \(\); fMRI is"),
    ],
)  # fmt: skip
def test_what_is_no_activity_is_refused(source, mask, message):
    with pytest.raises(MediaError, match=message):
        Fmri.load(source, mask=mask)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_nifti_volumes_equal_arrays(version, packed, tmp_path):
    pack = gzip.compress if packed else bytes
    (tmp_path / "volume").write_bytes(pack(nifti(VOLUME, version)))
    (tmp_path / "mask").write_bytes(pack(nifti(MASK.astype(np.uint8), version)))
    wanted = torch.from_numpy(VOLUME[MASK])
    assert torch.equal(Fmri.load("volume", mask="mask", root=tmp_path).voxels, wanted)
    assert torch.equal(Fmri.load((tmp_path / "volume").read_bytes(), mask=MASK).voxels, wanted)
    with pytest.raises(MediaError, match=r"volume' is a volume of shape \(3, 4, 5\); pass mask="):
        Fmri.load(tmp_path / "volume")
    half = (tmp_path / "volume").read_bytes()[:450]
    with pytest.raises(MediaError, match=r"damaged or truncated (NIfTI|gzip) file \(.+\); export"):
        Fmri.load(half if not packed else half[: len(half) // 2], mask=MASK)


def test_what_nifti_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(MissingExtraError, match=r"NIfTI files need nibabel: pip install 'mmbridge\[fmri\]'"):
        Fmri.load(gzip.compress(bytes(400)), mask=MASK)


def test_an_encoder_reads_as_many_voxels_as_it_was_made_for():
    fmri = Fmri(noise(11))
    assert torch.equal(prepare_fmri(fmri, FmriInput(11)), fmri.voxels)
    with pytest.raises(
        MediaError, match=r"the fMRI vector has 11 voxels, and the encoder reads 15724: those of one subj"
    ):
        prepare_fmri(fmri, FmriInput(15724))


def test_voxels_are_drawn_by_rows():
    pixels = Fmri(torch.arange(10).float()).draw().pixels
    assert pixels.shape == (3, 3 * 64, 4 * 64)
    middles = pixels[:, 32::64, 32::64].flatten(1)
    assert middles[:, 0].tolist() == [68, 1, 84] and middles[:, 9].tolist() == [253, 231, 37]
    assert (middles[:, 10:] == 255).all()
