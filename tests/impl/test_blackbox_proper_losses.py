"""Black-box losses against enumeration of every sample in rational numbers, against their series, and at the edges."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.impl.losses.blackbox_proper_losses import (
    all_counts,
    count,
    count_probabilities,
    expected_loss,
    inverse_binomial_log_loss,
    monomial,
    plug_in_power_loss,
    poisson_log_loss,
    poisson_monomial,
    power_loss,
)

FEW = settings(derandomize=True, deadline=None, max_examples=30)
P, Q = (Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)), (Fraction(2, 5), Fraction(1, 5), Fraction(2, 5))


def tensor(fractions):
    return torch.tensor([float(f) for f in fractions], dtype=torch.float64)


def expectation(values, draws, p):
    """Sum over all samples, in fractions: values[i] for the i-th of itertools.product."""
    total = Fraction(0)
    for value, sample in zip(values, itertools.product(range(len(p)), repeat=draws), strict=True):
        total += value * math.prod((p[y] for y in sample), start=Fraction(1))
    return total


def samples(draws, size):
    return count(torch.tensor(list(itertools.product(range(size), repeat=draws))).view(size**draws, draws), size)


@pytest.mark.parametrize("powers", [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 2, 1), (3, 0, 0), (1, 2, 1)])
def test_monomials_are_unbiased_in_fractions(powers):
    true = math.prod(p**k for p, k in zip(P, powers, strict=True))
    for draws in range(max(sum(powers), 1), 6):
        found = monomial(samples(draws, 3), powers)
        exact = [Fraction(value).limit_denominator(1000) for value in found.tolist()]
        torch.testing.assert_close(found, tensor(exact), rtol=1e-15, atol=0)
        assert expectation(exact, draws, P) == true


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_power_losses_are_unbiased_in_fractions(degree):
    true = (degree - 1) * sum(p**degree for p in P) - degree * sum(p ** (degree - 1) * q for p, q in zip(P, Q, strict=True))
    for draws, targets in ((degree, 1), (degree + 1, 2)):
        model, target = samples(draws, 3), samples(targets, 3)
        rows = power_loss(model.unsqueeze(1), target.unsqueeze(0), degree)
        exact = [[Fraction(v).limit_denominator(1000) for v in row] for row in rows.tolist()]
        torch.testing.assert_close(rows, torch.stack([tensor(row) for row in exact]), rtol=1e-14, atol=1e-15)
        assert expectation([expectation(row, targets, Q) for row in exact], draws, P) == true
        assert expected_loss(lambda x, y: power_loss(x, y, degree), tensor(P), tensor(Q), draws, targets).item() == pytest.approx(
            float(true), rel=1e-13
        )
    assert power_loss(all_counts(2, 3), all_counts(1, 3)[:1]).equal(power_loss(all_counts(2, 3), all_counts(1, 3)[:1], 2))


def test_squared_loss_is_two_collisions():
    pairs, singles = torch.cartesian_prod(torch.arange(3), torch.arange(3)), torch.arange(3).unsqueeze(-1)
    for pair in pairs:
        for single in singles:
            expected = float(pair[0] == pair[1]) - (pair == single).double().mean() * 2
            assert power_loss(count(pair, 3), count(single, 3)).item() == pytest.approx(expected.item(), abs=1e-15)


def test_plug_in_is_the_polynomial_of_frequencies():
    model, target = torch.tensor([[4, 1, 0], [1, 2, 2]]), torch.tensor([[1, 0, 1], [0, 3, 0]])
    f, g = model / 5, target / target.sum(-1, keepdim=True)
    for degree in (2, 3):
        expected = (degree - 1) * f.pow(degree).sum(-1) - degree * (f.pow(degree - 1) * g).sum(-1)
        torch.testing.assert_close(plug_in_power_loss(model, target, degree), expected.double(), rtol=1e-6, atol=1e-7)
    assert plug_in_power_loss(model, target).dtype == torch.float64
    assert plug_in_power_loss(model, target).equal(plug_in_power_loss(model, target, 2))
    # Its expectation at n = 2 draws: the squared distance plus (1 - ||p||^2) / n
    p, q = tensor(P), tensor(Q)
    biased = expected_loss(plug_in_power_loss, p, q, 2)
    expected = (p**2).sum() - 2 * (p * q).sum() + (1 - (p**2).sum()) / 2
    torch.testing.assert_close(biased, expected)


@FEW
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 100))
def test_monomials_of_counts(counts, seed):
    powers = torch.randint(3, (len(counts),), generator=torch.Generator().manual_seed(seed)).tolist()
    falling = math.prod(math.perm(x, k) for x, k in zip(counts, powers, strict=True))
    total, degree = sum(counts), sum(powers)
    given_counts = torch.tensor(counts)
    assert poisson_monomial(given_counts, powers, 2.5).item() == pytest.approx(falling / 2.5**degree, rel=1e-14)
    if total >= degree:
        assert monomial(given_counts, powers).item() == pytest.approx(falling / math.perm(total, degree), rel=1e-14)
    else:
        with pytest.raises(ValueError, match="needs as many draws"):
            monomial(given_counts, powers)


@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_poisson_losses_are_unbiased(lam):
    p = tensor(P)
    n = torch.arange(60)
    chance = (torch.xlogy(n, lam * p[0]) - lam * p[0] - torch.lgamma(n.double() + 1)).exp()
    for k in range(4):
        found = (chance * poisson_monomial(n.unsqueeze(-1), [k], lam)).sum()
        assert found.item() == pytest.approx(p[0].item() ** k, rel=1e-12)
    model = torch.tensor([[0, 0, 5], [2, 1, 0], [3, 0, 1], [0, 0, 0]])
    symbol = torch.tensor([2, 2, 1, 0])
    expected = [sum(math.perm(m, k) / (k * lam**k) for k in range(1, m + 1)) for m in (0, 3, 4, 0)]
    torch.testing.assert_close(poisson_log_loss(model, symbol, lam), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(poisson_log_loss(model[2], symbol[2], lam), torch.tensor(expected[2], dtype=torch.float64))
    assert poisson_log_loss(model[:0], symbol[:0], lam).shape == (0,)
    assert poisson_log_loss(torch.tensor([[10_000, 0]]), torch.tensor([1]), 1.0).isinf().all()


def test_inverse_binomial_loss_is_a_harmonic_number():
    found = inverse_binomial_log_loss(torch.arange(1, 6))
    torch.testing.assert_close(found, torch.tensor([0, 1, 1.5, 11 / 6, 25 / 12], dtype=torch.float64))
    k = torch.arange(1, 2000)
    for p in (0.05, 0.6, 1.0):
        chance = p * (1 - p) ** (k - 1.0).double()
        assert (chance * inverse_binomial_log_loss(k)).sum().item() == pytest.approx(-math.log(p), abs=1e-12)
    assert inverse_binomial_log_loss(k[:0]).shape == (0,)


def test_outcomes_and_their_probabilities():
    for n, size in ((0, 3), (1, 1), (2, 3), (4, 4)):
        counts = all_counts(n, size)
        assert counts.shape == (math.comb(n + size - 1, n), size)
        assert (counts.sum(-1) == n).all()
        assert len(counts.unique(dim=0)) == len(counts)
    p = torch.stack([tensor(P), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)])
    chance = count_probabilities(all_counts(3, 3), p)
    by_hand = [math.factorial(3) / math.prod(map(math.factorial, c)) * math.prod(float(f) ** k for f, k in zip(P, c, strict=True))
               for c in all_counts(3, 3).tolist()]  # fmt: skip
    torch.testing.assert_close(chance[0], torch.tensor(by_hand, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(chance.sum(-1), torch.ones(2, dtype=torch.float64))
    assert chance[1].max() == 1
    assert count_probabilities(all_counts(3, 3), p.float()).dtype == torch.float32
    assert count(torch.tensor([[0, 2, 2], [1, 1, 1]]), 3).tolist() == [[1, 0, 2], [0, 3, 0]]
    assert count(torch.zeros(2, 0, dtype=torch.int64), 3).equal(torch.zeros(2, 3, dtype=torch.int64))


def test_expected_loss_has_gradients_and_vanishes_only_at_the_target():
    p = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], dtype=torch.float64, requires_grad=True)
    q = tensor(Q)
    for degree in (2, 3):
        assert torch.autograd.gradcheck(lambda p, d=degree: expected_loss(lambda x, y: power_loss(x, y, d), p, q, d + 1), p)
        at_target = expected_loss(lambda x, y, d=degree: power_loss(x, y, d), q, q, degree)
        assert (expected_loss(lambda x, y, d=degree: power_loss(x, y, d), p, q, degree) > at_target).all()
        torch.testing.assert_close(at_target, -(q**degree).sum())


def test_bad_input_is_refused():
    counts, one = all_counts(2, 3), all_counts(1, 3)[0]
    for bad in (counts.double(), -counts, counts > 0, torch.tensor(3)):
        for call in (
            lambda c: monomial(c, [1, 0, 0]),
            lambda c: poisson_monomial(c, [1, 0, 0], 2.0),
            lambda c: power_loss(c, one),
            lambda c: power_loss(counts, c),
            lambda c: plug_in_power_loss(c, one),
            lambda c: poisson_log_loss(c, torch.zeros(6, dtype=torch.int64), 2.0),
            lambda c: count_probabilities(c, tensor(P)),
        ):
            with pytest.raises(ValueError, match="counts are integers"):
                call(bad)
    for powers in ([1, 0], [1, 0, -1], [0.5, 0.5, 1.0], [[1, 0, 0]]):
        with pytest.raises(ValueError, match="powers are 3 integers"):
            monomial(counts, powers)
        with pytest.raises(ValueError, match="powers are 3 integers"):
            poisson_monomial(counts, powers, 2.0)
    with pytest.raises(ValueError, match="degree 3 needs as many draws of the model, got 2"):
        power_loss(counts, one, 3)
    with pytest.raises(ValueError, match="a draw of the model"):
        plug_in_power_loss(0 * counts, one)
    with pytest.raises(ValueError, match="degree 3 needs as many draws, got 2"):
        monomial(counts, [1, 1, 1])
    for form in (power_loss, plug_in_power_loss):
        with pytest.raises(ValueError, match="same symbols"):
            form(counts, one[:2])
        with pytest.raises(ValueError, match="at least 2, got 1"):
            form(counts, one, 1)
        with pytest.raises(ValueError, match="a draw of the target"):
            form(counts, 0 * one)
    for lam in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lam is"):
            poisson_log_loss(counts, torch.zeros(6, dtype=torch.int64), lam)
        with pytest.raises(ValueError, match="lam is"):
            poisson_monomial(counts, [1, 0, 0], lam)
    for bad in (torch.zeros(5, dtype=torch.int64), torch.zeros(6), torch.zeros(6, dtype=torch.int32)):
        with pytest.raises(ValueError, match="symbols are int64"):
            poisson_log_loss(counts, bad, 2.0)
    for value in (-1, 3):
        with pytest.raises(ValueError, match=rf"in \[0, 3\), got {value}"):
            poisson_log_loss(counts, torch.full((6,), value), 2.0)
        with pytest.raises(ValueError, match=r"symbols are in \[0, 3\)"):
            count(torch.tensor([0, value]), 3)
    for bad in (torch.tensor([0, 1], dtype=torch.int32), torch.tensor(1), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="draws are int64"):
            count(bad, 3)
    for bad in (torch.tensor([1.0]), torch.tensor([0]), torch.tensor([2, -1])):
        with pytest.raises(ValueError, match="waiting times"):
            inverse_binomial_log_loss(bad)
    for bad in (tensor(P)[:2], torch.tensor([0, 1, 0]), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="p is floating point"):
            count_probabilities(counts, bad)


def test_poisson_loss_of_one_row_does_not_hang_on_the_others():
    model = torch.tensor([[200, 0], [300, 0], [3, 1]])
    losses = poisson_log_loss(model, torch.ones(3, dtype=torch.int64), 1.0)
    assert losses[:2].isinf().all()
    assert losses[2].item() == 3 + 3 * 2 / 2 + 3 * 2 * 1 / 3
