"""Norm loss against the formula, its closed gradient against autograd, and every kind of layer."""

import copy
import math

import pytest
import torch
from torch import nn

from paperclaims.impl.losses.norm_loss import (
    add_norm_loss_gradient_,
    module_norm_loss,
    norm_loss,
    norm_loss_gradient,
    unit_weights,
)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("target", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("shape", [(3, 4), (5, 2, 3, 3), (1, 1)])
def test_formula_and_gradients(shape, target):
    w = numbers(*shape).requires_grad_()
    expected = sum((target - math.sqrt(sum(x * x for x in row.flatten().tolist()))) ** 2 for row in w)
    loss = norm_loss(w, target)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(norm_loss_gradient(w.detach(), target), gradient, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda v: norm_loss(v, target), (w,))


def test_by_hand():
    w = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    assert norm_loss(w).item() == pytest.approx(16 + 0.25)
    expected = [[2 * 0.8 * 3, 2 * 0.8 * 4], [-2 * 0.3, -2 * 0.4]]
    torch.testing.assert_close(norm_loss_gradient(w), torch.tensor(expected, dtype=torch.float64))


def test_a_target_of_zero_is_weight_decay():
    w = numbers(3, 4).requires_grad_()
    torch.testing.assert_close(norm_loss(w, 0.0), w.square().sum())
    torch.testing.assert_close(norm_loss_gradient(w.detach(), 0.0), 2 * w.detach())


def test_a_target_for_every_row():
    w, targets = numbers(3, 4), torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    rows = list(zip(w.split(1), targets.tolist(), strict=True))
    torch.testing.assert_close(norm_loss(w, targets), sum(norm_loss(row, target) for row, target in rows))
    expected = torch.cat([norm_loss_gradient(row, target) for row, target in rows])
    torch.testing.assert_close(norm_loss_gradient(w, targets), expected)


def test_rows_of_zeros_and_none():
    w = torch.zeros(2, 3, requires_grad=True)
    loss = norm_loss(w)
    assert loss.item() == 2
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.count_nonzero() == 0
    assert norm_loss_gradient(w.detach()).count_nonzero() == 0
    assert norm_loss(torch.zeros(0, 3)).item() == 0
    assert norm_loss(torch.zeros(2, 0)).item() == 2
    assert norm_loss_gradient(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    w = torch.full((2, 100), 100.0, dtype=dtype)
    assert norm_loss(w).item() == pytest.approx(2 * 999**2, rel=1e-5)
    gradient = norm_loss_gradient(w)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, torch.full_like(w, 199.8))


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), lambda w: [w[i] for i in range(3)]),
    "convolution in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda w: [w[i] for i in range(6)]),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 2), lambda w: [w[:, i] for i in range(3)]),
    "transposed in groups": (
        lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
        lambda w: [w[2 * group : 2 * group + 2, i] for group in range(2) for i in range(3)],
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_of_a_unit(kind):
    make, units = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double()
    rows = unit_weights(layer)
    expected = units(layer.weight)
    assert len(rows) == len(expected)
    for row, own in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, own)
    # each output channel of a layer without a bias depends on its own row only
    loss = module_norm_loss(layer)
    assert loss.item() == pytest.approx(sum((1 - own.norm().item()) ** 2 for own in expected), rel=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_added_gradient_is_that_of_the_sum(kind):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind][0]().double(), nn.BatchNorm1d(3), nn.ReLU())
    twin, lam = copy.deepcopy(model), 0.3
    model[0].weight.sum().backward()
    add_norm_loss_gradient_(model, lam)
    (twin[0].weight.sum() + lam * module_norm_loss(twin)).backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad, rtol=1e-12, atol=1e-14)
    assert model[1].weight.grad is None


def test_gradient_descent_ends_at_length_one():
    w = (3 * numbers(5, 4)).float()
    for _ in range(200):
        w -= 0.1 * norm_loss_gradient(w)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(5))


def without_gradient():
    add_norm_loss_gradient_(nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: norm_loss(torch.ones(2, 2).long()), ValueError, "floating"),
        (lambda: norm_loss(torch.ones(2)), ValueError, "units"),
        (lambda: norm_loss(torch.ones(2, 2), -1.0), ValueError, "target"),
        (lambda: norm_loss(torch.ones(2, 2), torch.tensor([1.0, -1.0])), ValueError, "target"),
        (lambda: norm_loss_gradient(torch.ones(2)), ValueError, "units"),
        (lambda: norm_loss_gradient(torch.ones(2, 2), math.nan), ValueError, "target"),
        (lambda: unit_weights(nn.BatchNorm1d(2)), TypeError, "BatchNorm1d"),
        (lambda: module_norm_loss(nn.ReLU()), ValueError, "no linear"),
        (without_gradient, ValueError, "backward first"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
