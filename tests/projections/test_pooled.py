import pytest
import torch

from mmbridge.errors import ConfigError, ShapeError
from mmbridge.projections import Pooled


def small(**options):
    torch.manual_seed(6)
    return Pooled(12, 10, dim_hidden=16, num_heads=2, **options)


def test_normalize_scales_the_same_vector_to_unit_length():
    x = torch.randn(5, 4, 12)
    free, unit = small()(x), small(normalize=True)(x)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(5, 1))
    assert (free.norm(dim=-1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(torch.cosine_similarity(free, unit, dim=-1), torch.ones(5, 1))


def test_order_of_signals_makes_no_difference():
    projection, x = small().double(), torch.randn(2, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(projection(x.flip(1)), projection(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", [Pooled(dim_hidden=16), Pooled(12, 10, dim_hidden=16)], ids=["new", "built"])
def test_a_sequence_condition_is_refused(projection):
    with pytest.raises(ShapeError, match=r"gives 1 vector, but the decoder takes 77 .*; use 'signal_transformer'"):
        projection.build(12, 10, 77)


def test_full_size_on_the_meta_device():
    with torch.device("meta"):
        projection = Pooled(4096, 512)
    expected = 4096 * 512 + 512 + 3 * 512 + 4 * 512**2 + 512 + 2 * 512 + 512 * 2048 + 2048 + 2048 * 512 + 512
    assert sum(p.numel() for p in projection.parameters()) == expected


def test_wrong_options_are_refused_when_created():
    with pytest.raises(ConfigError, match="'pooled' got num_heads=7, which does not divide dim_hidden=512"):
        Pooled(num_heads=7)
