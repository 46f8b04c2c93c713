"""Second-order losses against sampling and integration, the minimum of the regularised one, and bad input."""

import math

import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from paperclaims.impl.uncertainty.epistemic_uq_pitfalls import (
    dirichlet_mean,
    inner_loss,
    kl_to_uniform,
    outer_loss,
    posterior,
    regularized_minimum,
    total_variance,
)

ALPHA = torch.tensor([[0.5, 2.0, 3.0], [10.0, 1.0, 0.3]], dtype=torch.float64)
Y = torch.tensor([1, 2])


def sampled(loss):
    torch.manual_seed(0)
    return loss(Dirichlet(ALPHA).sample((200_000,))).mean(0)


def test_outer_losses_by_sampling():
    index = Y.expand(200_000, 2).unsqueeze(-1)
    log = sampled(lambda theta: -theta.gather(-1, index).squeeze(-1).log())
    torch.testing.assert_close(outer_loss(ALPHA[:1], Y[:1]), log[:1], rtol=0.01, atol=0)
    hot = torch.nn.functional.one_hot(Y, 3)
    brier = sampled(lambda theta: (theta - hot).square().sum(-1))
    torch.testing.assert_close(outer_loss(ALPHA, Y, form="brier"), brier, rtol=0.01, atol=0)


def test_log_loss_of_two_classes_by_integration():
    a, b = 1.7, 0.6
    expected = sum(1 / (b + j) - 1 / (a + b + j) for j in range(200_000))  # psi(a + b) - psi(b)
    ours = outer_loss(torch.tensor([a, b], dtype=torch.float64), torch.tensor(1)).item()
    assert ours == pytest.approx(expected, abs=1e-4)


def test_inner_losses_see_the_mean_only():
    for form in ("log", "brier"):
        narrow, wide = (inner_loss(scale * ALPHA, Y, form=form) for scale in (1e5, 0.1))
        torch.testing.assert_close(narrow, wide, rtol=1e-12, atol=1e-14)
        assert (outer_loss(ALPHA, Y, form=form) > inner_loss(ALPHA, Y, form=form)).all()
        torch.testing.assert_close(outer_loss(1e8 * ALPHA, Y, form=form), inner_loss(ALPHA, Y, form=form), rtol=1e-5, atol=1e-7)
    mean = dirichlet_mean(ALPHA)
    torch.testing.assert_close(inner_loss(ALPHA, Y), -mean[[0, 1], Y].log())
    torch.testing.assert_close(mean.sum(-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("form", ["log", "brier"])
def test_more_axes(form):
    alphas, classes = ALPHA.expand(4, 2, 3) + torch.arange(4).view(4, 1, 1), Y.expand(4, 2)
    for loss in (outer_loss, inner_loss):
        together = loss(alphas, classes, form=form)
        torch.testing.assert_close(together, torch.stack([loss(a, Y, form=form) for a in alphas]))


def test_divergence_and_variance():
    expected = kl_divergence(Dirichlet(ALPHA), Dirichlet(torch.ones_like(ALPHA)))
    torch.testing.assert_close(kl_to_uniform(ALPHA), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(total_variance(ALPHA), Dirichlet(ALPHA).variance.sum(-1))
    assert kl_to_uniform(torch.ones(4)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["log", "brier"])
def test_gradients(form):
    alpha = ALPHA.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: outer_loss(a, Y, form=form), (alpha,))
    assert torch.autograd.gradcheck(lambda a: inner_loss(a, Y, form=form), (alpha,))
    assert torch.autograd.gradcheck(kl_to_uniform, (alpha,))


@pytest.mark.parametrize("lam", [0.05, 0.5, 2.0])
def test_minimum_of_the_regularised_loss(lam):
    frequencies = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)
    alpha = regularized_minimum(frequencies, lam).requires_grad_()
    losses = outer_loss(alpha.expand(3, 3), torch.arange(3))
    value = (frequencies * losses).sum() + lam * kl_to_uniform(alpha)
    (slope,) = torch.autograd.grad(value, alpha)
    assert slope.abs().max() < 1e-12
    assert alpha.sum().item() == pytest.approx(3 + 1 / lam)


def test_posterior():
    assert posterior(torch.tensor([3, 0, 1])).tolist() == [4, 1, 2]
    assert posterior(torch.tensor([3.0, 0.0]), prior=0.5).tolist() == [3.5, 0.5]
    few, many = (total_variance(posterior(n * torch.tensor([0.5, 0.5]))).item() for n in (100, 10_000))
    assert math.log(few / many) / math.log(100) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dirichlet_mean(torch.ones(3).long()), "floating"),
        (lambda: dirichlet_mean(torch.tensor(1.0)), "alpha is"),
        (lambda: total_variance(torch.tensor([1.0, 0.0])), "above 0"),
        (lambda: kl_to_uniform(torch.tensor([1.0, math.nan])), "above 0"),
        (lambda: outer_loss(ALPHA, torch.tensor([0])), "y is"),
        (lambda: outer_loss(ALPHA, torch.tensor([0.0, 1.0])), "int64"),
        (lambda: outer_loss(ALPHA, torch.tensor([0, 3])), "0..2"),
        (lambda: inner_loss(ALPHA, torch.tensor([0, -1])), "0..2"),
        (lambda: outer_loss(ALPHA, Y, form="hinge"), "form"),
        (lambda: inner_loss(ALPHA, Y, form="hinge"), "form"),
        (lambda: posterior(torch.tensor([-1, 2])), "counts"),
        (lambda: posterior(torch.tensor([1, 2]), prior=0.0), "prior"),
        (lambda: posterior(torch.tensor(1)), "counts"),
        (lambda: regularized_minimum(torch.tensor([0.5, 0.5]), 0.0), "lam"),
        (lambda: regularized_minimum(torch.tensor([-0.5, 1.5]), 1.0), "frequencies"),
        (lambda: regularized_minimum(torch.tensor([1, 0]), 1.0), "floating"),
        (lambda: regularized_minimum(torch.tensor(1.0), 1.0), "frequencies"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
