import pytest
import torch

from mmbridge.errors import ConfigError
from mmbridge.projections import Resampler
from mmbridge.projections.base import Attention


def small():
    torch.manual_seed(4)
    return Resampler(12, 10, num_tokens=3, dim_hidden=16, depth=2, num_heads=2)


def test_order_of_tokens_makes_no_difference():
    projection, x = small().double(), torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(projection(x.flip(1)), projection(x), rtol=0, atol=1e-12)


def test_number_of_slots_is_fixed_and_slots_differ():
    projection = small()
    assert projection.num_tokens(1) == projection.num_tokens(500) == 3
    y = projection(torch.randn(2, 50, 12))
    assert y.shape == (2, 3, 10)
    assert (y[:, 0] - y[:, 1]).abs().max() > 1e-4


def test_every_token_is_read():
    projection, x = small(), torch.randn(1, 6, 12, requires_grad=True)
    projection(x).square().sum().backward()
    assert (x.grad.abs().amax(dim=-1) > 1e-7).all()


def test_attention_equals_torch_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4, bias=True), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, context = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0], rtol=0, atol=1e-6)


def test_full_size_on_the_meta_device():
    with torch.device("meta"):
        projection = Resampler(1024, 4096)
    layer = 4 * 512**2 + 512 + 2 * 4 * 512**2 + 5 * 512 + 3 * 2 * 512
    expected = 1024 * 512 + 512 + 64 * 512 + 6 * layer + 2 * 512 + 512 * 4096 + 4096
    assert sum(p.numel() for p in projection.parameters()) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "'resampler' needs a positive integer for num_tokens, but got 0"),
        ({"depth": 0}, "positive integer for depth, but got 0"),
        ({"num_heads": 3}, "num_heads=3, which does not divide dim_hidden=512; choose a divisor"),
    ],
)
def test_wrong_options_are_refused_when_created(options, message):
    with pytest.raises(ConfigError, match=message):
        Resampler(**options)
