"""Pre-training objectives: corruptions by their frequencies and invariants, losses against sums in float64, steps by hand."""

import math
from functools import partial

import pytest
import torch

from paperclaims.impl.losses.efficient_pretraining_objectives import (
    cluster_tokens,
    cluster_weights,
    crts_step,
    detection_loss,
    electra_step,
    mask_tokens,
    mlm_step,
    random_tokens,
    rts_step,
    sampled_tokens,
    select_positions,
    slm_step,
    token_loss,
    updated_counts,
)

V, N, MASK = 7, 11, 7
CLUSTERS = torch.tensor([0, 1, 0, 2, 1, 0, 1])  # {0, 2, 5}, {1, 4, 6}, {3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(*shape, seed=0, words=V):
    return torch.randint(words, shape, generator=seeded(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def shares(values, words=V):
    return torch.bincount(values.flatten(), minlength=words).double() / values.numel()


def test_selected_positions():
    tokens, keep = make(200, 500), make(200, 500, seed=1, words=2).bool()
    chosen = select_positions(tokens, generator=seeded())
    assert chosen.dtype == torch.bool
    assert chosen.double().mean().item() == pytest.approx(0.15, abs=0.005)
    kept = select_positions(tokens, 0.15, keep=keep, generator=seeded())
    assert torch.equal(kept, chosen & keep)
    assert not select_positions(tokens, 0.0).any()
    assert select_positions(tokens, 1.0).all()
    assert torch.equal(chosen, select_positions(tokens, generator=seeded()))
    assert not torch.equal(chosen, select_positions(tokens, generator=seeded(1)))


def test_mask_tokens():
    tokens, selected = make(3, N), make(3, N, seed=1, words=2).bool()
    out = mask_tokens(tokens, selected, MASK)
    assert out[selected].tolist() == [MASK] * selected.sum()
    assert torch.equal(out[~selected], tokens[~selected])
    assert tokens.max() < MASK


def test_berts_rule():
    tokens, selected = make(300, 400), make(300, 400, seed=1, words=2).bool()
    out = mask_tokens(tokens, selected, MASK, vocabulary=V, masked=0.8, randomised=0.1, generator=seeded())
    assert torch.equal(out[~selected], tokens[~selected])
    masked, same = (out == MASK)[selected], (out == tokens)[selected]
    assert masked.double().mean().item() == pytest.approx(0.8, abs=0.01)
    assert same.double().mean().item() == pytest.approx(0.1, abs=0.006)
    swapped = out[selected][~masked & ~same]
    assert shares(swapped).tolist() == pytest.approx([1 / V] * V, abs=0.02)
    assert torch.equal(mask_tokens(tokens, selected, MASK, vocabulary=V, masked=0, randomised=0), tokens)
    assert (mask_tokens(tokens, selected, MASK, vocabulary=V, masked=0, randomised=1) != tokens)[selected].all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_random_tokens_are_any_other(dtype):
    tokens = torch.full((300, 400), 3, dtype=dtype)
    selected = make(300, 400, seed=1, words=2).bool()
    out = random_tokens(tokens, selected, V, generator=seeded())
    assert out.dtype == dtype
    assert torch.equal(out[~selected], tokens[~selected])
    assert shares(out[selected].long()).tolist() == pytest.approx([1 / 6] * 3 + [0] + [1 / 6] * 3, abs=0.01)
    two = torch.tensor([0, 1, 1, 0])
    assert random_tokens(two, torch.ones(4, dtype=torch.bool), 2).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("token", range(V))
def test_cluster_tokens_by_their_frequencies(token):
    """A cluster by the weights of those that hold another token, then another token of it, uniformly."""
    weights = torch.tensor([[1.0, 2.0, 5.0], [3.0, 0.0, 1.0], [1.0, 1.0, 9.0]])
    tokens = torch.full((200, 300), token)
    selected = make(200, 300, seed=1, words=2).bool()
    out = cluster_tokens(tokens, selected, CLUSTERS, weights, generator=seeded(token))
    assert torch.equal(out[~selected], tokens[~selected])
    expected = torch.zeros(V)
    for other in range(V):
        rivals = [v for v in range(V) if v != token and CLUSTERS[v] == CLUSTERS[other]]
        if other != token:
            expected[other] = weights[CLUSTERS[token], CLUSTERS[other]] / len(rivals)
    assert shares(out[selected]).tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.012)


def test_cluster_tokens_of_many_rows():
    """Every row as if it stood alone: no token of another place decides."""
    tokens, selected = make(4, 5000), torch.ones(4, 5000, dtype=torch.bool)
    out = cluster_tokens(tokens.int(), selected, CLUSTERS, torch.eye(3), generator=seeded())
    assert out.dtype == torch.int32
    assert torch.equal(CLUSTERS[out.long()], CLUSTERS[tokens])
    alone = CLUSTERS[tokens] == 2
    assert torch.equal(out == tokens, alone)  # the only token of its cluster stays
    one = cluster_tokens(tokens, selected, torch.zeros(V, dtype=torch.int64), torch.ones(1, 1), generator=seeded())
    assert (one != tokens).all()
    assert shares(one).tolist() == pytest.approx([1 / V] * V, abs=0.02)
    empty = cluster_tokens(tokens, selected, 2 * CLUSTERS, torch.full((5, 5), 1.0), generator=seeded())
    assert (empty != tokens).all()  # clusters 1 and 3 hold nothing and are never drawn


def test_cluster_weights():
    counts = torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0], [-1.0, 0.0, 9.0]])
    e = math.e
    total = 1 + e**2 + e
    assert cluster_weights(counts)[0].tolist() == pytest.approx([1 / total, e**2 / total, e / total])
    assert cluster_weights(counts)[1].tolist() == pytest.approx([1 / 3] * 3)
    row = [1.0, math.exp(3 * 0.1), math.exp(3)]
    assert cluster_weights(counts, 3.0)[2].tolist() == pytest.approx([x / sum(row) for x in row])
    assert cluster_weights(counts, 0.0).flatten().tolist() == pytest.approx([1 / 3] * 9)


def test_counts_go_up_for_what_passed_and_down_for_what_was_detected():
    tokens, inputs = torch.tensor([[0, 1, 3, 5], [0, 2, 6, 1]]), torch.tensor([[1, 1, 2, 2], [4, 1, 4, 3]])
    detected = torch.tensor([[True, True, False, False], [True, True, False, False]])
    expected = torch.ones(3, 3)
    for old, new, found in zip(tokens.flatten(), inputs.flatten(), detected.flatten(), strict=True):
        if old != new:
            expected[CLUSTERS[old], CLUSTERS[new]] += -1 if found else 1
    counts = torch.ones(3, 3)
    assert torch.equal(updated_counts(counts, CLUSTERS, tokens, inputs, detected), expected)
    assert expected[0, 1] == -2
    assert torch.equal(counts, torch.ones(3, 3))
    assert updated_counts(counts.double(), CLUSTERS, tokens, inputs, detected).dtype == torch.float64


def test_sampled_tokens_follow_the_logits():
    logits = normal(V)
    tokens, selected = torch.full((200, 300), 2), make(200, 300, seed=1, words=2).bool()
    out = sampled_tokens(tokens, selected, logits.expand(200, 300, V), generator=seeded())
    assert torch.equal(out[~selected], tokens[~selected])
    assert shares(out[selected]).tolist() == pytest.approx(logits.softmax(0).tolist(), abs=0.012)
    certain = torch.full((200, 300, V), -1e4).half()
    certain[..., 5] = 1e4
    assert (sampled_tokens(tokens.int(), selected, certain)[selected] == 5).all()


def loop_token_loss(logits, tokens, counted):
    each = []
    for row, token, kept in zip(
        logits.reshape(-1, V).tolist(), tokens.flatten().tolist(), counted.flatten().tolist(), strict=True
    ):
        top = max(row)
        each.append(top + math.log(sum(math.exp(x - top) for x in row)) - row[token] if kept else 0.0)
    return each


def loop_detection_loss(logits, replaced, counted):
    each = []
    for x, label, kept in zip(logits.flatten().tolist(), replaced.flatten().tolist(), counted.flatten().tolist(), strict=True):
        wrong = -x if label else x
        each.append(max(wrong, 0) + math.log1p(math.exp(-abs(x))) if kept else 0.0)
    return each


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("every", [True, False])
def test_losses_against_loops(scale, every):
    counted = torch.ones(2, N, dtype=torch.bool) if every else make(2, N, seed=3, words=2).bool()
    number = counted.sum().item()
    chosen = None if every else counted
    tokens, replaced = make(2, N), make(2, N, seed=4, words=2).bool()
    wide, narrow = scale * normal(2, N, V), scale * normal(2, N)
    pairs = [
        (partial(token_loss, wide, tokens, chosen), loop_token_loss(wide, tokens, counted)),
        (partial(detection_loss, narrow, replaced, chosen), loop_detection_loss(narrow, replaced, counted)),
    ]
    for loss, each in pairs:
        assert loss(reduction="none").shape == (2, N)
        assert loss(reduction="none").flatten().tolist() == pytest.approx(each, rel=1e-12, abs=1e-12)
        assert loss(reduction="sum").item() == pytest.approx(sum(each), rel=1e-12)
        assert loss().item() == pytest.approx(sum(each) / number, rel=1e-12)


def test_uninformed_detection_costs_the_entropy():
    replaced = torch.arange(100) < 15
    logits = torch.full((100,), math.log(15 / 85), dtype=torch.float64)
    assert detection_loss(logits, replaced).item() == pytest.approx(0.42270908780599)
    assert detection_loss(torch.zeros(100), replaced).item() == pytest.approx(math.log(2))
    certain = torch.where(replaced, 1e4, -1e4)
    assert detection_loss(certain, replaced).item() == 0
    assert detection_loss(certain, ~replaced).item() == 1e4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(reduction):
    counted, replaced = make(2, 4, seed=3, words=2).bool(), make(2, 4, seed=4, words=2).bool()
    tokens, wide, narrow = make(2, 4), normal(2, 4, V).requires_grad_(), normal(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_loss(x, tokens, counted, reduction=reduction), wide)
    assert torch.autograd.gradcheck(lambda x: detection_loss(x, replaced, counted, reduction=reduction), narrow)
    (token_loss(wide, tokens, counted) + detection_loss(narrow, replaced, counted)).backward()
    assert wide.grad[~counted].eq(0).all()
    assert narrow.grad[~counted].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    wide, narrow, tokens, replaced = normal(2, N, V).to(dtype), normal(2, N).to(dtype), make(2, N), make(2, N, words=2).bool()
    for loss, true in (
        (token_loss(wide, tokens.int()), token_loss(wide.double(), tokens)),
        (detection_loss(narrow, replaced), detection_loss(narrow.double(), replaced)),
    ):
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(true.item(), rel=2 * torch.finfo(dtype).eps)
    many = torch.full((70_000,), 4.0, dtype=torch.float16)  # their sum is beyond float16
    assert detection_loss(many, torch.zeros(70_000, dtype=torch.bool)).item() == pytest.approx(4.018, abs=0.01)


def test_nothing_and_single_tokens():
    none = torch.zeros(2, 0, dtype=torch.int64)
    nowhere = none.bool()
    assert random_tokens(none, nowhere, V).shape == (2, 0)
    assert cluster_tokens(none, nowhere, CLUSTERS, torch.eye(3)).shape == (2, 0)
    assert sampled_tokens(none, nowhere, torch.zeros(2, 0, V)).shape == (2, 0)
    assert token_loss(torch.zeros(2, 0, V), none, reduction="sum").item() == 0
    assert detection_loss(torch.zeros(2, 0), nowhere, reduction="none").shape == (2, 0)
    assert detection_loss(torch.zeros(2, 0), nowhere).isnan()
    unselected = torch.zeros(1, 2, dtype=torch.bool)
    assert token_loss(torch.zeros(1, 2, V), make(1, 2), unselected).isnan()
    assert detection_loss(torch.zeros(1, 2), unselected, unselected).isnan()
    single = torch.tensor(3)
    assert token_loss(torch.zeros(V), single).item() == pytest.approx(math.log(V))
    assert token_loss(torch.zeros(V), single, reduction="none").shape == ()
    assert detection_loss(torch.tensor(0.0), torch.tensor(True)).item() == pytest.approx(math.log(2))
    assert cluster_tokens(single, torch.tensor(True), CLUSTERS, torch.ones(3, 3)).item() != 3


@pytest.fixture
def batch():
    return make(2, N), make(2, N, seed=5, words=2).bool()


def words(table):
    return lambda tokens: table[tokens]


def test_steps_over_the_vocabulary(batch):
    tokens, selected = batch
    table = normal(V + 1, V).requires_grad_()
    masked = mlm_step(words(table), tokens, selected, MASK)
    assert torch.equal(masked.inputs, mask_tokens(tokens, selected, MASK))
    assert masked.loss.item() == pytest.approx(token_loss(table[masked.inputs], tokens, selected).item())
    inputs = random_tokens(tokens, selected, V, generator=seeded(9))
    for counted in (None, torch.ones_like(selected)):
        step = slm_step(words(table), tokens, selected, V, counted=counted, generator=seeded(9))
        assert torch.equal(step.inputs, inputs)
        expected = token_loss(table[inputs], tokens, selected if counted is None else counted)
        assert step.loss.item() == pytest.approx(expected.item())
        assert step.loss.requires_grad
        assert torch.equal(step.scores, table[inputs])
        assert not step.scores.requires_grad


def test_steps_of_detection(batch):
    tokens, selected = batch
    table, part = normal(V + 1).requires_grad_(), make(2, N, seed=6, words=2).bool()
    for counted in (None, part):
        step = rts_step(words(table), tokens, selected, V, counted=counted, generator=seeded(9))
        assert torch.equal(step.inputs, random_tokens(tokens, selected, V, generator=seeded(9)))
        assert step.loss.item() == pytest.approx(detection_loss(table[step.inputs], selected, counted).item())
        counts = torch.tensor([[1.0, 5.0, 2.0], [0.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
        step, after = crts_step(
            words(table), tokens, selected, CLUSTERS, counts, beta=1.5, counted=counted, generator=seeded(9)
        )  # fmt: skip
        drawn = cluster_tokens(tokens, selected, CLUSTERS, cluster_weights(counts, 1.5), generator=seeded(9))
        assert torch.equal(step.inputs, drawn)
        assert step.loss.item() == pytest.approx(detection_loss(table[drawn], selected, counted).item())
        assert torch.equal(after, updated_counts(counts, CLUSTERS, tokens, drawn, table[drawn] > 0))
    by_default, _ = crts_step(words(table), tokens, selected, CLUSTERS, counts, generator=seeded(9))
    drawn = cluster_tokens(tokens, selected, CLUSTERS, cluster_weights(counts, 2.0), generator=seeded(9))
    assert torch.equal(by_default.inputs, drawn)


def test_electra_step(batch):
    tokens, selected = batch
    proposer, table, part = normal(V + 1, V).requires_grad_(), normal(V + 1, seed=1).requires_grad_(), ~selected
    for weight, counted in ((None, None), (3.0, part)):
        settings = {} if weight is None else {"weight": weight, "counted": counted}
        step = electra_step(words(proposer), words(table), tokens, selected, MASK, generator=seeded(9), **settings)
        logits = proposer[mask_tokens(tokens, selected, MASK)]
        drawn = sampled_tokens(tokens, selected, logits, generator=seeded(9))
        assert torch.equal(step.inputs, drawn)
        assert (drawn == tokens)[selected].any()  # a right guess counts as not replaced
        detected = detection_loss(table[drawn], drawn != tokens, counted)
        assert step.loss.item() == pytest.approx((token_loss(logits, tokens, selected) + (weight or 50) * detected).item())
    (alone,) = torch.autograd.grad(step.loss, proposer)
    (proposed,) = torch.autograd.grad(token_loss(proposer[mask_tokens(tokens, selected, MASK)], tokens, selected), proposer)
    torch.testing.assert_close(alone, proposed)  # the draw passes no gradient


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, m, x: select_positions(t, 1.1), "rate"),
        (lambda t, m, x: select_positions(t, math.nan), "rate"),
        (lambda t, m, x: select_positions(x), "tokens are integers"),
        (lambda t, m, x: select_positions(m), "tokens are integers"),
        (lambda t, m, x: select_positions(t, keep=m[:, 1:]), "keep is bool"),
        (lambda t, m, x: mask_tokens(t, m.long(), MASK), "selected is bool"),
        (lambda t, m, x: mask_tokens(x, m, MASK), "tokens are integers"),
        (lambda t, m, x: mask_tokens(t, m, MASK, vocabulary=V, masked=0.8, randomised=0.3), "shares"),
        (lambda t, m, x: mask_tokens(t, m, MASK, vocabulary=V, masked=0.8, randomised=-0.1), "shares"),
        (lambda t, m, x: mask_tokens(t, m, MASK, masked=-0.1), "shares"),
        (lambda t, m, x: mask_tokens(t, m, MASK, masked=0.8, randomised=0.1), "vocabulary"),
        (lambda t, m, x: random_tokens(t, m, 1), "vocabulary"),
        (lambda t, m, x: random_tokens(t, m[0], V), "selected is bool"),
        (lambda t, m, x: random_tokens(x.to(torch.complex64), m, V), "tokens are integers"),
        (lambda t, m, x: cluster_tokens(x, m, CLUSTERS, torch.eye(3)), "tokens are integers"),
        (lambda t, m, x: cluster_tokens(t, m[0], CLUSTERS, torch.eye(3)), "selected is bool"),
        (lambda t, m, x: cluster_tokens(t, m, CLUSTERS.int(), torch.eye(3)), "clusters are int64"),
        (lambda t, m, x: cluster_tokens(t, m, CLUSTERS[None], torch.eye(3)), "clusters are int64"),
        (lambda t, m, x: cluster_tokens(t, m, CLUSTERS, torch.ones(3, 2)), "weights and counts"),
        (lambda t, m, x: cluster_tokens(t, m, CLUSTERS, torch.ones(3)), "weights and counts"),
        (lambda t, m, x: cluster_tokens(t, m, CLUSTERS, torch.eye(3).long()), "weights and counts"),
        (lambda t, m, x: cluster_weights(torch.ones(3, 2)), "counts are"),
        (lambda t, m, x: cluster_weights(torch.ones(3)), "counts are"),
        (lambda t, m, x: cluster_weights(torch.ones(3, 3).long()), "counts are"),
        (lambda t, m, x: updated_counts(torch.ones(3, 3), CLUSTERS, t, t[0], m), "inputs have"),
        (lambda t, m, x: updated_counts(torch.ones(3, 3), CLUSTERS, t, t, m[0]), "detected is bool"),
        (lambda t, m, x: updated_counts(torch.ones(3, 3), CLUSTERS, x, t, m), "tokens are integers"),
        (lambda t, m, x: updated_counts(torch.ones(3, 2), CLUSTERS, t, t, m), "weights and counts"),
        (lambda t, m, x: sampled_tokens(t, m, x), "logits are"),
        (lambda t, m, x: sampled_tokens(t, m[0], torch.zeros(2, N, V)), "selected is bool"),
        (lambda t, m, x: token_loss(x, t), "logits are"),
        (lambda t, m, x: token_loss(torch.zeros(2, N, V).long(), t), "logits are"),
        (lambda t, m, x: token_loss(torch.zeros(3, N, V), t), "logits are"),
        (lambda t, m, x: token_loss(torch.zeros(2, N, V), x), "tokens are integers"),
        (lambda t, m, x: token_loss(torch.zeros(2, N, V), t, m[0]), "counted is bool"),
        (lambda t, m, x: token_loss(torch.zeros(2, N, V), t, reduction="max"), "reduction"),
        (lambda t, m, x: detection_loss(t, m), "logits are"),
        (lambda t, m, x: detection_loss(x, m.long()), "replaced is bool"),
        (lambda t, m, x: detection_loss(x, m, m[0]), "counted is bool"),
        (lambda t, m, x: detection_loss(x, m, reduction="max"), "reduction"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(2, N), make(2, N, words=2).bool(), torch.zeros(2, N))
