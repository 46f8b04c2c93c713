"""EnsLoss against the definition of a convex, calibrated loss, the authors' formula, and its edges."""

import math

import pytest
import torch

from paperclaims.impl.losses.ensloss import EnsLoss, calibrated_derivatives, inverse_box_cox

LEAST = 1e-6


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("lam", [-1.0, -0.3, 0.0, 0.4, 1.0])
def test_inverse_box_cox_undoes_the_transformation(lam):
    x = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    e = x.log() if lam == 0 else (x**lam - 1) / lam
    torch.testing.assert_close(inverse_box_cox(e, lam), x, rtol=1e-12, atol=0)
    scipy = pytest.importorskip("scipy.special").inv_boxcox(e.numpy(), lam)
    torch.testing.assert_close(inverse_box_cox(e, lam), torch.from_numpy(scipy), rtol=1e-12, atol=0)


def test_edges_of_inverse_box_cox():
    e = torch.tensor([-5.0, -2.0, 0.0, 2.0, 5.0])
    torch.testing.assert_close(inverse_box_cox(e, 0.5), torch.tensor([0.0, 0.0, 1.0, 4.0, 12.25]))
    assert inverse_box_cox(e, -0.5).tolist()[2:] == [1.0, math.inf, math.inf]
    near = inverse_box_cox(e.double(), 1e-12)
    torch.testing.assert_close(near, e.double().exp(), rtol=1e-9, atol=0)
    lam = torch.tensor([[0.0], [1.0]])
    torch.testing.assert_close(inverse_box_cox(e.expand(2, 5), lam), torch.stack([e.exp(), (1 + e).clamp(min=0)]))


@pytest.mark.parametrize("lam", [-0.9, 0.0, 0.7])
def test_every_draw_is_convex_calibrated_bounded_and_has_the_tail(lam):
    margins = 3 * normal(500, 64)
    g = calibrated_derivatives(margins, normal(500, 64, seed=1), lam)
    in_order = g.gather(-1, margins.argsort(-1))
    assert (in_order.diff(dim=-1) >= 0).all()
    assert (g < 0).all()
    assert (g >= -1 - LEAST).all()
    assert (g.abs() - LEAST <= 1 / margins.clamp(min=1) + 1e-15).all()
    assert not g.requires_grad


def test_the_formula_of_the_authors():
    margins, e, lam = torch.tensor([2.0, -1.0, 0.5, 4.0]), torch.tensor([0.1, -1.0, 0.7, -2.0]), 0.5
    drawn = [-min((1 + lam * value) ** 2, 1.0) if 1 + lam * value > 0 else 0.0 for value in e.tolist()]
    smallest = sorted(drawn)
    expected = torch.tensor([smallest[2] / 2, smallest[0], smallest[1], smallest[3] / 4]) - LEAST
    torch.testing.assert_close(calibrated_derivatives(margins, e, lam), expected)
    assert expected[3] == -LEAST  # where the draw is 0 the loss still falls


def test_ties_and_extremes():
    g = calibrated_derivatives(torch.zeros(6), normal(6, dtype=torch.float32), 0.0)
    assert ((g < 0) & (g >= -1 - LEAST)).all()
    g = calibrated_derivatives(torch.tensor([-1e30, 1e30, 0.0]), normal(3, dtype=torch.float32), -0.9)
    assert torch.isfinite(g).all()
    assert g[1] == pytest.approx(-LEAST)
    assert calibrated_derivatives(torch.zeros(2, 0), torch.zeros(2, 0), 0.5).shape == (2, 0)
    half = calibrated_derivatives(normal(8, dtype=torch.float16), normal(8, seed=1, dtype=torch.float16), -0.5)
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()


def test_batches_are_drawn_apart():
    margins, e = normal(3, 10), normal(3, 10, seed=1)
    lam = torch.tensor([[-0.5], [0.0], [0.5]], dtype=torch.float64)
    together = calibrated_derivatives(margins, e, lam)
    for place in range(3):
        alone = calibrated_derivatives(margins[place], e[place], lam[place].item())
        torch.testing.assert_close(together[place], alone, rtol=1e-14, atol=0)


def test_loss_and_its_gradient():
    scores = normal(4, 5).requires_grad_()
    targets = (normal(4, 5, seed=1) > 0).double()
    loss = EnsLoss(generator=torch.Generator().manual_seed(2))(scores, targets)
    margins = (scores * (2 * targets - 1)).flatten()
    e = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    g = calibrated_derivatives(margins, e, 0.0)
    torch.testing.assert_close(loss, (g * margins).mean())
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, g.view(4, 5) * (2 * targets - 1) / 20, rtol=1e-14, atol=0)
    by_whole_numbers = EnsLoss(generator=torch.Generator().manual_seed(2))(scores, targets.long())
    torch.testing.assert_close(by_whole_numbers, loss)
    assert EnsLoss()(torch.zeros(0), torch.zeros(0)).isnan()
    assert EnsLoss()(torch.zeros(1), torch.ones(1)).item() == 0


def test_period():
    loss, seen = EnsLoss(period=3, generator=torch.Generator().manual_seed(0)), []
    for _ in range(9):
        loss(torch.zeros(2), torch.ones(2))
        seen.append(loss.lam)
    assert seen[:3] == [0.0] * 3
    assert seen[3] == seen[4] == seen[5] != seen[6] == seen[7] == seen[8]
    many = EnsLoss(period=1, generator=torch.Generator().manual_seed(0))
    drawn = [many(torch.zeros(1), torch.ones(1)) is None or many.lam for _ in range(400)][1:]
    assert -1 <= min(drawn) < -0.97
    assert 0.97 < max(drawn) <= 1
    assert abs(sum(drawn) / len(drawn)) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_box_cox(torch.zeros(2).long(), 0.5), "floating"),
        (lambda: inverse_box_cox(torch.zeros(2), math.nan), "finite"),
        (lambda: calibrated_derivatives(torch.zeros(2).long(), torch.zeros(2).long(), 0.5), "floating"),
        (lambda: calibrated_derivatives(torch.zeros(2), torch.zeros(3), 0.5), "shape"),
        (lambda: calibrated_derivatives(torch.zeros(2), torch.zeros(2).double(), 0.5), "dtype"),
        (lambda: calibrated_derivatives(torch.tensor(0.0), torch.tensor(0.0), 0.5), "shape"),
        (lambda: EnsLoss(period=0), "period"),
        (lambda: EnsLoss()(torch.zeros(2), torch.zeros(3)), "shape"),
        (lambda: EnsLoss()(torch.zeros(2).long(), torch.zeros(2)), "floating"),
        (lambda: EnsLoss()(torch.zeros(2), torch.tensor([1.0, -1.0])), "0 and 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
