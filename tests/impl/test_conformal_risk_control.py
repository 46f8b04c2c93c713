"""Conformal risk control against the definition on every candidate, split conformal prediction, and bad input."""

import math

import pytest
import torch

from paperclaims.impl.uncertainty.conformal_risk_control import (
    false_negative_rate,
    fnr_threshold,
    monotone,
    prediction_sets,
    risk_threshold,
)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(*shape, seed=0):
    return uniform(*shape, seed=seed), uniform(*shape, seed=seed + 1) < 0.3


def by_definition(scores, labels, alpha, weights, new):
    """Smallest of 0, 1 and all jumps at which the bound holds; 1 where none does."""
    jumps = sorted({0.0, 1.0, *(1 - scores[labels]).tolist()})
    for lam in jumps:
        losses = false_negative_rate(prediction_sets(scores, lam), labels)
        if (weights * losses).sum() + new <= alpha * (weights.sum() + new) + 1e-12:
            return lam
    return 1.0


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
def test_threshold_by_definition(alpha, weighted):
    for seed in range(8):
        scores, labels = problem(12, 5, seed=10 * seed)
        weights = uniform(12, seed=seed) + 0.1 if weighted else torch.ones(12, dtype=torch.float64)
        given = {"weights": weights, "new_weight": 0.7} if weighted else {}
        expected = by_definition(scores, labels, alpha, weights, 0.7 if weighted else 1.0)
        assert fnr_threshold(scores, labels, alpha, **given).item() == pytest.approx(expected, abs=1e-15)


def test_grid_finds_the_same_up_to_its_step():
    scores, labels = problem(40, 6)
    lambdas = torch.linspace(0, 1, 2001, dtype=torch.float64)
    losses = torch.stack([false_negative_rate(prediction_sets(scores, lam), labels) for lam in lambdas], -1)
    exact, grid = fnr_threshold(scores, labels, 0.2), risk_threshold(losses, lambdas, 0.2)
    assert 0 <= grid - exact < 1 / 2000


def test_batches_are_apart():
    scores, labels = problem(3, 20, 4)
    together = fnr_threshold(scores, labels, 0.2)
    torch.testing.assert_close(together, torch.stack([fnr_threshold(s, y, 0.2) for s, y in zip(scores, labels, strict=True)]))
    weights, new = uniform(3, 20, seed=5), uniform(3, seed=6)
    together = fnr_threshold(scores, labels, 0.2, weights=weights, new_weight=new)
    alone = [fnr_threshold(scores[i], labels[i], 0.2, weights=weights[i], new_weight=new[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_miscoverage_is_split_conformal_prediction():
    scores = uniform(19, 1)
    labels = torch.ones(19, 1, dtype=torch.bool)
    for alpha in (0.1, 0.25):
        rank = math.ceil(20 * (1 - alpha))
        expected = (1 - scores[:, 0]).sort().values[rank - 1]
        torch.testing.assert_close(fnr_threshold(scores, labels, alpha), expected, rtol=0, atol=0)


def test_edges():
    scores, labels = problem(5, 3)
    assert fnr_threshold(scores, labels, 0.1).item() == 1  # 1 / 6 alone exceeds alpha
    assert fnr_threshold(scores, labels, 1.0).item() == 0
    nothing = torch.zeros(9, 3, dtype=torch.bool)
    assert fnr_threshold(uniform(9, 3), nothing, 0.1).item() == 0
    ties = fnr_threshold(torch.full((9, 1), 0.25), torch.ones(9, 1, dtype=torch.bool), 0.5)
    assert ties.item() == 0.75
    lam = fnr_threshold(scores.float(), labels, 0.5)
    assert prediction_sets(scores.float(), lam).any()
    assert fnr_threshold(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), 0.1).item() == 1
    shifted = fnr_threshold(scores, labels, 0.3, weights=torch.ones(5, dtype=torch.float64), new_weight=1e9)
    assert shifted.item() == 1


def test_sets_and_rates():
    scores = torch.tensor([[0.9, 0.4, 0.1], [0.2, 0.6, 0.5]])
    sets = prediction_sets(scores, 0.5)
    assert sets.tolist() == [[True, False, False], [False, True, True]]
    labels = torch.tensor([[True, True, True], [False, False, False]])
    assert false_negative_rate(sets, labels).tolist() == pytest.approx([2 / 3, 0])


def test_monotone():
    losses = torch.tensor([[0.3, 0.5, 0.1, 0.4, 0.0]])
    torch.testing.assert_close(monotone(losses), torch.tensor([[0.5, 0.5, 0.4, 0.4, 0.0]]))
    made = monotone(uniform(4, 30))
    assert (made.diff(dim=-1) <= 0).all()


def test_grid_by_hand():
    losses = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    lambdas = torch.tensor([0.1, 0.2, 0.3])
    means = [(column + 1) / 4 for column in (2.5, 1.0, 0.5)]
    assert risk_threshold(losses, lambdas, means[0]).item() == pytest.approx(0.1)
    assert risk_threshold(losses, lambdas, means[1]).item() == pytest.approx(0.2)
    assert risk_threshold(losses, lambdas, means[2]).item() == pytest.approx(0.3)
    assert risk_threshold(losses, lambdas, 0.1).item() == pytest.approx(0.3)
    assert risk_threshold(losses, lambdas, 0.5, bound=2.0).item() == pytest.approx(0.3)


BOOLS = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: risk_threshold(torch.ones(3), torch.ones(3), 0.1), "losses are"),
        (lambda: risk_threshold(torch.ones(3, 2), torch.arange(3.0), 0.1), "lambdas"),
        (lambda: risk_threshold(torch.ones(3, 2).long(), torch.arange(2.0), 0.1), "floating"),
        (lambda: risk_threshold(torch.ones(3, 0), torch.ones(0), 0.1), "lambdas"),
        (lambda: risk_threshold(torch.ones(3, 2), torch.tensor([1.0, 0.0]), 0.1), "lambdas rise"),
        (lambda: risk_threshold(torch.tensor([[0.0, 1.0]]), torch.arange(2.0), 0.1), "monotone"),
        (lambda: risk_threshold(torch.full((3, 2), 2.0), torch.arange(2.0), 0.1), "bound"),
        (lambda: risk_threshold(torch.full((3, 2), math.nan), torch.arange(2.0), 0.1), "bound"),
        (lambda: fnr_threshold(torch.ones(3), torch.ones(3, dtype=torch.bool), 0.1), "scores are"),
        (lambda: fnr_threshold(torch.ones(2, 3).long(), BOOLS, 0.1), "floating"),
        (lambda: fnr_threshold(torch.ones(2, 2), BOOLS, 0.1), "labels"),
        (lambda: fnr_threshold(torch.ones(2, 3), torch.ones(2, 3), 0.1), "bool"),
        (lambda: fnr_threshold(2 * torch.ones(2, 3), BOOLS, 0.1), r"\[0, 1\]"),
        (lambda: fnr_threshold(-torch.ones(2, 3), BOOLS, 0.1), r"\[0, 1\]"),
        (lambda: fnr_threshold(torch.ones(2, 3), BOOLS, 0.1, weights=torch.ones(2)), "together"),
        (lambda: fnr_threshold(torch.ones(2, 3), BOOLS, 0.1, new_weight=1.0), "together"),
        (lambda: fnr_threshold(torch.ones(2, 3), BOOLS, 0.1, weights=torch.ones(3), new_weight=1.0), "weights are"),
        (lambda: fnr_threshold(torch.ones(2, 3), BOOLS, 0.1, weights=-torch.ones(2), new_weight=1.0), "not negative"),
        (lambda: fnr_threshold(torch.ones(2, 3), BOOLS, 0.1, weights=torch.ones(2), new_weight=-1.0), "not negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
