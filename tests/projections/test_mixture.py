"""The mixture of projection experts: one computation that equals its parts, routers as they are described."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmbridge.errors import ConfigError, ShapeError
from mmbridge.projections import MixtureOfExperts, add_modality, balance_loss, upcycle
from mmbridge.projections.mixture import Experts

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


def forward_and_gradients(experts, x, run):
    x = x.clone().requires_grad_()
    made = run(x)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
    return [made.detach(), *torch.autograd.grad((made * weights).sum(), [x, *experts.parameters()])]


def one_by_one(experts, x, queries):
    """Every expert alone, from the same parameters, on its own."""
    made = []
    for number in range(experts.sizes[0]):
        alone = Experts(1, *experts.sizes[1:])
        named = {name: value[number : number + 1] for name, value in experts.named_parameters()}
        made.append(torch.func.functional_call(alone, named, (x, queries)))
    return torch.cat(made)


@pytest.mark.parametrize(
    "other",
    [one_by_one, lambda experts, x, queries: experts(x, x.shape[1])[:, :, :queries]],
    ids=["one by one", "last block whole"],
)
def test_batched_and_pruned_experts_are_the_others_in_single_precision(other):
    """Forward and gradients of the input and of every parameter, to 1e-6 of the largest."""
    experts, x = Experts(3, 3, 32, 4, 48), torch.randn(2, 11, 32)
    ours = forward_and_gradients(experts, x, lambda x: experts(x, 5))
    theirs = forward_and_gradients(experts, x, lambda x: other(experts, x, 5))
    assert ours[0].shape == (3, 2, 5, 32)
    for found, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))


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


@pytest.mark.parametrize("options", [{"router": "features"}, {"router": "tokens", "normalize": "sigmoid", "top_k": 2}])
def test_load_tells_of_the_last_call(features, options):
    projection = make(**options)
    with pytest.raises(ShapeError, match="has weighed nothing yet"):
        projection.load()
    projection(features.flip(0))
    projection(features)
    weights = projection.weights(features)
    torch.testing.assert_close(projection.routing, weights, rtol=0, atol=0)
    load = projection.load()
    torch.testing.assert_close(load.share, weights.mean((0, 1)))
    shares = weights / weights.sum(-1, keepdim=True)
    wanted = torch.stack([-sum(p * p.log() for p in slot if p > 0) for slot in shares.flatten(0, 1)]).mean()
    torch.testing.assert_close(load.entropy, wanted)
    assert not load.share.requires_grad and not load.entropy.requires_grad


def test_load_of_even_weights_is_even(features):
    projection = make(router="constant")
    projection(features)
    torch.testing.assert_close(projection.load().share, torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(projection.load().entropy, torch.tensor(math.log(3), dtype=torch.float64))


def test_balance_loss_is_the_squared_coefficient_of_variation():
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])  # totals 1.2, 0.7, 0.1, of mean 2/3
    wanted = ((1.2 - 2 / 3) ** 2 + (0.7 - 2 / 3) ** 2 + (0.1 - 2 / 3) ** 2) / 3 / (2 / 3) ** 2
    assert balance_loss(weights).item() == pytest.approx(wanted)
    assert balance_loss(torch.full((2, 4, 5), 0.2)).item() == pytest.approx(0, abs=1e-12)
    assert balance_loss(torch.tensor([[1.0, 0, 0]]).expand(4, -1)).item() == pytest.approx(2)


def test_balance_loss_trains_the_router_to_even_weights(features):
    projection = make(router="features")
    with torch.no_grad():
        projection.router[2].bias.copy_(torch.tensor([3.0, 0, 0]))
    optimizer = torch.optim.Adam(projection.router.parameters(), 0.05)
    shares = []
    for _ in range(40):
        projection(features)
        shares.append(projection.load().share.max().item())
        optimizer.zero_grad()
        balance_loss(projection.routing).backward()
        optimizer.step()
    assert shares[0] > 0.8 and shares[-1] < 0.4


def test_a_copy_has_no_last_call(features):
    projection = make(router="features")
    projection(features)
    other = copy.deepcopy(projection)
    assert other.routing is None and projection.routing is not None
    assert torch.equal(other(features), projection(features))


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("normalize", ["softmax", "sigmoid"])
def test_upcycled_experts_start_as_the_one(features, normalize, built):
    options = {**SIZES, "num_experts": 1, "normalize": normalize}
    one = MixtureOfExperts(12, 20, **options) if built else MixtureOfExperts(**options).build(12, 20)
    one = one.double().eval()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    wanted = one(features)
    made = upcycle(one, 3, experts="experts", router="features")
    torch.testing.assert_close(made(features), wanted, rtol=0, atol=1e-12)
    assert made.weights(features).shape == (2, 4, 3) and not made.training
    assert made.arguments == {**options, "num_experts": 3, "experts": "experts", "router": "features"}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_noise_sets_upcycled_experts_apart(features):
    one = make(num_experts=1)
    weight = one.experts.blocks[0].gate
    found = upcycle(one, 4, noise=0.5).experts.blocks[0].gate - weight
    assert found.shape == (4, 24, 16)
    assert (found.std((1, 2)) / weight.std() - 0.5).abs().max() < 0.1
    assert (found[0] - found[1]).abs().max() > 0.1 * weight.std()


@pytest.mark.parametrize(
    ("options", "changed", "sentence"),
    [
        ({}, {}, "starts from one expert, but the projection has 3"),
        ({"num_experts": 1}, {"noise": -0.1}, "noise=-0.1, but it must be 0 or more"),
        ({"num_experts": 1}, {"normalise": "sigmoid"}, "can't change 'normalise'; did you mean 'normalize'"),
        ({"num_experts": 1}, {"depth": 2}, "can't change 'depth'; known: experts, normalize, router, top_k"),
        ({"num_experts": 1}, {"num_experts": 0}, "positive integer for num_experts"),
    ],
)
def test_upcycling_that_cannot_be_is_one_sentence(options, changed, sentence):
    with pytest.raises(ConfigError, match=sentence):
        upcycle(make(**options), **{"num_experts": 3, **changed})


@pytest.mark.parametrize("container", [dict, nn.ModuleDict])
def test_a_new_modality_starts_as_another_and_shares_its_experts(features, container):
    image = make(experts="experts", router="features")
    projections = container({"image": image})
    thermal = add_modality(projections, "thermal")
    assert projections["thermal"] is thermal and thermal.experts is image.experts
    assert torch.equal(thermal(features), image(features))
    own = {name: value for name, value in thermal.named_parameters() if not name.startswith("experts.")}
    assert own and not {id(value) for value in own.values()} & {id(value) for value in image.parameters()}
    before = image(features).detach()
    with torch.no_grad():
        for value in own.values():
            value.add_(torch.randn_like(value))
    assert torch.equal(image(features), before)
    assert not torch.equal(thermal(features), before)
    pool = {}
    for projection in (image, thermal):  # as a bridge does
        projection.share(pool)
    assert image.experts is thermal.experts is pool["experts"]


def test_modalities_that_cannot_be_added_are_one_sentence():
    projections = {
        "image": make(experts="experts"),
        "audio": make(),
        "imu": MixtureOfExperts(**SIZES, experts="experts"),
    }
    for name, like, error, sentence in (
        ("audio", "image", ConfigError, "there is a projection for 'audio' already"),
        ("thermal", "imagee", ConfigError, "no projection for 'imagee'; did you mean 'image'"),
        ("thermal", "audio", ConfigError, "projection of 'audio' has no experts to share; give it as"),
        ("thermal", "imu", ShapeError, r"has no widths yet; call build\(dim_in, dim_out\) first"),
    ):
        with pytest.raises(error, match=sentence):
            add_modality(projections, name, like)
    assert set(projections) == {"image", "audio", "imu"}


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
        ({"upcycle": -0.1}, "upcycle=-0.1, but it must be 0 or more"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(**options)


def test_the_default_feed_forward_is_llamas():
    assert MixtureOfExperts(8, 8, depth=1, num_experts=1).experts.sizes == (1, 1, 1024, 16, 2816)
