import warnings

import pytest
import torch

from mmbridge.errors import ConfigError, ShapeError
from mmbridge.projections import SignalTransformer


def small(num_queries: int = 7, **options):
    torch.manual_seed(5)
    options = {"dim_hidden": 16, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 32} | options
    return SignalTransformer(12, 10, num_queries, **options)


@pytest.mark.parametrize("signals", [1, 4, 24])
def test_any_number_of_signals_gives_all_queries(signals):
    assert small()(torch.randn(2, signals, 12)).shape == (2, 7, 10)


def test_order_of_signals_makes_no_difference():
    projection, x = small().double().eval(), torch.randn(2, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(projection(x.flip(1)), projection(x), rtol=0, atol=1e-12)


def test_queries_differ_from_the_first_step():
    projection = small(num_queries=400)
    assert projection.queries.std().item() == pytest.approx(0.02, rel=0.05)
    y = small()(torch.randn(1, 4, 12))[0]
    assert torch.pdist(y).min() > 1e-3


def test_dropout_acts_in_training_only():
    projection, x = small(dropout=0.5), torch.randn(1, 4, 12)
    assert not torch.equal(projection.train()(x), projection(x))
    projection.eval()
    assert torch.equal(projection(x), projection(x))


def test_layers_start_apart():
    encoder = small().transformer.encoder
    assert not torch.equal(encoder.layers[0].linear1.weight, encoder.layers[1].linear1.weight)


def test_creation_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small()


def test_clash_with_the_decoder_is_one_sentence():
    projection = SignalTransformer(12, 768, 77, dim_hidden=8, num_encoder_layers=1, num_decoder_layers=1)
    with pytest.raises(ShapeError) as error:
        projection.build(12, 1024, 64)
    assert str(error.value) == (
        "projection 'signal_transformer' was built for 12 -> 77 x 768, but the decoder takes width 1024 and the "
        "decoder takes 64 condition tokens; create it with dim_out=1024, num_queries=64, or without sizes to have them "
        "derived."
    )


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((4096, 768, 77), 31_958_784), ((4096, 1024, 77), 32_090_112), ((4096, 512, 1), 31_788_544)],
)
def test_published_sizes_on_the_meta_device(sizes, count):
    with torch.device("meta"):
        projection = SignalTransformer(*sizes)
    assert sum(p.numel() for p in projection.parameters()) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "'signal_transformer' got num_heads=3, which does not divide dim_hidden=512"),
        ({"num_decoder_layers": 0}, "positive integer for num_decoder_layers, but got 0"),
        ({"dropout": 1.0}, "got dropout=1.0; choose a probability from 0 to below 1"),
        ({"dim_in": 8, "dim_out": 8}, "was given dim_in, dim_out without num_queries; give all of them, or none"),
    ],
)
def test_wrong_options_are_refused_when_created(options, message):
    with pytest.raises(ConfigError, match=message):
        SignalTransformer(**options)
