"""The way in of an encoder's tokens."""

import pytest
import torch

from mmbridge.encoders import ImageBind
from mmbridge.errors import ConfigError, ShapeError
from mmbridge.inputs import Encoded
from mmbridge.media import Image
from mmbridge.projections import Linear, MixtureOfExperts, Resampler, balance_loss

CONFIG = {"embed_dim": 12, "vision": {"dim": 16, "depth": 1, "heads": 2, "image_size": 16, "patch": 8}}


def picture(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    return Image(torch.randint(0, 256, (3, size, size + 4), generator=generator, dtype=torch.uint8))


def way(projection=None, **options):
    return Encoded(ImageBind("image", config=CONFIG), projection or Linear(), **options)


def test_widths_are_derived():
    encoded = way()
    encoded.build("image", 32)
    assert (encoded.projection.dim_in, encoded.projection.dim_out) == (12, 32)
    assert encoded.length(torch.zeros(4, 12)) == 4


def test_features_come_one_per_medium_in_order_whatever_the_batch_size():
    pictures = [picture(seed, size) for seed, size in enumerate((16, 40, 24))]
    encoded = way(batch_size=2)
    together = encoded.features(pictures)
    encoded.batch_size = 1
    for one, other in zip(together, encoded.features(pictures), strict=True):
        assert one.shape == (4, 12)
        assert not one.requires_grad
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_media_of_unequal_length_enter_in_their_order():
    encoded = way()
    encoded.build("image", 32)
    features = [torch.randn(length, 12) for length in (4, 2, 4, 3)]
    slots = encoded.enter(features)
    assert slots.requires_grad
    wanted = torch.cat([encoded.projection(tensor[None])[0] for tensor in features])
    torch.testing.assert_close(slots, wanted)


def test_the_balance_loss_is_of_all_media_of_a_batch_together():
    sizes = {"num_tokens": 2, "dim_hidden": 16, "depth": 1, "num_heads": 2, "dim_feedforward": 16}
    mixture = MixtureOfExperts(**sizes, router="features", balance=True)
    encoded = way(mixture)
    encoded.build("image", 32)
    assert encoded.losses() == {}  # nothing entered yet
    with torch.no_grad():
        mixture.router[2].weight.mul_(20)
    features = [torch.randn(length, 12) for length in (4, 2, 4, 3)]
    alone = torch.cat([mixture.weights(one[None]) for one in features])
    for entered in ([0, 1, 2, 3], [1], [0, 2]):
        encoded.enter([features[index] for index in entered])
        torch.testing.assert_close(encoded.losses(), {"balance": balance_loss(alone[entered])})
        torch.testing.assert_close(mixture.load().share, alone[entered].mean((0, 1)))
    together = balance_loss(alone)
    assert all((balance_loss(one) - together).abs() > 1e-3 for one in alone)
    encoded.losses()["balance"].backward()
    assert mixture.router[2].weight.grad.abs().max() > 0


def test_no_loss_is_computed_unless_it_is_asked_for():
    for projection in (MixtureOfExperts(dim_hidden=16, depth=1, num_heads=2, dim_feedforward=16), Linear()):
        encoded = way(projection)
        encoded.build("image", 32)
        encoded.enter([torch.randn(4, 12)])
        assert encoded.losses() == {}


def test_tags_stand_around_each_medium_and_train():
    encoded = way(tags=True)
    encoded.build("image", 32)
    features = [torch.randn(length, 12) for length in (4, 2, 4)]
    assert [encoded.length(tensor) for tensor in features] == [6, 4, 6]
    start, end = encoded.tags.start, encoded.tags.end
    wanted = [tensor for one in features for tensor in (start, encoded.projection(one[None])[0], end)]
    slots = encoded.enter(features)
    torch.testing.assert_close(slots, torch.cat(wanted))
    assert not torch.equal(start, end)
    slots.sum().backward()
    assert {name: list(dict(part.named_parameters())) for name, part in encoded.trainable().items()} == {
        "projection": ["layer.weight", "layer.bias"],
        "tags": ["start", "end"],
    }
    assert torch.equal(start.grad, torch.full((1, 32), 3.0))
    assert torch.equal(end.grad, torch.full((1, 32), 3.0))


def test_without_tags_there_is_no_such_part():
    encoded = way()
    encoded.build("image", 32)
    assert list(encoded.trainable()) == ["projection"]


def test_only_the_projection_trains():
    encoded = way(Resampler(num_tokens=2, dim_hidden=16, num_heads=2))
    encoded.build("image", 32)
    encoded.train()
    encoded.enter(encoded.features([picture(0)])).sum().backward()
    assert all(value.grad is not None for value in encoded.trainable()["projection"].parameters())
    assert all(value.grad is None and not value.requires_grad for value in encoded.encoder.parameters())
    assert not encoded.encoder.training


def test_the_fingerprint_is_the_encoders():
    assert way().fingerprint != way().fingerprint  # random weights differ
    encoded = way()
    assert encoded.fingerprint == encoded.encoder.fingerprint


def test_faults_are_named():
    with pytest.raises(ConfigError, match="'causal' or 'full', not 'both'"):
        way(attention="both")
    with pytest.raises(ConfigError, match="input 'audio' was given an encoder for 'image'"):
        way().build("audio", 32)
    with pytest.raises(ShapeError, match="the encoder gives width 12"):
        way(Linear(dim_in=13, dim_out=32)).build("image", 32)
