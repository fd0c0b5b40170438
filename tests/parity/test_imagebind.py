"""ImageBind against numbers of the published code (the file's metadata names commit, seed and shapes)."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmbridge.conversion import imagebind

NAME = "nextgpt_new_imagebind_patch_mini"
SHAPES = {"image": (2, 3, 224, 224), "video": (1, 3, 3, 2, 224, 224), "audio": (1, 3, 1, 128, 204)}
HEADS = {"image": 4, "video": 4, "audio": 3}


@pytest.mark.parametrize("modality", SHAPES)
def test_patch_tokens_equal_the_published_code(modality: str) -> None:
    oracle = load_file(Path(__file__).with_name(f"{NAME}.safetensors"))
    state = {name[2:]: tensor for name, tensor in oracle.items() if name.startswith("w.")}
    encoder = imagebind.encoder(state, modality, heads=HEADS[modality])
    seed = (zlib.crc32(f"input:{NAME}.{modality}".encode()) ^ 20240611) & 0xFFFFFFFF
    x = torch.from_numpy(np.random.RandomState(seed).standard_normal(SHAPES[modality]).astype(np.float32))

    y = encoder(x)

    torch.testing.assert_close(y, oracle[f"y_{modality}"], atol=1e-5, rtol=0)
    assert y.shape[1:] == (encoder.spec.tokens, encoder.spec.dim)
