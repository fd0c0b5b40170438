import pytest
import torch

from mmbridge.errors import ConfigError, ShapeError
from mmbridge.projections import Grouping
from mmbridge.projections.grouping import INITIAL_TEMPERATURE, ConceptGrouping, PublishedGrouping, assign

VARIANTS = ["paper", "published"]


def small(variant: str = "paper", **changes):
    torch.manual_seed(3)
    options = {"num_tokens": 3, "num_concepts": (5,), "depths": (2, 1, 1), "dim_hidden": 16, "num_heads": 2}
    return Grouping(12, 10, **options | {"variant": variant} | changes)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 30])
def test_any_number_of_tokens_also_fewer_than_concepts(variant, tokens):
    projection, x = small(variant), torch.randn(2, tokens, 12)
    for mode in (True, False):
        y = projection.train(mode)(x)
        assert y.shape == (2, 3, 10) and y.isfinite().all()
    assert projection.num_tokens(tokens) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_tokens_makes_no_difference(variant):
    projection, x = small(variant).double().eval(), torch.randn(2, 9, 12, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(projection(x[:, order]), projection(x), rtol=0, atol=1e-12)
    assert torch.equal(projection.assignments(x[:, order])[0], projection.assignments(x)[0][:, order])


@pytest.mark.parametrize("variant", VARIANTS)
def test_assignments_are_noise_free_indices_per_stage(variant):
    projection, x = small(variant, num_concepts=(5, 4), depths=(1, 1, 1, 1)), torch.randn(2, 30, 12)
    in_training = projection.train().assignments(x)
    assert [tuple(index.shape) for index in in_training] == [(2, 30), (2, 5), (2, 4)]
    assert [int(index.max()) < groups for index, groups in zip(in_training, (5, 4, 3), strict=True)] == [True] * 3
    assert projection.training
    assert all(map(torch.equal, in_training, projection.eval().assignments(x)))
    with pytest.raises(ShapeError, match=r"takes tokens of shape .* 12\), but got \(2, 30, 11\)"):
        projection.assignments(x[..., :11])


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_samples_and_evaluation_does_not(variant):
    projection, x = small(variant), torch.randn(2, 30, 12)
    projection.train()
    assert not torch.equal(projection(x), projection(x))
    state = torch.get_rng_state()
    projection.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_published_gradients_vanish_only_where_a_normalisation_cancels_the_parameter():
    projection = small("published").double().train()
    y = projection(torch.randn(2, 30, 12, dtype=torch.float64))
    (y * torch.randn_like(y)).sum().backward()
    gradients = {key: p.grad.abs().max() for key, p in projection.named_parameters()}
    # A bias on the keys adds one number to all logits of a query; one on the assigning queries, to all of a token.
    softmax_cancels = ("cross_attention.key.bias", "assign_query.bias")
    # A bias after mixing tokens adds one number to all channels of a concept.
    layer_norm_cancels = ("mixer.mlp.2.bias", "carry.mlp.2.bias")
    blind = {key for key in gradients if key.endswith((*softmax_cancels, *layer_norm_cancels))}
    assert len(blind) == 7 and all(gradients[key] < 1e-12 for key in blind)
    assert min(gradients[key] for key in gradients.keys() - blind) > 1e-8


def test_assign_is_one_hot_in_value_and_softmax_in_gradient():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    hard, index = assign(logits, sample=False)
    assert torch.equal(index, logits.argmax(dim=1))
    assert torch.equal(hard, torch.nn.functional.one_hot(index, 5).mT.float())
    weights = torch.randn(2, 5, 7)
    (ours,) = torch.autograd.grad((hard * weights).sum(), logits)
    (soft,) = torch.autograd.grad((logits.softmax(dim=1) * weights).sum(), logits)
    torch.testing.assert_close(ours, soft)


def test_sampled_assignments_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    draws = 20000
    _, index = assign(logits[None, :, None].expand(1, 4, draws), sample=True)
    expected = logits.softmax(dim=0)
    observed = torch.bincount(index[0], minlength=4) / draws
    assert ((observed - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()  # four standard errors


def test_paper_update_is_concept_plus_mlp_of_the_mean():
    torch.manual_seed(0)
    grouping, concepts = ConceptGrouping(8), torch.randn(1, 4, 8)
    token = torch.randn(1, 1, 8)
    once, index = grouping(token, concepts, sample=False)
    cosines = torch.nn.functional.cosine_similarity(
        grouping.norm_concepts(concepts), grouping.norm_tokens(token), dim=-1
    )
    assert index.item() == cosines.argmax().item()
    chosen = index.item()
    empty = [i for i in range(4) if i != chosen]
    unassigned = concepts + grouping.mlp(torch.zeros(8))
    torch.testing.assert_close(once[:, empty], unassigned[:, empty])
    torch.testing.assert_close(once[0, chosen], concepts[0, chosen] + grouping.mlp(grouping.norm_tokens(token))[0, 0])
    twice, _ = grouping(token.expand(1, 2, 8), concepts, sample=False)
    torch.testing.assert_close(twice, once)
    assert grouping.log_temperature.exp().item() == pytest.approx(INITIAL_TEMPERATURE)


def test_published_sum_is_divided_by_the_count_plus_one():
    torch.manual_seed(0)
    grouping = PublishedGrouping(8, 2, 4)
    with torch.no_grad():  # leave only what was gathered: identity output, no cross-attention, no feed-forward
        for layer in (grouping.cross_attention.out, grouping.cross_mlp[2], grouping.mlp[2]):
            layer.weight.zero_(), layer.bias.zero_()
        grouping.assign_out.weight.copy_(torch.eye(8)), grouping.assign_out.bias.zero_()
    token, concepts = torch.randn(1, 1, 8), torch.randn(1, 4, 8)
    value = grouping.assign_value(grouping.norm_tokens(token))[0, 0]
    base = grouping.norm_cross(grouping.norm_mixed(grouping.mixer(concepts)))
    for count in (1, 2, 5):
        grouped, index = grouping(token.expand(1, count, 8), concepts, sample=False)
        gathered = torch.zeros(4, 8)
        gathered[index[0, 0]] = value * count / (count + 1)
        torch.testing.assert_close(grouped - base, gathered[None])


def test_seeded_training_separates_two_kinds_of_tokens():
    torch.manual_seed(0)
    projection = Grouping(8, 4, 2, num_concepts=(4,), depths=(1, 1, 1), dim_hidden=16, num_heads=2)
    optimiser = torch.optim.Adam(projection.parameters(), lr=3e-3)
    kinds = torch.randn(2, 8)
    for _ in range(150):
        label = torch.randint(2, (32,))
        x = kinds[label][:, None] + 0.3 * torch.randn(32, 6, 8)
        loss = torch.nn.functional.cross_entropy(projection(x).mean(dim=1), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    label = torch.arange(64) % 2
    logits = projection.eval()(kinds[label][:, None] + 0.3 * torch.randn(64, 6, 8)).mean(dim=1)
    assert (logits.argmax(dim=-1) == label).float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "count"),
    [({"variant": "published"}, 53_144_912), ({}, 44_677_634), ({"depths": (4, 2, 2)}, 32_074_242)],
)
def test_full_size_on_the_meta_device(options, count):
    with torch.device("meta"):
        projection = Grouping(1024, 4096, **options)
    assert sum(p.numel() for p in projection.parameters()) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (6, 3)}, r"'grouping' has 2 grouping stages \(64, 8\) but depths=\(6, 3\); give 3 depths"),
        (
            {"num_concepts": (), "depths": (6, 3, 3)},
            r"has 1 grouping stages \(8,\) but depths=\(6, 3, 3\); give 2 depths",
        ),
        ({"num_concepts": (0,)}, "needs a positive integer for num_concepts, but got 0"),
        ({"num_tokens": 0}, "needs a positive integer for num_concepts, but got 0"),
        ({"depths": (1, 0, 1)}, "needs a positive integer for depths, but got 0"),
        ({"dim_hidden": 100}, "num_heads=8, which does not divide dim_hidden=100; choose a divisor"),
        ({"variant": "legacy"}, "no variant 'legacy'; choose 'paper' or 'published'"),
    ],
)
def test_wrong_options_are_refused_when_created(options, message):
    with pytest.raises(ConfigError, match=message):
        Grouping(**options)
