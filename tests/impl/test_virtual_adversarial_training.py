"""Virtual adversarial training against float64 formulas, the exact Hessian, and the passes that it costs."""

import math

import pytest
import torch
from torch import nn

from paperclaims.impl.losses import virtual_adversarial_training as vat


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def test_divergence_and_entropy_by_hand():
    a, b = numbers(3, 5), numbers(3, 5, seed=1)
    p, q = a.softmax(-1), b.softmax(-1)
    torch.testing.assert_close(vat.kl_from_logits(a, b), (p * (p / q).log()).sum(-1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vat.conditional_entropy(a), -(p * p.log()).sum(-1), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(vat.kl_from_logits, (a.requires_grad_(), b.requires_grad_()))
    assert torch.autograd.gradcheck(vat.conditional_entropy, (a,))


def test_extreme_logits():
    certain, other = torch.tensor([1e4, -1e4, 0.0]).requires_grad_(), torch.tensor([0.0, 0.0, 0.0]).requires_grad_()
    divergence, entropy = vat.kl_from_logits(certain, other), vat.conditional_entropy(certain)
    assert divergence.item() == pytest.approx(math.log(3), rel=1e-6)
    assert entropy.item() == 0
    assert all(torch.isfinite(part).all() for part in torch.autograd.grad(divergence + entropy, (certain, other)))
    assert vat.kl_from_logits(torch.tensor([0.0, 0.0]), torch.tensor([1e4, -1e4])).item() == pytest.approx(1e4, rel=1e-3)
    assert vat.kl_from_logits(torch.zeros(3, 1), torch.ones(3, 1)).tolist() == [0, 0, 0]


def test_finds_the_first_eigenvector(network):
    x = numbers(5, 6)
    d = vat.virtual_adversarial_perturbation(network, x, 1.0, steps=200, xi=1e-6, generator=generator())
    for row, direction in zip(x, d, strict=True):
        hessian = torch.autograd.functional.hessian(
            lambda r, row=row: vat.kl_from_logits(network(row), network(row + r)), torch.zeros(6, dtype=torch.float64)
        )
        first = torch.linalg.eigh(hessian).eigenvectors[:, -1]
        assert abs(first @ direction).item() == pytest.approx(1, abs=1e-4)


def test_one_step_by_hand(network):
    x, eps, xi = numbers(4, 6), 0.3, 1e-3
    start = vat.random_perturbation(x, 1.0, generator=generator(3))
    r = (xi * start).requires_grad_()
    p = network(x).softmax(-1).detach()
    (g,) = torch.autograd.grad((p * (p.log() - network(x + r).log_softmax(-1))).sum(), r)
    expected = eps * g / g.norm(dim=-1, keepdim=True)
    ours = vat.virtual_adversarial_perturbation(network, x, eps, xi=xi, generator=generator(3))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    given = vat.virtual_adversarial_perturbation(network, x, eps, xi=xi, generator=generator(3), logits=network(x))
    torch.testing.assert_close(given, ours, rtol=0, atol=0)
    assert not given.requires_grad
    none = vat.virtual_adversarial_perturbation(network, x, eps, steps=0, generator=generator(3))
    torch.testing.assert_close(none, eps * start, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_default_distance_is_fit_for_the_dtype(network, dtype):
    x = numbers(20, 6).to(dtype)
    d = vat.virtual_adversarial_perturbation(network.to(dtype), x, 1.0, steps=5, generator=generator()).double()
    exact = vat.virtual_adversarial_perturbation(network.double(), x.double(), 1.0, steps=20, xi=1e-6, generator=generator())
    aligned = (d * exact).sum(-1).abs().median().item()
    assert aligned > (0.9 if dtype == torch.bfloat16 else 0.99)


def test_loss_is_the_divergence_at_the_perturbation(network):
    x = numbers(7, 6)
    r = vat.virtual_adversarial_perturbation(network, x, 0.5, generator=generator())
    p, q = network(x).softmax(-1).detach(), network(x + r).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    losses = vat.virtual_adversarial_loss(network, x, 0.5, generator=generator(), reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    for reduction in ("mean", "sum"):
        loss = vat.virtual_adversarial_loss(network, x, 0.5, generator=generator(), reduction=reduction)
        torch.testing.assert_close(loss, getattr(expected, reduction)(), rtol=1e-9, atol=1e-12)
    weights = list(network.parameters())
    by_hand = torch.autograd.grad(expected.mean(), weights)
    ours = torch.autograd.grad(vat.virtual_adversarial_loss(network, x, 0.5, generator=generator()), weights)
    for a, b in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_leaves_the_gradients_of_the_network_alone(network):
    vat.virtual_adversarial_perturbation(network, numbers(3, 6), 0.5)
    assert all(part.grad is None for part in network.parameters())
    with torch.no_grad():
        assert not vat.virtual_adversarial_loss(network, numbers(3, 6), 0.5).requires_grad


@pytest.mark.parametrize("steps", [1, 3])
def test_two_pairs_of_passes_and_a_clean_one(network, steps):
    calls = {"forward": 0, "backward": 0}
    network[2].register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    network[2].register_full_backward_hook(lambda *_: calls.update(backward=calls["backward"] + 1))
    x = numbers(3, 6)
    logits = network(x)
    vat.virtual_adversarial_loss(network, x, 0.5, steps=steps, logits=logits).backward()
    assert calls == {"forward": 1 + steps + 1, "backward": steps + 1}
    vat.virtual_adversarial_loss(network, x, 0.5, steps=steps)
    assert calls["forward"] == 2 * (steps + 2)


def test_norm_of_images_and_of_a_tensor_of_norms():
    x = numbers(2, 3, 4, 5)
    r = vat.random_perturbation(x, 2.0, event=3, generator=generator())
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((2,), 2.0, dtype=torch.float64))
    eps = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    r = vat.random_perturbation(x, eps, event=3, generator=generator())
    torch.testing.assert_close(r.flatten(1).norm(dim=1), eps.flatten())
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).double()
    r = vat.virtual_adversarial_perturbation(model, x, 2.0, event=3, generator=generator())
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((2,), 2.0, dtype=torch.float64))
    assert vat.random_perturbation(x.float(), 0.0, event=3).count_nonzero() == 0


def test_random_directions_are_uniform():
    r = vat.random_perturbation(torch.zeros(20_000, 3, dtype=torch.float64), 1.0, generator=generator())
    torch.testing.assert_close(r.T @ r / len(r), torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=0.01)
    assert r.mean(0).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_steep_or_flat_network(dtype):
    x = torch.ones(3, 4, dtype=dtype)
    steep = vat.virtual_adversarial_perturbation(lambda v: torch.stack([3e3 * v[..., 0], -v[..., 1]], -1), x, 0.5)
    assert torch.isfinite(steep).all()
    torch.testing.assert_close(steep.norm(dim=-1), torch.full((3,), 0.5, dtype=dtype), rtol=1e-2, atol=0)
    flat = vat.virtual_adversarial_perturbation(lambda v: 0 * v, x, 0.5, generator=generator())
    torch.testing.assert_close(flat, vat.random_perturbation(x, 0.5, generator=generator()))


def test_few_points(network):
    assert vat.virtual_adversarial_loss(network, numbers(0, 6), 0.5, reduction="none").shape == (0,)
    assert vat.virtual_adversarial_loss(network, numbers(0, 6), 0.5, reduction="sum").item() == 0
    assert vat.virtual_adversarial_loss(network, numbers(0, 6), 0.5).isnan()
    assert vat.virtual_adversarial_loss(network, numbers(6), 0.5).shape == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: vat.kl_from_logits(torch.zeros(3, 2), torch.zeros(3, 3)), "a shape"),
        (lambda net: vat.kl_from_logits(torch.zeros(2), torch.zeros(2).double()), "dtype"),
        (lambda net: vat.kl_from_logits(torch.zeros(2).long(), torch.zeros(2).long()), "floating"),
        (lambda net: vat.kl_from_logits(torch.tensor(0.0), torch.tensor(0.0)), "shape"),
        (lambda net: vat.conditional_entropy(torch.zeros(2).long()), "floating"),
        (lambda net: vat.conditional_entropy(torch.tensor(0.0)), "classes"),
        (lambda net: vat.random_perturbation(torch.zeros(2, 3).long(), 1.0), "floating"),
        (lambda net: vat.random_perturbation(torch.zeros(2, 3), -1.0), "at least 0"),
        (lambda net: vat.random_perturbation(torch.zeros(2, 3), float("nan")), "at least 0"),
        (lambda net: vat.random_perturbation(torch.zeros(2, 3), 1.0, event=3), "3 axes"),
        (lambda net: vat.random_perturbation(torch.zeros(2, 3), 1.0, event=0), "0 axes"),
        (lambda net: vat.virtual_adversarial_perturbation(net, numbers(2, 6), 1.0, steps=-1), "steps"),
        (lambda net: vat.virtual_adversarial_perturbation(net, numbers(2, 6), 1.0, xi=0.0), "xi above 0"),
        (lambda net: vat.virtual_adversarial_perturbation(net, numbers(2, 6), -1.0), "at least 0"),
        (lambda net: vat.virtual_adversarial_loss(net, numbers(2, 6), 1.0, reduction="max"), "reduction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(network, call, message):
    with pytest.raises(ValueError, match=message):
        call(network)
