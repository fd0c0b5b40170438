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


def values(medium):
    """What a medium holds, as floats of about unit size."""
    match medium.modality:
        case "image":
            return medium.pixels / 255
        case "audio":
            return medium.samples
        case _:
            return medium.frames / 255


def test_a_row_does_not_depend_on_its_neighbours(decoder):
    condition, mask = decoder.encode(CAPTIONS)
    alone, its_mask = decoder.encode(CAPTIONS[1:2])
    assert_close(alone[0], condition[1], atol=1e-5, rtol=1e-4)  # other batch sizes may round differently
    assert torch.equal(its_mask[0], mask[1])
    together = decoder.sample(condition, seed=[1, 2, 3], steps=2)
    (single,) = decoder.sample(condition[1:2], seed=2, steps=2)
    assert_close(values(single), values(together[1]), atol=1 / 200, rtol=0)


def test_offloaded_components_take_turns(made, decoder):
    offloaded = registry.create(made[0], **made[1], offload=True)
    condition, target = offloaded.encode(CAPTIONS)[0], offloaded.target(media(offloaded, 3))
    with offloaded.using(*offloaded.sampling):
        parts = [offloaded.component(name) for name in offloaded.sampling]
        for before, part in zip(
            [None, *parts], parts, strict=False
        ):  # each comes when it is called, and sends one away
            hook = part._hf_hook
            assert hook.execution_device == offloaded.anchor.device
            assert getattr(hook.prev_module_hook, "model", None) is before
    assert not any(hasattr(module, "_hf_hook") for module in offloaded.modules()), "nothing is left behind"
    assert_close(condition, decoder.encode(CAPTIONS)[0], rtol=0, atol=0)
    assert [medium.content_hash for medium in offloaded.sample(condition, seed=1, steps=2)] == [
        medium.content_hash for medium in decoder.sample(condition, seed=1, steps=2)
    ]
    condition.requires_grad_()
    offloaded.loss(condition, target, torch.Generator().manual_seed(0)).backward()
    assert condition.grad.abs().sum() > 0
    offloaded.to(torch.bfloat16)
    assert {parameter.dtype for parameter in offloaded.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU alone has nowhere to bring components to")
def test_offloaded_components_are_on_the_device_only_to_work(made):
    offloaded = registry.create(made[0], **made[1], offload=True).to("cuda")
    seen = []
    denoiser = offloaded.component(offloaded.denoiser)
    denoiser.register_forward_hook(
        lambda *_: seen.append((denoiser.device.type, offloaded.component("vae").device.type))
    )
    condition, _ = offloaded.encode(CAPTIONS)
    offloaded.sample(condition, steps=2)
    assert condition.device.type == "cuda" and set(seen) == {("cuda", "cpu")}
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"cpu"}
    condition.requires_grad_()
    offloaded.loss(condition, offloaded.target(media(offloaded, 3))).backward()
    assert condition.grad.abs().sum() > 0


def test_it_can_be_planned_without_weights(made, decoder):
    with torch.device("meta"):
        planned = registry.create(made[0], **made[1])
    assert planned.spec == decoder.spec and planned.latent_shape == decoder.latent_shape
    for name in planned.encoders:
        assert all(value.is_meta for value in planned.component(name).parameters())
    planned.component(planned.denoiser), planned.component("vae")
    condition = torch.empty(1, planned.spec.tokens, planned.spec.dim, device="meta")
    time = torch.zeros(1, dtype=torch.long, device="meta")
    noisy = torch.empty(1, *planned.latent_shape, device="meta")
    assert planned.denoise(noisy, time, condition).shape == noisy.shape
    moments = planned.moments(torch.empty(1, *planned.pixel_shape, device="meta"))
    channels, *places = planned.latent_shape
    assert moments.shape == (1, 2 * channels, *places)
    assert decoder.target(media(decoder, 1)).shape == moments.shape
