"""Memory, operations and times against cases whose answer is known exactly."""

import time
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from paperclaims.fixtures import measurement
from paperclaims.fixtures.measurement import (
    Timings,
    count_flops,
    fake_mode,
    interleaved,
    peak_bytes_cpu,
    peak_bytes_cuda,
    peak_bytes_fake,
)

MEGABYTE = 250_000  # floats

# Memory. Every case is (function of its input x, a megabyte of floats; the peak beyond x in megabytes).


def chain(x):
    y = torch.empty_like(x)
    z = torch.empty(2 * MEGABYTE)
    del y
    return z, torch.empty(MEGABYTE // 2)


def replaced(x):
    for _ in range(5):
        y = torch.empty_like(x)  # the old one lives until the new one has its name
    return y


def freed_first(x):
    for _ in range(5):
        y = torch.empty_like(x)
        del y


def views(x):
    y = torch.empty_like(x)
    z = y.view(500, -1).t()[:3].unsqueeze(0).expand(7, -1, -1)
    del y
    return z, torch.empty_like(x)


def in_place(x):
    y = x.clone()
    return y.exp_().mul_(y).clamp_(y, y)


def on_input(x):
    x.exp_()
    return x.view(2, -1), x[3:]


def copying_reshape(x):
    return x.view(500, 500)[:, 1:].reshape(-1)


def grown(x):
    out = torch.empty(0)
    torch.exp(x, out=out)
    return out


def several(x):
    values, places = x.view(-1, 10).max(-1)  # 4 and 8 bytes for every tenth float
    return values, places


CASES = [
    (chain, 3),
    (replaced, 2),
    (freed_first, 1),
    (views, 2),
    (in_place, 1),
    (on_input, 0),
    (copying_reshape, 0.998),
    (grown, 1),
    (several, 0.3),
]


@pytest.mark.parametrize(("function", "megabytes"), CASES)
def test_peak_of_fake_tensors(function, megabytes):
    with fake_mode():
        x = torch.empty(MEGABYTE)
        assert peak_bytes_fake(partial(function, x)) == megabytes * 1_000_000
        assert peak_bytes_fake(partial(function, x)) == megabytes * 1_000_000


@pytest.mark.parametrize(("function", "megabytes"), CASES)
def test_peak_of_the_cpu_allocator(function, megabytes):
    x = torch.randn(MEGABYTE)
    assert peak_bytes_cpu(partial(function, x)) == megabytes * 1_000_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_of_the_cuda_allocator():
    for function, megabytes in CASES:
        x = torch.randn(MEGABYTE, device="cuda")
        with torch.device("cuda"):
            peak = peak_bytes_cuda(partial(function, x))
        assert peak == pytest.approx(megabytes * 1_000_000, abs=2**18), function.__name__  # blocks are rounded up


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_peak_skips_without_cuda():
    with pytest.raises(pytest.skip.Exception, match="CUDA"):
        peak_bytes_cuda(lambda: None)


def powers(x, n):
    for _ in range(n):
        x = x.exp()  # autograd saves the result
    return x


@pytest.mark.parametrize("measure", [peak_bytes_fake, peak_bytes_cpu])
def test_what_autograd_saves_is_alive(measure):
    with fake_mode() if measure is peak_bytes_fake else torch.device("cpu"):
        x = torch.ones(MEGABYTE, requires_grad=True)
        assert measure(lambda: powers(x, 6)) == 6_000_000
        with torch.no_grad():
            assert measure(lambda: powers(x, 6)) == 2_000_000
        # the sum (4 bytes), its gradient (4) and the first gradient beside the six results; each step then frees as much
        assert measure(lambda: powers(x, 6).sum().backward()) == 7_000_008


def test_checkpointing_lowers_the_peak():
    def loss(run):
        y = x
        for _ in range(4):
            y = run(powers, y, 4)
        total = y.sum()
        del y
        total.backward()
        x.grad = None

    with fake_mode():
        x = torch.empty(MEGABYTE, requires_grad=True)
        plain = peak_bytes_fake(lambda: loss(lambda f, *inputs: f(*inputs)))
        lean = peak_bytes_fake(lambda: loss(partial(checkpoint, use_reentrant=False)))
    assert plain == 17_000_008  # all sixteen results and a gradient
    assert lean == 8_000_008  # the inputs of three segments, the fourth's four results and a gradient


def test_what_an_earlier_call_left_is_an_input():
    kept = []
    with fake_mode():
        x = torch.empty(MEGABYTE)
        assert peak_bytes_fake(lambda: kept.append(x + 1)) == 1_000_000
        assert peak_bytes_fake(lambda: kept[0].mul_(2)) == 0
        assert peak_bytes_fake(lambda: kept[0].mul(2)) == 1_000_000


def test_new_constants_count():
    with fake_mode():
        assert peak_bytes_fake(lambda: torch.tensor([1.0, 2.0, 3.0])) == 12


def test_emptied_storage_is_free():
    def function():
        y = torch.empty(MEGABYTE)
        y.untyped_storage().resize_(0)
        return y, torch.empty(MEGABYTE)

    with fake_mode():
        assert peak_bytes_fake(function) == 1_000_000


def test_the_paper_s_shapes_cost_nothing():
    tokens, words, width = 8192, 256_000, 2304
    with fake_mode():
        e, c = torch.empty(tokens, width), torch.empty(words, width)
        targets = torch.empty(tokens, dtype=torch.int64)
        peak = peak_bytes_fake(lambda: F.cross_entropy(e @ c.T, targets))
    assert peak == 2 * tokens * words * 4 + 8  # logits, their log-softmax; the loss and the summed weight


def test_measuring_keeps_nothing_alive():
    with fake_mode():
        x = torch.empty(MEGABYTE)
        made = []
        peak_bytes_fake(lambda: made.append(weakref.ref(x + 1)))
        assert made[0]() is None


def test_fake_peak_needs_fake_mode():
    with pytest.raises(RuntimeError, match="inside `with fake_mode"):
        peak_bytes_fake(lambda: torch.empty(3))


# A registered operator hides its body: from the dispatch mode its memory, from the counter its operations.


def tiled_rows(a: torch.Tensor, b: torch.Tensor, tile: int) -> torch.Tensor:
    """Row sums of exp(a @ b.T), a tile of columns at a time."""
    total = a.new_zeros(a.shape[0])
    for start in range(0, b.shape[0], tile):
        total += (a @ b[start : start + tile].T).exp_().sum(-1)
    return total


registered_rows = torch.library.custom_op("paperclaims_tests::tiled_rows", tiled_rows, mutates_args=())
registered_rows.register_fake(lambda a, b, tile: a.new_empty(a.shape[0]))


def inputs():
    return torch.zeros(200, 10), torch.zeros(5000, 10)


def expected_peak(tile):
    return 200 * (tile + 2) * 4  # the tile of products, its sums and the total


@pytest.mark.parametrize("tile", [500, 5000])
def test_fake_peak_sees_the_body_but_not_the_operator(tile):
    with fake_mode():
        a, b = inputs()
        assert peak_bytes_fake(lambda: tiled_rows(a, b, tile)) == expected_peak(tile)
        assert peak_bytes_fake(lambda: registered_rows(a, b, tile)) == 200 * 4, "the output alone, whatever the tile"


@pytest.mark.parametrize("tile", [500, 5000])
@pytest.mark.parametrize("function", [tiled_rows, registered_rows])
def test_cpu_peak_sees_both(function, tile):
    a, b = inputs()
    assert peak_bytes_cpu(lambda: function(a, b, tile)) == expected_peak(tile)


def rows_formula(a, b, tile, out_shape=None, **_):
    return 2 * a[0] * a[1] * b[0]


def test_flops_see_the_body_but_not_the_operator_without_a_formula():
    a, b = inputs()
    body = count_flops(lambda: tiled_rows(a, b, 512))
    assert body == 2 * 200 * 10 * 5000
    assert count_flops(lambda: registered_rows(a, b, 512)) == 0
    formulas = {torch.ops.paperclaims_tests.tiled_rows: rows_formula}
    assert count_flops(lambda: registered_rows(a, b, 512), formulas) == body
    assert count_flops(lambda: registered_rows(a, b, 512)) == 0, "a formula that was passed does not stay"


def test_flops_take_formulas_registered_for_good():
    @torch.library.custom_op("paperclaims_tests::product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b.T

    a, b = inputs()
    assert count_flops(lambda: product(a, b)) == 0
    register_flop_formula(torch.ops.paperclaims_tests.product)(lambda a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[0])
    assert count_flops(lambda: product(a, b)) == count_flops(lambda: a @ b.T) == 20_000_000


def test_flops_of_products_and_convolutions():
    a, b = torch.zeros(3, 5, requires_grad=True), torch.zeros(5, 7, requires_grad=True)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    assert count_flops(lambda: torch.zeros(4, 3, 5) @ torch.zeros(4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    image, kernels = torch.zeros(2, 3, 9, 9), torch.zeros(4, 3, 3, 3)
    assert count_flops(lambda: F.conv2d(image, kernels)) == 2 * (2 * 4 * 7 * 7) * (3 * 3 * 3)
    assert count_flops(lambda: a.exp() + 1) == 0


def test_flops_at_the_paper_s_shapes():
    with fake_mode():
        e, c = torch.empty(8192, 2304), torch.empty(256_000, 2304)
        assert count_flops(lambda: e @ c.T) == 2 * 8192 * 2304 * 256_000


# Time. A clock that only the variants move makes the answers exact.


class Clock:
    def __init__(self, drift=0.0):
        self.now, self.drift, self.calls = 0.0, drift, []

    def variant(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds * (1 + self.drift * len(self.calls))

        return run


@pytest.fixture
def clock(monkeypatch):
    def make(drift=0.0):
        clock = Clock(drift)
        monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock.now)
        return clock

    return make


def test_times_are_those_of_the_clock(clock, rng):
    clock = clock()
    timings = interleaved({"a": clock.variant("a", 3.0), "b": clock.variant("b", 2.0)}, rounds=9, rng=rng)
    assert {name: seconds.shape for name, seconds in timings.seconds.items()} == {"a": (9,), "b": (9,)}
    assert timings.ratio("a", "b").estimate == pytest.approx(1.5)
    assert timings.ratio("b", "a").high == pytest.approx(2 / 3)
    assert timings.median("b").estimate == pytest.approx(2)
    assert timings.aa.estimate == pytest.approx(1)
    assert timings.trustworthy


def test_every_round_runs_all_in_random_order(clock, rng):
    clock = clock()
    interleaved({name: clock.variant(name, 1.0) for name in "abc"}, rounds=40, rng=rng, warmup=3)
    calls = "".join(clock.calls)
    rounds = [calls[start : start + 4] for start in range(9, len(calls), 4)]
    assert calls[:9] == "abcabcabc"
    assert len(rounds) == 40
    assert {"".join(sorted(order)) for order in rounds} == {"aabc"}
    assert len(set(rounds)) > 6, "12 orders are possible"


class Unshuffled:
    @staticmethod
    def permutation(n):
        return np.arange(n)


def test_random_order_cancels_drift_that_a_fixed_order_does_not(clock, rng):
    drifting = clock(drift=0.01)
    variants = {"a": drifting.variant("a", 1.0), "b": drifting.variant("b", 1.0)}
    random, fixed = (interleaved(variants, rounds=30, rng=order) for order in (rng, Unshuffled))
    assert random.trustworthy
    assert random.ratio("a", "b").low < 1 < random.ratio("a", "b").high
    assert not fixed.trustworthy
    assert fixed.aa.high < 1


def test_a_comparison_with_itself_must_contain_one():
    ones = np.ones(8)
    assert Timings({"a": ones}, ones).trustworthy
    assert not Timings({"a": ones}, 1.1 * ones).trustworthy
    assert not Timings({"a": ones}, 0.9 * ones).trustworthy


def test_real_sleeps(rng):
    timings = interleaved({"long": partial(time.sleep, 0.02), "short": partial(time.sleep, 0.005)}, rounds=9, rng=rng, warmup=1)
    assert 1.5 < timings.ratio("long", "short").estimate < 5
    assert timings.median("long").low >= 0.02


def test_few_rounds_and_no_variants_are_refused(rng):
    with pytest.raises(ValueError, match="at least 8 rounds, got 5"):
        interleaved({"a": lambda: None}, rounds=5, rng=rng)
    with pytest.raises(ValueError, match="no variants"):
        interleaved({}, rounds=9, rng=rng)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
