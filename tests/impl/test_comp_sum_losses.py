"""Comp-sum losses against sums in float64, brute force over scores, and what is known of each member."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from paperclaims.impl.losses.comp_sum_losses import (
    comp_sum_loss,
    consistency_bound,
    consistency_transform,
    least_excess_risk,
    least_risk,
    margin_differences,
    perturb,
    smooth_adversarial_loss,
)

TAUS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
FEW = settings(derandomize=True, deadline=None, max_examples=30)


def make(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def phi(u, tau):
    return math.log(u) if tau == 1 else (u ** (1 - tau) - 1) / (1 - tau)


def loop(logits, targets, tau):
    """Definition, term by term."""
    rows = zip(logits.tolist(), targets.tolist(), strict=True)
    return torch.tensor([phi(sum(math.exp(h - row[y]) for h in row), tau) for row, y in rows], dtype=logits.dtype)


@pytest.mark.parametrize("tau", TAUS)
def test_loss_is_the_definition(tau):
    logits, targets = make(7, 5)
    expected = loop(logits, targets, tau)
    losses = comp_sum_loss(logits, targets, tau, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(comp_sum_loss(logits, targets, tau), losses.mean())
    torch.testing.assert_close(comp_sum_loss(logits, targets, tau, reduction="sum"), losses.sum())
    shaped = comp_sum_loss(logits.view(1, 7, 5), targets.view(1, 7), tau, reduction="none")
    assert torch.equal(shaped, losses.view(1, 7))


def test_known_members():
    logits, targets = make(9, 4)
    p = logits.softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    for tau, expected in [(0, 1 / p - 1), (1, -p.log()), (1.7, (1 - p**0.7) / 0.7), (2, 1 - p)]:
        torch.testing.assert_close(comp_sum_loss(logits, targets, tau, reduction="none"), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(comp_sum_loss(logits, targets), F.cross_entropy(logits, targets), rtol=1e-14, atol=0)
    for tau in (1 - 1e-9, 1 + 1e-9):  # the family is continuous at 1
        torch.testing.assert_close(comp_sum_loss(logits, targets, tau), F.cross_entropy(logits, targets), rtol=1e-7, atol=0)


@pytest.mark.parametrize("tau", TAUS)
def test_gradients(tau):
    logits, targets = make(4, 3)
    targets[1] = -100
    logits.requires_grad_()
    for reduction in ("none", "mean", "sum"):
        assert torch.autograd.gradcheck(lambda h, r=reduction: comp_sum_loss(h, targets, tau, reduction=r), logits)
    assert torch.autograd.gradgradcheck(lambda h: comp_sum_loss(h, targets, tau), logits)


@pytest.mark.parametrize("tau", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(tau, dtype):
    logits = torch.tensor([[1e4, -1e4, 0], [1e4, -1e4, 0], [7, 7, 7], [-1e4, -1e4, -1e4]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    losses = comp_sum_loss(logits, targets, tau, reduction="none")
    wrong = phi(1e300, tau) if tau > 1 else 2e4
    expected = torch.tensor([0, wrong, phi(3, tau), phi(3, tau)], dtype=dtype)
    torch.testing.assert_close(losses, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert losses.dtype == dtype
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isfinite().all()
    tied = torch.tensor([1, 1, -2], dtype=dtype) / 3 * 3 ** (1 - tau)
    torch.testing.assert_close(gradient[2], tied, rtol=0.02, atol=0.01)


def test_below_one_overflows_to_infinity_only():
    assert comp_sum_loss(torch.tensor([[0.0, 1e4]]), torch.tensor([0]), 0.0).item() == math.inf
    confident = torch.tensor([[1e4, 0.0]], requires_grad=True)
    comp_sum_loss(confident, torch.tensor([0]), 0.0).backward()
    assert confident.grad.eq(0).all()


def test_ignored_empty_and_single():
    logits, targets = make(6, 5)
    ignoring = targets.clone()
    ignoring[[1, 4]] = 3
    kept = ignoring != 3
    losses = comp_sum_loss(logits, ignoring, 1.5, ignore_index=3, reduction="none")
    assert losses[~kept].eq(0).all()
    torch.testing.assert_close(losses[kept], comp_sum_loss(logits[kept], ignoring[kept], 1.5, reduction="none"))
    torch.testing.assert_close(comp_sum_loss(logits, ignoring, 1.5, ignore_index=3), losses[kept].mean())
    assert comp_sum_loss(logits, targets.fill_(-100)).isnan()
    assert comp_sum_loss(logits, targets, reduction="sum") == 0
    assert comp_sum_loss(logits[:0], targets[:0], reduction="sum") == 0
    assert comp_sum_loss(logits[:0], targets[:0]).isnan()
    assert comp_sum_loss(logits[:0], targets[:0], reduction="none").shape == (0,)
    single = comp_sum_loss(logits[0], torch.tensor(2), 0.5, reduction="none")
    assert single.shape == ()
    assert comp_sum_loss(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), 0.5).item() == 0  # one class is certain


@FEW
@given(st.integers(0, 10**6), st.sampled_from(TAUS), st.integers(2, 5))
def test_least_risk_is_below_every_score(seed, tau, n):
    logits, _ = make(50, n, seed=seed)
    p = make(n, seed=seed + 1)[0].softmax(-1)
    classes = torch.arange(n).expand(50, n)
    risks = comp_sum_loss(logits.unsqueeze(1).expand(50, n, n), classes, tau, reduction="none") @ p
    assert (risks >= least_risk(p, tau) - 1e-12).all()
    best = p.log() / (2 - tau) if tau < 2 else torch.where(p == p.max(), 800.0, 0.0).double()
    reached = comp_sum_loss(best.expand(n, n), torch.arange(n), tau, reduction="none") @ p
    torch.testing.assert_close(reached, least_risk(p, tau), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_least_excess_risk_by_constrained_optimisation(tau):
    """Minimum over softmax vectors q with q_k at least every other, by a solver that knows nothing of pooling."""
    for seed in range(4):
        n = 3 + seed % 3
        p = make(n, seed=seed, scale=1.0)[0].softmax(-1)
        for k in range(n):

            def risk(q, p=p):
                return sum(float(p[y]) * phi(1 / max(q[y], 1e-12), tau) for y in range(len(q)))

            bounds = [(1e-9, 1)] * n
            limits = [{"type": "eq", "fun": lambda q: q.sum() - 1}, {"type": "ineq", "fun": lambda q, k=k: q[k] - q}]
            found = minimize(risk, [1 / n] * n, bounds=bounds, constraints=limits, method="SLSQP", options={"ftol": 1e-13})
            expected = found.fun - least_risk(p, tau).item()
            assert least_excess_risk(p, torch.tensor(k), tau).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tau", [2.0, 3.0])
def test_least_excess_risk_of_bounded_losses_by_enumeration(tau):
    """From 2 on the risk is concave in q: the best q lies at a corner, uniform on a set of classes with the predicted one."""
    p = make(4, seed=3, scale=1.0)[0].softmax(-1)
    for k in range(4):
        sets = [[y for y in range(4) if y == k or mask >> y & 1] for mask in range(16)]
        risks = [sum(p[y].item() * phi(len(s), tau) for y in s) + (1 - p[s].sum().item()) / (tau - 1) for s in sets]
        expected = min(risks) - least_risk(p, tau).item()
        assert least_excess_risk(p, torch.tensor(k), tau).item() == pytest.approx(expected, abs=1e-12)


def test_least_excess_risk_of_a_stack():
    p, k = make(3, 4, 5, scale=1.0)
    p = p.softmax(-1)
    for tau in TAUS:
        stacked = least_excess_risk(p, k, tau)
        torch.testing.assert_close(stacked[2, 1], least_excess_risk(p[2, 1], k[2, 1], tau))
        assert least_excess_risk(p, p.argmax(-1), tau).abs().max() < 1e-12


@FEW
@given(st.floats(0, 1), st.sampled_from(TAUS), st.integers(2, 6))
def test_transform_is_convex_increasing_and_inverted(beta, tau, n):
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    values = consistency_transform(grid, tau, n)
    assert values[0] == pytest.approx(0, abs=1e-15)
    assert (values.diff() > 0).all()
    assert (values.diff().diff() > -1e-12).all()
    b = torch.tensor([beta, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(consistency_bound(consistency_transform(b, tau, n), tau, n), b, rtol=1e-6, atol=2e-7)


def test_transform_known_values():
    b = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    torch.testing.assert_close(consistency_transform(b, 0, 3), 1 - (1 - b**2).sqrt())
    entropy = (1 + b) / 2 * (1 + b).log() + torch.special.xlogy((1 - b) / 2, 1 - b)
    torch.testing.assert_close(consistency_transform(b, 1, 3), entropy)
    torch.testing.assert_close(consistency_transform(b, 2, 5), b / 5)
    torch.testing.assert_close(consistency_transform(b, 3, 3), b / 18)
    assert consistency_transform(b, 1.5, 3)[0].item() == pytest.approx((1.04**0.5 - 1) / (0.5 * 3**0.5), rel=1e-12)
    for tau in (1 - 1e-6, 1 + 1e-6):
        torch.testing.assert_close(consistency_transform(b, tau, 3), consistency_transform(b, 1, 3), rtol=1e-4, atol=0)


def test_bound_is_vacuous_from_the_largest_excess_on():
    for tau in TAUS:
        most = consistency_transform(torch.ones((), dtype=torch.float64), tau, 4)
        assert consistency_bound(most, tau, 4) == 1
        assert consistency_bound(most + 5, tau, 4) == 1
        assert 0.9 < consistency_bound(most * 0.999, tau, 4) < 1
    assert consistency_bound(torch.zeros(0), 1.0, 2).shape == (0,)
    assert consistency_bound(torch.tensor([0.1]), 1.0, 2).dtype == torch.float32


def test_margin_differences():
    logits, targets = make(2, 3, 4)
    found = margin_differences(logits, targets)
    for i in range(2):
        for j in range(3):
            y = targets[i, j]
            assert found[i, j].tolist() == [logits[i, j, y].item() - logits[i, j, k].item() for k in range(4)]


def test_adversarial_loss():
    clean, targets = make(6, 4)
    perturbed = clean + make(6, 4, seed=1)[0]
    found = smooth_adversarial_loss(clean, perturbed, targets, 0.5, rho=2.0, nu=0.3)
    moved = margin_differences(perturbed, targets) - margin_differences(clean, targets)
    expected = comp_sum_loss(clean / 2, targets, 0.5, reduction="none") + 0.3 * moved.square().sum(-1).sqrt()
    torch.testing.assert_close(found, expected)
    default = smooth_adversarial_loss(clean, perturbed, targets)
    torch.testing.assert_close(default, comp_sum_loss(clean, targets, reduction="none") + moved.norm(dim=-1))
    for h in (clean, perturbed):
        h.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: smooth_adversarial_loss(a, b, targets, 1.5, rho=0.7, nu=2.0), (clean, perturbed))
    same = clean.detach().clone().requires_grad_()
    smooth_adversarial_loss(same, same * 1.0, targets).sum().backward()
    assert same.grad.isfinite().all()


def test_adversarial_loss_bounds_the_loss_of_the_perturbed_point():
    """Phi of the margins is Lipschitz with constant 1 / rho for tau >= 1, so nu = 1 / rho majorises the loss at x'."""
    clean, targets = make(400, 4)
    perturbed = clean + make(400, 4, seed=1)[0]
    for tau in (1.0, 1.5, 2.0):
        above = smooth_adversarial_loss(clean, perturbed, targets, tau, rho=2.0, nu=0.5)
        assert (above >= comp_sum_loss(perturbed / 2, targets, tau, reduction="none")).all()


def test_perturb_finds_the_corner_of_a_linear_objective():
    slope = torch.tensor([2.0, -1.0, 3.0])
    x = torch.tensor([0.5, 0.5, 0.95], requires_grad=True)
    for start in (None, torch.tensor([9.0, 0.45, 0.9])):
        found = perturb(lambda z: z @ slope, x, 0.1, steps=5, step_size=0.05, start=start, low=0.0, high=1.0)
        torch.testing.assert_close(found, torch.tensor([0.6, 0.4, 1.0]))
        assert not found.requires_grad
    assert torch.equal(perturb(lambda z: z @ slope, x, 0.1, steps=0, step_size=0.05), x)
    assert torch.equal(perturb(lambda z: z @ slope, x, 0.1, steps=2, step_size=0.0), x)
    one = perturb(lambda z: z @ slope, x, 0.1, steps=1, step_size=0.03)
    torch.testing.assert_close(one, x.detach() + torch.tensor([0.03, -0.03, 0.03]))
    assert torch.equal(perturb(lambda z: z @ slope, x, 0.0, steps=2, step_size=0.05), x)


def test_bad_input_is_refused():
    logits, targets = make(6, 4)
    for bad in (targets[:5], targets.int(), targets.double()):
        with pytest.raises(ValueError, match="classes are int64"):
            comp_sum_loss(logits, bad)
    for bad in (logits.long(), logits[..., :0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="floating point of shape"):
            comp_sum_loss(bad, targets)
        with pytest.raises(ValueError, match="floating point of shape"):
            least_risk(bad, 1.0)
    for bad in (-1, 4):
        out = targets.clone()
        out[2] = bad
        for function in (comp_sum_loss, margin_differences, lambda h, y: least_excess_risk(h.softmax(-1), y, 1.0)):
            with pytest.raises(ValueError, match=r"in \[0, 4\)"):
                function(logits, out)
    for tau in (-0.1, math.nan, math.inf):
        for call in (
            lambda t: comp_sum_loss(logits, targets, t),
            lambda t: least_risk(logits.softmax(-1), t),
            lambda t: least_excess_risk(logits.softmax(-1), targets, t),
            lambda t: consistency_transform(torch.zeros(1), t, 2),
        ):
            with pytest.raises(ValueError, match="tau is"):
                call(tau)
    with pytest.raises(ValueError, match="reduction is"):
        comp_sum_loss(logits, targets, reduction="max")
    for beta in (torch.tensor([1.1]), torch.tensor([-0.1]), torch.tensor([math.nan]), torch.tensor([1])):
        with pytest.raises(ValueError, match="beta is"):
            consistency_transform(beta, 1.0, 2)
    for excess in (torch.tensor([-0.1]), torch.tensor([math.nan]), torch.tensor([1])):
        with pytest.raises(ValueError, match="excess is"):
            consistency_bound(excess, 1.0, 2)
    for function in (consistency_transform, consistency_bound):
        with pytest.raises(ValueError, match="n is at least 2"):
            function(torch.zeros(1), 1.0, 1)
    for bad in (logits[:5], logits.float()):
        with pytest.raises(ValueError, match="share shape and dtype"):
            smooth_adversarial_loss(logits, bad, targets)
    for settings_ in ({"rho": 0.0}, {"nu": -1.0}, {"rho": math.nan}, {"nu": math.nan}):
        with pytest.raises(ValueError, match="rho is above 0"):
            smooth_adversarial_loss(logits, logits, targets, **settings_)
    with pytest.raises(ValueError, match=r"in \[0, 4\)"):
        smooth_adversarial_loss(logits, logits, targets.clamp(max=0) - 1)
    with pytest.raises(ValueError, match="x is floating"):
        perturb(torch.sum, targets, 0.1, steps=1, step_size=0.1)
    for epsilon, steps, size in ((-0.1, 1, 0.1), (0.1, -1, 0.1), (0.1, 1, -0.1), (math.nan, 1, 0.1)):
        with pytest.raises(ValueError, match="at least 0"):
            perturb(torch.sum, logits, epsilon, steps=steps, step_size=size)
