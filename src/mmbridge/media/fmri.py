"""Brain activity as functional magnetic resonance imaging measures it: vectors of voxels from files and arrays."""

import gzip
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmbridge.errors import MediaError, MissingExtraError
from mmbridge.media.arrays import MAX_BYTES, check_finite, check_size, encode_npy, read_npy, to_floats
from mmbridge.media.base import MediaFile, find_file, hash_content, suffix_of, write_atomically
from mmbridge.media.drawing import draw_matrix
from mmbridge.media.image import Image
from mmbridge.modality import register
from mmbridge.specs import FmriInput

_FORMATS = {"NumPy": "NPY", "NIfTI": "NIfTI (.nii)", "gzip": "NIfTI (.nii.gz)"}


@register("fmri")
@dataclass(eq=False, repr=False)
class Fmri:
    """The response of a brain, one number per voxel of a region.

    Args:
        voxels: float32, shape (V,); kept on the CPU.

    Raises:
        MediaError: Another dtype or shape, no voxels, or NaN or infinite values.
    """

    modality: ClassVar[str] = "fmri"
    noun: ClassVar[str] = "an fMRI vector"
    suffix: ClassVar[str] = ".npy"
    voxels: Tensor

    def __post_init__(self) -> None:
        if self.voxels.dtype != torch.float32 or self.voxels.ndim != 1 or not len(self.voxels):
            raise MediaError(
                f"an fMRI vector holds float32 values of shape (V,), not {self.voxels.dtype} of shape "
                f"{tuple(self.voxels.shape)}; Fmri.load converts arrays, tensors and volumes."
            )
        check_finite(self.voxels, "the fMRI vector")
        self.voxels = self.voxels.detach().cpu()

    def __repr__(self) -> str:
        return f"Fmri({len(self.voxels)} voxels)"

    @classmethod
    def load(cls, source: object, *, mask: object = None, root: str | os.PathLike[str] | None = None) -> "Fmri":
        """Read a vector, or the voxels of a volume that a mask chooses; repeats of a measurement become their mean.

        Args:
            source: A path or the bytes of an NPY or NIfTI (.nii, .nii.gz) file; an array or tensor (V,), (repeats, V) or,
                with a mask, (X, Y, Z) or (X, Y, Z, repeats); or an ``Fmri``.
            mask: Which voxels are kept, in the order of the array (last axis fastest): a path or the bytes of an NPY or
                NIfTI file, or an array (X, Y, Z), not 0 where they are.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged or of another format; the shape is another; the mask is missing,
                superfluous, empty or of another shape; kept values are NaN; a path leads out of ``root``.
            MissingExtraError: A NIfTI file is given and nibabel is not installed.
        """
        if isinstance(source, Fmri):
            return source
        values, name = _array(source, "fmri", root)
        if values.ndim in (1, 2):
            if mask is not None:
                raise MediaError(f"{name} has shape {values.shape}; a mask is for volumes (X, Y, Z[, repeats]).")
            if not values.size:
                raise MediaError(f"{name} holds no voxels: its shape is {values.shape}.")
        elif values.ndim not in (3, 4):
            raise MediaError(f"{name} has shape {values.shape}; fMRI is (V,), (repeats, V) or (X, Y, Z[, repeats]).")
        else:
            values = _masked(values, name, mask, root)
        voxels = to_floats(values, name)
        return cls(voxels if voxels.ndim == 1 else voxels.mean(dim=0))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an NPY file, whole or not at all.

        Raises:
            MediaError: Unknown suffix, or the file can't be written.
        """
        suffix_of(path, "fmri", (".npy",))
        write_atomically(path, encode_npy(self.voxels))

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the values."""
        return hash_content(self.modality, self.voxels)

    def draw(self) -> Image:
        """Return the voxels as a matrix, by rows, dark at the smallest and bright at the largest value."""
        return Image(draw_matrix(self.voxels))


def _masked(values: np.ndarray, name: str, mask: object, root: str | os.PathLike[str] | None) -> np.ndarray:
    """Return the chosen voxels of a volume, (V,) or (repeats, V)."""
    if mask is None:
        raise MediaError(
            f"{name} is a volume of shape {values.shape}; pass mask=, which says which voxels to read, and save the vector as "
            "NPY for data files."
        )
    chosen, called = _array(mask, "mask", root)
    if chosen.shape != values.shape[:3]:
        raise MediaError(
            f"{called} has shape {chosen.shape}, and the volume {values.shape}; they must be of one space."
        )
    if not (chosen != 0).any():
        raise MediaError(f"{called} chooses no voxel; it must be other than 0 where voxels are read.")
    return np.asarray(values[chosen != 0].T)


def _array(source: object, modality: str, root: str | os.PathLike[str] | None) -> tuple[np.ndarray, str]:
    if isinstance(source, np.ndarray):
        return source, "the array"
    if isinstance(source, Tensor):
        values = source.detach().cpu()
        return (values if values.is_complex() else values.float()).numpy(), "the tensor"
    if isinstance(source, (str, os.PathLike, bytes)):
        medium = find_file(source, modality, _FORMATS, root)
        return read_npy(medium) if medium.format == "NumPy" else _read_nifti(medium), medium.name
    noun = "a mask of voxels" if modality == "mask" else "an fMRI vector"
    raise MediaError(
        f"{noun} can't be loaded from {type(source).__name__}; accepted: a path, bytes, a NumPy array or a torch tensor."
    )


def _read_nifti(medium: MediaFile) -> np.ndarray:
    nibabel = _nibabel()
    check_size(medium)
    with medium.decoding(), medium.open() as file:
        if medium.format == "gzip":
            with gzip.open(file) as packed:
                content = packed.read(MAX_BYTES + 1)
        else:
            content = file.read()
        if len(content) > MAX_BYTES:
            raise MediaError(f"{medium.name} unpacks to more than {MAX_BYTES // 1024**3} GiB; cut it first.")
        kind = nibabel.Nifti2Image if content[4:8] == b"n+2\0" else nibabel.Nifti1Image
        return np.asarray(kind.from_bytes(content).get_fdata(dtype=np.float32))


def _nibabel() -> Any:
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise MissingExtraError("NIfTI files need nibabel: pip install 'mmbridge[fmri]'.") from error
    return nibabel


def prepare_fmri(fmri: Fmri, spec: FmriInput) -> Tensor:
    """Return the voxels, floats (V,), where they are as many as the encoder was made for.

    Raises:
        MediaError: They are more or fewer.
    """
    if len(fmri.voxels) != spec.voxels:
        raise MediaError(
            f"the fMRI vector has {len(fmri.voxels)} voxels, and the encoder reads {spec.voxels}: those of one subject and "
            "one mask; give these."
        )
    return fmri.voxels
