"""What every registered encoder promises; a new encoder is under these tests as soon as it is registered."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmbridge import media
from mmbridge.encoders import Encoder
from mmbridge.registry import encoders as registry
from mmbridge.specs import AudioInput, ImageInput, VideoInput

NAMES = [name for name in registry.names() if registry.tiny(name) is not None]


def create(name: str, **changes: Any) -> Encoder:
    torch.manual_seed(0)
    return registry.create(name, **{**(registry.tiny(name) or {}), **changes})


def medium(encoder: Encoder, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    match encoder.input:
        case ImageInput():
            return media.Image(torch.randint(0, 256, (3, 40, 52), generator=generator, dtype=torch.uint8))
        case VideoInput():
            return media.Video(torch.randint(0, 256, (6, 3, 40, 52), generator=generator, dtype=torch.uint8), 4.0)
        case AudioInput() as spec:
            return media.Audio(torch.randn(spec.sample_rate, generator=generator) / 10, spec.sample_rate)
    raise AssertionError(f"the tiny {encoder.modality} encoder should read a modality that has files")


def batch(encoder: Encoder) -> Tensor:
    return torch.stack([encoder.prepare(medium(encoder, seed)) for seed in range(2)])


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_output_has_the_shape_of_the_spec(name: str) -> None:
    encoder = create(name)
    y = encoder(batch(encoder))
    assert y.shape[0] == 2
    assert y.shape[2] == encoder.spec.dim
    assert encoder.spec.tokens in (None, y.shape[1])
    assert y.isfinite().all()
    assert not torch.equal(y[0], y[1])


def test_media_in_a_batch_do_not_touch_each_other(name: str) -> None:
    encoder = create(name)
    x = batch(encoder)
    torch.testing.assert_close(encoder(x)[1:], encoder(x[1:]), atol=1e-5, rtol=1e-5)


def test_is_frozen_and_stays_in_evaluation_mode(name: str) -> None:
    encoder = create(name)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert list(encoder.parameters())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_output_is_deterministic_and_has_no_gradient(name: str) -> None:
    encoder = create(name)
    x = batch(encoder)
    first = encoder(x.clone().requires_grad_())
    assert not first.requires_grad
    assert torch.equal(first, encoder.train()(x))


def test_fingerprint_follows_every_weight(name: str) -> None:
    encoder = create(name)
    before = encoder.fingerprint
    assert before == encoder.fingerprint == create(name).fingerprint
    last = list(encoder.parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-3
    assert encoder.fingerprint != before


def test_fingerprint_follows_output_options(name: str) -> None:
    if "tokens" not in inspect.signature(registry.get(name)).parameters:
        pytest.skip("this encoder has one output")
    assert create(name, tokens="pooled").fingerprint != create(name, tokens="patch").fingerprint


def test_pooled_output_is_one_token(name: str) -> None:
    if "tokens" not in inspect.signature(registry.get(name)).parameters:
        pytest.skip("this encoder has one output")
    encoder = create(name, tokens="pooled")
    assert encoder.spec.tokens == 1
    assert encoder(batch(encoder)).shape == (2, 1, encoder.spec.dim)


def test_saved_weights_give_the_same_encoder(name: str, tmp_path: Path) -> None:
    encoder = create(name)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    save_file(
        {key: tensor.contiguous() for key, tensor in encoder.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    other = create(name)
    x = batch(encoder)
    assert not torch.equal(other(x), encoder(x))
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(x), encoder(x))
    assert other.fingerprint == encoder.fingerprint


def test_half_precision_weights_take_ordinary_input(name: str) -> None:
    encoder = create(name)
    x = batch(encoder)
    expected = encoder(x)
    y = encoder.to(torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    # bfloat16 has 8 bits of mantissa: about 1 % per operation
    torch.testing.assert_close(y.float(), expected, atol=0.15 * float(expected.abs().max()), rtol=0)


def test_describes_itself_for_a_manifest(name: str) -> None:
    facts = create(name).describe()
    assert facts == {"name": name, "weights": None, "sha256": None, "licence": "unknown", "revision": None}
