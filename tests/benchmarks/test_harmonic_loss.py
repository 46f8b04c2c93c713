"""Time and memory of the harmonic loss's CPU body against all distances at once, as written and compiled, forward and backward.

    python -m pytest tests/benchmarks/test_harmonic_loss.py --benchmark-enable -s

runs alone on a quiet machine: every variant in one process, interleaved, at three sizes, with one and two threads; it prints a
table and writes what it measured to reports/benchmarks.
"""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.benchmark import measure_and_keep, skip_unless_wanted
from paperclaims.kernels.losses.harmonic_loss import harmonic_cross_entropy

SIZES = {"small": (1024, 16_000, 384), "middle": (2048, 32_000, 512), "large": (4096, 32_000, 512)}
ABOUT = {
    "kernel": "harmonic_cross_entropy, forward and backward",
    "baseline": "all distances",
    "module": "kernels/losses/harmonic_loss.py",
}


def all_distances(x, w, targets):
    """The plain expression: squared distances by one product, their logarithms, cross-entropy."""
    squares = x.square().sum(1)[:, None] + w.square().sum(1) - 2 * x @ w.T
    return F.cross_entropy(squares.clamp(min=1e-12).log() * (-(x.shape[1] ** 0.5) / 2), targets)


def compiled():
    torch._dynamo.reset()  # the number of threads is compiled in
    return {"all distances, compiled": torch.compile(all_distances)} if shutil.which("g++") else {}


OURS = {
    "ours": harmonic_cross_entropy,
    "ours, without a look for near pairs": partial(harmonic_cross_entropy, refine=False),
    "ours, tiles of 512": partial(harmonic_cross_entropy, tile=(512, 512)),
}


def problem(n, v, d):
    """Points at about half the typical distance from their centres."""
    generator = torch.Generator().manual_seed(0)
    w, targets = torch.randn(v, d, generator=generator), torch.randint(v, (n,), generator=generator)
    x = w[targets] + torch.randn(n, d, generator=generator)
    return x.requires_grad_(), w.requires_grad_(), targets


def least(n, v, d):
    """Operations of the four products of a step and bytes of its inputs and gradients."""
    return {"least_flops": 8 * n * v * d, "least_bytes": 4 * (3 * (n + v) * d + 4 * n)}


def forget(x, w, targets):
    x.grad = w.grad = None


def step(loss, x, w, targets):
    forget(x, w, targets)
    loss(x, w, targets).backward()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_time_and_memory(size, threads, request):
    """Not slower than the plain expression, in an eighth of its memory at the middle size."""
    skip_unless_wanted(request, threads)
    shape = SIZES[size]
    inputs = problem(*shape)
    losses = {"all distances": all_distances, **OURS, **compiled()}
    rows = measure_and_keep(
        "harmonic_loss",
        {name: partial(step, loss, *inputs) for name, loss in losses.items()},
        ABOUT,
        size=size,
        shape=shape,
        number=threads,
        **least(*shape),
        reset=partial(forget, *inputs),
    )
    full, default, *_ = rows
    assert default["low"] <= 1.05, "slower than the plain expression"
    if size == "middle":
        assert default["peak_bytes"] <= full["peak_bytes"] / 8


@pytest.mark.parametrize("name", ["all distances", "ours"])
def test_middle_size(benchmark, name):
    """One step of each by pytest-benchmark."""
    inputs = problem(*SIZES["small" if benchmark.disabled else "middle"])
    losses = {"all distances": all_distances, **OURS}
    benchmark.pedantic(step, args=(losses[name], *inputs), rounds=1 if benchmark.disabled else 5, warmup_rounds=0)
