"""The way out by signals: blocks, conditions, targets and losses."""

import pytest
import torch
from torch.nn import functional as F

from mmbridge.backbones import CausalLM
from mmbridge.decoders import StableDiffusion
from mmbridge.errors import ConfigError, DataError, ShapeError
from mmbridge.media import Image
from mmbridge.outputs import Signals
from mmbridge.projections import SignalTransformer
from mmbridge.specs import ConditionSpec

SIZES = {"dim_hidden": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
PICTURE = Image(torch.arange(768, dtype=torch.uint8).view(3, 16, 16))


@pytest.fixture(scope="module")
def backbone(parts):
    return CausalLM(parts["llama"], template="plain")


@pytest.fixture
def make(parts, backbone):
    def signals(**options):
        torch.manual_seed(0)
        way = Signals(SignalTransformer(**SIZES), StableDiffusion(parts["sd"]), **options)
        way.build("image", backbone)
        return way.eval()

    return signals


def test_sizes_are_derived_from_backbone_and_decoder(make):
    way = make(num_signals=3)
    condition = way.condition(torch.randn(2, 3, 32), torch.randn(2, 3, 32))
    assert condition.shape == (2, way.decoder.spec.tokens, way.decoder.spec.dim)
    assert (way.length(), way.ids(), way.rows.head.shape[0]) == (3, [0, 1, 2], 1)


def test_appended_queries_follow_a_trigger_that_is_not_read(make):
    way = make(num_signals=3, mode="appended")
    assert (way.length(), way.ids()) == (4, [0, 1, 2, 3])
    hidden, embeddings = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    before = way.condition(hidden, embeddings)
    hidden[:, 0] += 1
    assert torch.equal(way.condition(hidden, embeddings), before)
    hidden[:, 1] += 1
    assert not torch.allclose(way.condition(hidden, embeddings), before)


def test_hidden_states_and_embeddings_are_added(make):
    way = make()
    hidden, embeddings = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    torch.testing.assert_close(way.condition(hidden, embeddings), way.projection(hidden + embeddings))


def test_conditions_have_unit_rows_where_the_decoder_wants_them(make, monkeypatch):
    way = make()
    spec = way.decoder.spec
    monkeypatch.setitem(way.decoder.__dict__, "spec", ConditionSpec(spec.tokens, spec.dim, normalized=True))
    condition = way.condition(torch.randn(2, 4, 32), torch.randn(2, 4, 32))
    torch.testing.assert_close(condition.norm(dim=-1), torch.ones(2, spec.tokens))


def test_conditions_stay_as_projected_where_normalising_is_off(make, monkeypatch):
    way = make(normalize=False)
    spec = way.decoder.spec
    monkeypatch.setitem(way.decoder.__dict__, "spec", ConditionSpec(spec.tokens, spec.dim, normalized=True))
    hidden, embeddings = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    assert torch.equal(way.condition(hidden, embeddings), way.projection(hidden + embeddings))


def test_spaces_between_signals_are_rows_that_are_forced_and_read(make):
    way = make(num_signals=3, spaces=True)
    assert (way.length(), way.ids(), way.rows.count, way.rows.head.shape[0]) == (5, [0, 1, 2, 3, 4], 5, 1)
    hidden, embeddings = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    condition = way.condition(hidden, embeddings)
    torch.testing.assert_close(condition, way.projection(hidden + embeddings))
    for place in range(5):
        changed = hidden.clone()
        changed[:, place] += 1
        assert not torch.allclose(way.condition(changed, embeddings), condition)


def test_targets_are_the_decoders_own_conditions(make):
    way = make()
    first, second = way.targets([None, PICTURE], ["red", "blue"])
    torch.testing.assert_close(
        torch.stack([first["condition"], second["condition"]]), way.decoder.encode(["red", "blue"])[0]
    )
    assert "latent" not in second


def test_alignment_is_the_mean_square_or_the_published_norm(make):
    hidden, embeddings = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    for alignment in ("mse", "norm"):
        way = make(alignment=alignment)
        targets = way.targets([None, None], ["red", "blue"])
        wanted = torch.stack([target["condition"] for target in targets])
        condition = way.condition(hidden, embeddings)
        expected = F.mse_loss(condition, wanted) if alignment == "mse" else (condition - wanted).norm(dim=-1).mean()
        losses = way.losses(hidden, embeddings, targets, seed=0)
        assert list(losses) == ["alignment"]
        torch.testing.assert_close(losses["alignment"], expected)


def test_the_published_norm_has_a_gradient_at_zero(make, monkeypatch):
    way = make(alignment="norm")
    hidden = torch.randn(1, 4, 32, requires_grad=True)
    target = {"condition": way.condition(hidden, hidden)[0].detach()}
    way.losses(hidden, hidden, [target], seed=0)["alignment"].backward()
    assert hidden.grad.isfinite().all()


def test_denoising_is_the_decoders_own_loss_and_seeded(make):
    way = make(denoising=True)
    targets = way.targets([PICTURE], ["red"])
    hidden, embeddings = torch.randn(1, 4, 32, requires_grad=True), torch.randn(1, 4, 32)
    one, two, other = (way.losses(hidden, embeddings, targets, seed=seed)["denoising"] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    latent = way.decoder.target([PICTURE])
    generator = torch.Generator().manual_seed(1)
    torch.testing.assert_close(one, way.decoder.loss(way.condition(hidden, embeddings), latent, generator=generator))
    one.backward()
    assert hidden.grad.any()


def test_what_targets_depend_on_is_in_the_fingerprint(make):
    with_latents, without = make(denoising=True), make()
    assert (with_latents.reads_media, without.reads_media) == (True, False)
    assert with_latents.fingerprint != without.fingerprint


def test_only_projection_and_rows_train(make):
    way = make()
    assert list(way.trainable()) == ["projection", "rows"]
    way.targets([None], ["red"])
    trained = {id(value) for part in way.trainable().values() for value in part.parameters()}
    assert all(not value.requires_grad for value in way.parameters() if id(value) not in trained)


def test_faults_are_named(make, parts, backbone):
    for options, words in (
        ({"mode": "sung"}, "'emitted' or 'appended', not 'sung'"),
        ({"alignment": "l1"}, "'mse' or 'norm', not 'l1'"),
        ({"num_signals": 0}, "num_signals must be a positive integer, not 0"),
        ({"mode": "appended", "spaces": True}, "spaces stand between signals that are 'emitted'"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(**options)
    with pytest.raises(DataError, match="has no 'caption' to align to"):
        make().targets([None], [None])
    with pytest.raises(DataError, match="not only their captions"):
        make(denoising=True).targets([None], ["red"])
    with pytest.raises(ConfigError, match="output 'audio' was given a decoder for 'image'"):
        Signals(SignalTransformer(**SIZES), StableDiffusion(parts["sd"])).build("audio", backbone)
    wrong = SignalTransformer(32, 768, 12, **SIZES)
    with pytest.raises(ShapeError, match="output 'image': .*the decoder takes width 16"):
        Signals(wrong, StableDiffusion(parts["sd"])).build("image", backbone)
