"""The operator against float64 over the full matrix of logits, in every option, both bodies."""

import itertools
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.measurement import count_flops, fake_mode, peak_bytes_fake
from paperclaims.kernels.losses import cut_cross_entropy_torch as torch_body
from paperclaims.kernels.losses.cut_cross_entropy import Options, cost, default_tile, linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BODIES = ["torch", *(["triton"] if find_spec("triton") else [])]


def make(n=37, v=101, d=19, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    e, c, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (v, d), (v,)))
    targets = torch.randint(v, (n,), generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (e, c, bias)], targets.to(device)


def make_peaked(n=64, v=80, d=24, dtype=torch.float32, device="cpu", shuffle=False):
    """Embeddings, classifier and targets in which some words are likely for every token and some hardly for any."""
    generator = torch.Generator().manual_seed(1)
    e, c = torch.randn(n, d, generator=generator) / d**0.5, torch.randn(v, d, generator=generator)
    e[:, 0], c[:, 0] = 1, torch.linspace(4, -8, v)
    order = torch.randperm(v, generator=generator) if shuffle else torch.arange(v)
    targets = order.argsort()[torch.randint(v // 3, (n,), generator=generator)]
    return e.to(device, dtype).requires_grad_(), c[order].to(device, dtype).requires_grad_(), targets.to(device)


def reference(leaves, targets, upstream=None, *, softcap=None, z_loss=0.0, poly=(), reduction="mean", **settings):
    """Loss and gradients from all logits at once, in float64."""
    e, c, bias = (x.detach().double().requires_grad_() for x in leaves)
    logits = e @ c.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets.long(), reduction="none", **settings) + z_loss * logits.logsumexp(1).square()
    log_p, smoothing = logits.log_softmax(1), settings.get("label_smoothing", 0.0)
    share = torch.full_like(log_p, smoothing / logits.shape[1])
    share.scatter_add_(1, targets.clamp(min=0).long()[:, None], torch.full_like(loss, 1 - smoothing)[:, None])
    rest = 1 - (share * log_p.exp()).sum(1)
    loss = loss + sum((eps * rest**j for j, eps in enumerate(poly, 1)), torch.zeros_like(rest))
    valid = targets != settings.get("ignore_index", -100)
    loss = loss.where(valid, 0)
    loss = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / valid.sum()}[reduction]
    grads = torch.autograd.grad(loss, (e, c, bias), torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grads


def ours(leaves, targets, upstream=None, **settings):
    e, c, bias = leaves
    loss = linear_cross_entropy(e, c, targets, bias=bias, **settings)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream)


def assert_near(actual, expected, dtype, tolerance=None):
    """Within a tolerance, by default the dtype's, of the largest entry."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    size = expected.nan_to_num().abs().amax() if expected.numel() else 0
    assert ((actual - expected).nan_to_num().abs() <= (tolerance or TOLERANCE[dtype]) * (size + 1e-30)).all()


def assert_same(result, expected, dtype):
    (loss, grads), (true_loss, true_grads) = result, expected
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(loss, true_loss, torch.promote_types(dtype, torch.float32))
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert_near(grad, true, dtype)


SETTINGS = {
    "reduction": ["mean", "sum", "none"],
    "softcap": [None, 2.0],
    "label_smoothing": [0.0, 0.1],
    "z_loss": [0.0, 0.02],
    "poly": [(), (1.5, -0.7, 0.4)],
    "ignored": [False, True],
    "sort_vocabulary": [False, True],
    "accumulate": ["fp32", "compensated", "input"],
    "gradients": ["forward", "backward"],
    "filter_eps": [None, 1e-30],
}


def every_combination(**fixed):
    choices = [fixed.get(name, values) for name, values in SETTINGS.items()]
    for values in itertools.product(*choices):
        one = dict(zip(SETTINGS, values, strict=True))
        if one["gradients"] == "backward" or not (one["sort_vocabulary"] or one["reduction"] == "none"):
            yield one


def pairwise(**fixed):
    """Combinations, chosen greedily, that hold every pair of two settings' values at least once."""
    left = list(every_combination(**fixed))
    seen = set()
    for one in left:
        pairs = set(itertools.combinations(one.items(), 2))
        if pairs - seen:
            seen |= pairs
            yield one


def run_both(leaves, targets, one, **settings):
    settings = {**one, **settings}
    targets = (
        targets.masked_fill(torch.arange(len(targets), device=targets.device) % 5 == 2, -100)
        if settings.pop("ignored")
        else targets
    )
    shared = {name: settings[name] for name in ("reduction", "softcap", "label_smoothing", "z_loss", "poly")}
    upstream = (
        torch.linspace(-1, 2, len(targets), dtype=torch.float64) if one["reduction"] == "none" else torch.tensor(-1.5).double()
    )
    upstream = upstream.to(targets.device)
    return ours(leaves, targets, upstream, **settings), reference(leaves, targets, upstream, **shared)


def test_combinations_of_settings_in_float64():
    """All of cross-entropy's own; with the terms that are added, every pair."""
    leaves, targets = make()
    for one in (*every_combination(z_loss=[0.0], poly=[()]), *pairwise()):
        assert_same(*run_both(leaves, targets, one, backend="torch", tile=(16, 32)), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pairs_of_settings_in_lower_precision(dtype):
    leaves, targets = make(dtype=dtype)
    for one in pairwise():
        if one["accumulate"] != "input":
            assert_same(*run_both(leaves, targets, one, backend="torch", tile=(8, 16)), dtype)


@pytest.mark.skipif("triton" not in BODIES, reason="needs Triton: pip install triton")
@pytest.mark.parametrize(("dtype", "cap"), [(torch.float32, 2.0), (torch.float16, None), (torch.bfloat16, 2.0)], ids=str)
def test_triton_pairs_of_settings(dtype, cap):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 products")
    leaves, targets = make(n=19, v=45, d=19, dtype=dtype, device=DEVICE)
    for one in pairwise(gradients=["backward"], softcap=[cap], accumulate=["fp32", "compensated"]):
        assert_same(*run_both(leaves, targets, one, backend="triton", tile=(16, 32)), dtype)


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize(
    ("n", "v", "d"), [(1, 1, 1), (1, 101, 1), (2, 3, 5), (17, 31, 37), (16, 32, 64), (33, 65, 16), (0, 5, 3)], ids=str
)
def test_awkward_shapes(backend, n, v, d):
    dtype = torch.float32
    leaves, targets = make(n, v, d, dtype, DEVICE)
    for reduction in ("none", "mean"):
        expected = reference(leaves, targets, reduction=reduction)
        assert_same(ours(leaves, targets, reduction=reduction, backend=backend, tile=(16, 16)), expected, dtype)


@pytest.mark.parametrize("backend", BODIES)
def test_leading_dimensions_strides_and_int32_targets(backend):
    (e, c, bias), targets = make(30, 21, 7, torch.float32, DEVICE)
    expected = reference((e, c, bias), targets, reduction="sum")
    batched = e.detach().view(5, 6, 7).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    strided = torch.stack([c.detach().T, c.detach().T], -1)[..., 0].T.requires_grad_()
    assert not batched.is_contiguous()
    assert not strided.is_contiguous()
    loss = linear_cross_entropy(
        batched, strided, targets.view(5, 6).int(), bias=bias, reduction="none", backend=backend, tile=(16, 16)
    )
    assert loss.shape == (5, 6)
    grads = torch.autograd.grad(loss.sum(), (batched, strided, bias))
    assert_same((loss.sum().detach(), (grads[0].reshape(30, 7), *grads[1:])), expected, torch.float32)


@pytest.mark.parametrize("backend", BODIES)
def test_targets_and_bias_that_are_columns(backend):
    (e, c, bias), targets = make(30, 21, 7, torch.float32, DEVICE)
    column = torch.stack([bias.detach(), bias.detach() + 1], 1)[:, 0].requires_grad_()
    loss = ours((e, c, column), torch.stack([targets, 0 * targets], 1)[:, 0], backend=backend, tile=(16, 16))
    assert_same(loss, reference((e, c, bias), targets), torch.float32)


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_all_ignored(backend, gradients):
    if (backend, gradients) == ("triton", "forward"):
        pytest.skip("the Triton body computes gradients in the backward pass")
    leaves, targets = make(5, 7, 3, torch.float32, DEVICE)
    targets = torch.full_like(targets, 3)
    settings = {"ignore_index": 3, "backend": backend, "gradients": gradients, "tile": (16, 16)}
    loss, grads = ours(leaves, targets, **settings)
    assert loss.isnan()  # the mean of no tokens, as in F.cross_entropy
    loss, more = ours(leaves, targets, reduction="sum", **settings)
    assert loss == 0
    assert not any(grad.any() for grad in (*grads, *more))


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("factor", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("poly", [(), (0.5, 2.0)], ids=["plain", "poly"])
def test_extreme_logits_and_ties(backend, factor, poly):
    n, v, d = 17, 33, 4
    e, c = torch.ones(n, d, device=DEVICE), torch.zeros(v, d, device=DEVICE)
    c[::7] = factor / d  # several words share the largest (or smallest) logit
    leaves = [x.requires_grad_() for x in (e, c, torch.zeros(v, device=DEVICE))]
    targets = torch.arange(n, device=DEVICE) % v
    for gradients in ("backward", *(["forward"] if backend == "torch" else [])):
        loss, grads = ours(leaves, targets, poly=poly, backend=backend, gradients=gradients, tile=(16, 16))
        true_loss, true_grads = reference(leaves, targets, poly=poly)
        assert_near(loss, true_loss, torch.float32)
        for grad, true in zip(grads, true_grads, strict=True):  # a log-sum-exp near 1e4 is only known to float32's spacing there
            assert_near(grad, true, torch.float32, tolerance=4e-6 + abs(factor) * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", BODIES)
def test_words_that_a_bias_forbids(backend):
    (e, c, bias), targets = make(9, 40, 5, torch.float32, DEVICE)
    with torch.no_grad():
        bias[:20] = -torch.inf
    targets = targets % 20 + 20
    for terms in ({}, {"z_loss": 0.1, "poly": (0.5, 2.0)}):
        result = ours((e, c, bias), targets, backend=backend, tile=(16, 16), **terms)
        assert_same(result, reference((e, c, bias), targets, **terms), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", [1, 2])
def test_shift(reduction, shift):
    (e, c, bias), targets = make(24, 21, 7)
    e, targets = e.detach().view(3, 8, 7).requires_grad_(), targets.view(3, 8).clone()
    targets[1, 4] = -100
    loss = linear_cross_entropy(e, c, targets, bias=bias, shift=shift, reduction=reduction)
    logits = (e @ c.T + bias)[:, :-shift]
    expected = F.cross_entropy(logits.transpose(1, 2), targets[:, shift:], reduction=reduction)
    torch.testing.assert_close(loss, expected)
    for ours_, true in zip(*(torch.autograd.grad(x.sum(), (e, c, bias)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours_, true)


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("sort", [False, True])
def test_filter_skips_exactly_the_small_blocks(backend, sort):
    """Against G with its small blocks set to zero, each gradient filtered or not."""
    e, c, targets = make_peaked(device=DEVICE, shuffle=sort)
    eps, tile = 2.0**-6, (16, 16)
    with torch.no_grad():
        order = torch_body.vocabulary_order(e, c, None) if sort else torch.arange(80, device=DEVICE)
        g = (e @ c.T).softmax(1) - F.one_hot(targets, 80)
        blocks = g[:, order].unflatten(0, (4, 16)).unflatten(2, (5, 16)).abs().amax((1, 3)) >= eps
        kept = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
        small = torch.empty_like(g)
        small[:, order] = g[:, order] * kept
    assert 0 < blocks.sum() < blocks.numel()
    for by_e, by_c in itertools.product((False, True), repeat=2):
        for gradients in ("backward", *(["forward"] if backend == "torch" and not sort else [])):
            loss = linear_cross_entropy(
                e, c, targets, reduction="sum", filter_eps=eps, filter_e=by_e, filter_c=by_c, tile=tile, backend=backend,
                sort_vocabulary=sort, gradients=gradients,
            )  # fmt: skip
            de, dc = torch.autograd.grad(loss, (e, c))
            torch.testing.assert_close(de, (small if by_e else g) @ c, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dc, (small if by_c else g).T @ e, rtol=1e-4, atol=1e-5)


def test_one_coefficient_in_any_form():
    (e, c, _), targets = make()
    expected = linear_cross_entropy(e, c, targets, poly=[0.5])
    for poly in (0.5, (0.5,), torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.array([0.5])):
        assert torch.equal(linear_cross_entropy(e, c, targets, poly=poly), expected)


def test_automatic_filter_follows_the_dtype():
    e, c, targets = make_peaked()
    for dtype, eps in ((torch.bfloat16, 2.0**-12), (torch.float32, 2.0**-28)):
        x, w = e.detach().to(dtype).requires_grad_(), c.detach().to(dtype).requires_grad_()
        grads = [
            torch.autograd.grad(linear_cross_entropy(x, w, targets, filter_eps=f, tile=(16, 16), gradients="backward"), (x, w))
            for f in ("auto", eps, None)
        ]
        assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))
        assert (dtype == torch.bfloat16) == (not torch.equal(grads[0][1], grads[2][1]))


def test_sorting_orders_by_average_logit():
    (e, c, bias), _ = make()
    average = (e @ c.T + bias).mean(0)
    assert (average[torch_body.vocabulary_order(e, c, bias)].diff() <= 0).all()
    assert torch_body.inverse(torch.tensor([2, 0, 1])).tolist() == [1, 2, 0]


@pytest.mark.parametrize("backend", BODIES)
def test_compensation_recovers_what_16_bits_lose(backend):
    """A running sum over many tiles in the input's dtype loses digits that Kahan summation keeps."""
    leaves, targets = make(16, 512, 16, torch.float16, DEVICE)
    true = reference(leaves, targets, reduction="sum")[1][0]
    error = {}
    for accumulate in ("fp32", "compensated", "input"):
        settings = {"accumulate": accumulate, "backend": backend, "tile": (16, 16), "gradients": "backward"}
        if backend == "triton":
            with pytest.MonkeyPatch.context() as patch:
                from paperclaims.kernels.losses import cut_cross_entropy_triton

                patch.setattr(cut_cross_entropy_triton, "chunk_words", lambda *_: 32)
                grad = ours(leaves, targets, reduction="sum", **settings)[1][0]
        else:
            grad = ours(leaves, targets, reduction="sum", **settings)[1][0]
        error[accumulate] = (grad - true).square().mean().sqrt().item()
    assert error["compensated"] < 1.5 * error["fp32"]
    assert error["input"] > 2 * error["compensated"]


@pytest.mark.skipif("triton" not in BODIES, reason="needs Triton: pip install triton")
@pytest.mark.parametrize("sort", [False, True])
def test_triton_over_several_chunks(sort, monkeypatch):
    from paperclaims.kernels.losses import cut_cross_entropy_triton

    monkeypatch.setattr(cut_cross_entropy_triton, "chunk_words", lambda *_: 32)
    leaves, targets = make(19, 75, 19, torch.float32, DEVICE)
    for filter_eps in (None, 1e-30):
        result = ours(leaves, targets, backend="triton", tile=(16, 16), sort_vocabulary=sort, filter_eps=filter_eps)
        assert_same(result, reference(leaves, targets), torch.float32)


@pytest.mark.parametrize("gradients", ["forward", "backward"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(gradients, softcap):
    leaves, targets = make(5, 7, 3)
    targets[1] = -100
    for reduction in ("mean", "sum", *(["none"] if gradients == "backward" else [])):
        assert torch.autograd.gradcheck(
            lambda e, c, b, reduction=reduction: linear_cross_entropy(
                e,
                c,
                targets,
                bias=b,
                softcap=softcap,
                label_smoothing=0.1,
                z_loss=0.1,
                poly=[0.8, -0.5],
                reduction=reduction,
                gradients=gradients,
                tile=(2, 3),
            ),
            leaves,
            nondet_tol=1e-12,  # a second backward through gradients formed in the forward pass computes them from tiles
        )


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("poly", [(), (0.5, 2.0)], ids=["plain", "poly"])
def test_opcheck(backend, reduction, form, poly):
    if form and (backend == "triton" or reduction == "none"):
        pytest.skip("gradients are formed in the forward pass by the PyTorch body for a scalar")
    (e, c, bias), targets = make(9, 20, 5, torch.float32, DEVICE)
    options = Options(softcap=3.0, z_loss=0.1, poly=poly, reduction=reduction, tile_tokens=16, tile_words=16)
    for b in (bias, None):
        arguments = (e, c, targets, b, form, form, form and b is not None, backend, *options)
        torch.library.opcheck(torch.ops.paperclaims.cut_cross_entropy, arguments)
    grad = torch.ones((9,) if reduction == "none" else (), device=DEVICE)
    leaves = [x.detach() for x in (e, c, bias)]
    arguments = (grad, *leaves[:2], targets, leaves[2], *torch.ones(2, 9, device=DEVICE), True, True, True, backend, *options)
    torch.library.opcheck(torch.ops.paperclaims.cut_cross_entropy_backward, arguments)


@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_compiled_as_one_graph(gradients):
    leaves, targets = make(dtype=torch.float32)

    def step(e, c, bias, targets):
        loss = linear_cross_entropy(2 * e, c, targets, bias=bias, gradients=gradients, tile=(8, 16))
        return 3 * loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function in (compiled, step):
        loss = function(*leaves, targets)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        expected = torch.autograd.grad(3 * F.cross_entropy(2 * leaves[0] @ leaves[1].T + leaves[2], targets), leaves)
        for one, two, true in zip(first, again, expected, strict=True):
            assert_near(one, true, torch.float32)
            assert_near(two, true, torch.float32)


@pytest.mark.parametrize("gradients", ["forward", "backward"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs(gradients, frozen):
    leaves, targets = make(dtype=torch.float32)
    expected = reference(leaves, targets)[1]
    leaves[frozen].requires_grad_(False)
    e, c, bias = leaves
    linear_cross_entropy(e, c, targets, bias=bias, gradients=gradients, tile=(8, 16)).backward()
    for place, (leaf, true) in enumerate(zip(leaves, expected, strict=True)):
        assert leaf.grad is None if place == frozen else (leaf.grad - true).abs().max() < 1e-5


@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_second_derivative_is_refused(gradients):
    (e, c, _), targets = make(5, 7, 3)
    loss = linear_cross_entropy(e, c, targets, gradients=gradients)
    (by_e,) = torch.autograd.grad(loss, e, create_graph=True)
    torch.testing.assert_close(by_e.detach(), reference((e, c, torch.zeros(7)), targets)[1][0])
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (loss + by_e.square().sum()).backward()


def test_no_gradient_is_formed_where_none_is_wanted():
    (e, c, _), targets = make(8, 16, 4)
    with torch.no_grad():
        loss = linear_cross_entropy(e, c, targets)
        assert count_flops(lambda: linear_cross_entropy(e, c, targets)) == 2 * 8 * 16 * 4
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(e @ c.T, targets).detach())


@pytest.mark.parametrize("needs", [(True, True, False), (True, False, False), (False, True, True)], ids=str)
def test_flop_formula_counts_what_the_body_does(needs):
    (e, c, bias), targets = make(24, 48, 8)
    options = Options(tile_tokens=8, tile_words=16)
    one, lse, pull = torch.ones((), dtype=torch.float64), torch.ones(24, dtype=torch.float64), torch.empty(0)
    with torch.no_grad():
        arguments = e, c, targets, bias
        body = count_flops(lambda: torch_body.forward_and_gradients(*arguments, one, needs, options))
        assert count_flops(lambda: torch.ops.paperclaims.cut_cross_entropy(*arguments, *needs, "torch", *options)) == body
        body = count_flops(lambda: torch_body.backward(*arguments, lse, None, None, one, needs, options))
        arguments = one, *arguments, lse, pull
        assert (
            count_flops(lambda: torch.ops.paperclaims.cut_cross_entropy_backward(*arguments, *needs, "torch", *options)) == body
        )


def test_cost_is_what_a_step_does_at_least():
    (e, c, _), targets = make(24, 48, 8)
    for gradients, recompute in (("forward", False), ("backward", True)):
        flops = count_flops(lambda gradients=gradients: linear_cross_entropy(e, c, targets, gradients=gradients).backward())
        assert cost(24, 48, 8, 8, recompute=recompute).flops == flops
    assert cost(24, 48, 8, 8, gradients=False).flops == 2 * 24 * 48 * 8
    assert cost(24, 48, 8, 4, gradients=False).bytes == (24 + 48) * 8 * 4 + 24 * 16
    assert cost(24, 48, 8, 4).bytes == 3 * (24 + 48) * 8 * 4 + 2 * 24 * 16


def test_default_tiles():
    tokens, _ = default_tile(2048, 32000, 512, 4, True, False, "torch")
    assert 16 <= tokens <= 512
    assert tokens * 32000 <= 0.375 * (2048 + 32000) * 512
    assert default_tile(8, 4096, 4, 4, True, False, "torch") == (256, 4096)  # 4 MiB
    assert default_tile(8, 4096, 4, 4, True, True, "torch") == (128, 256)
    assert default_tile(8, 10**6, 4, 4, True, False, "torch")[0] == 16
    assert default_tile(8192, 256000, 2304, 2, False, True, "triton") == (128, 128)


def test_autocast_casts_the_inputs():
    (e, c, _), targets = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(e, c, targets)
    loss.backward()
    assert e.grad.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(e.bfloat16(), c.bfloat16(), targets))
    e, c = e.detach().bfloat16(), c.detach().bfloat16().requires_grad_()
    grads = []
    for enabled in (False, True):  # the sums inside stay in float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(e, c, targets, gradients="forward", accumulate="compensated", tile=(8, 16))
        grads += torch.autograd.grad(loss, c)
    assert torch.equal(*grads)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cross_entropy(e.double(), c.double(), targets).dtype == torch.float64


BAD = {
    "shapes": ({"c": torch.zeros(5, 4)}, "e is"),
    "targets": ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets have the shape"),
    "target range": ({"targets": torch.tensor([0, 5])}, r"targets are in \[0, 5\)"),
    "target below": ({"targets": torch.tensor([0, -1])}, r"targets are in \[0, 5\)"),
    "target dtype": ({"targets": torch.zeros(2)}, "int64 or int32"),
    "dtypes": ({"c": torch.zeros(5, 3, dtype=torch.float64)}, "one dtype"),
    "integers": ({"e": torch.zeros(2, 3, dtype=torch.int64), "c": torch.zeros(5, 3, dtype=torch.int64)}, "one dtype"),
    "bias": ({"bias": torch.zeros(4)}, "bias has the shape"),
    "device": ({"c": torch.zeros(5, 3, device="meta")}, "one device"),
    "no words": ({"c": torch.zeros(0, 3)}, "at least one word"),
    "softcap": ({"softcap": 0.0}, "softcap"),
    "smoothing": ({"label_smoothing": 1.5}, "label_smoothing"),
    "z-loss": ({"z_loss": -1.0}, "z_loss"),
    "poly": ({"poly": float("nan")}, "poly"),
    "poly of none": ({"poly": None}, "poly"),
    "poly in words": ({"poly": ["a"]}, "poly"),
    "poly among some": ({"poly": [1.0, float("inf")]}, "poly"),
    "reduction": ({"reduction": "median"}, "reduction"),
    "shift": ({"shift": 2}, "shift"),
    "negative shift": ({"shift": -1}, "shift"),
    "accumulate": ({"accumulate": "bf16"}, "accumulate"),
    "gradients": ({"gradients": "never"}, "gradients"),
    "tile": ({"tile": (0, 4)}, "tile"),
    "filter": ({"filter_eps": -1.0}, "filter_eps"),
    "filter not a number": ({"filter_eps": float("nan")}, "filter_eps"),
    "filter word": ({"filter_eps": "on"}, "filter_eps"),
    "backend": ({"backend": "cuda"}, "backend"),
    "forward and none": ({"gradients": "forward", "reduction": "none"}, "gradients='forward'"),
    "forward and sorted": ({"gradients": "forward", "sort_vocabulary": True}, "gradients='forward'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused(bad):
    change, message = BAD[bad]
    arguments = {"e": torch.zeros(2, 3), "c": torch.zeros(5, 3), "targets": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.skipif("triton" not in BODIES, reason="needs Triton: pip install triton")
def test_triton_refuses_what_it_cannot_do(monkeypatch):
    (e, c, _), targets = make(device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(e, c, targets, backend="triton")
    e, c = e.float(), c.float()
    with pytest.raises(ValueError, match="powers of two"):
        linear_cross_entropy(e, c, targets, backend="triton", tile=(24, 32))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="bfloat16"):
            linear_cross_entropy(e.bfloat16(), c.bfloat16(), targets, backend="triton")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            linear_cross_entropy(e, c, targets, backend="triton")


def test_the_loss_holds_one_tile_of_logits():
    options = Options(tile_tokens=256, tile_words=1024)
    with fake_mode():
        e, c, targets = torch.empty(512, 8), torch.empty(4096, 8), torch.empty(512, dtype=torch.int64)
        peak = peak_bytes_fake(lambda: torch_body.forward(e, c, targets, None, options))
    assert 1 <= peak / (4 * 256 * 1024) < 1.1
