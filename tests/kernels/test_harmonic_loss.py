"""The operator against float64 over all distances, both bodies: values, gradients, points on centres, memory."""

import itertools
import math
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.measurement import count_flops, fake_mode, peak_bytes_cpu, peak_bytes_fake
from paperclaims.kernels.losses import distances_torch
from paperclaims.kernels.losses import harmonic_loss as operator
from paperclaims.kernels.losses.harmonic_loss import Options, default_tile, harmonic_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BODIES = ["torch", *(["triton"] if find_spec("triton") else [])]
TRITON = pytest.mark.skipif("triton" not in BODIES, reason="needs Triton: pip install triton")
MIB = 2**20


def make(n=23, v=45, d=7, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (v, d)))
    targets = torch.randint(v, (n,), generator=generator)
    return [z.to(device, dtype).requires_grad_() for z in (x, w)], targets.to(device)


def reference(leaves, targets, upstream=None, *, n, eps=0.0, **settings):
    """Loss and gradients from all distances, in float64."""
    x, w = (z.detach().double().requires_grad_() for z in leaves)
    squares = (x[:, None] - w).square().sum(-1) + eps * (x.square().sum(1)[:, None] + w.square().sum(1))
    loss = F.cross_entropy(-n / 2 * squares.log(), targets.long(), **settings)
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    return loss.detach(), torch.autograd.grad(loss, (x, w), upstream)


def ours(leaves, targets, upstream=None, **settings):
    loss = harmonic_cross_entropy(*leaves, targets, **settings)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream)


def assert_near(actual, expected, tolerance):
    """Within a share of the largest entry."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    size = expected.nan_to_num().abs().amax() if expected.numel() else 0
    assert ((actual - expected).nan_to_num().abs() <= tolerance * (size + 1e-30)).all()


def assert_same(result, expected, dtype):
    (loss, grads), (true_loss, true_grads) = result, expected
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(loss, true_loss, TOLERANCE[torch.promote_types(dtype, torch.float32)])
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert_near(grad, true, TOLERANCE[dtype])


def combinations():
    return itertools.product(("mean", "sum", "none"), (0.7, 1.0, 5.0), (0.0, 0.3), (False, True))


def check_combination(leaves, targets, one, dtype, **settings):
    reduction, n, eps, ignored = one
    if ignored:
        targets = targets.masked_fill(torch.arange(len(targets), device=targets.device) % 5 == 2, -100)
    upstream = torch.linspace(-1, 2, len(targets)) if reduction == "none" else torch.tensor(-1.5)
    upstream = upstream.to(targets.device)
    shared = {"n": n, "eps": eps, "reduction": reduction}
    assert_same(ours(leaves, targets, upstream, **shared, **settings), reference(leaves, targets, upstream, **shared), dtype)


@pytest.mark.parametrize("refine", [True, False])
def test_every_combination_in_float64(refine):
    leaves, targets = make()
    for one in combinations():
        check_combination(leaves, targets, one, torch.float64, backend="torch", tile=(8, 16), refine=refine)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lower_precision(dtype):
    dtype = getattr(torch, dtype)
    leaves, targets = make(dtype=dtype)
    for one in combinations():
        check_combination(leaves, targets, one, dtype, backend="torch", tile=(8, 16))


@TRITON
@pytest.mark.parametrize("size", [1.0, 64.0])
def test_triton_in_half_precision_at_any_scale(size):
    leaves, targets = make(n=19, v=37, dtype=torch.float16, device=DEVICE)
    leaves = [(size * x.detach()).requires_grad_() for x in leaves]
    settings = {"n": 5.0, "eps": 0.0, "reduction": "mean"}
    upstream = torch.ones((), device=DEVICE)
    result = ours(leaves, targets, upstream, backend="triton", tile=(16, 16), **settings)
    assert_same(result, reference(leaves, targets, upstream, **settings), torch.float16)


@TRITON
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_triton(dtype):
    dtype = getattr(torch, dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 products")
    leaves, targets = make(n=19, v=37, dtype=dtype, device=DEVICE)
    for place, one in enumerate(combinations()):
        if place % 5 == 0:
            check_combination(leaves, targets, one, dtype, backend="triton", tile=(16, 32), refine=place % 2 == 0)


@TRITON
def test_triton_over_several_chunks(monkeypatch):
    from paperclaims.kernels.losses import distances_triton

    monkeypatch.setattr(distances_triton, "chunk_words", lambda *_: 32)
    leaves, targets = make(19, 75, 9, torch.float32, DEVICE)
    result = ours(leaves, targets, n=3.0, eps=0.1, backend="triton", tile=(16, 16))
    assert_same(result, reference(leaves, targets, n=3.0, eps=0.1), torch.float32)


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("shape", ["1 1 1", "1 33 1", "2 3 5", "17 31 37", "16 32 64", "33 65 16", "0 5 3"])
def test_awkward_shapes(backend, shape):
    n, v, d = map(int, shape.split())
    leaves, targets = make(n, v, d, torch.float32, DEVICE)
    for reduction in ("none", "mean"):
        expected = reference(leaves, targets, n=2.0, reduction=reduction)
        result = ours(leaves, targets, n=2.0, reduction=reduction, backend=backend, tile=(16, 16))
        assert_same(result, expected, torch.float32)


@pytest.mark.parametrize("backend", BODIES)
def test_leading_dimensions_strides_and_int32_targets(backend):
    (x, w), targets = make(30, 21, 7, torch.float32, DEVICE)
    expected = reference((x, w), targets, n=7**0.5, reduction="sum")
    batched = x.detach().view(5, 6, 7).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    strided = torch.stack([w.detach().T, w.detach().T], -1)[..., 0].T.requires_grad_()
    loss = harmonic_cross_entropy(batched, strided, targets.view(5, 6).int(), reduction="none", backend=backend, tile=(16, 16))
    assert loss.shape == (5, 6)
    by_x, by_w = torch.autograd.grad(loss.sum(), (batched, strided))
    assert_same((loss.sum().detach(), (by_x.reshape(30, 7), by_w)), expected, torch.float32)


@pytest.mark.parametrize("backend", BODIES)
def test_all_ignored(backend):
    leaves, targets = make(5, 7, 3, torch.float32, DEVICE)
    targets = torch.full_like(targets, 3)
    settings = {"ignore_index": 3, "backend": backend, "tile": (16, 16)}
    loss, grads = ours(leaves, targets, **settings)
    assert loss.isnan()
    loss, more = ours(leaves, targets, reduction="sum", **settings)
    assert loss == 0
    assert not any(grad.any() for grad in (*grads, *more))


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("n", [1.0, 4.0])
def test_points_on_centres(backend, n):
    """On its own centre, on one that two classes share, on another's, and where all are in one place."""
    w = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 4.0], [-3.0, -4.0]], device=DEVICE, requires_grad=True)
    x = w.detach()[[0, 1, 3]].clone().requires_grad_()
    targets = torch.tensor([0, 1, 0], device=DEVICE)
    loss = harmonic_cross_entropy(x, w, targets, n, reduction="none", backend=backend, tile=(16, 16))
    tiny = math.log(torch.finfo(torch.float32).tiny) / 2
    expected = torch.tensor([0, math.log(2), n * (math.log(52**0.5) - tiny)], device=DEVICE)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-18)
    by_x, by_w = torch.autograd.grad(loss.sum(), (x, w))
    assert by_x[:2].abs().max() < 1e-6
    pull = n * torch.tensor([-6.0, -4.0], device=DEVICE) / 52  # towards the target, at distance sqrt(52)
    torch.testing.assert_close(by_x[2], pull, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_w, torch.stack([-pull, *torch.zeros(3, 2, device=DEVICE)]), rtol=1e-5, atol=1e-6)
    together = torch.zeros(4, 2, device=DEVICE, requires_grad=True)
    loss = harmonic_cross_entropy(together.detach()[:3], together, targets, n, backend=backend, tile=(16, 16))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)
    assert torch.autograd.grad(loss, together)[0].abs().max() == 0


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("far", [1.0, 1e4, 1e-4])
def test_near_its_centre_the_digits_remain(backend, far):
    """At 1e-4 of the centre's norm float32 products know nothing of the distance, and 1 - p is below its precision."""
    generator = torch.Generator().manual_seed(2)
    w = (far * torch.randn(20, 8, generator=generator)).to(DEVICE)
    targets = torch.arange(20, device=DEVICE)
    x = w * (1 + 1e-4)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    loss, grads = ours(leaves, targets, n=3.0, reduction="none", backend=backend, tile=(16, 16))
    true_loss, true_grads = reference(leaves, targets, n=3.0, reduction="none")
    assert true_loss.max() < 1e-9
    exact = -torch.expm1(-loss.double())  # a float64 log-softmax has lost digits of such a loss, its gradient has not
    assert (exact > 0).all()
    x, w = (z.detach().double() for z in leaves)
    ratios = ((x - w).square().sum(1, keepdim=True) / (x[:, None] - w).square().sum(-1)).pow(1.5)
    torch.testing.assert_close(loss.double(), torch.log1p(ratios.sum(1) - 1), rtol=1e-4, atol=0)
    for grad, true in zip(grads, true_grads, strict=True):
        assert_near(grad, true, 1e-4)


def test_near_another_centre_the_torch_body_stays_exact():
    (x, w), targets = make(20, 30, 6, torch.float32)
    with torch.no_grad():
        x.copy_(w[:20] * (1 + 1e-4))
    targets = torch.arange(20) + 5
    assert_same(ours((x, w), targets, n=2.0, tile=(8, 16)), reference((x, w), targets, n=2.0), torch.float32)
    rough = ours((x, w), targets, n=2.0, tile=(8, 16), refine=False)[1][0]
    assert (rough - reference((x, w), targets, n=2.0)[1][0]).abs().max() > 1e-3 * rough.abs().max()
    assert rough.isfinite().all()


@TRITON
def test_near_another_centre_the_triton_body_has_the_loss():
    (x, w), targets = make(20, 30, 6, torch.float32, DEVICE)
    with torch.no_grad():
        x.copy_(w[:20] * (1 + 1e-4))
    targets = torch.arange(20, device=DEVICE) + 5
    loss, grads = ours((x, w), targets, n=2.0, backend="triton", tile=(16, 16))
    assert_near(loss, reference((x, w), targets, n=2.0)[0], 2e-5)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", BODIES)
def test_scale_leaves_the_loss_alone(backend):
    (x, w), targets = make(20, 30, 6, torch.float32, DEVICE)
    plain = []
    for eps in (0.0, 0.1):
        settings = {"eps": eps, "backend": backend, "tile": (16, 16)}
        plain.append(harmonic_cross_entropy(x, w, targets, 2.0, **settings))
        for a in (2.0**-20, 2.0**20):
            scaled = harmonic_cross_entropy(a * x, a * w, targets, 2.0, **settings)
            torch.testing.assert_close(scaled, plain[-1], rtol=1e-6, atol=0)
    assert abs(plain[1] - plain[0]) > 1e-3


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_gradcheck(eps):
    leaves, targets = make(5, 7, 3)
    targets[1] = -100
    with torch.no_grad():
        leaves[0][0] = leaves[1][2] * 1.01  # a near pair
    for reduction in ("mean", "sum", "none"):
        call = partial(harmonic_cross_entropy, targets=targets, n=3.0, eps=eps, reduction=reduction, tile=(2, 3))
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend, reduction):
    leaves, targets = make(9, 20, 5, torch.float32, DEVICE)
    settings = backend, -100, reduction, 2.0, 0.1, True, 16, 16
    torch.library.opcheck(torch.ops.paperclaims.harmonic_loss, (*leaves, targets, *settings))
    grad = torch.ones((9,) if reduction == "none" else (), device=DEVICE)
    _, losses, lse = torch.ops.paperclaims.harmonic_loss(*leaves, targets, *settings)
    x, w, losses, lse = (z.detach() for z in (*leaves, losses, lse))
    for needs in ((True, True), (True, False), (False, True)):
        arguments = grad, x, w, targets, losses, lse, *needs, *settings
        torch.library.opcheck(torch.ops.paperclaims.harmonic_loss_backward, arguments)


def test_compiled_as_one_graph():
    leaves, targets = make(dtype=torch.float32)

    def step(x, w, targets):
        return 3 * harmonic_cross_entropy(2 * x, 2 * w, targets, 2.0, tile=(8, 16))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    true_loss, true = reference(leaves, targets, torch.tensor(3.0), n=2.0)
    for function in (compiled, step):
        loss = function(*leaves, targets)
        assert_near(loss.detach(), 3 * true_loss, 2e-5)
        for grad, expected in zip(torch.autograd.grad(loss, leaves), true, strict=True):
            assert_near(grad, expected, 2e-5)


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs(backend, frozen):
    leaves, targets = make(dtype=torch.float32, device=DEVICE)
    expected = reference(leaves, targets, n=2.0)[1]
    leaves[frozen].requires_grad_(False)
    harmonic_cross_entropy(*leaves, targets, 2.0, backend=backend, tile=(16, 16)).backward()
    for place, (leaf, true) in enumerate(zip(leaves, expected, strict=True)):
        assert leaf.grad is None if place == frozen else (leaf.grad - true).abs().max() < 1e-5


def test_second_derivative_is_refused():
    (x, w), targets = make(5, 7, 3)
    loss = harmonic_cross_entropy(x, w, targets)
    (by_x,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (loss + by_x.square().sum()).backward()


def test_autocast_casts_the_inputs():
    (x, w), targets = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = harmonic_cross_entropy(x, w, targets)
        assert harmonic_cross_entropy(x.double(), w.double(), targets).dtype == torch.float64
    loss.backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(loss, harmonic_cross_entropy(x.bfloat16(), w.bfloat16(), targets))


@pytest.mark.parametrize("needs", ["xw", "x", "w"])
def test_flop_formula_counts_what_the_body_does(needs):
    (x, w), targets = make(24, 48, 8)
    options, needs = Options(power=2.0, refine=False, tile_rows=8, tile_columns=16), ("x" in needs, "w" in needs)
    settings = "torch", -100, "sum", 2.0, 0.0, False, 8, 16
    with torch.no_grad():
        body = count_flops(lambda: operator.losses_and_sums(x, w, targets, options))
        assert count_flops(lambda: torch.ops.paperclaims.harmonic_loss(x, w, targets, *settings)) == body
        loss, lse = operator.losses_and_sums(x, w, targets, options)
        weights = torch.ones_like(loss)
        body = count_flops(lambda: operator.gradients(x, w, targets, loss, lse, weights, needs, options))
        arguments = weights.sum(), x, w, targets, loss, lse, *needs, *settings
        assert count_flops(lambda: torch.ops.paperclaims.harmonic_loss_backward(*arguments)) == body


def plain(x, w, targets, n):
    """What one writes without the operator: all squared distances by one product, then cross-entropy."""
    squares = x.square().sum(1)[:, None] + w.square().sum(1) - 2 * x @ w.T
    return F.cross_entropy(-n / 2 * squares.clamp(min=1e-12).log(), targets)


GPT2 = 8 * 1024, 50_257, 768  # the paper's language model: a batch of eight contexts, the vocabulary, the embedding


def step_bytes(body, tile, dtype, **options):
    """Bytes of loss and gradients at GPT-2's shapes beyond the inputs, by an undecorated body, and the gradients' own."""
    n, v, d = GPT2
    options = Options(power=d**0.5, tile_rows=tile[0], tile_columns=tile[1], **options)

    def step(x, w, targets):
        loss, lse = operator.losses_and_sums(x, w, targets, options, body)
        return operator.gradients(x, w, targets, loss, lse, torch.ones_like(loss), (True, True), options, body)

    with fake_mode():
        x, w, targets = torch.empty(n, d, dtype=dtype), torch.empty(v, d, dtype=dtype), torch.empty(n, dtype=torch.int64)
        return peak_bytes_fake(lambda: step(x, w, targets)), x.nbytes + w.nbytes


def test_memory_at_the_papers_language_model():
    n, v, d = GPT2
    peak, gradients = step_bytes(distances_torch, default_tile(4, "torch"), torch.float32, refine=False)
    assert peak < gradients + 64 * MIB
    whole, _ = step_bytes(distances_torch, (n, v), torch.float32, refine=False)
    assert whole > gradients + 1500 * MIB
    with fake_mode():
        x, w, targets = torch.empty(n, d, requires_grad=True), torch.empty(v, d, requires_grad=True), torch.empty(n).long()
        full = peak_bytes_fake(lambda: plain(x, w, targets, 28.0).backward())
    assert full > 6000 * MIB
    assert full > 20 * peak


@TRITON
def test_memory_of_the_triton_body():
    from paperclaims.kernels.losses import distances_triton

    class Body:
        log_sums = staticmethod(partial(distances_triton.log_sums, launch=lambda *_, **__: None))
        gradients = staticmethod(partial(distances_triton.gradients, launch=lambda *_, **__: None))

    peak, gradients = step_bytes(Body, default_tile(2, "triton"), torch.bfloat16)
    assert peak < gradients + 128 * MIB


def test_memory_on_a_cpu():
    """Also where pairs are near: 512 points on the centres of 8,192 classes."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8192, 32, generator=generator).requires_grad_()
    x = (1.001 * w.detach()[:512]).requires_grad_()
    targets = torch.arange(512).roll(1)

    def peak(loss):
        x.grad = w.grad = None
        return peak_bytes_cpu(lambda: loss(x, w, targets, 6.0).backward())

    ours_, full = peak(partial(harmonic_cross_entropy, tile=(256, 512))), peak(plain)
    assert ours_ < full / 8


BAD = {
    "shapes": ({"w": torch.zeros(5, 4)}, "x is"),
    "targets": ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets have the shape"),
    "target range": ({"targets": torch.tensor([0, 5])}, r"targets are in \[0, 5\)"),
    "target below": ({"targets": torch.tensor([0, -1])}, r"targets are in \[0, 5\)"),
    "target dtype": ({"targets": torch.zeros(2)}, "int64 or int32"),
    "dtypes": ({"w": torch.zeros(5, 3, dtype=torch.float64)}, "one dtype"),
    "integers": ({"x": torch.zeros(2, 3, dtype=torch.int64), "w": torch.zeros(5, 3, dtype=torch.int64)}, "one dtype"),
    "device": ({"w": torch.zeros(5, 3, device="meta")}, "one device"),
    "no classes": ({"w": torch.zeros(0, 3)}, "at least one class"),
    "exponent": ({"n": 0.0}, "n is None or"),
    "exponent not a number": ({"n": float("nan")}, "n is None or"),
    "eps": ({"eps": -1.0}, "eps is"),
    "eps infinite": ({"eps": float("inf")}, "eps is"),
    "reduction": ({"reduction": "median"}, "reduction"),
    "tile": ({"tile": (0, 4)}, "tile"),
    "tile length": ({"tile": (4,)}, "tile"),
    "backend": ({"backend": "cuda"}, "backend"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused(bad):
    change, message = BAD[bad]
    arguments = {"x": torch.zeros(2, 3), "w": torch.zeros(5, 3), "targets": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        harmonic_cross_entropy(**arguments)


@TRITON
def test_triton_refuses_what_it_cannot_do():
    (x, w), targets = make(device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        harmonic_cross_entropy(x, w, targets, backend="triton")
    with pytest.raises(ValueError, match="powers of two"):
        harmonic_cross_entropy(x.float(), w.float(), targets, backend="triton", tile=(24, 32))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="bfloat16"):
            harmonic_cross_entropy(x.bfloat16(), w.bfloat16(), targets, backend="triton")
