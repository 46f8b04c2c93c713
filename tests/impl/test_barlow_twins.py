"""Barlow Twins: against loops in float64, against known answers, and over two processes."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paperclaims.impl.contrastive.barlow_twins import (
    barlow_twins_loss,
    barlow_twins_terms,
    cross_correlation,
    gram_redundancy,
    standardise,
)

FORMS = [{}, {"tile": 1}, {"tile": 2}, {"tile": 3}, {"tile": 5}, {"tile": 64}, {"gram": True}]


def make(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z_a = torch.randn(*shape, dtype=torch.float64, generator=generator) * 3 + 1
    return z_a, 0.6 * z_a.flip(-1) + torch.randn(*shape, dtype=torch.float64, generator=generator) - 2


def loop_correlation(z_a, z_b):
    """Eq. 2 entry by entry on mean-centred embeddings, without epsilon."""
    n, d = z_a.shape
    a, b = (z.tolist() for z in (z_a, z_b))
    mean_a, mean_b = ([sum(row[i] for row in z) / n for i in range(d)] for z in (a, b))
    c = [[0.0] * d for _ in range(d)]
    for i in range(d):
        for j in range(d):
            dot = sum((a[k][i] - mean_a[i]) * (b[k][j] - mean_b[j]) for k in range(n))
            norm_a = math.sqrt(sum((a[k][i] - mean_a[i]) ** 2 for k in range(n)))
            norm_b = math.sqrt(sum((b[k][j] - mean_b[j]) ** 2 for k in range(n)))
            c[i][j] = dot / (norm_a * norm_b)
    return c


def loop_terms(z_a, z_b):
    """The two sums of Eq. 1, entry by entry."""
    c = loop_correlation(z_a, z_b)
    d = len(c)
    return sum((1 - c[i][i]) ** 2 for i in range(d)), sum(c[i][j] ** 2 for i in range(d) for j in range(d) if i != j)


def test_cross_correlation_is_equation_2():
    z_a, z_b = make(7, 5)
    expected = torch.tensor(loop_correlation(z_a, z_b), dtype=torch.float64)
    torch.testing.assert_close(cross_correlation(z_a, z_b, eps=0), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (7, 5), (5, 11), (64, 6)])
def test_terms_are_equation_1(options, shape):
    z_a, z_b = make(*shape)
    invariance, redundancy = barlow_twins_terms(z_a, z_b, eps=0, **options)
    expected = loop_terms(z_a, z_b)
    assert invariance.item() == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
    assert redundancy.item() == pytest.approx(expected[1], rel=1e-12, abs=1e-12)
    loss = barlow_twins_loss(z_a, z_b, 0.3, eps=0, **options)
    assert loss.item() == pytest.approx(expected[0] + 0.3 * expected[1], rel=1e-12, abs=1e-12)


def test_default_eps_is_that_of_standardise():
    z_a, z_b = (1e-3 * z for z in make(9, 4))
    for measured, expected in zip(barlow_twins_terms(z_a, z_b), barlow_twins_terms(z_a, z_b, eps=1e-5), strict=True):
        assert torch.equal(measured, expected)


def test_default_weight_is_the_papers():
    z_a, z_b = make(7, 5)
    assert barlow_twins_loss(z_a, z_b).item() == pytest.approx(barlow_twins_loss(z_a, z_b, 5e-3).item(), rel=1e-15)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradients(options):
    views = [z.requires_grad_() for z in make(2, 4, 3)]
    for weight in (0.0, 0.7):
        assert torch.autograd.gradcheck(lambda a, b, w=weight: barlow_twins_loss(a, b, w, **options), views)
    if "tile" not in options:
        views = [z.requires_grad_() for z in make(4, 3)]
        assert torch.autograd.gradgradcheck(lambda a, b: barlow_twins_loss(a, b, 0.7, **options), views)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_leading_dimensions_are_separate_problems(options):
    z_a, z_b = make(2, 3, 6, 5)
    stacked = barlow_twins_terms(z_a, z_b, **options)
    for i in range(2):
        for j in range(3):
            for term, alone in zip(stacked, barlow_twins_terms(z_a[i, j], z_b[i, j], **options), strict=True):
                torch.testing.assert_close(term[i, j], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_known_answers(options):
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    for z_b, expected in [(signs, (0, 0)), (-signs, (12, 0)), (signs.roll(1, -1), (3, 3)), (signs[:, :1].expand(4, 3), (2, 2))]:
        torch.testing.assert_close(
            torch.stack(barlow_twins_terms(5 * signs + 2, z_b, eps=0, **options)),
            torch.tensor(expected).double(),
            atol=1e-12,
            rtol=0,
        )


def test_gram_form_is_the_sum_of_squares():
    a, b = (standardise(z) for z in make(3, 6, 9))
    c = a.mT @ b / 6
    c.diagonal(0, -2, -1).zero_()
    torch.testing.assert_close(gram_redundancy(a, b), c.square().sum((-2, -1)), rtol=1e-12, atol=1e-12)


def test_standardise_agrees_with_batch_norm_and_constant_columns():
    z = make(9, 4)[0]
    z[:, 2] = 7
    torch.testing.assert_close(
        standardise(z), torch.nn.functional.batch_norm(z, None, None, training=True), rtol=1e-12, atol=1e-12
    )
    assert standardise(z)[:, 2].eq(0).all()
    assert standardise(z, eps=0)[:, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    z_a, z_b = (z.to(dtype) for z in make(64, 6))
    for options in FORMS:
        loss = barlow_twins_loss(z_a, z_b, **options)
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(barlow_twins_loss(z_a.double(), z_b.double()).item(), rel=30 * torch.finfo(dtype).eps)


def test_bad_input_is_refused():
    z_a, z_b = make(6, 5)
    for bad in (z_b[:5], z_b[:, :4], z_b.float(), z_b[0]):
        with pytest.raises(ValueError, match="two views"):
            barlow_twins_loss(z_a, bad)
    with pytest.raises(ValueError, match="two views"):
        cross_correlation(z_a, z_b[:5])
    for bad in (z_a.long(), z_a[0]):
        with pytest.raises(ValueError, match="two views"):
            barlow_twins_loss(bad, bad)
        with pytest.raises(ValueError, match="floating point of shape"):
            standardise(bad)
    with pytest.raises(ValueError, match="at least 2 rows"):
        barlow_twins_loss(z_a[:1], z_b[:1])
    for eps in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="eps"):
            barlow_twins_loss(z_a, z_b, eps=eps)
    for lambd in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="lambd"):
            barlow_twins_loss(z_a, z_b, lambd)
    with pytest.raises(ValueError, match=r"two views .* got \(6, 5\) and \(1, 5\)"):
        gram_redundancy(z_a, z_b[:1])
    with pytest.raises(ValueError, match="tile must be"):
        barlow_twins_loss(z_a, z_b, tile=0)
    with pytest.raises(ValueError, match="neither a tile nor a group"):
        barlow_twins_loss(z_a, z_b, gram=True, tile=2)


def compare_with_one_process(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        z_a, z_b = make(8, 5)
        mine = slice(4 * rank, 4 * rank + 4)
        for options in ({}, {"tile": 2}):
            whole = [z.clone().requires_grad_() for z in (z_a, z_b)]
            share = [z[mine].clone().requires_grad_() for z in (z_a, z_b)]
            expected = barlow_twins_loss(*whole, 0.3)
            measured = barlow_twins_loss(*share, 0.3, group=dist.group.WORLD, **options)
            torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-12)
            for part, full in zip(torch.autograd.grad(measured, share), torch.autograd.grad(expected, whole), strict=True):
                torch.testing.assert_close(part, full[mine], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            cross_correlation(z_a[mine], z_b[mine], group=dist.group.WORLD), cross_correlation(z_a, z_b), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(standardise(z_a[mine], group=dist.group.WORLD), standardise(z_a)[mine], rtol=1e-12, atol=1e-12)
        alone = [dist.new_group([member]) for member in range(2)][rank]
        share = z_a[mine], z_b[mine]
        torch.testing.assert_close(
            barlow_twins_loss(*share, tile=2, group=alone), barlow_twins_loss(*share), rtol=1e-12, atol=1e-12
        )
        try:
            barlow_twins_loss(z_a[mine], z_b[mine], gram=True, group=dist.group.WORLD)
        except ValueError:
            return
        raise AssertionError("gram with a group was accepted")
    finally:
        dist.destroy_process_group()


CHILD = """
import runpy, sys
conftest, module, rank, store = sys.argv[1:]
runpy.run_path(conftest)
runpy.run_path(module)["compare_with_one_process"](int(rank), store)
"""


def test_two_processes_give_the_global_batch(tmp_path):
    conftest = Path(__file__).parents[2] / "conftest.py"
    command = [sys.executable, "-c", CHILD, conftest, __file__]
    children = [subprocess.Popen([*command, str(rank), tmp_path / "store"], stderr=subprocess.PIPE) for rank in range(2)]
    errors = [child.communicate(timeout=120)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
