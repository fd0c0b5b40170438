"""FID's network with random weights: its file is checked and its features go through; the published weights are not here."""

import sys

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from mmbridge import hub
from mmbridge.encoders import inception
from mmbridge.encoders.inception import Inception
from mmbridge.errors import CheckpointError, ConfigError, MissingExtraError
from mmbridge.media import Image


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, file)
        network = FeatureExtractorInceptionV3("random", ["2048"], str(file))
    torch.save(network.state_dict(), file)
    return file


def test_weights_that_are_absent_or_others_are_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(CheckpointError) as said:
        Inception()
    assert str(place) in str(said.value) and f"download {inception.ADDRESS} to there" in str(said.value)
    with pytest.raises(CheckpointError, match="is not the Inception network of FID"):
        Inception(weights)


def test_pictures_of_any_size_become_features(weights, monkeypatch):
    monkeypatch.setattr(inception, "SHA256", hub.file_sha256(weights)[:8])
    network = Inception(weights)
    pictures = [Image(torch.randint(0, 256, (3, *size), dtype=torch.uint8)) for size in ((20, 30), (40, 16))]
    features = network.embed("image", pictures)
    assert features.shape == (2, 2048)
    (alone,) = network.network(pictures[1].pixels.unsqueeze(0))
    torch.testing.assert_close(features[1:], alone)
    with pytest.raises(ConfigError, match="reads pictures, not 'audio'"):
        network.embed("audio", [])


def test_torch_fidelity_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmbridge\[metrics\]'"):
        Inception()
