"""Goldfish loss: masks against loops over whole numbers, losses against sums in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.impl.losses.goldfish_loss import (
    TABLE_SEED,
    TABLE_SIZE,
    goldfish_loss,
    goldfish_targets,
    hashed_mask,
    linear_goldfish_loss,
    random_mask,
    static_mask,
    table_mask,
)

N, V, D = 40, 29, 5


def make(*shape, seed=0, words=V):
    return torch.randint(words, shape, generator=torch.Generator().manual_seed(seed))


def splitmix(x):
    """SplitMix64's finaliser on numbers below 2**64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def loop_hashed(tokens, k, h, key=0):
    """Token by token: hash of the h before it, below 1/k of the range is left out."""
    keep = [True] * len(tokens)
    for i in range(h, len(tokens)):
        state = splitmix(key)
        for token in tokens[i - h : i]:
            state = splitmix((state + splitmix((token + 1) % 2**64)) % 2**64)
        keep[i] = state // 2 >= int(2**63 / k)
    return keep


def loop_table(tokens, k, width):
    table = torch.rand(TABLE_SIZE, generator=torch.Generator().manual_seed(TABLE_SEED)).tolist()
    keep = [True] * len(tokens)
    for i in range(width - 1, len(tokens)):
        keep[i] = table[math.prod(tokens[i - width + 1 : i + 1]) % TABLE_SIZE] >= 1 / k
    return keep


def test_the_mixer_is_splitmix64():
    """The first outputs of the published generator from state 0."""
    assert [splitmix(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize(("k", "h"), [(2, 1), (3, 2), (4, 13), (128, 3), (1.5, 4)])
def test_hashed_mask_against_whole_numbers(k, h):
    rows = make(3, 200, seed=1, words=50_000)
    assert hashed_mask(rows, k, h).tolist() == [loop_hashed(row, k, h) for row in rows.tolist()]
    assert hashed_mask(rows, k, h, key=7).tolist() == [loop_hashed(row, k, h, 7) for row in rows.tolist()]
    assert not torch.equal(hashed_mask(rows, k, h), hashed_mask(rows, k, h, key=7))


def test_hashed_mask_takes_any_integers_and_leading_axes():
    rows = make(2, 3, N)
    mask = hashed_mask(rows)
    assert torch.equal(mask[1, 2], hashed_mask(rows[1, 2]))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(mask, hashed_mask(rows.to(dtype)))
    blanked = rows.clone()
    blanked[..., 20] = -100
    assert hashed_mask(blanked[0, 0], 2, 3).tolist() == loop_hashed(blanked[0, 0].tolist(), 2, 3)


def test_defaults_are_the_papers():
    rows = make(5, 100)
    assert torch.equal(hashed_mask(rows), hashed_mask(rows, 4, 13, key=0))
    assert torch.equal(table_mask(rows), table_mask(rows, 4, 4))
    assert torch.equal(static_mask(rows), static_mask(rows, 4, start=0))


@pytest.mark.parametrize("n", [0, 1, 12, 13, 14])
def test_short_rows_are_kept(n):
    mask = hashed_mask(make(500, n), 1.0001)
    assert mask.shape == (500, n)
    assert mask[:, :13].all()
    assert not mask[:, 13:].any()
    assert table_mask(make(500, n), 1e9, 13).all()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), max_size=20), st.integers(1, 6))
def test_copies_agree_and_context_ends_at_h(one, other, h):
    passage = make(30, seed=2, words=10).tolist()
    masks = [hashed_mask(torch.tensor(prefix + passage), 2, h)[len(prefix) + h :] for prefix in (one, other)]
    assert torch.equal(*masks)


def test_order_of_the_context_matters_to_the_hash_only():
    rows = make(2000, 4, words=1000)
    turned = rows[:, [1, 0, 2, 3]]
    assert (hashed_mask(rows, 2, 3) != hashed_mask(turned, 2, 3))[:, 3].double().mean() > 0.4
    assert torch.equal(table_mask(rows, 2, 4), table_mask(turned, 2, 4))


def test_rates():
    rows = make(200, 513, words=50_000)
    for k in (2, 4, 32):
        for mask in (hashed_mask(rows, k), table_mask(rows, k), random_mask(rows, k, generator=torch.Generator().manual_seed(0))):
            assert 1 - mask[:, 13:].double().mean().item() == pytest.approx(1 / k, abs=0.006)


@pytest.mark.parametrize("width", [1, 4, 13])
def test_table_mask_is_the_released_rule(width):
    rows = make(3, 100, words=20)
    assert table_mask(rows, 3, width).tolist() == [loop_table(row, 3, width) for row in rows.tolist()]


def test_static_mask():
    tokens = make(2, 11)
    for k, start in [(2, 0), (3, 0), (3, 2), (4, 9), (2, 20)]:
        expected = [not (i >= start and (i - start) % k == 0) for i in range(11)]
        assert static_mask(tokens, k, start=start).tolist() == [expected, expected]


def test_random_mask_follows_its_generator():
    tokens = make(4, 50)
    first, again, other = (random_mask(tokens, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.bool


def test_targets():
    targets, keep = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[True, False], [False, True]])
    assert goldfish_targets(targets, keep).tolist() == [[3, -100], [-100, 0]]
    assert goldfish_targets(targets, keep, ignore_index=9).tolist() == [[3, 9], [9, 0]]
    assert targets.tolist() == [[3, 1], [2, 0]]


def loop_loss(logits, targets, keep, ignore_index=-100):
    """-log softmax of every kept target, and how many there are."""
    total, count = [], 0
    for row, target, kept in zip(
        logits.flatten(0, -2).tolist(), targets.flatten().tolist(), keep.flatten().tolist(), strict=True
    ):
        if kept and target != ignore_index:
            top = max(row)
            total.append(top + math.log(sum(math.exp(x - top) for x in row)) - row[target])
            count += 1
        else:
            total.append(0.0)
    return total, count


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_is_equation_2(scale):
    logits = scale * torch.randn(2, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    targets = make(2, N)
    targets[0, 3:6] = -100
    for keep in (None, static_mask(targets, 3), torch.ones_like(targets, dtype=torch.bool)):
        used = hashed_mask(targets, 4, 13) if keep is None else keep
        each, count = loop_loss(logits, targets, used)
        assert 0 < count < 2 * N
        assert goldfish_loss(logits, targets, keep).item() == pytest.approx(sum(each) / count, rel=1e-12)
        assert goldfish_loss(logits, targets, keep, reduction="sum").item() == pytest.approx(sum(each), rel=1e-12)
        assert goldfish_loss(logits, targets, keep, reduction="none").flatten().tolist() == pytest.approx(each, rel=1e-12)
    each, count = loop_loss(logits, targets, hashed_mask(targets, 2, 3))
    assert goldfish_loss(logits, targets, k=2, h=3).item() == pytest.approx(sum(each) / count, rel=1e-12)


def test_certain_and_tied_logits():
    logits = torch.zeros(1, 3, 4).double()
    logits[0, 0, 2] = 1e4
    loss = goldfish_loss(logits, torch.tensor([[2, 0, 3]]), reduction="none")
    assert loss[0].tolist() == pytest.approx([0.0, math.log(4), math.log(4)], abs=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(reduction):
    logits = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    targets, keep = make(2, 6, words=4), static_mask(make(2, 6), 3)
    assert torch.autograd.gradcheck(lambda x: goldfish_loss(x, targets, keep, reduction=reduction), logits)
    goldfish_loss(logits, targets, keep).backward()
    assert logits.grad[~keep].eq(0).all()
    assert logits.grad[keep].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_form_equals_the_plain_one(reduction):
    generator = torch.Generator().manual_seed(5)
    e, c = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, N, D), (V, D)))
    targets = make(2, N)
    targets[1, 7] = -100
    for options in ({}, {"k": 2, "h": 3}, {"keep": static_mask(targets, 3)}):
        grads = []
        for linear in (False, True):
            leaves = [x.clone().requires_grad_() for x in (e, c)]
            scored = leaves if linear else [leaves[0] @ leaves[1].T]
            loss = (linear_goldfish_loss if linear else goldfish_loss)(*scored, targets, reduction=reduction, **options)
            grads.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
        for plain, linear in zip(*grads, strict=True):
            torch.testing.assert_close(plain, linear)


def test_ignored_index_is_the_callers():
    logits = torch.randn(1, N, V, generator=torch.Generator().manual_seed(6)).double()
    targets = make(1, N)
    keep = (targets != 3) & hashed_mask(targets)
    expected = goldfish_loss(logits, targets, keep)
    torch.testing.assert_close(goldfish_loss(logits, targets, ignore_index=3), expected)
    weights = torch.randn(V, V, generator=torch.Generator().manual_seed(7)).double()
    e = logits @ torch.linalg.inv(weights).T
    torch.testing.assert_close(linear_goldfish_loss(e, weights, targets, ignore_index=3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    logits = torch.randn(2, N, V, generator=torch.Generator().manual_seed(8)).to(dtype)
    targets = make(2, N)
    loss = goldfish_loss(logits, targets)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(goldfish_loss(logits.double(), targets).item(), rel=4 * torch.finfo(dtype).eps)
    assert goldfish_loss(logits, targets.int()).item() == loss.item()


def test_nothing_to_learn_from():
    logits, targets = torch.zeros(1, 3, V), make(1, 3)
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert goldfish_loss(logits, targets, none).isnan()
    assert goldfish_loss(logits, targets, none, reduction="sum").item() == 0
    assert goldfish_loss(logits[:, :0], targets[:, :0], reduction="sum").item() == 0
    assert goldfish_loss(logits[:, :0], targets[:, :0], reduction="none").shape == (1, 0)
    assert goldfish_loss(logits[0, :1], targets[0, :1]).item() == pytest.approx(math.log(V))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t, m: hashed_mask(t, 1), "k is above 1"),
        (lambda x, t, m: hashed_mask(t, math.nan), "k is above 1"),
        (lambda x, t, m: hashed_mask(t, 4, 0), "h is at least 1"),
        (lambda x, t, m: hashed_mask(x), "tokens are integers"),
        (lambda x, t, m: hashed_mask(m), "tokens are integers"),
        (lambda x, t, m: hashed_mask(t[0, 0]), "tokens are integers"),
        (lambda x, t, m: hashed_mask(x.to(torch.complex64)), "tokens are integers"),
        (lambda x, t, m: table_mask(x), "tokens are integers"),
        (lambda x, t, m: table_mask(t, 0.5), "k is above 1"),
        (lambda x, t, m: table_mask(t, 4, 0), "width is at least 1"),
        (lambda x, t, m: static_mask(t, 1), "whole k"),
        (lambda x, t, m: static_mask(t, 2.5), "whole k"),
        (lambda x, t, m: static_mask(t, start=-1), "start"),
        (lambda x, t, m: static_mask(t[0, 0]), "tokens"),
        (lambda x, t, m: random_mask(t, 1), "k is above 1"),
        (lambda x, t, m: goldfish_targets(t, m[:, 1:]), "mask is bool"),
        (lambda x, t, m: goldfish_targets(t, m.long()), "mask is bool"),
        (lambda x, t, m: goldfish_loss(x, t, m[:, 1:]), "mask is bool"),
        (lambda x, t, m: goldfish_loss(x[:, 1:], t), "logits are"),
        (lambda x, t, m: goldfish_loss(x[..., 0], t), "logits are"),
        (lambda x, t, m: goldfish_loss(x.long(), t), "logits are"),
        (lambda x, t, m: goldfish_loss(x, t, reduction="max"), "reduction"),
        (lambda x, t, m: goldfish_loss(x, t, k=1), "k is above 1"),
        (lambda x, t, m: linear_goldfish_loss(x, x[0], t, shift=1), "shift"),
        (lambda x, t, m: linear_goldfish_loss(x, x[0], t, m[:, 1:]), "mask is bool"),
        (lambda x, t, m: linear_goldfish_loss(x, x[0, :, 1:], t), "e is"),
    ],
)
def test_bad_input_is_refused(call, message):
    logits, targets = torch.zeros(2, N, V), make(2, N)
    with pytest.raises(ValueError, match=message):
        call(logits, targets, static_mask(targets))
