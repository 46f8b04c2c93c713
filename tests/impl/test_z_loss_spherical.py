"""The Z-loss and the factored output layer against loops, autograd and dense gradient descent in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.fixtures.measurement import count_flops, fake_mode
from paperclaims.impl.losses.z_loss_spherical import (
    SphericalOutput,
    log_taylor_softmax_from,
    output_step,
    spherical_loss,
    squared_error_from,
    z_loss,
    z_loss_from,
    z_scores,
)

FEW = settings(derandomize=True, deadline=None, max_examples=30)
FAMILY = {
    "z": partial(z_loss_from, a=0.7, b=3.0),
    "squared error": squared_error_from,
    "log-Taylor": log_taylor_softmax_from,
}


def make(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def loop(row, target, a, b):
    """Definition, term by term."""
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((o - mean) ** 2 for o in row) / len(row))
    return math.log1p(math.exp(a * (b - (row[target] - mean) / deviation))) / a


@pytest.mark.parametrize(("a", "b"), [(1.0, 10.0), (0.3, 2.0), (5.0, -1.0)])
def test_z_loss_is_the_definition(a, b):
    logits, targets = make(7, 5)
    expected = [loop(row, y, a, b) for row, y in zip(logits.tolist(), targets, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    losses = z_loss(logits, targets, a, b, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_loss(logits, targets, a, b), losses.mean())
    torch.testing.assert_close(z_loss(logits, targets, a, b, reduction="sum"), losses.sum())
    torch.testing.assert_close(z_loss(logits.view(1, 7, 5), targets.view(1, 7), a, b, reduction="none"), losses.view(1, 7))
    torch.testing.assert_close(spherical_loss(logits, targets, partial(z_loss_from, a=a, b=b)), losses)


def test_defaults():
    logits, targets = make(7, 5)
    assert z_loss(logits, targets) == z_loss(logits, targets, 1.0, 10.0, reduction="mean")
    torch.testing.assert_close(spherical_loss(logits, targets, z_loss_from).mean(), z_loss(logits, targets))


@FEW
@given(st.integers(0, 10**6), st.floats(-50, 50), st.floats(1e-2, 1e2))
def test_z_loss_ignores_shift_and_scale(seed, shift, scale):
    logits, targets = make(4, 6, seed=seed)
    torch.testing.assert_close(
        z_loss(scale * logits + shift, targets, reduction="none"),
        z_loss(logits, targets, reduction="none"),
        rtol=1e-9,
        atol=1e-12,
    )


def test_z_scores():
    logits, _ = make(3, 2, 6)
    z = z_scores(logits)
    torch.testing.assert_close(z.mean(-1), torch.zeros(3, 2).double())
    torch.testing.assert_close(z.var(-1, correction=0), torch.ones(3, 2).double())
    largest = z_scores(F.one_hot(torch.tensor([2]), 50).double())[0, 2]
    assert largest.item() == pytest.approx(math.sqrt(49), rel=1e-12)
    assert z_scores(torch.full((2, 3), 7.0)).isnan().all()


def test_other_members_of_the_family():
    logits, targets = make(7, 5)
    squared = (logits - F.one_hot(targets, 5)).square().sum(-1) / 2
    torch.testing.assert_close(spherical_loss(logits, targets, squared_error_from), squared)
    taylor = 1 + logits + logits.square() / 2
    expected = (taylor.sum(-1) / taylor.gather(-1, targets[:, None]).squeeze(-1)).log()
    torch.testing.assert_close(spherical_loss(logits, targets, log_taylor_softmax_from), expected)


def test_gradients():
    logits, targets = make(4, 5)
    logits.requires_grad_()
    ignoring = targets.clone()
    ignoring[1] = -100
    assert torch.autograd.gradcheck(lambda o: z_loss(o, ignoring, 0.7, 2.0), logits)
    assert torch.autograd.gradgradcheck(lambda o: z_loss(o, ignoring, 0.7, 2.0), logits)
    for loss in FAMILY.values():
        assert torch.autograd.gradcheck(lambda o, loss=loss: spherical_loss(o, targets, loss), logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_outputs(dtype):
    logits = torch.tensor([[1e4, -1e4, 0, 0], [0, 0, 1e4, 0], [2, 2, -2, -2]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([1, 2, 0])
    losses = z_loss(logits, targets, 1.0, 1.0, reduction="none")
    expected = torch.tensor([loop(row, y, 1, 1) for row, y in zip(logits.tolist(), targets, strict=True)], dtype=dtype)
    torch.testing.assert_close(losses, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.autograd.grad(losses.sum(), logits)[0].isfinite().all()
    far = z_loss(logits, targets, 100.0, 1e4, reduction="none")  # no overflow in the exponential
    torch.testing.assert_close(far.double(), torch.full((3,), 1e4).double(), rtol=0.01, atol=0)


def test_ignored_empty_and_single():
    logits, targets = make(6, 5)
    ignoring = targets.clone()
    ignoring[[1, 4]] = 3
    kept = ignoring != 3
    losses = z_loss(logits, ignoring, ignore_index=3, reduction="none")
    assert losses[~kept].eq(0).all()
    torch.testing.assert_close(losses[kept], z_loss(logits[kept], ignoring[kept], reduction="none"))
    torch.testing.assert_close(z_loss(logits, ignoring, ignore_index=3), losses[kept].mean())
    assert z_loss(logits, torch.full_like(targets, -100)).isnan()
    assert z_loss(logits[:0], targets[:0], reduction="sum") == 0
    assert z_loss(logits[:0], targets[:0], reduction="none").shape == (0,)
    assert z_loss(logits[0], targets[0], reduction="none").shape == ()


def dense_steps(weight, batches, loss, lr):
    """Losses, gradients by h and the weights after plain gradient descent on the dense weights."""
    weight, seen = weight.clone().requires_grad_(), []
    for hidden, targets in batches:
        hidden = hidden.clone().requires_grad_()
        losses = spherical_loss(hidden @ weight.T, targets, loss)
        grad_w, grad_h = torch.autograd.grad(losses.mean(), (weight, hidden))
        weight = (weight - lr * grad_w).detach().requires_grad_()
        seen.append((losses.detach(), grad_h))
    return seen, weight.detach()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("m", [1, 3, 7])
def test_factored_steps_are_the_dense_ones(name, m):
    classes, d, lr = 11, 4, 0.3
    weight, _ = make(classes, d, scale=1.0)
    batches = [make(m, d, seed=seed, scale=1.0) for seed in range(8)]
    batches = [(h, make(m, classes, seed=seed)[1]) for seed, (h, _) in enumerate(batches)]  # with targets that repeat
    expected, dense = dense_steps(weight, batches, FAMILY[name], lr)
    state = SphericalOutput.of(weight)
    original = weight.clone()
    for (hidden, targets), (losses, grad) in zip(batches, expected, strict=True):
        found, slope = state.step(hidden, targets, FAMILY[name], lr)
        torch.testing.assert_close(found, losses, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(slope, grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state.weight, dense, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state.gram, dense.T @ dense, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.total, dense.sum(0), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.u @ state.u_inverse, torch.eye(d).double(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.scores(batches[0][0]), batches[0][0] @ dense.T, rtol=1e-9, atol=1e-10)
    assert torch.equal(weight, original)


def test_refresh_keeps_the_weights_and_drops_the_factors():
    weight, _ = make(9, 3, scale=1.0)
    state = SphericalOutput.of(weight)
    hidden, targets = make(4, 3)[0], torch.tensor([0, 8, 8, 2])
    state.step(hidden, targets, squared_error_from, 0.05)
    before = state.weight
    state.refresh()
    torch.testing.assert_close(state.weight, before)
    assert torch.equal(state.u, torch.eye(3).double())
    assert torch.equal(state.u_inverse, torch.eye(3).double())
    assert state.shift.eq(0).all()
    torch.testing.assert_close(state.gram, before.T @ before)
    torch.testing.assert_close(state.total, before.sum(0))


def test_the_step_costs_the_same_whatever_the_number_of_classes():
    def flops(classes, m, d=64):
        with fake_mode():
            parts = (
                torch.empty(classes, d),
                torch.empty(d, d),
                torch.empty(d, d),
                torch.empty(d),
                torch.empty(d, d),
                torch.empty(d),
            )
            state, h, y = SphericalOutput(*parts), torch.empty(m, d), torch.empty(m, dtype=torch.int64)
            return count_flops(lambda: output_step(state, h, y, z_loss_from, 0.1))

    assert flops(100, 1) == flops(1_000_000, 1)
    assert flops(100, 1) <= 16 * 64**2
    assert flops(100, 16) <= 16 * (16 * 64**2 + 16**2 * 64)


def test_float32_and_empty_batches():
    weight = make(50, 8, scale=1.0)[0].float()
    state = SphericalOutput.of(weight)
    hidden, targets = make(6, 8, scale=1.0)[0].float(), torch.arange(6)
    losses, grad = state.step(hidden, targets, z_loss_from, 0.1)
    assert losses.dtype == grad.dtype == state.gram.dtype == torch.float32
    expected, dense = dense_steps(weight.double(), [(hidden.double(), targets)], z_loss_from, 0.1)
    torch.testing.assert_close(losses.double(), expected[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.weight.double(), dense, rtol=1e-4, atol=1e-5)
    before = state.weight
    losses, grad = state.step(hidden[:0], targets[:0], z_loss_from, 0.1)
    assert losses.shape == (0,)
    assert grad.shape == (0, 8)
    torch.testing.assert_close(state.weight, before)
    still, _ = state.step(hidden, targets, z_loss_from, 0.0)
    torch.testing.assert_close(state.weight, before)
    assert not still.requires_grad


def test_hidden_that_needs_a_gradient_is_taken_as_it_is():
    state = SphericalOutput.of(make(9, 3, scale=1.0)[0].requires_grad_())
    hidden = make(4, 3)[0].requires_grad_()
    _, grad = state.step(2 * hidden, torch.tensor([0, 1, 2, 8]), z_loss_from, 0.1)
    (2 * hidden).backward(grad)
    torch.testing.assert_close(hidden.grad, 2 * grad)
    assert not state.weight.requires_grad


def test_bad_input_is_refused():
    logits, targets = make(6, 4)
    dense = [z_loss, lambda o, y: spherical_loss(o, y, z_loss_from)]
    for call in dense:
        for bad in (targets[:5], targets.int(), targets.double()):
            with pytest.raises(ValueError, match="targets are int64"):
                call(logits, bad)
        for bad in (logits.long(), logits[..., :1], torch.tensor(1.0)):
            with pytest.raises(ValueError, match="logits are floating"):
                call(bad, targets)
        for value in (-1, 4):
            out = targets.clone()
            out[3] = value
            with pytest.raises(ValueError, match=rf"in \[0, 4\), got {value}"):
                call(logits, out)
    for bad in (logits.long(), logits[..., :1], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="logits are floating"):
            z_scores(bad)
    with pytest.raises(ValueError, match=r"in \[0, 4\), got -100"):
        spherical_loss(logits, torch.full_like(targets, -100), z_loss_from)
    with pytest.raises(ValueError, match="reduction is"):
        z_loss(logits, targets, reduction="max")
    for a, b in ((0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)):
        with pytest.raises(ValueError, match="a is a number"):
            z_loss(logits, targets, a, b)
        with pytest.raises(ValueError, match="a is a number"):
            spherical_loss(logits, targets, partial(z_loss_from, a=a, b=b))
    for bad in (logits.long(), logits[0], logits[:0], logits[:, :0]):
        with pytest.raises(ValueError, match="weight is floating"):
            SphericalOutput.of(bad)
    state = SphericalOutput.of(logits)
    hidden, y = make(3, 4)[0], torch.tensor([0, 1, 5])
    for bad in (hidden[0], hidden[:, :3], hidden.float()):
        with pytest.raises(ValueError, match="hidden is"):
            state.step(bad, y, z_loss_from, 0.1)
    for bad in (y[:2], y.int()):
        with pytest.raises(ValueError, match="targets are int64"):
            state.step(hidden, bad, z_loss_from, 0.1)
    for bad in (torch.tensor([0, 1, 6]), torch.tensor([0, -1, 5])):
        with pytest.raises(ValueError, match=r"in \[0, 6\)"):
            state.step(hidden, bad, z_loss_from, 0.1)
    for lr in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr is"):
            state.step(hidden, y, z_loss_from, lr)
