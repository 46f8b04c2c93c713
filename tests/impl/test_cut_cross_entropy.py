"""The plain form and the filter's measures against the full matrix of logits in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from paperclaims.impl.losses.cut_cross_entropy import (
    EPS,
    PRESETS,
    LinearCrossEntropy,
    cut_cross_entropy,
    entries_above,
    indexed_logits,
    kept_blocks,
    linear_cross_entropy,
    linear_log_sum_exp,
    vocabulary_order,
)

N, V, D = 13, 29, 5


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    e, c = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, V))
    return e.requires_grad_(), c.requires_grad_(), torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("block", [1, 7, V, 100])
def test_plain_form_is_the_cross_entropy(problem, block):
    e, c, targets = problem
    logits = e @ c.T
    torch.testing.assert_close(linear_log_sum_exp(e, c, block=block), logits.logsumexp(1))
    torch.testing.assert_close(indexed_logits(e, c, targets), logits[torch.arange(N), targets])
    loss = cut_cross_entropy(e, c, targets, block=block)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(loss, linear_cross_entropy(e, c, targets, reduction="none"))


def test_plain_form_passes_every_transform(problem):
    e, c, targets = problem
    assert torch.autograd.gradcheck(lambda e, c: cut_cross_entropy(e, c, targets, block=7), (e, c))
    few = e.detach()[:3].requires_grad_(), c.detach()[:9].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda e, c: cut_cross_entropy(e, c, targets[:3] % 9, block=7), few)
    by_func = torch.func.grad(lambda c: cut_cross_entropy(e.detach(), c, targets).mean())(c.detach())
    linear_cross_entropy(e, c, targets).backward()
    torch.testing.assert_close(by_func, c.grad)


def test_plain_form_takes_extreme_logits():
    e, c = torch.full((2, 1), 1e4).double(), torch.tensor([[1.0], [-1.0], [1.0]]).double()
    expected = torch.tensor([math.log(2), 2e4 + math.log(2)]).double()
    torch.testing.assert_close(cut_cross_entropy(e, c, torch.tensor([0, 1]), block=1), expected)


def test_entries_above_counts_the_softmax(problem):
    e, c, _ = problem
    softmax = (e @ c.T).softmax(1)
    for eps in (0.0, EPS, 0.01, 0.3, 1.0):
        assert torch.equal(entries_above(e, c, eps, block=7), (softmax >= eps).sum(1))
    certain = torch.tensor([[1.0], [0.0]])
    assert entries_above(torch.zeros(1, 1), certain, 0.5).item() == 2  # exactly at the threshold counts
    assert EPS == 1 / 4096


@pytest.mark.parametrize("shuffled", [False, True])
def test_kept_blocks_against_every_block(problem, shuffled):
    e, c, targets = problem
    order = torch.randperm(V, generator=torch.Generator().manual_seed(1)) if shuffled else None
    g = ((e @ c.T).softmax(1) - F.one_hot(targets, V)).abs()
    g = g if order is None else g[:, order]
    for eps in (0.01, 0.1, 0.9):
        kept = kept_blocks(e, c, targets, eps, tile=(4, 6), order=order)
        expected = [[bool((block >= eps).any()) for block in rows.split(6, 1)] for rows in g.split(4)]
        assert kept.tolist() == expected


def test_kept_blocks_keeps_what_is_exactly_at_the_threshold():
    kept = kept_blocks(torch.zeros(1, 1), torch.zeros(4, 1), torch.tensor([3]), 0.25, tile=(1, 1))
    assert kept.tolist() == [[True, True, True, True]]


def test_filtered_gradient_is_that_of_the_kept_blocks(problem):
    e, c, targets = problem
    eps = 0.15
    kept = kept_blocks(e, c, targets, eps, tile=(4, 6)).repeat_interleave(4, 0)[:N].repeat_interleave(6, 1)[:, :V]
    g = ((e @ c.T).softmax(1) - F.one_hot(targets, V)) * kept
    assert 0 < kept.double().mean() < 1
    linear_cross_entropy(e, c, targets, reduction="sum", filter_eps=eps, tile=(4, 6)).backward()
    torch.testing.assert_close(e.grad, g @ c)
    torch.testing.assert_close(c.grad, g.T @ e)


def test_vocabulary_order_falls(problem):
    e, c, _ = problem
    assert ((e @ c.T).mean(0)[vocabulary_order(e, c, None)].diff() <= 0).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bias", [False, True])
def test_module(preset, bias):
    torch.manual_seed(0)
    head = LinearCrossEntropy(D, V, bias=bias, preset=preset, ignore_index=3)
    assert head.weight.shape == (V, D)
    assert (head.bias is not None) == bias
    e, targets = torch.randn(2, 6, D), torch.randint(V, (2, 6))
    targets[0, 0] = 3
    loss = head(e, targets)
    torch.testing.assert_close(
        loss, F.cross_entropy(F.linear(e, head.weight, head.bias).flatten(0, 1), targets.flatten(), ignore_index=3)
    )
    loss.backward()
    assert head.weight.grad.abs().sum() > 0


def test_presets_are_the_papers_variants():
    filtered = [name for name, settings in PRESETS.items() if settings["filter_eps"] is not None]
    assert filtered == ["cce", "cce_kahan", "cce_kahan_full_c"]
    assert [name for name in PRESETS if PRESETS[name].get("accumulate") == "compensated"] == ["cce_kahan", "cce_kahan_full_c"]
    assert [name for name in PRESETS if PRESETS[name].get("filter_c") is False] == ["cce_kahan_full_c"]
    assert all(PRESETS[name]["sort_vocabulary"] for name in filtered)
    assert LinearCrossEntropy(2, 3, preset="cce", filter_eps=0.5).settings["filter_eps"] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, c, t: linear_log_sum_exp(e[0], c), "e is"),
        (lambda e, c, t: linear_log_sum_exp(e, c[0]), "e is"),
        (lambda e, c, t: linear_log_sum_exp(e, c[:, 1:]), "e is"),
        (lambda e, c, t: linear_log_sum_exp(e, c[:0]), "v >= 1"),
        (lambda e, c, t: linear_log_sum_exp(e, c, block=0), "block"),
        (lambda e, c, t: indexed_logits(e, c, t[1:]), "targets are"),
        (lambda e, c, t: indexed_logits(e, c, t + V), r"targets are in \[0, 29\)"),
        (lambda e, c, t: indexed_logits(e, c, torch.full_like(t, V)), r"targets are in \[0, 29\)"),
        (lambda e, c, t: indexed_logits(e, c, t - V), r"targets are in \[0, 29\)"),
        (lambda e, c, t: indexed_logits(e[:, 1:], c, t), "e is"),
        (lambda e, c, t: kept_blocks(e, c, t, tile=(0, 4)), "tile"),
        (lambda e, c, t: LinearCrossEntropy(D, V, preset="kahan"), "preset"),
    ],
)
def test_bad_input_is_refused(problem, call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem)


def test_the_ends_of_the_vocabulary_are_targets(problem):
    e, c, _ = problem
    ends = torch.tensor([0, V - 1])
    torch.testing.assert_close(indexed_logits(e[:2], c, ends), torch.stack([e[0] @ c[0], e[1] @ c[-1]]))
    assert indexed_logits(e[:0], c, ends[:0]).shape == (0,)
