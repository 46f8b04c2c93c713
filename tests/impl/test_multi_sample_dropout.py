"""Multi-sample dropout: what its expectation, variance and equivalent batch have to be, and the lean head against autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperclaims.impl.losses.multi_sample_dropout import (
    MultiSampleDropout,
    dropout_samples,
    mean_loss,
    multi_sample_cross_entropy,
)


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_autograd(h, weight, bias, targets, p, samples, ignore_index=-100, seed=0):
    """The same masks, drawn in the same order, all logits kept."""
    draws, losses = generator(seed), []
    for _ in range(samples):
        mask = (torch.rand(h.shape, generator=draws) >= p).to(h.dtype) / (1 - p)
        losses.append(F.cross_entropy(F.linear(h * mask, weight, bias), targets, ignore_index=ignore_index))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("p", "samples"), [(0.5, 4), (0.0, 1), (0.9, 3)])
def test_lean_head_is_the_sum_that_autograd_sees(p, samples, bias):
    h, weight, targets = numbers(6, 5), numbers(4, 5, seed=1), torch.tensor([0, 3, -100, 1, 2, -100])
    parts = [h, weight] + ([numbers(4, seed=2)] if bias else [])
    ours = [part.clone().requires_grad_() for part in parts]
    theirs = [part.clone().requires_grad_() for part in parts]
    loss = multi_sample_cross_entropy(*(ours if bias else [*ours, None]), targets, p=p, samples=samples, generator=generator())
    expected = by_autograd(*(theirs if bias else [*theirs, None]), targets, p, samples)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad(3 * loss, ours), torch.autograd.grad(3 * expected, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_gradient_of_one_part_alone(place):
    parts = [numbers(3, 5), numbers(4, 5, seed=1), numbers(4, seed=2)]
    parts[place].requires_grad_()
    targets = torch.tensor([0, 1, 3])
    loss = multi_sample_cross_entropy(*parts, targets, samples=3, generator=generator())
    (ours,) = torch.autograd.grad(loss, parts[place])
    (expected,) = torch.autograd.grad(by_autograd(*parts, targets, 0.5, 3), parts[place])
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


def test_extremes_and_nothing():
    h, weight = torch.full((2, 3), 1e4, requires_grad=True), torch.tensor([[1.0] * 3, [-1.0] * 3], requires_grad=True)
    loss = multi_sample_cross_entropy(h, weight, None, torch.tensor([1, 0]), p=0.0, samples=2)
    assert loss.item() == pytest.approx(3e4)
    assert all(torch.isfinite(part).all() for part in torch.autograd.grad(loss, (h, weight)))
    empty = multi_sample_cross_entropy(torch.zeros(0, 3), torch.zeros(2, 3), None, torch.zeros(0, dtype=torch.int64))
    assert empty.isnan()
    ignored = multi_sample_cross_entropy(torch.zeros(1, 3), torch.zeros(2, 3), None, torch.tensor([7]), ignore_index=7)
    assert ignored.isnan()
    with torch.no_grad():
        assert not multi_sample_cross_entropy(h, weight, None, torch.tensor([1, 0])).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    h, weight, targets = numbers(300, 8, dtype=torch.float32), numbers(5, 8, seed=1, dtype=torch.float32), torch.arange(300) % 5
    own = [part.to(dtype).requires_grad_() for part in (h, weight)]
    wide = [part.detach().float().requires_grad_() for part in own]
    loss = multi_sample_cross_entropy(*own, None, targets, samples=4, generator=generator())
    expected = by_autograd(*wide, None, targets, 0.5, 4)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    for a, b in zip(torch.autograd.grad(loss, own), torch.autograd.grad(expected, wide), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=2e-4)


def test_keeps_no_masks_and_no_logits():
    h, weight = numbers(64, 32).requires_grad_(), numbers(1000, 32, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part.numel()) or part, lambda part: part):
        multi_sample_cross_entropy(h, weight, None, torch.arange(64), samples=8)
    assert sum(kept) == h.numel() + weight.numel()


def test_module_and_mean_loss():
    torch.manual_seed(0)
    layer = MultiSampleDropout(nn.Linear(6, 3), p=0.5, samples=4)
    h, targets = torch.randn(7, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    outputs = layer(h)
    assert outputs.shape == (4, 7, 3)
    assert not torch.equal(outputs[0], outputs[1])
    loss = mean_loss(F.cross_entropy, outputs, targets)
    torch.testing.assert_close(loss, F.cross_entropy(outputs.flatten(0, 1), targets.repeat(4)))
    layer.eval()
    torch.testing.assert_close(layer(h), layer.head(h).unsqueeze(0))
    assert "p=0.5, samples=4" in repr(layer)


def test_a_masked_feature_counts_twice_or_not_at_all():
    torch.manual_seed(0)
    layer = MultiSampleDropout(nn.Identity(), p=0.75, samples=500)
    outputs = layer(torch.full((40,), 3.0))
    assert set(outputs.flatten().tolist()) == {0.0, 12.0}
    assert outputs.mean().item() == pytest.approx(3, rel=0.05)


def test_copies_are_masked_apart():
    h = numbers(6, 5)
    copies = dropout_samples(h, 0.25, 300, generator=generator())
    assert copies.shape == (300, 6, 5)
    kept = copies != 0
    torch.testing.assert_close(copies[kept], (h / 0.75).expand(300, 6, 5)[kept])
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    assert (kept.double().mean(0) - 0.75).abs().max() < 0.12
    assert torch.equal(copies, dropout_samples(h, 0.25, 300, generator=generator()))
    assert torch.equal(dropout_samples(h, 0.0, 2), h.expand(2, 6, 5))


def test_equals_a_batch_that_holds_every_sample_m_times():
    h, weight, targets = numbers(5, 6), numbers(3, 6, seed=1).requires_grad_(), torch.tensor([0, 1, 2, 1, 0])
    masks = (torch.rand(4, 5, 6, generator=generator()) >= 0.5).double() * 2
    by_masks = torch.stack([F.cross_entropy((h * mask) @ weight.T, targets) for mask in masks]).mean()
    enlarged = F.cross_entropy((h.repeat(4, 1) * masks.flatten(0, 1)) @ weight.T, targets.repeat(4))
    torch.testing.assert_close(by_masks, enlarged)
    a, b = (torch.autograd.grad(loss, weight)[0] for loss in (by_masks, enlarged))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(multi_sample_cross_entropy(h, weight, None, targets, samples=4, generator=generator()), by_masks)


def test_mean_of_ordinary_dropout_and_a_variance_that_falls_with_the_masks():
    h, weight, targets = numbers(2, 3), numbers(2, 3, seed=1).requires_grad_(), torch.tensor([0, 1])
    slopes = []
    for bits in itertools.product((0.0, 2.0), repeat=6):
        mask = torch.tensor(bits, dtype=torch.float64).view(2, 3)
        slopes.append(torch.autograd.grad(F.cross_entropy((h * mask) @ weight.T, targets), weight)[0])
    mean, variance = torch.stack(slopes).mean(0), torch.stack(slopes).var(0, correction=0).sum()
    draws = generator()
    for samples in (1, 4):
        drawn = []
        for _ in range(2000):
            loss = multi_sample_cross_entropy(h, weight, None, targets, samples=samples, generator=draws)
            drawn.append(torch.autograd.grad(loss, weight)[0])
        drawn = torch.stack(drawn)
        assert (drawn.mean(0) - mean).norm() < 4 * (variance / samples / 2000).sqrt()
        assert drawn.var(0).sum().item() == pytest.approx((variance / samples).item(), rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.0}, "p is in"),
        ({"p": -0.1}, "p is in"),
        ({"samples": 0}, "samples"),
        ({"h": torch.zeros(2, 4)}, "weight"),
        ({"h": torch.zeros(6)}, "weight"),
        ({"weight": torch.zeros(3)}, "weight"),
        ({"h": torch.zeros(2, 3).double()}, "share"),
        ({"bias": torch.zeros(2)}, "bias"),
        ({"h": torch.zeros(2, 3).long(), "weight": torch.zeros(4, 3).long(), "bias": None}, "floating"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets are int64"),
        ({"targets": torch.zeros(2)}, "targets are int64"),
        ({"targets": torch.tensor([0, 4])}, "0..3"),
        ({"targets": torch.tensor([-1, 0])}, "0..3"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {
        "h": torch.zeros(2, 3),
        "weight": torch.zeros(4, 3),
        "bias": torch.zeros(4),
        "targets": torch.tensor([0, 1]),
    } | change
    with pytest.raises(ValueError, match=message):
        multi_sample_cross_entropy(**given)


def test_bad_modules_are_refused():
    with pytest.raises(ValueError, match="p is in"):
        MultiSampleDropout(nn.Identity(), p=1.0)
    with pytest.raises(ValueError, match="samples"):
        MultiSampleDropout(nn.Identity(), samples=0)
    with pytest.raises(ValueError, match="floating"):
        dropout_samples(torch.zeros(3).long(), 0.5, 2)
    with pytest.raises(ValueError, match="at least 1"):
        mean_loss(F.cross_entropy, torch.zeros(0, 2, 3), torch.zeros(2).long())
