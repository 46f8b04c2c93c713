"""MADL as what a strategy earns, its gradient that is none, and the smooth form that has one."""

import math

import pytest
import torch

from paperclaims.impl.losses.madl import directional_loss, information_ratio, madl, smooth_madl, strategy_returns


def numbers(*shape, seed=0):
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_formula_and_what_the_strategy_earns():
    r, f = numbers(3, 40), numbers(3, 40, seed=1)
    expected = [-math.copysign(1, a * b) * abs(a) for a, b in zip(r.flatten().tolist(), f.flatten().tolist(), strict=True)]
    losses = madl(r, f, reduction="none")
    torch.testing.assert_close(losses.flatten(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(madl(r, f), losses.mean(-1))
    torch.testing.assert_close(madl(r, f, reduction="sum"), -strategy_returns(r, f).sum(-1))
    earned = sum(a if b > 0 else -a for a, b in zip(r[0].tolist(), f[0].tolist(), strict=True))
    assert -40 * madl(r, f)[0].item() == pytest.approx(earned)


def test_no_forecast_and_no_return_count_nothing():
    r, f = torch.tensor([0.02, -0.03, 0.0]), torch.tensor([0.0, 1e-9, 5.0])
    assert madl(r, f, reduction="none").tolist() == pytest.approx([0, 0.03, 0])
    assert strategy_returns(r, f).tolist() == pytest.approx([0, -0.03, 0])
    assert directional_loss(r, f, reduction="none").tolist() == [0, 1, 0]


def test_only_the_sign_of_a_forecast_counts():
    r, f = numbers(20), numbers(20, seed=1)
    torch.testing.assert_close(madl(r, f), madl(r, 1e6 * f))
    torch.testing.assert_close(madl(3 * r, f), 3 * madl(r, f))
    torch.testing.assert_close(directional_loss(3 * r, f), directional_loss(r, f))


def test_several_forecasts_of_one_series():
    r, f = numbers(20), numbers(4, 20, seed=1)
    for loss in (madl, directional_loss, lambda r, f: smooth_madl(r, f, 1e4)):
        torch.testing.assert_close(loss(r, f), torch.stack([loss(r, row) for row in f]))


def test_gradients():
    r, f = numbers(20), numbers(20, seed=1).requires_grad_()
    (flat,) = torch.autograd.grad(madl(r, f), f)
    assert flat.count_nonzero() == 0
    (slope,) = torch.autograd.grad(smooth_madl(r, f, 1e4), f)
    assert slope.count_nonzero() == 20
    assert torch.autograd.gradcheck(lambda v: smooth_madl(100 * r, v, 2.0), (100 * f.detach()).requires_grad_())
    (none,) = torch.autograd.grad(smooth_madl(r, f, 0.0), f)
    assert none.count_nonzero() == 0


def test_smooth_form_by_hand_and_in_the_limit():
    r, f = numbers(50), numbers(50, seed=1)
    expected = [-math.tanh(1e4 * a * b) * abs(a) for a, b in zip(r.tolist(), f.tolist(), strict=True)]
    torch.testing.assert_close(smooth_madl(r, f, 1e4, reduction="none"), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(smooth_madl(r, f, 1e15), madl(r, f))
    assert torch.isfinite(smooth_madl(1e4 * torch.ones(2), -1e4 * torch.ones(2), 1e4)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smooth_form_in_sixteen_bits(dtype):
    r, f = torch.tensor([8.0, -8.0, 0.5], dtype=dtype), torch.tensor([0.0, 3.0, 0.25], dtype=dtype)
    losses = smooth_madl(r, f, 1e4, reduction="none")
    assert losses.dtype == dtype
    assert losses.tolist() == [0, 8, -0.5]


def test_information_ratio():
    returns = torch.tensor([[0.01, -0.02, 0.03], [0.0, 0.0, 0.0]], dtype=torch.float64)
    mean, deviation = 0.02 / 3, math.sqrt(((0.01 - 0.02 / 3) ** 2 + (0.02 + 0.02 / 3) ** 2 + (0.03 - 0.02 / 3) ** 2) / 2)
    ratio = information_ratio(returns)
    assert ratio[0].item() == pytest.approx(mean / deviation * math.sqrt(252))
    assert ratio[1].isnan()
    assert information_ratio(returns, periods=1)[0].item() == pytest.approx(mean / deviation)
    assert information_ratio(torch.tensor([0.0, 1.0]), periods=2).item() == pytest.approx(1)


def test_no_periods():
    assert madl(torch.zeros(0), torch.zeros(0)).isnan()
    assert madl(torch.zeros(0), torch.zeros(0), reduction="sum").item() == 0
    assert madl(torch.zeros(1), torch.ones(1)).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: madl(torch.zeros(2).long(), torch.zeros(2).long()), "floating"),
        (lambda: madl(torch.zeros(2), torch.zeros(2).double()), "dtype, got torch.float32 and torch.float64"),
        (lambda: madl(torch.zeros(2), torch.zeros(3)), "broadcast"),
        (lambda: madl(torch.tensor(0.0), torch.tensor(0.0)), "periods"),
        (lambda: madl(torch.zeros(2), torch.zeros(2), reduction="max"), "reduction"),
        (lambda: smooth_madl(torch.zeros(2), torch.zeros(2), -1.0), "a is"),
        (lambda: smooth_madl(torch.zeros(2), torch.zeros(2), math.inf), "a is"),
        (lambda: smooth_madl(torch.zeros(2), torch.zeros(3), 1.0), "broadcast"),
        (lambda: directional_loss(torch.zeros(2), torch.zeros(3)), "broadcast"),
        (lambda: strategy_returns(torch.zeros(2), torch.zeros(2).double()), "torch.float32 and torch.float64"),
        (lambda: smooth_madl(torch.zeros(2), torch.zeros(2).double(), 1.0), "torch.float32 and torch.float64"),
        (lambda: information_ratio(torch.zeros(1)), "at least 2"),
        (lambda: information_ratio(torch.zeros(2).long()), "floating"),
        (lambda: information_ratio(torch.zeros(2), periods=0), "returns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
