import shutil

import pytest
from decoders import tiny_decoders


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A tiny Stable Diffusion folder; not to be changed."""
    return tiny_decoders.stable_diffusion(tmp_path_factory.mktemp("stable_diffusion"))["source"]


@pytest.fixture
def folder(shipped, tmp_path):
    """A copy of that folder, to be changed at will."""
    return shutil.copytree(shipped, tmp_path / "model")


@pytest.fixture
def components(tmp_path):
    return tiny_decoders.stable_diffusion_parts(tmp_path / "files")
