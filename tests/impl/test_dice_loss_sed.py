"""Dice loss and the scores of sound event detection: against counts written out, F1 of certain outputs, and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from paperclaims.impl.losses.dice_loss_sed import dice_loss, error_rate, f1_score, segments

FEW = settings(derandomize=True, deadline=None, max_examples=40)


def make(*shape, seed=0, rate=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return logits, (torch.rand(*shape, generator=generator) < rate).double()


@pytest.mark.parametrize("smooth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("squared", [False, True])
def test_loss_is_the_formula(smooth, squared):
    logits, targets = make(5, 4)
    power = 2 if squared else 1
    overlap = sizes = 0.0
    for z, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        overlap, sizes = overlap + p * y, sizes + p**power + y**power
    expected = 1 - (2 * overlap + smooth) / (sizes + smooth)
    assert dice_loss(logits, targets, smooth=smooth, squared=squared).item() == pytest.approx(expected, rel=1e-13)


def test_defaults_and_axes():
    logits, targets = make(2, 7, 3)
    assert torch.equal(dice_loss(logits, targets), dice_loss(logits, targets, smooth=1.0, squared=False))
    each = dice_loss(logits, targets, dim=-2)
    assert each.shape == (2, 3)
    assert each[1, 2].item() == pytest.approx(dice_loss(logits[1, :, 2], targets[1, :, 2]).item(), rel=1e-13)
    rows = dice_loss(logits, targets, dim=(1, 2))
    assert rows.shape == (2,)
    assert rows[0].item() == pytest.approx(dice_loss(logits[0], targets[0]).item(), rel=1e-13)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("squared", [False, True])
def test_gradcheck(smooth, squared):
    logits, targets = make(4, 3)
    for dim in (None, 0):
        loss = lambda z, dim=dim: dice_loss(z, targets, dim=dim, smooth=smooth, squared=squared)  # noqa: E731
        assert torch.autograd.gradcheck(loss, logits.clone().requires_grad_())


def test_gradient_by_the_probabilities_is_the_closed_form():
    """dL/dp = -2 (y (sum p + sum y + s) - (sum p y + s / 2)) / (sum p + sum y + s)^2, times p (1 - p) for the logits."""
    logits, targets = make(6, 2, seed=1)
    for smooth in (0.0, 1.0):
        point = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(dice_loss(point, targets, smooth=smooth), point)
        p = logits.sigmoid()
        total = p.sum() + targets.sum() + smooth
        slope = -2 * (targets * total - (p * targets).sum() - smooth / 2) / total**2
        torch.testing.assert_close(gradient, slope * p * (1 - p), rtol=1e-12, atol=1e-15)
        assert (gradient[targets == 1] < 0).all()
        assert (gradient[targets == 0] > 0).all()


@FEW
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20), st.booleans())
def test_certain_outputs_give_one_minus_f1(cells, squared):
    found = torch.tensor([cell[0] for cell in cells])
    true = torch.tensor([cell[1] for cell in cells])
    logits = torch.where(found, 1e4, -1e4).double()
    loss = dice_loss(logits, true, smooth=0.0, squared=squared).item()
    assert loss == pytest.approx(1 - f1_score(found[:, None], true[:, None]).item(), abs=1e-12)


@FEW
@given(st.integers(0, 10**6), st.floats(0, 3), st.booleans())
def test_loss_lies_in_the_unit_interval_and_is_least_at_the_targets(seed, smooth, squared):
    logits, targets = make(3, 4, seed=seed)
    perfect = torch.where(targets > 0, 1e4, -1e4).double()
    assert dice_loss(perfect, targets, smooth=smooth, squared=squared).item() == pytest.approx(0, abs=1e-12)
    assert 0 <= dice_loss(logits, targets, smooth=smooth, squared=squared).item() <= 1


@FEW
@given(st.integers(1, 1000), st.floats(0, 3))
def test_silent_cells_that_are_held_for_silent_do_not_count(count, smooth):
    logits, targets = make(9)
    more = torch.cat([logits, torch.full((count,), -1e4, dtype=torch.float64)])
    silent = torch.cat([targets, torch.zeros(count)])
    assert dice_loss(more, silent, smooth=smooth).item() == pytest.approx(dice_loss(logits, targets, smooth=smooth).item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_extremes_and_dtypes(dtype, size):
    for targets in (torch.zeros(4), torch.ones(4), torch.tensor([1.0, 0, 0, 0])):
        for kind in (torch.bool, torch.int64, torch.float32):
            for smooth in (0.0, 1.0):
                logits = torch.full((4,), size, dtype=dtype).requires_grad_()
                loss = dice_loss(logits, targets.to(kind), smooth=smooth)
                assert loss.dtype == dtype
                assert 0 <= loss.item() <= 1
                assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_half_precision_holds_large_batches():
    logits = torch.zeros(200_000, dtype=torch.float16)
    assert dice_loss(logits, torch.ones(200_000)).item() == pytest.approx(1 / 3, abs=1e-3)


def test_empty_and_single():
    empty = torch.zeros(0, 3)
    assert dice_loss(empty, empty).item() == 0
    assert dice_loss(empty, empty, smooth=0.0).item() == 0
    assert dice_loss(empty, empty, dim=0, smooth=0.0).tolist() == [0, 0, 0]
    one = torch.zeros(())
    assert dice_loss(one, one + 1, smooth=0.0).item() == pytest.approx(1 / 3)
    assert dice_loss(one - 1e4, one, smooth=0.0).item() == 0
    assert dice_loss(one, one + 0.5, smooth=0.0).item() == pytest.approx(0.5)


def test_segments():
    active = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0], [0, 1]]).bool()
    assert segments(active, 2).tolist() == [[True, False], [False, False], [False, True]]
    assert segments(active, 5).tolist() == [[True, True]]
    assert segments(active, 9).tolist() == [[True, True]]
    assert torch.equal(segments(active, 1), active)
    assert segments(active[:0], 2).shape == (0, 2)
    assert segments(active.expand(4, 3, 5, 2), 2).shape == (4, 3, 3, 2)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_scores_are_the_definitions(seed, length):
    generator = torch.Generator().manual_seed(seed)
    found, true = (torch.rand(7, 3, generator=generator) < 0.4 for _ in range(2))
    true[0, 0] = True
    tp = fp = fn = wrong = active = 0
    for start in range(0, 7, length):
        f, t = (part[start : start + length].any(0).tolist() for part in (found, true))
        hits = sum(a and b for a, b in zip(f, t, strict=True))
        missed, invented = sum(t) - hits, sum(f) - hits
        substituted, deleted, inserted = min(missed, invented), max(0, missed - invented), max(0, invented - missed)
        tp, fn, fp = tp + hits, fn + missed, fp + invented
        wrong, active = wrong + substituted + deleted + inserted, active + sum(t)
    assert f1_score(found, true, length).item() == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-14)
    assert error_rate(found, true, length).item() == pytest.approx(wrong / active, rel=1e-14)
    if length == 1:
        assert f1_score(found, true).item() == pytest.approx(metrics.f1_score(true.flatten(), found.flatten()))
    stacked = f1_score(torch.stack([true, found]), torch.stack([true, true]), length)
    assert stacked[0] == 1
    assert stacked[1].item() == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-14)
    assert error_rate(true, true, length) == 0


def test_scores_where_nothing_is_active():
    silence, noise = torch.zeros(4, 2).bool(), torch.ones(4, 2).bool()
    assert f1_score(silence, silence) == 1
    assert f1_score(noise, silence) == 0
    assert error_rate(silence, silence).isnan()
    assert error_rate(noise, silence) == math.inf
    assert f1_score(silence[:0], silence[:0]) == 1


def test_bad_input_is_refused():
    logits, targets = make(3, 2)
    for z, y in ((logits.long(), targets), (logits, targets[:2]), (logits, targets[:, :1])):
        with pytest.raises(ValueError, match="floating point and targets share"):
            dice_loss(z, y)
    for wrong in (targets - 0.5, targets + 0.5, targets * math.nan, targets.to(torch.complex128)):
        with pytest.raises(ValueError, match=r"targets are in \[0, 1\]"):
            dice_loss(logits, wrong)
    for smooth in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="smooth is"):
            dice_loss(logits, targets, smooth=smooth)
    active = targets.bool()
    for wrong in (targets, active[0]):
        with pytest.raises(ValueError, match="activities are bool"):
            segments(wrong, 1)
    with pytest.raises(ValueError, match="at least one frame"):
        segments(active, 0)
    for score in (f1_score, error_rate):
        with pytest.raises(ValueError, match="share a shape"):
            score(active, active[:2])
        with pytest.raises(ValueError, match="at least one frame"):
            score(active, active, 0)
