"""Sums of Gaussian kernels by tiles against float64 over the whole Gram matrix, both bodies."""

import math
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from paperclaims.fixtures.measurement import count_flops, fake_mode, peak_bytes_cpu, peak_bytes_fake
from paperclaims.kernels.losses import distances_torch
from paperclaims.kernels.losses.cs_ib import Options, default_tile, gaussian_log_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BODIES = ["torch", *(["triton"] if find_spec("triton") else [])]
TRITON = pytest.mark.skipif("triton" not in BODIES, reason="needs Triton: pip install triton")
MIB = 2**20


def make(n=37, m=45, d=5, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (m, d)))
    return [z.to(device, dtype).requires_grad_() for z in (x, w)]


def dense(x, w):
    return (-0.5 * (x[:, None] - w).square().sum(-1)).logsumexp(1)


def check(leaves, dtype, **settings):
    x, w = (z.detach().double().requires_grad_() for z in leaves)
    upstream = torch.linspace(-1, 2, len(x), dtype=torch.float64, device=x.device)
    expected = dense(x, w)
    true = torch.autograd.grad(expected, (x, w), upstream)
    result = gaussian_log_sums(*leaves, **settings)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert result.shape == expected.shape
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    for grad, exact in zip(torch.autograd.grad(result, leaves, upstream.to(result.dtype)), true, strict=True):
        assert grad.dtype == dtype
        size = exact.abs().max() if exact.numel() else 0
        assert ((grad - exact).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_torch(dtype):
    dtype = getattr(torch, dtype)
    check(make(dtype=dtype), dtype, backend="torch", tile=(16, 8))


@TRITON
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_triton(dtype):
    dtype = getattr(torch, dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 products")
    check(make(dtype=dtype, device=DEVICE), dtype, backend="triton", tile=(16, 32))


@TRITON
def test_triton_over_several_chunks(monkeypatch):
    from paperclaims.kernels.losses import distances_triton

    monkeypatch.setattr(distances_triton, "chunk_words", lambda *_: 16)
    check(make(dtype=torch.float32, device=DEVICE), torch.float32, backend="triton", tile=(16, 16))


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("shape", ["1 1 1", "1 33 1", "2 3 5", "17 31 37", "16 32 64", "33 65 16", "0 5 3"])
def test_awkward_shapes(backend, shape):
    check(make(*map(int, shape.split()), torch.float32, DEVICE), torch.float32, backend=backend, tile=(16, 16))


@pytest.mark.parametrize("backend", BODIES)
def test_no_rows_to_sum_over(backend):
    x, w = make(4, 0, 3, torch.float32, DEVICE)
    result = gaussian_log_sums(x, w, backend=backend, tile=(16, 16))
    assert (result == -math.inf).all()
    by_x, by_w = torch.autograd.grad(result.sum(), (x, w))
    assert by_x.shape == (4, 3)
    assert by_w.shape == (0, 3)
    assert not by_x.any()


@pytest.mark.parametrize("backend", BODIES)
def test_strides_and_one_set_of_points_on_both_sides(backend):
    (x, _) = make(33, 1, 6, torch.float32, DEVICE)
    strided = x.detach().T.contiguous().T.requires_grad_()
    sums = gaussian_log_sums(strided, strided, backend=backend, tile=(16, 16))
    torch.testing.assert_close(sums, dense(x, x), rtol=1e-5, atol=1e-5)
    grad, true = (torch.autograd.grad((s * s).sum(), z)[0] for s, z in ((sums, strided), (dense(x, x), x)))
    torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BODIES)
def test_extreme_points(backend):
    """Kernels that underflow, one point many times, and a tie of far points."""
    x = torch.tensor([[0.0], [1e4], [-1e4]], device=DEVICE, requires_grad=True)
    w = torch.tensor([[0.0], [0.0], [300.0], [-300.0]], device=DEVICE, requires_grad=True)
    sums = gaussian_log_sums(x, w, backend=backend, tile=(16, 16))
    far = -(9700.0**2) / 2
    torch.testing.assert_close(sums, torch.tensor([math.log(2), far, far], device=DEVICE))
    by_x, by_w = torch.autograd.grad(sums.sum(), (x, w))
    torch.testing.assert_close(by_x, torch.tensor([[0.0], [-9700.0], [9700.0]], device=DEVICE))
    torch.testing.assert_close(by_w, torch.tensor([[0.0], [0.0], [9700.0], [-9700.0]], device=DEVICE))


def test_gradcheck():
    assert torch.autograd.gradcheck(partial(gaussian_log_sums, tile=(2, 3)), make(5, 7, 3))


@pytest.mark.parametrize("backend", BODIES)
def test_opcheck(backend):
    x, w = make(9, 20, 5, torch.float32, DEVICE)
    torch.library.opcheck(torch.ops.paperclaims.gaussian_log_sums, (x, w, backend, 16, 16))
    x, w = x.detach(), w.detach()
    for needs in ((True, True), (True, False), (False, True)):
        arguments = torch.ones(9, device=DEVICE), x, w, gaussian_log_sums(x, w), *needs, backend, 16, 16
        torch.library.opcheck(torch.ops.paperclaims.gaussian_log_sums_backward, arguments)


def test_compiled_as_one_graph():
    leaves = make(dtype=torch.float32)

    def step(x, w):
        return 3 * gaussian_log_sums(2 * x, w, tile=(8, 16)).sum()

    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        grads = torch.autograd.grad(function(*leaves), leaves)
        expected = torch.autograd.grad(3 * dense(2 * leaves[0], leaves[1]).sum(), leaves)
        for grad, true in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs(backend, frozen):
    leaves = make(dtype=torch.float32, device=DEVICE)
    expected = torch.autograd.grad(dense(*leaves).sum(), leaves)
    leaves[frozen].requires_grad_(False)
    gaussian_log_sums(*leaves, backend=backend, tile=(16, 16)).sum().backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, expected[1 - frozen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", ["xw", "x", "w"])
def test_flop_formula_counts_what_the_body_does(needs):
    x, w = (z.detach() for z in make(24, 48, 8))
    options, needs = Options(tile_rows=8, tile_columns=16), ("x" in needs, "w" in needs)
    body = count_flops(lambda: distances_torch.log_sums(x, w, None, options))
    assert count_flops(lambda: torch.ops.paperclaims.gaussian_log_sums(x, w, "torch", 8, 16)) == body
    sums = gaussian_log_sums(x, w)
    body = count_flops(lambda: distances_torch.gradients(x, w, None, sums, sums, None, needs, options))
    arguments = sums, x, w, sums, *needs, "torch", 8, 16
    assert count_flops(lambda: torch.ops.paperclaims.gaussian_log_sums_backward(*arguments)) == body


def test_memory_does_not_hold_the_gram_matrix():
    """4,096 points in 32 dimensions, counted in the undecorated body: 64 MiB a Gram matrix."""
    options = Options(tile_rows=512, tile_columns=512)

    def step(x):
        sums = distances_torch.log_sums(x, x, None, options)
        return distances_torch.gradients(x, x, None, sums, torch.ones_like(sums), None, (True, True), options)

    with fake_mode():
        x, leaf = torch.empty(4096, 32), torch.empty(4096, 32, requires_grad=True)
        ours = peak_bytes_fake(lambda: step(x))
        full = peak_bytes_fake(lambda: by_product(leaf, leaf).sum().backward())
    assert default_tile(4, "torch") == options.tile
    assert ours < 2 * x.nbytes + 2 * MIB
    assert full > 3 * 64 * MIB


def by_product(x, w):
    squares = x.square().sum(1)[:, None] + w.square().sum(1) - 2 * x @ w.T
    return (-0.5 * squares.clamp(min=0)).logsumexp(1)


def test_both_sides_of_the_tile_bound_the_memory_on_a_cpu():
    leaves = make(1024, 1024, 1, torch.float32)

    def peak(*tile):
        return peak_bytes_cpu(lambda: gaussian_log_sums(*leaves, tile=tile).sum().backward())

    assert max(peak(16, 1024), peak(1024, 16)) < peak(1024, 1024) / 4


def test_memory_grows_with_the_points_on_a_cpu():
    def peak(n, function):
        x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        return peak_bytes_cpu(lambda: function(x, x).sum().backward())

    tiled = partial(gaussian_log_sums, tile=(64, 64))
    assert math.log2(peak(2048, tiled) / peak(512, tiled)) / 2 < 1.1
    assert math.log2(peak(2048, by_product) / peak(512, by_product)) / 2 > 1.9


BAD = {
    "columns": ({"w": torch.zeros(5, 4)}, "x is"),
    "axes": ({"x": torch.zeros(3)}, "x is"),
    "more axes": ({"w": torch.zeros(1, 5, 3)}, "x is"),
    "dtypes": ({"w": torch.zeros(5, 3, dtype=torch.float64)}, "one dtype"),
    "integers": ({"x": torch.zeros(2, 3, dtype=torch.int64), "w": torch.zeros(5, 3, dtype=torch.int64)}, "one dtype"),
    "device": ({"w": torch.zeros(5, 3, device="meta")}, "one device"),
    "tile": ({"tile": (0, 4)}, "tile"),
    "tile length": ({"tile": (4,)}, "tile"),
    "backend": ({"backend": "cuda"}, "backend"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused(bad):
    change, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        gaussian_log_sums(**{"x": torch.zeros(2, 3), "w": torch.zeros(5, 3)} | change)


@TRITON
def test_triton_refuses_what_it_cannot_do():
    x, w = make(device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        gaussian_log_sums(x, w, backend="triton")
    with pytest.raises(ValueError, match="powers of two"):
        gaussian_log_sums(x.float(), w.float(), backend="triton", tile=(16, 24))
