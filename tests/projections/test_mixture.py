"""The mixture of projection experts: one computation that equals its parts, routers as they are described."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmbridge.errors import ConfigError
from mmbridge.projections import MixtureOfExperts

SIZES = {"num_tokens": 4, "dim_hidden": 16, "num_experts": 3, "depth": 3, "num_heads": 2, "dim_feedforward": 24}


def make(**options):
    torch.manual_seed(0)
    return MixtureOfExperts(12, 20, **{**SIZES, **options}).double()


@pytest.fixture
def features():
    return torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def alone(projection, features):
    """The slots by the definition: one expert after the other, every block on all tokens."""
    both = torch.cat([projection.tokens.expand(len(features), -1, -1), projection.project_in(features)], dim=1)
    mixed = 0.0
    for number in range(projection.num_experts):
        x = both
        for block in projection.experts.blocks:
            normed = F.rms_norm(x, x.shape[-1:], block.norm_attention[number, 0], 1e-5)
            query, key, value = (
                F.linear(normed, weight[number]).unflatten(-1, (2, 8)).transpose(1, 2)
                for weight in (block.query, block.key, block.value)
            )
            scores = (query @ key.mT / 8**0.5).softmax(-1)
            x = x + F.linear((scores @ value).transpose(1, 2).flatten(2), block.out[number])
            normed = F.rms_norm(x, x.shape[-1:], block.norm_mlp[number, 0], 1e-5)
            inner = F.silu(F.linear(normed, block.gate[number])) * F.linear(normed, block.up[number])
            x = x + F.linear(inner, block.down[number])
        mixed = mixed + projection.weights(features)[..., number : number + 1] * x[:, :4]
    return projection.project_out(mixed)


@pytest.mark.parametrize("router", ["tokens", "features", "constant"])
def test_experts_together_are_experts_one_by_one(features, router):
    projection = make(router=router)
    parameters = list(projection.parameters())
    wanted = alone(projection, features)
    gradients = torch.autograd.grad(wanted.square().sum(), parameters)
    made = projection(features)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    for found, gradient in zip(torch.autograd.grad(made.square().sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_a_router_reads_what_it_says(features):
    other = features.flip(0) * 2
    assert torch.equal(make().weights(features), make().weights(other))
    reading = make(router="features")
    assert reading.weights(features).shape == (2, 4, 3)
    assert (reading.weights(features) - reading.weights(other)).abs().max() > 1e-3
    assert torch.equal(make(router="constant").weights(features), torch.full((1, 4, 3), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid"])
def test_weights_are_positive_and_sum_to_one(features, normalize):
    weights = make(normalize=normalize).weights(features)
    assert weights.min() > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, dtype=torch.float64))
    scores = make(normalize=normalize).router(make().tokens)
    wanted = scores.softmax(-1) if normalize == "softmax" else scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(weights, wanted)


def test_the_strongest_experts_keep_their_weights(features):
    whole, some = make().weights(features), make(top_k=2).weights(features)
    assert ((some > 0).sum(-1) == 2).all()
    assert torch.equal(some[some > 0], whole[some > 0])
    torch.testing.assert_close(some.sum(-1), whole.sum(-1) - whole.min(-1).values)


@pytest.mark.parametrize("built", [True, False])
def test_projections_of_one_name_share_their_experts(features, built):
    widths = [{"dim_in": 12, "dim_out": 20}, {"dim_in": 9, "dim_out": 20}, {"dim_in": 12, "dim_out": 20}]
    names = ["experts", "experts", None]
    sizes = [{**SIZES, **(width if built else {}), "experts": name} for width, name in zip(widths, names, strict=True)]
    made, pool = nn.ModuleList(MixtureOfExperts(**size) for size in sizes), {}
    for projection, width in zip(made, widths, strict=True):
        projection.share(pool)
        projection.build(**width)
    one, two, alone = made.double()
    assert one.experts is two.experts is pool["experts"] and alone.experts is not one.experts
    assert one(features).shape == alone(features).shape == (2, 4, 20)
    assert not any(key.startswith("_") for key in two.state_dict())
    count = sum(value.numel() for value in one.experts.parameters())
    apart = sum(value.numel() for projection in made for value in projection.parameters())
    assert sum(value.numel() for value in made.parameters()) == apart - count
    other = MixtureOfExperts(9, 20, **{**SIZES, "depth": 2}, experts="experts")
    with pytest.raises(ConfigError, match="share experts of the sizes"):
        other.share(pool)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 3}, "num_heads=3, which does not divide dim_hidden=16"),
        ({"router": "router"}, "router='router'; choose one of tokens, features, constant"),
        ({"normalize": "sum"}, "normalize='sum'; choose one of softmax, sigmoid"),
        ({"top_k": 4}, "top_k=4, which is not in 1..3"),
        ({"num_experts": 0}, "positive integer for num_experts"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(**options)


def test_the_default_feed_forward_is_llamas():
    assert MixtureOfExperts(8, 8, depth=1, num_experts=1).experts.sizes == (1, 1, 1024, 16, 2816)
