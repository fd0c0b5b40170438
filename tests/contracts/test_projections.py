"""What every registered projection promises, whatever its mechanism."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbridge.errors import ConfigError, ShapeError
from mmbridge.projections import InputProjection, OutputProjection
from mmbridge.registry import projections as registry

DIM_IN, DIM_OUT = 12, 20
NAMES = registry.names()


def sizes_of(name: str) -> dict[str, int]:
    sizes = {"dim_in": DIM_IN, "dim_out": DIM_OUT}
    return sizes if registry.get(name).direction == "in" else sizes | {"num_queries": 1}


def create(name: str):
    """Return an unbuilt instance of the small size that the projection registers for tests."""
    return registry.create(name, **registry.tiny(name))


def build(name: str):
    torch.manual_seed(0)
    return create(name).build(**sizes_of(name))


def slots(projection, tokens_in: int) -> int:
    return projection.num_tokens(tokens_in) if projection.direction == "in" else projection.num_queries


def test_all_projections_are_registered():
    assert {"linear", "mlp", "grouping", "resampler", "signal_transformer", "pooled"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_direction_matches_the_base_class(name):
    base = {"in": InputProjection, "out": OutputProjection}[registry.get(name).direction]
    assert isinstance(create(name), base)


@pytest.mark.parametrize("name", NAMES)
def test_has_no_parameters_until_built_and_then_knows_its_sizes(name):
    projection = create(name)
    assert not projection.is_built and projection.dim_in is None and projection.dim_out is None
    assert not list(projection.parameters()) and "not built" in repr(projection)
    assert projection.build(**sizes_of(name)) is projection
    assert projection.is_built and (projection.dim_in, projection.dim_out) == (DIM_IN, DIM_OUT)
    assert list(projection.parameters()) and "12 -> " in repr(projection)


@pytest.mark.parametrize("name", NAMES)
def test_widths_at_creation_equal_widths_at_build(name):
    built = build(name)
    widths = {key: size for key, size in sizes_of(name).items() if key != "num_queries"}
    if "num_queries" in sizes_of(name) and name != "pooled":
        widths["num_queries"] = 1
    torch.manual_seed(0)
    created = registry.create(name, **registry.tiny(name), **widths)
    for key, value in built.state_dict().items():
        assert torch.equal(created.state_dict()[key], value), key


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_in_float32_and_bfloat16(name, tokens):
    projection = build(name)
    for dtype in (torch.float32, torch.bfloat16):
        for mode in (True, False):
            y = projection.to(dtype).train(mode)(torch.randn(3, tokens, DIM_IN, dtype=dtype))
            assert y.shape == (3, slots(projection, tokens), DIM_OUT)
            assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_trains_under_bfloat16_autocast(name):
    projection = build(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = projection(torch.randn(3, 9, DIM_IN)).square().sum()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in projection.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter_and_the_input_in_training(name):
    projection = build(name).train()
    x = torch.randn(4, 9, DIM_IN, requires_grad=True)
    y = projection(x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad.abs().max() > 1e-6
    weak = [key for key, p in projection.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert not weak


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_passes_and_leaves_zero_gradients(name):
    projection = build(name).train()
    y = projection(torch.randn(0, 5, DIM_IN))
    assert y.shape == (0, slots(projection, 5), DIM_OUT)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in projection.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic_and_training_follows_the_global_seed(name):
    projection, x = build(name), torch.randn(3, 9, DIM_IN)
    projection.eval()
    torch.manual_seed(1)
    first = projection(x)
    assert torch.equal(first, projection(x))
    projection.train()
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        runs.append(projection(x))
    assert torch.equal(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_do_not_touch_each_other(name):
    projection, x = build(name).double().eval(), torch.randn(3, 5, DIM_IN, dtype=torch.float64)
    torch.testing.assert_close(projection(x)[1:2], projection(x[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_load_bit_equal(name, tmp_path):
    projection, x = build(name).eval(), torch.randn(2, 5, DIM_IN)
    save_file(projection.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(99)
    loaded = create(name).build(**sizes_of(name)).eval()
    assert not torch.equal(loaded(x), projection(x))
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(loaded(x), projection(x))


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_the_meta_device(name):
    with torch.device("meta"):
        projection = create(name).build(**sizes_of(name))
    assert all(p.is_meta for p in projection.parameters())
    real = build(name).state_dict()
    assert {key: value.shape for key, value in projection.state_dict().items()} == {
        key: value.shape for key, value in real.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_forward_before_build_says_what_to_do(name):
    message = rf"projection '{name}' has no widths yet; give dim_in, dim_out.* when creating it, or call build\(dim_in"
    with pytest.raises(ShapeError, match=message):
        create(name)(torch.randn(1, 2, DIM_IN))


@pytest.mark.parametrize("shape", [(2, 5, DIM_IN + 1), (2, 0, DIM_IN), (2, DIM_IN), (DIM_IN,)])
@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_are_refused_with_both_shapes_named(name, shape):
    with pytest.raises(ShapeError) as error:
        build(name)(torch.randn(shape))
    assert f"projection '{name}' takes tokens of shape (batch, at least 1, {DIM_IN})" in str(error.value)
    assert f"got {shape}" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_building_again_checks_the_sizes_and_keeps_the_weights(name):
    projection, sizes = build(name), sizes_of(name)
    before = [id(p) for p in projection.parameters()]
    assert projection.build(**sizes) is projection
    assert [id(p) for p in projection.parameters()] == before
    giver, taker = ("encoder", "backbone") if projection.direction == "in" else ("backbone", "decoder")
    with pytest.raises(ShapeError) as error:
        projection.build(**sizes | {"dim_in": 13})
    assert f"projection '{name}' was built for 12 -> " in str(error.value)
    assert f"but the {giver} gives width 13; create it with dim_in=13" in str(error.value)
    with pytest.raises(ShapeError, match=f"{giver} gives width 13 and the {taker} takes width 21; .*dim_out=21"):
        projection.build(**sizes | {"dim_in": 13, "dim_out": 21})


@pytest.mark.parametrize("name", NAMES)
def test_half_given_or_impossible_sizes_are_refused(name):
    tiny = registry.tiny(name)
    with pytest.raises(ConfigError, match=rf"'{name}' was given dim_in.* without dim_out.*; give all of them, or none"):
        registry.create(name, **tiny, dim_in=DIM_IN)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match=rf"'{name}' needs a positive integer for dim_out, but got {wrong}"):
            create(name).build(**sizes_of(name) | {"dim_out": wrong})
