"""Time and memory of the operator's CPU body against full logits and torch's own chunked loss, forward and backward.

    python -m pytest tests/benchmarks/test_cut_cross_entropy.py --benchmark-enable -s

runs alone on a quiet machine for some twenty minutes (`-k middle` for six): every variant in one process, interleaved, at three
sizes, with one and two threads; it prints a table and writes what it measured to reports/benchmarks/cut_cross_entropy.json.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.evidence import machine, write_json
from paperclaims.fixtures.measurement import interleaved, peak_bytes_cpu
from paperclaims.kernels.losses.cut_cross_entropy import cost, linear_cross_entropy

SIZES = {"small": (1024, 16_000, 384), "middle": (2048, 32_000, 512), "large": (4096, 32_000, 512)}
ROUNDS = 8
RECORD = Path(__file__).resolve().parents[2] / "reports" / "benchmarks" / "cut_cross_entropy.json"


def full_logits(e, c, targets):
    return F.cross_entropy(e @ c.T, targets)


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


def step(loss, e, c, targets):
    e.grad = c.grad = None
    loss(e, c, targets).backward()


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    if rows:
        write_json(RECORD, {"machine": machine(), "torch": torch.__version__, "rows": rows})
        print(f"\n{RECORD}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_front_of_time_and_memory(size, threads, table, request):
    """Not slower than full logits, an eighth of their memory at the middle size, and no peer faster by 5% and leaner at once."""
    if not request.config.getoption("--benchmark-enable"):
        pytest.skip("measures for minutes: --benchmark-enable")
    if threads > (os.cpu_count() or 1):
        pytest.skip(f"needs {threads} processors")
    shape = SIZES[size]
    inputs = problem(*shape)
    losses = {"full logits": full_logits, **ours(), **torch_options()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        variants = {name: partial(step, loss, *inputs) for name, loss in losses.items()}
        times = interleaved(variants, rounds=ROUNDS, rng=np.random.default_rng(0), warmup=1)
        peaks = {}
        for name, variant in variants.items():
            inputs[0].grad = inputs[1].grad = None
            peaks[name] = peak_bytes_cpu(variant)
    finally:
        torch.set_num_threads(before)
    ratios = {name: times.ratio(name, "full logits") for name in losses}
    least = cost(*shape, 4, recompute=False)
    print(f"\n{size} {shape}, {threads} thread(s); full logits over themselves {times.aa.estimate:.3f}")
    for name, ratio in sorted(ratios.items(), key=lambda pair: pair[1].estimate):
        seconds, peak = times.median(name).estimate, peaks[name] / 2**20
        rate = least.flops / seconds / 1e9
        spread = f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        print(f"{name:36} {seconds:7.3f} s  {spread}  {peak:7.1f} MiB  {rate:5.0f} GFLOP/s")
        row = {"variant": name, "size": size, "shape": shape, "threads": threads, "seconds": seconds, "peak_bytes": peaks[name]}
        interval = {"ratio": ratio.estimate, "low": ratio.low, "high": ratio.high}
        floor = {"least_flops": least.flops, "least_bytes": least.bytes}
        table.append(row | interval | floor | {"aa": [times.aa.low, times.aa.high]})

    assert ratios["ours"].low <= 1.05, "slower than full logits"
    if size == "middle":
        assert peaks["ours"] <= peaks["full logits"] / 8
    own = [name for name in losses if name.startswith("ours")]
    best = min(own, key=lambda name: ratios[name].estimate if peaks[name] <= peaks["full logits"] / 8 else np.inf)
    for name in set(losses) - set(own):
        faster = ratios[name].estimate < 0.95 * ratios[best].estimate
        assert not (faster and peaks[name] < peaks[best]), f"{name} is faster and leaner than {best}"


@pytest.mark.parametrize("name", ["full logits", "ours", "ours, computed again", "torch, automatic"])
def test_middle_size(benchmark, name):
    """One step of each by pytest-benchmark."""
    losses = {"full logits": full_logits, **ours(), **torch_options()}
    if name not in losses:
        pytest.skip("needs torch 2.13")
    shape = SIZES["small" if benchmark.disabled else "middle"]
    inputs = problem(*shape)
    benchmark.pedantic(step, args=(losses[name], *inputs), rounds=1 if benchmark.disabled else 5, warmup_rounds=0)
