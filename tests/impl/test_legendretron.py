"""Links against written-out networks and finite differences, their inverses, copies, and what is canonical about which."""

import math

import pytest
import torch
import torch.nn.functional as F

from paperclaims.impl.losses.legendretron import (
    ConvexGradient,
    LegendreLink,
    MixtureLink,
    canonical_loss,
    inverse_link_jacobian,
    log_softmax_plus,
    logsumexp_plus,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def link_of(classes=4, seed=0, **options):
    link = LegendreLink(classes, generator=generator(seed), dtype=torch.float64, **options)
    return link.requires_grad_(False)


def mixture_of(classes=4, components=3, seed=0):
    link = MixtureLink(classes, components, generator=generator(seed), dtype=torch.float64)
    with torch.no_grad():
        for place, parameter in enumerate(link.parameters()):
            parameter.add_(normal(*parameter.shape, seed=seed + place))
    return link.requires_grad_(False)


def test_plus_functions():
    z = normal(5, 3)
    denominator = 1 + z.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(logsumexp_plus(z), denominator.log().squeeze(-1))
    torch.testing.assert_close(log_softmax_plus(z).exp(), torch.cat([z.exp(), torch.ones_like(z[:, :1])], -1) / denominator)
    extreme = torch.tensor([[1e4, -1e4], [-1e4, -1e4], [0.0, 0.0]])
    torch.testing.assert_close(log_softmax_plus(extreme)[0], torch.tensor([0, -2e4, -1e4]))
    torch.testing.assert_close(log_softmax_plus(extreme)[1], torch.tensor([-1e4, -1e4, 0]))
    torch.testing.assert_close(log_softmax_plus(extreme)[2], torch.full((3,), -math.log(3)))


def written_out(block, z):
    """The potential of one row, unit by unit, as the paper's input-convex network has it."""

    def positive(value):
        return math.log1p(math.exp(value))

    def linear(row, weight, bias=None):
        sums = [sum(x * w for x, w in zip(row, column, strict=True)) for column in zip(*weight.tolist(), strict=True)]
        return sums if bias is None else [s + b for s, b in zip(sums, bias.tolist()[0], strict=True)]

    z, hidden, half = z.tolist(), block.hidden, block.hidden // 2
    units = [positive(u) for u in linear(z, block.inputs[:, :hidden], block.bias[:, :hidden])]
    for layer in range(block.depth - 1):
        first = (layer + 1) * hidden
        weights = [[positive(w) for w in row] for row in block.mix[layer].tolist()]
        mixed = [sum(u * row[j] for u, row in zip(units, weights, strict=True)) / hidden for j in range(half)]
        skip = linear(z, block.inputs[:, first : first + half], block.bias[:, first : first + half])
        side = linear(z, block.inputs[:, first + half : first + hidden], block.bias[:, first + half : first + hidden])
        shift, scale = block.shift[layer].tolist()[0], [math.exp(v) for v in block.log_scale[layer].tolist()[0]]
        own = [positive((m + s + b) * c) for m, s, b, c in zip(mixed, skip, shift, scale, strict=True)]
        units = own + [positive(v) for v in side]
    last = sum(u * positive(w) for u, w in zip(units, block.last_mix[:, 0].tolist(), strict=True)) / hidden
    network = math.exp(block.last_log_scale.item()) * (last + linear(z, block.last_input)[0])
    return positive(block.w1.item()) * network + positive(block.w0.item()) * sum(v * v for v in z) / 2


@pytest.mark.parametrize(("hidden", "depth"), [(2, 4), (4, 2), (2, 1)])
def test_block_is_the_gradient_of_its_network(hidden, depth):
    block = ConvexGradient(3, hidden, depth, (), generator=generator(), dtype=torch.float64).requires_grad_(False)
    z = 2 * normal(6, 3)
    block.normalise(z)
    torch.testing.assert_close(block.potential(z), torch.tensor([written_out(block, row) for row in z], dtype=torch.float64))
    step = 1e-5 * torch.eye(3, dtype=torch.float64)
    slopes = torch.stack([(block.potential(z + h) - block.potential(z - h)) / 2e-5 for h in step], -1)
    torch.testing.assert_close(block(z), slopes, rtol=1e-7, atol=1e-7)


def test_sizes_of_random_starts():
    block = ConvexGradient(4, 60, 2, (), generator=generator())
    for weights, fan_in in ((block.inputs, 4), (block.bias, 4), (block.mix[0], 60), (block.last_mix, 60)):
        assert 0.8 * fan_in**-0.5 < weights.abs().max() <= fan_in**-0.5
    rows = MixtureLink(9, 20, generator=generator()).rows - 8 * torch.eye(8, 9)
    assert rows.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("depth", [1, 4])
def test_block_is_a_monotone_gradient(depth):
    block = ConvexGradient(4, 2, depth, (), generator=generator(), dtype=torch.float64).requires_grad_(False)
    z = 3 * normal(50, 4)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: torch.func.grad(lambda r: block.potential(r[None]).sum())(row)))(z)
    torch.testing.assert_close(jacobian, jacobian.mT)
    assert torch.linalg.eigvalsh(jacobian).min() > F.softplus(block.w0).item() - 1e-10


def test_normalise():
    block = ConvexGradient(3, 4, 3, (2,), generator=generator(), dtype=torch.float64).requires_grad_(False)
    z = 5 + 3 * normal(2, 40, 3)
    block.normalise(z)
    *_, second, third = block._layers(z)
    for layer in (second, third):
        torch.testing.assert_close(layer[..., :2].mean(1), torch.zeros(2, 2).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer[..., :2].std(1, correction=0), torch.ones(2, 2).double(), rtol=1e-4, atol=0)
    curved = (block.potential(z) - F.softplus(block.w0).squeeze(-1) * z.square().sum(-1) / 2) / F.softplus(block.w1).squeeze(-1)
    torch.testing.assert_close(curved.std(1, correction=0), torch.ones(2).double(), rtol=1e-4, atol=0)
    before = block.potential(z)
    block.normalise(z)
    torch.testing.assert_close(block.potential(z), before)
    link, scores = link_of(), normal(30, 3)
    link.normalise(scores)
    second = link.blocks[0](scores)
    shifts = [shift.clone() for shift in link.blocks[1].shift]
    link.blocks[1].normalise(second)
    torch.testing.assert_close(shifts, list(link.blocks[1].shift))


def test_link_is_its_blocks_then_softmax_plus():
    link, scores = link_of(), normal(2, 5, 3)
    torch.testing.assert_close(link(scores), log_softmax_plus(link.blocks[1](link.blocks[0](scores))))
    torch.testing.assert_close(link_of(blocks=0)(scores), log_softmax_plus(scores))
    torch.testing.assert_close(link(scores).exp().sum(-1), torch.ones(2, 5).double())
    assert len(link.blocks) == 2
    assert link.blocks[0].inputs.shape == (3, 8)
    assert len(link.blocks[0].mix) == 3
    assert LegendreLink(3)(normal(4, 2).float()).dtype == torch.float32
    assert link(scores[0, :0]).shape == (0, 4)
    with torch.no_grad():
        assert not link(scores).requires_grad


def test_copies_are_independent():
    stack = link_of(copies=(2,))
    scores = normal(2, 6, 3)
    stack.normalise(scores)
    for place in range(2):
        one = link_of(seed=9)
        for own, shared in zip(one.parameters(), stack.parameters(), strict=True):
            own.copy_(shared[place])
        torch.testing.assert_close(one(scores[place]), stack(scores)[place])
    assert (stack.blocks[0].inputs[0] != stack.blocks[0].inputs[1]).all()


def test_gradients_of_the_link():
    link, scores = link_of(3), normal(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(link, scores)
    link.requires_grad_()
    link(scores)[:, 0].mean().backward()
    for name, parameter in link.named_parameters():
        values = []
        for move in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[0].add_(move)
                values.append(link(scores)[:, 0].mean().item())
                parameter.view(-1)[0].sub_(move)
        assert parameter.grad.flatten()[0].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9), name


def test_composition_of_gradients_is_not_a_gradient():
    scores = normal(40, 3)
    for blocks, symmetric in ((0, True), (1, False), (2, False)):
        jacobian = inverse_link_jacobian(link_of(blocks=blocks), scores)
        off = (jacobian - jacobian.mT).abs().amax() / jacobian.abs().amax()
        assert (off < 1e-12) == symmetric
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    link = link_of()
    columns = torch.stack([(link(scores + h).exp() - link(scores - h).exp())[:, :-1] / 2e-6 for h in step], -1)
    torch.testing.assert_close(inverse_link_jacobian(link, scores), columns, rtol=1e-6, atol=1e-8)


def test_mixture_is_canonical():
    link, scores = mixture_of(), 2 * normal(30, 3)
    p = link(scores).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(30).double())
    gradient = torch.func.vmap(torch.func.grad(link.potential))(scores)
    torch.testing.assert_close(gradient, p[:, :-1])
    jacobian = inverse_link_jacobian(link, scores)
    torch.testing.assert_close(jacobian, jacobian.mT, rtol=1e-10, atol=1e-14)
    assert torch.linalg.eigvalsh(jacobian).min() > 0
    w, t, rows = link.log_w.softmax(0), link.log_t.exp(), link.rows.softmax(-1)[..., :-1]
    expected = sum(w[r] / t[r] * (1 + (t[r] * scores @ rows[r].T + link.bias[r]).exp().sum(-1)).log() for r in range(3))
    torch.testing.assert_close(link.potential(scores), expected)
    assert link(scores[:0]).shape == (0, 4)
    assert link(1e4 * scores.float().double()).isfinite().all()
    start = MixtureLink(4, generator=generator(), dtype=torch.float64)
    assert start.log_w.shape == (2,)
    assert (start(scores).exp() - log_softmax_plus(scores).exp()).abs().max() < 0.02


def test_canonical_loss_is_proper():
    link, scores = mixture_of(), normal(5, 3).requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 3])
    losses = canonical_loss(link, scores, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    torch.testing.assert_close(gradient, link(scores).exp()[:, :-1] - F.one_hot(targets, 4)[:, :-1])
    torch.testing.assert_close(canonical_loss(link, scores, targets), losses.mean())
    torch.testing.assert_close(canonical_loss(link, scores, targets, reduction="sum"), losses.sum())
    assert torch.autograd.gradcheck(lambda s: canonical_loss(link, s, targets), scores)
    assert canonical_loss(link, scores[:0], targets[:0], reduction="sum") == 0
    assert canonical_loss(link, scores[:0], targets[:0]).isnan()
    assert canonical_loss(link, scores[0], targets[0]).shape == ()
    start = normal(1, 3)
    p = link(start).exp()
    near = (start + 0.3 * normal(200, 3, seed=1)).unsqueeze(1).expand(-1, 4, -1)
    every = canonical_loss(link, near, torch.arange(4).expand(200, -1), reduction="none")
    at_p = canonical_loss(link, start.expand(4, -1), torch.arange(4), reduction="none")
    assert ((p * every).sum(-1) > (p * at_p).sum(-1)).all()


def test_bad_input_is_refused():
    for options in ({"classes": 1}, {"classes": 3, "blocks": -1}, {"classes": 3, "hidden": 3}, {"classes": 3, "hidden": 0}):
        with pytest.raises(ValueError, match="a link needs"):
            LegendreLink(**options)
    with pytest.raises(ValueError, match="a link needs"):
        LegendreLink(3, depth=0)
    for sizes in ((1, 2), (3, 0)):
        with pytest.raises(ValueError, match="a mixture needs"):
            MixtureLink(*sizes)
    link, mixture, scores = link_of(), mixture_of(), normal(5, 3)
    for bad in (scores[:, :2], scores.long(), torch.tensor(1.0)):
        for call in (link, link.normalise, mixture, mixture.potential):
            with pytest.raises(ValueError, match="scores are floating point"):
                call(bad)
    stack = link_of(copies=(2,))
    for bad in (scores, scores[0], normal(3, 5, 3)):
        with pytest.raises(ValueError, match="copies are of shape"):
            stack(bad)
    targets = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="a link with a potential, MixtureLink, got LegendreLink"):
        canonical_loss(link, scores, targets)
    for bad in (targets[:4], targets.int(), targets.double()):
        with pytest.raises(ValueError, match="targets are int64"):
            canonical_loss(mixture, scores, bad)
    for value in (-1, 4):
        with pytest.raises(ValueError, match=r"targets are in \[0, 4\)"):
            canonical_loss(mixture, scores, torch.full_like(targets, value))
    with pytest.raises(ValueError, match="scores are floating point"):
        canonical_loss(mixture, scores[:, :2], targets)
    with pytest.raises(ValueError, match="reduction is"):
        canonical_loss(mixture, scores, targets, reduction="max")
