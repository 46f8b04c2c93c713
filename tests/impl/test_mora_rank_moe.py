"""MoRA: against loops over tokens and experts in float64, special cases with known answers, and the pool's bookkeeping."""

import math

import pytest
import torch
from torch import nn

from paperclaims.impl.merging.mora_rank_moe import MixtureOfRanks, mixture_of_ranks, relevance, self_activated_gates


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_gates(activations, temperature, budget=None, threshold=None, renormalise=False):
    """Gates of one input, expert by expert."""
    norm = math.sqrt(sum(a * a for a in activations))
    scores = [a / norm for a in activations]
    weights = [math.exp(s / temperature) for s in scores]
    gates = [w / sum(weights) for w in weights]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: budget or len(scores)]
    kept = [g if i in best and (threshold is None or scores[i] >= threshold) else 0.0 for i, g in enumerate(gates)]
    total = sum(kept)
    return [g / total if total else 0.0 for g in kept] if renormalise else kept


def loop_update(x, keys, values, scale, **gating):
    rows = []
    for token in x.tolist():
        activations = [sum(k * t for k, t in zip(key, token, strict=True)) for key in keys.tolist()]
        gates = loop_gates(activations, **gating)
        weighted = [scale * g * a for g, a in zip(gates, activations, strict=True)]
        rows.append([sum(w * v for w, v in zip(weighted, value, strict=True)) for value in values.tolist()])
    return torch.tensor(rows, dtype=torch.float64)


SETTINGS = [
    {"temperature": 0.2},
    {"temperature": 1.5, "budget": 1},
    {"temperature": 0.2, "budget": 3},
    {"temperature": 0.2, "budget": 6},
    {"temperature": 0.2, "budget": 99},
    {"temperature": 0.2, "threshold": 0.1},
    {"temperature": 0.2, "threshold": 2.0, "renormalise": True},
    {"temperature": 0.2, "budget": 3, "threshold": 0.45, "renormalise": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_update_is_the_loop_over_tokens(settings):
    x, keys, values = normal(9, 5, seed=1), normal(6, 5, seed=2), normal(4, 6, seed=3)
    expected = loop_update(x, keys, values, 1.7, **settings)
    torch.testing.assert_close(mixture_of_ranks(x, keys, values, scale=1.7, **settings), expected, rtol=1e-12, atol=1e-12)
    unscaled = loop_update(x, keys, values, 1.0, **settings)
    torch.testing.assert_close(mixture_of_ranks(x, keys, values, **settings), unscaled, rtol=1e-12, atol=1e-12)
    if "budget" in settings:
        gathered = mixture_of_ranks(x, keys, values, scale=1.7, gather=True, **settings)
        torch.testing.assert_close(gathered, expected, rtol=1e-12, atol=1e-12)
    gates = self_activated_gates(x @ keys.mT, **settings)
    assert gates.count_nonzero(-1).max() <= settings.get("budget", 6)
    if not settings.keys() & {"budget", "threshold"}:
        torch.testing.assert_close(gates.sum(-1), torch.ones(9).double())


def test_a_score_at_the_threshold_stays():
    assert self_activated_gates(torch.tensor([3.0, 4.0, 0.0]), temperature=1.0, threshold=0.0).gt(0).tolist() == [True] * 3
    assert self_activated_gates(torch.tensor([3.0, 4.0, -1e-3]), temperature=1.0, threshold=0.0).gt(0).tolist() == [
        True,
        True,
        False,
    ]


def test_relevance_does_not_depend_on_scale_and_is_zero_at_zero():
    activations = normal(3, 6)
    torch.testing.assert_close(relevance(7 * activations), relevance(activations))
    torch.testing.assert_close(relevance(activations).square().sum(-1), torch.ones(3).double())
    zero = torch.zeros(2, 6, requires_grad=True)
    assert relevance(zero).eq(0).all()
    self_activated_gates(zero, temperature=0.1, budget=2).mul(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_uniform_gates_over_all_ranks_are_lora():
    x, keys, values = normal(9, 5, seed=1), normal(6, 5, seed=2), normal(4, 6, seed=3)
    lora = x @ keys.mT @ values.mT
    assert (mixture_of_ranks(x, keys, values, temperature=1e12, scale=6) - lora).abs().max() < 1e-10
    assert (mixture_of_ranks(x, keys, values, temperature=1e12, scale=6, budget=1) - lora).abs().max() > 0.1


def test_leading_dimensions_are_separate_pools():
    x, keys, values = normal(3, 9, 5, seed=1), normal(3, 6, 5, seed=2), normal(3, 4, 6, seed=3)
    stacked = mixture_of_ranks(x, keys, values, temperature=0.2, budget=2)
    for i in range(3):
        torch.testing.assert_close(stacked[i], mixture_of_ranks(x[i], keys[i], values[i], temperature=0.2, budget=2))


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_gradients(settings):
    inputs = [normal(4, 5, seed=1).requires_grad_(), normal(6, 5, seed=2).requires_grad_(), normal(4, 6, seed=3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, a, b: mixture_of_ranks(x, a, b, **settings), inputs)
    if "budget" in settings:
        assert torch.autograd.gradcheck(lambda x, a, b: mixture_of_ranks(x, a, b, gather=True, **settings), inputs)


def trained_layer(bias=True, **options):
    """A layer with two tasks of ranks 3 and 2 whose values are not zero."""
    layer = MixtureOfRanks(nn.Linear(5, 4, bias=bias, dtype=torch.float64), **{"temperature": 0.2, "budget": 2, **options})
    for i, rank in enumerate((3, 2)):
        layer.add_task(rank, torch.Generator().manual_seed(i))
        with torch.no_grad():
            layer.values[-1].copy_(normal(4, rank, seed=i + 5))
    return layer


def test_layer_is_base_plus_update():
    assert trained_layer().scale == 1
    layer, x = trained_layer(threshold=0.45, scale=1.3), normal(2, 7, 5)
    keys, values = layer.pool()
    assert (layer.ranks, keys.shape, values.shape) == (5, (5, 5), (4, 5))
    for mode, threshold in ((True, None), (False, 0.45)):
        layer.train(mode)
        update = loop_update(x.reshape(14, 5), keys, values, 1.3, temperature=0.2, budget=2, threshold=threshold)
        torch.testing.assert_close(layer(x), layer.linear(x) + update.reshape(2, 7, 4), rtol=1e-12, atol=1e-12)
    assert layer(x[0, 0]).shape == (4,)
    active = (layer.gates(x) > 0).sum(-1)
    assert active.min() < active.max() <= 2
    assert torch.equal(layer.active_parameters(x), 9 * active)


def test_a_new_task_freezes_the_old_ones_and_changes_nothing_but_gates():
    linear = nn.Linear(5, 4)
    layer, x = MixtureOfRanks(linear, temperature=0.2), torch.randn(3, 5)
    torch.testing.assert_close(layer(x), linear(x))
    layer.add_task(3)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.keys[0].abs().max() <= 5**-0.5
    assert layer.keys[0].unique().numel() == 15
    layer.add_task(2)
    assert [p.shape for p in layer.parameters() if p.requires_grad] == [(2, 5), (4, 2)]
    layer(x).sum().backward()
    assert layer.values[1].grad.abs().sum() > 0
    assert layer.values[0].grad is None
    assert linear.weight.grad is None


@pytest.mark.parametrize("bias", [True, False])
def test_merge_is_exact_for_constant_gates(bias):
    layer, x = trained_layer(bias, temperature=1e12, budget=None, scale=1.3), normal(7, 5)
    merged = layer.merge(layer.gates(x).mean(0))
    assert (merged.bias is not None) == bias
    assert (merged(x) - layer(x)).abs().max() < 1e-10
    assert (merged(x) - layer.linear(x)).abs().max() > 0.1


def test_dropping_experts_without_value_changes_nothing():
    layer, x = trained_layer(temperature=1e12, budget=None), normal(7, 5)
    before, trained = layer(x), layer.values[1]
    dropped = torch.tensor([True, True, True, False, False])
    layer.drop(dropped)
    assert layer.ranks == 2
    assert torch.equal(layer.pool()[1], trained)
    assert layer.keys[0].requires_grad
    assert layer.values[0].requires_grad
    torch.testing.assert_close((layer(x) - layer.linear(x)) * 2 / 5, x @ layer.keys[0].mT @ trained.mT / 5)
    assert not torch.allclose(layer(x), before)
    layer.drop(torch.tensor([True, False]))
    assert layer.ranks == 1


def test_state_survives_a_copy():
    layer, x = trained_layer(), normal(7, 5)
    copy = MixtureOfRanks(nn.Linear(5, 4, dtype=torch.float64), temperature=0.2, budget=2)
    for rank in (3, 2):
        copy.add_task(rank)
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy(x), layer(x))


def test_bad_input_is_refused():
    x, keys, values = normal(9, 5), normal(6, 5), normal(4, 6)
    for settings, message in [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1.0, "budget": 0}, "budget"),
        ({"temperature": 1.0, "budget": math.nan}, "budget"),
        ({"temperature": 1.0, "threshold": math.nan}, "threshold"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixture_of_ranks(x, keys, values, **settings)
        with pytest.raises(ValueError, match=message):
            MixtureOfRanks(nn.Linear(5, 4), **settings)
    for bad in (torch.zeros(3, 0), torch.zeros(3, dtype=torch.long), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="activations"):
            relevance(bad)
    for bad in ((x[:, :4], keys, values), (x, keys[:5], values), (x[0], keys, values)):
        with pytest.raises(ValueError, match="do not fit"):
            mixture_of_ranks(*bad, temperature=1.0)
    with pytest.raises(ValueError, match="gather needs"):
        mixture_of_ranks(x, keys, values, temperature=1.0, gather=True)
    with pytest.raises(ValueError, match="gather needs"):
        mixture_of_ranks(x, keys[None], values[None], temperature=1.0, budget=1, gather=True)
    layer = trained_layer()
    with pytest.raises(ValueError, match="rank must"):
        layer.add_task(0)
    for bad in (torch.ones(4, dtype=torch.bool), torch.ones(5)):
        with pytest.raises(ValueError, match="one bool"):
            layer.drop(bad)
    with pytest.raises(ValueError, match="one gate"):
        layer.merge(torch.ones(4))
    with pytest.raises(ValueError, match="empty"):
        MixtureOfRanks(nn.Linear(5, 4), temperature=1.0).gates(x)
