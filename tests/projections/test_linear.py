import pytest
import torch

from mmbridge.errors import ConfigError
from mmbridge.projections import MLP, InputProjection, Linear


@pytest.mark.parametrize("projection", [Linear(6, 5), MLP(6, 5, dim_hidden=7)], ids=["linear", "mlp"])
def test_each_token_is_mapped_by_itself(projection):
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    projection.double()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(projection(x[:, order]), projection(x)[:, order], rtol=0, atol=1e-12)
    assert projection.num_tokens(4) == 4


def test_linear_is_affine():
    projection, x = Linear(6, 5).double(), torch.randn(1, 3, 6, dtype=torch.float64)
    zero = projection(torch.zeros_like(x))
    torch.testing.assert_close(projection(2 * x) - zero, 2 * (projection(x) - zero), rtol=0, atol=1e-12)


def test_mlp_hidden_width_defaults_to_the_output_width():
    assert sum(p.numel() for p in MLP(6, 5).parameters()) == 6 * 5 + 5 + 5 * 5 + 5
    assert sum(p.numel() for p in MLP(6, 5, dim_hidden=9).parameters()) == 6 * 9 + 9 + 9 * 5 + 5
    with pytest.raises(ConfigError, match="'mlp' needs a positive integer for dim_hidden, but got 0"):
        MLP(dim_hidden=0)


def test_a_projection_outside_the_registry_goes_by_its_class_name():
    class Doubling(InputProjection):
        def __init__(self, dim_in=None, dim_out=None):
            super().__init__()
            self._build_if_given(dim_in=dim_in, dim_out=dim_out)

        def num_tokens(self, tokens_in):
            return 2 * tokens_in

        def _create(self, dim_in, dim_out):
            self.layer = torch.nn.Linear(dim_in, dim_out)

        def _project(self, x):
            return self.layer(x.repeat_interleave(2, dim=1))

    projection = Doubling().build(3, 4)
    assert projection(torch.randn(1, 5, 3)).shape == (1, projection.num_tokens(5), 4)
    assert projection.name == "Doubling"
