"""Time and memory of Cauchy-Schwarz estimators by tiles against their Gram matrices, as written and compiled, with gradients.

    python -m pytest tests/benchmarks/test_cs_ib.py --benchmark-enable -s

runs alone on a quiet machine: every variant in one process, interleaved, at three sizes, with one and two threads; it prints a
table and writes what it measured to reports/benchmarks.
"""

import shutil
from functools import partial

import pytest
import torch

from paperclaims.fixtures.benchmark import measure_and_keep, skip_unless_wanted
from paperclaims.impl.losses.cs_ib import cs_ib_loss

SIZES = {"small": (512, 8, 128), "middle": (2048, 8, 128), "large": (4096, 8, 128)}  # rows, inputs, representation
ABOUT = {
    "kernel": "objective of the information bottleneck on gaussian_log_sums, forward and backward",
    "baseline": "Gram matrices",
    "module": "kernels/losses/cs_ib.py",
}


def gram(a, b):
    return torch.exp(-(a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0) / 2)


def information(k, q):
    both, single = (k * q).sum().log(), k.sum().log() + q.sum().log()
    return both + single - 2 * (k.sum(1) @ q.sum(1)).log()


def gram_matrices(x, t, y, predictions):
    """The plain expression: every Gram matrix once, entrywise products, sums."""
    k, q = gram(x, x), gram(t, t)
    below = k.sum(1).square()
    pairs = (y, y), (predictions, predictions), (predictions, y)
    first, second, cross = (((k * gram(a, b)).sum(1) / below).sum().log() for a, b in pairs)
    scale = (information(k, k) * information(q, q)).sqrt()
    return first + second - 2 * cross + 0.1 * information(k, q) / scale


def ours(x, t, y, predictions):
    return cs_ib_loss(x, t, y, predictions, 0.1)


def compiled():
    torch._dynamo.reset()  # the number of threads is compiled in
    return {"Gram matrices, compiled": torch.compile(gram_matrices)} if shutil.which("g++") else {}


def problem(n, d, k):
    generator = torch.Generator().manual_seed(0)
    x, t, y, p = (torch.randn(n, columns, generator=generator) for columns in (d, k, 1, 1))
    return x, (t / k**0.5).requires_grad_(), y, p.requires_grad_()


def least(n, d, k):
    """Operations of the products of the five Gram matrices and of the gradients, twice each; bytes of inputs and gradients."""
    return {"least_flops": 2 * n * n * (d + k + 3 + 2 * (k + 2)), "least_bytes": 4 * n * (d + 2 * k + 3)}


def forget(x, t, y, predictions):
    t.grad = predictions.grad = None


def step(loss, *inputs):
    forget(*inputs)
    loss(*inputs).backward()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_time_and_memory(size, threads, request):
    """At the large size an eighth of the plain expression's memory."""
    skip_unless_wanted(request, threads)
    shape = SIZES[size]
    inputs = problem(*shape)
    losses = {"Gram matrices": gram_matrices, "ours": ours, **compiled()}
    rows = measure_and_keep(
        "cs_ib",
        {name: partial(step, loss, *inputs) for name, loss in losses.items()},
        ABOUT,
        size=size,
        shape=shape,
        number=threads,
        **least(*shape),
        reset=partial(forget, *inputs),
    )
    full, default, *_ = rows
    if size == "large":
        assert default["peak_bytes"] <= full["peak_bytes"] / 8


def test_the_same_loss():
    """What is compared has the same value and gradients."""
    inputs = problem(*SIZES["small"])
    grads = []
    for loss in (gram_matrices, ours):
        step(loss, *inputs)
        grads.append((loss(*inputs).detach(), inputs[1].grad, inputs[3].grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["Gram matrices", "ours"])
def test_middle_size(benchmark, name):
    """One step of each by pytest-benchmark."""
    inputs = problem(*SIZES["small" if benchmark.disabled else "middle"])
    losses = {"Gram matrices": gram_matrices, "ours": ours}
    benchmark.pedantic(step, args=(losses[name], *inputs), rounds=1 if benchmark.disabled else 5, warmup_rounds=0)
