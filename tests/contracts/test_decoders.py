"""What every registered decoder keeps to; a decoder comes under these tests by being registered.

A decoder that can't be built from arguments alone has a function of its registry name, in
``tests/decoders/tiny_decoders.py``, that writes a tiny folder.
"""

import pytest
import torch
from decoders import tiny_decoders
from torch.testing import assert_close

from mmbridge.media import Audio, Image, Video
from mmbridge.registry import decoders as registry

CAPTIONS = ["a red blob", "red", "a wide blob"]


@pytest.fixture(scope="module", params=registry.names())
def made(request, tmp_path_factory):
    """Registry name and the arguments of a tiny instance."""
    arguments = registry.tiny(request.param)
    if arguments is None:
        arguments = getattr(tiny_decoders, request.param)(tmp_path_factory.mktemp(request.param))
    return request.param, arguments


@pytest.fixture
def decoder(made):
    return registry.create(made[0], **made[1])


def media(decoder, count):
    generator = torch.Generator().manual_seed(0)
    makers = {
        "image": lambda: Image(torch.randint(256, (3, 20, 30), generator=generator, dtype=torch.uint8)),
        "audio": lambda: Audio(torch.rand(900, generator=generator) - 0.5, 8000),
        "video": lambda: Video(torch.randint(256, (5, 3, 20, 30), generator=generator, dtype=torch.uint8), 10),
    }
    return [makers[decoder.modality]() for _ in range(count)]


def test_spec_says_what_encode_gives(decoder):
    condition, mask = decoder.encode(CAPTIONS)
    assert condition.shape == (3, decoder.spec.tokens, decoder.spec.dim) and not condition.requires_grad
    assert mask.shape == condition.shape[:2] and mask.dtype == torch.bool and mask.any(dim=1).all()
    if decoder.spec.normalized:
        assert_close(condition.norm(dim=-1), torch.ones(condition.shape[:2]))


def test_sample_makes_one_medium_per_row_and_repeats_by_seed(decoder):
    condition, _ = decoder.encode(CAPTIONS)
    first, again, other = (decoder.sample(condition, seed=seed, steps=2) for seed in (1, 1, 7))
    assert len(first) == 3 and all(medium.modality == decoder.modality for medium in first)
    assert [medium.content_hash for medium in first] == [medium.content_hash for medium in again]
    assert not {medium.content_hash for medium in first} & {medium.content_hash for medium in other}


def test_loss_reaches_the_condition_and_leaves_the_weights(decoder):
    condition, target = decoder.encode(CAPTIONS)[0], decoder.target(media(decoder, 3))
    assert len(target) == 3 and not target.requires_grad
    condition.requires_grad_()
    loss = decoder.train().loss(condition, target, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite()
    assert condition.grad.flatten(1).abs().sum(dim=1).gt(0).all()
    assert list(decoder.parameters()) and not any(parameter.requires_grad for parameter in decoder.parameters())
    assert not any(module.training for module in decoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    again = decoder.loss(condition, target, torch.Generator().manual_seed(0))
    assert_close(loss, again, rtol=0, atol=0)


def test_two_instances_agree_on_everything_that_is_cached(made):
    one, two = (registry.create(made[0], **made[1]) for _ in range(2))
    assert one.fingerprint == two.fingerprint and one.describe() == two.describe()
    assert_close(one.encode(CAPTIONS), two.encode(CAPTIONS), rtol=0, atol=0)
    assert_close(one.target(media(one, 2)), two.target(media(two, 2)), rtol=0, atol=0)


def test_the_manifest_entry_is_complete(decoder, made):
    entry = decoder.describe()
    assert set(entry) == {"name", "source", "sha256", "licence", "revision"} and entry["name"] == made[0]
