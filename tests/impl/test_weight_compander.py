"""Companded weights against the formula and its inverse, as a parametrization, and the two measures of what weights do."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from paperclaims.impl.losses.weight_compander import (
    WeightCompander,
    compand,
    compand_weights,
    expand,
    near_zero_share,
    participation,
)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_formula_slope_and_bound():
    v = 5 * numbers(3, 4)
    expected = torch.tensor([[0.7 * math.atan(x / 0.3) for x in row] for row in v.tolist()], dtype=torch.float64)
    torch.testing.assert_close(compand(v, 0.7, 0.3), expected, rtol=1e-14, atol=0)
    v.requires_grad_()
    (slope,) = torch.autograd.grad(compand(v, 0.7, 0.3).sum(), v)
    torch.testing.assert_close(slope, 0.7 * 0.3 / (0.3**2 + v.detach().square()), rtol=1e-12, atol=0)
    assert compand(torch.tensor([-1e300, 1e300], dtype=torch.float64), 2.0, 1.0).tolist() == [-math.pi, math.pi]


def test_gradients_by_everything():
    scales = torch.tensor([[0.5], [2.0], [1.0]], dtype=torch.float64)
    leaves = [numbers(3, 4), scales, scales.flip(0)]
    assert torch.autograd.gradcheck(compand, [leaf.clone().requires_grad_() for leaf in leaves])
    assert torch.autograd.gradcheck(lambda v, *ab: expand(v.tanh() / 2, *ab), [leaf.clone().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inverse(dtype):
    w = torch.linspace(-1, 1, 9).to(dtype)
    back = compand(expand(w, 0.8, 0.2), 0.8, 0.2)
    assert back.dtype == dtype
    torch.testing.assert_close(back, w, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert compand(torch.zeros(0), 1.0, 1.0).shape == expand(torch.zeros(0), 1.0, 1.0).shape == (0,)


def test_scales_are_not_learned_unless_asked():
    assert not list(WeightCompander(1.0, 2.0).parameters())
    assert len(list(WeightCompander(1.0, 2.0, learned=True).parameters())) == 2


@pytest.mark.parametrize("learned", [False, True])
def test_parametrization_keeps_the_function_and_trains(learned):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(7, 5)
    before, weight = layer(x), layer.weight.detach().clone()
    assert compand_weights(layer, reach=2.0, slope=3.0, learned=learned) is layer
    torch.testing.assert_close(layer(x), before)
    compander = layer.parametrizations.weight[0]
    size = weight.square().mean().sqrt().item()
    assert compander.log_a.exp().item() == pytest.approx(2 * size, rel=1e-5)
    assert compander.log_b.exp().item() == pytest.approx(2 * size / 3, rel=1e-5)
    names = {name for name, _ in layer.named_parameters()}
    learned_names = {"parametrizations.weight.0.log_a", "parametrizations.weight.0.log_b"}
    assert names == {"bias", "parametrizations.weight.original"} | (learned_names if learned else set())
    torch.testing.assert_close(layer.parametrizations.weight.original, expand(weight, 2 * size, 2 * size / 3))
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    loaded = compand_weights(nn.Linear(5, 3), reach=2.0, learned=learned)
    loaded.load_state_dict(copy.deepcopy(layer.state_dict()))
    torch.testing.assert_close(loaded(x), before)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), before)


def test_defaults_and_other_tensors():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)
    nn.init.uniform_(layer.bias, -1, 1)
    size = layer.bias.detach().square().mean().sqrt().item()
    compander = compand_weights(layer, "bias").parametrizations.bias[0]
    assert compander.log_a.exp().item() == pytest.approx(1.5 * size, rel=1e-5)
    assert compander.log_b.exp().item() == pytest.approx(size, rel=1e-5)
    assert not compander.log_a.requires_grad


def test_measures():
    assert participation(torch.tensor([2.0, -2.0, 2.0])) == 1
    assert participation(torch.tensor([0.0, 0.0, 3.0, 0.0])) == 0.25
    assert participation(torch.zeros(3)).isnan()
    w = numbers(2, 3, 50_000)
    torch.testing.assert_close(participation(w, (1, 2)), torch.full((2,), 1 / 3).double(), rtol=0.03, atol=0)
    torch.testing.assert_close(participation(1e3 * w, -1), participation(w, -1))
    torch.testing.assert_close(near_zero_share(w, -1), torch.full((2, 3), math.erf(0.1 / 2**0.5)).double(), rtol=0.1, atol=0)
    assert near_zero_share(torch.tensor([0.0, 0.1, -2.0, 0.0])) == 0.75
    assert near_zero_share(torch.tensor([0.0, 0.1, -2.0, 0.0]), within=0.05) == 0.5
    assert near_zero_share(torch.tensor([3.0, -3.0]), within=1.0) == 0


def test_bad_input_is_refused():
    v = torch.ones(3)
    for form in (compand, expand):
        with pytest.raises(ValueError, match="floating point"):
            form(v.long(), 1.0, 1.0)
        for bad in (0.0, -1.0, math.nan, torch.tensor([1.0, 0.0, 1.0])):
            with pytest.raises(ValueError, match="a is above 0"):
                form(v, bad, 1.0)
            with pytest.raises(ValueError, match="b is above 0"):
                form(v, 1.0, bad)
    with pytest.raises(ValueError, match="no parameter is companded"):
        expand(v, 2 / math.pi, 1.0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        for sizes in ((bad, 1.0), (1.0, bad)):
            with pytest.raises(ValueError, match="numbers above 0"):
                WeightCompander(*sizes)
            with pytest.raises(ValueError, match="needs reach, slope"):
                compand_weights(nn.Linear(2, 2), reach=sizes[0], slope=sizes[1])
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="weights other than 0"):
        compand_weights(layer)
    nn.init.eye_(layer.weight)
    with pytest.raises(ValueError, match=r"2 root mean squares: take a reach above 1.27"):
        compand_weights(layer, reach=1.2)
