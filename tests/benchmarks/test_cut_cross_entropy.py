"""Time and memory of the operator's CPU body against full logits and torch's own chunked loss, forward and backward.

    python -m pytest tests/benchmarks/test_cut_cross_entropy.py --benchmark-enable -s

runs alone on a quiet machine for some twenty minutes (`-k middle` for six): every variant in one process, interleaved, at three
sizes, with one and two threads; it prints a table and writes what it measured to reports/benchmarks/cut_cross_entropy.json.
"""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.benchmark import measure_and_keep, skip_unless_wanted
from paperclaims.kernels.losses.cut_cross_entropy import cost, linear_cross_entropy

SIZES = {"small": (1024, 16_000, 384), "middle": (2048, 32_000, 512), "large": (4096, 32_000, 512)}
ABOUT = {
    "kernel": "linear_cross_entropy, forward and backward",
    "baseline": "full logits",
    "module": "kernels/losses/cut_cross_entropy.py",
}


def full_logits(e, c, targets):
    return F.cross_entropy(e @ c.T, targets)


def compiled():
    """Full logits compiled, where there is a compiler: also what the authors' package, cut-cross-entropy, runs on a CPU."""
    torch._dynamo.reset()  # the number of threads is compiled in
    return {"full logits, compiled": torch.compile(full_logits)} if shutil.which("g++") else {}


def torch_options():
    """How torch.nn.functional.linear_cross_entropy chunks and accumulates, from torch 2.13 on."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return {}
    chunks = {f"torch, {n} tokens": {"batch_chunk_size": n} for n in (256, 512, 1024)}
    policies = {f"torch, {policy}": {"acc_policy": policy} for policy in ("accurate", "compact")}
    return {
        name: partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions(**settings))
        for name, settings in {"torch, automatic": {}, **chunks, **policies}.items()
    }


def ours():
    """The default, a larger tile, and the least memory."""
    return {
        "ours": linear_cross_entropy,
        "ours, 512 tokens": partial(linear_cross_entropy, gradients="forward", tile=(512, 1024)),
        "ours, computed again": partial(linear_cross_entropy, gradients="backward"),
    }


def problem(n, v, d):
    generator = torch.Generator().manual_seed(0)
    e, c = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) / d**0.5
    return e.requires_grad_(), c.requires_grad_(), torch.randint(v, (n,), generator=generator)


def forget(e, c, targets):
    e.grad = c.grad = None


def step(loss, e, c, targets):
    forget(e, c, targets)
    loss(e, c, targets).backward()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_front_of_time_and_memory(size, threads, request):
    """Not slower than full logits, an eighth of their memory at the middle size, and no peer faster by 5% and leaner at once."""
    skip_unless_wanted(request, threads)
    shape = SIZES[size]
    inputs = problem(*shape)
    losses = {"full logits": full_logits, **ours(), **torch_options(), **compiled()}
    least = cost(*shape, 4, recompute=False)
    rows = measure_and_keep(
        "cut_cross_entropy",
        {name: partial(step, loss, *inputs) for name, loss in losses.items()},
        ABOUT,
        size=size,
        shape=shape,
        number=threads,
        least_flops=least.flops,
        least_bytes=least.bytes,
        reset=partial(forget, *inputs),
    )
    full, default, *_ = rows
    assert default["low"] <= 1.05, "slower than full logits"
    if size == "middle":
        assert default["peak_bytes"] <= full["peak_bytes"] / 8
    for peer in (row for row in rows if not row["own"]):
        faster, leaner = peer["ratio"] < 0.95 * default["ratio"], peer["peak_bytes"] < default["peak_bytes"]
        assert not (faster and leaner), f"{peer['variant']} is faster and leaner"


@pytest.mark.parametrize("name", ["full logits", "ours", "ours, computed again", "torch, automatic"])
def test_middle_size(benchmark, name):
    """One step of each by pytest-benchmark."""
    losses = {"full logits": full_logits, **ours(), **torch_options()}
    if name not in losses:
        pytest.skip("needs torch 2.13")
    shape = SIZES["small" if benchmark.disabled else "middle"]
    inputs = problem(*shape)
    benchmark.pedantic(step, args=(losses[name], *inputs), rounds=1 if benchmark.disabled else 5, warmup_rounds=0)
