"""The soft entropy against brute force and its limits, the bound, the regularisers, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.impl.losses.diff_range_entropy import (
    EntropyNet,
    assignment_bound,
    attention_entropy,
    cell_entropy,
    cell_masses,
    chamfer_distance,
    margin,
    range_entropy,
    soft_masses,
)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_masses_and_entropy_by_hand():
    points, anchors, alpha = numbers(5, 2), numbers(3, 2, seed=1), 1.7
    masses = [0.0] * 3
    for x in points.tolist():
        q = [math.exp(-alpha * math.dist(x, c) ** 2) for c in anchors.tolist()]
        masses = [mass + part / sum(q) / 5 for mass, part in zip(masses, q, strict=True)]
    torch.testing.assert_close(soft_masses(points, anchors, alpha), torch.tensor(masses, dtype=torch.float64))
    entropy = -sum(mass * math.log(mass) for mass in masses)
    assert range_entropy(points, anchors, alpha).item() == pytest.approx(entropy)
    assert torch.autograd.gradcheck(lambda x, c: range_entropy(x, c, alpha), (points.requires_grad_(), anchors.requires_grad_()))


def test_limits_of_the_sharpness():
    points, anchors = numbers(50, 2), numbers(4, 2, seed=1)
    torch.testing.assert_close(soft_masses(points, anchors, 0.0), torch.full((4,), 0.25, dtype=torch.float64))
    assert range_entropy(points, anchors, 0.0).item() == pytest.approx(math.log(4))
    torch.testing.assert_close(soft_masses(points, anchors, 1e9), cell_masses(points, anchors))
    torch.testing.assert_close(range_entropy(points, anchors, 1e9), cell_entropy(points, anchors))


def test_hard_cells():
    anchors = torch.tensor([[0.0], [1.0], [5.0]])
    points = torch.tensor([[0.1], [0.5], [0.9], [2.9]])
    assert cell_masses(points, anchors).tolist() == [0.5, 0.5, 0.0]  # the tie goes to the first
    assert cell_entropy(points, anchors).item() == pytest.approx(math.log(2))
    assert margin(points[[0, 2]], anchors).item() == pytest.approx(0.8)
    assert margin(points, anchors).item() == pytest.approx(0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.1, 60))
def test_bound(seed, k, alpha):
    points, anchors = numbers(20, 2, seed=seed), numbers(k, 2, seed=seed + 1)
    error = (soft_masses(points, anchors, alpha) - cell_masses(points, anchors)).abs().max()
    assert error <= assignment_bound(alpha, margin(points, anchors), k) + 1e-12


def test_one_anchor_and_batches():
    points, anchors = numbers(3, 7, 2), numbers(4, 2, seed=1)
    assert range_entropy(points, anchors[:1], 2.0).tolist() == [0, 0, 0]
    together = range_entropy(points, anchors, 2.0)
    torch.testing.assert_close(together, torch.stack([range_entropy(x, anchors, 2.0) for x in points]))
    far = soft_masses(1e4 * points, anchors, 50.0)
    assert torch.isfinite(far).all()


def test_chamfer():
    a, b = torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [3, 0], [1, 0]])
    assert chamfer_distance(a, b).item() == pytest.approx((1 + 0) / 2 + (1 + 4 + 0) / 3)
    assert chamfer_distance(a, a).item() == 0


def test_attention_entropy():
    weights = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    torch.testing.assert_close(attention_entropy(weights), torch.tensor([math.log(2) / 2]))
    shuffled = weights[:, [1, 0]][..., [1, 0]]
    torch.testing.assert_close(attention_entropy(shuffled), attention_entropy(weights))


def test_gradients_stay_finite_where_a_mass_is_zero():
    points, anchors = torch.tensor([[0.0, 0.0], [0.1, 0.0]]).requires_grad_(), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    entropy = range_entropy(points, anchors, 20.0)
    assert entropy.item() == pytest.approx(0)
    assert torch.isfinite(torch.autograd.grad(entropy, points)[0]).all()
    scores = torch.tensor([[0.0, -200.0]]).requires_grad_()
    assert torch.isfinite(torch.autograd.grad(attention_entropy(scores.softmax(-1)), scores)[0]).all()


def test_entropy_net():
    net = EntropyNet(2, 8, generator=torch.Generator().manual_seed(0)).double()
    points, anchors = numbers(3, 30, 2), numbers(4, 2, seed=1)
    torch.testing.assert_close(net(points), points)
    torch.testing.assert_close(net.objective(points, anchors, 3.0, 0.7), 0.7 * range_entropy(points, anchors, 3.0))
    before = range_entropy(points, anchors, 3.0).mean().item()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        net.objective(points, anchors, 3.0, 2.0).mean().backward()
        optimizer.step()
    moved = net(points)
    assert range_entropy(moved, anchors, 3.0).mean().item() < before - 0.2
    expected = 2 * range_entropy(moved, anchors, 3.0) + chamfer_distance(moved, points)
    torch.testing.assert_close(net.objective(points, anchors, 3.0, 2.0), expected)
    same = [EntropyNet(2, generator=torch.Generator().manual_seed(1)).layers[0].weight for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_masses(torch.ones(3, 2), torch.ones(2, 2), -1.0), "alpha"),
        (lambda: soft_masses(torch.ones(3, 2), torch.ones(2, 2), math.inf), "alpha"),
        (lambda: soft_masses(torch.ones(3, 2), torch.ones(2, 3), 1.0), "points are"),
        (lambda: soft_masses(torch.ones(3), torch.ones(2, 3), 1.0), "points are"),
        (lambda: soft_masses(torch.ones(0, 2), torch.ones(2, 2), 1.0), "neither empty"),
        (lambda: soft_masses(torch.ones(3, 2), torch.ones(0, 2), 1.0), "neither empty"),
        (lambda: range_entropy(torch.ones(3, 2), torch.ones(2, 2).double(), 1.0), "dtype"),
        (lambda: cell_masses(torch.ones(3, 2).long(), torch.ones(2, 2).long()), "floating"),
        (lambda: margin(torch.ones(3, 2), torch.ones(1, 2)), "two anchors"),
        (lambda: chamfer_distance(torch.ones(3, 2), torch.ones(2, 3)), "points are"),
        (lambda: attention_entropy(torch.ones(3)), "queries"),
        (lambda: attention_entropy(torch.ones(3, 2).long()), "floating"),
        (lambda: EntropyNet(0), "at least 1"),
        (lambda: EntropyNet(2, 0), "at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
