"""Codes, similarity and loss against brute force, the identity that ties linear heads together, and bad input."""

import itertools
import math

import pytest
import torch

from paperclaims.impl.losses.target_embedding import (
    class_similarity,
    code_loss,
    distortion_bound,
    eigen_codes,
    nearest_code,
    random_codes,
)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("signs", [False, True])
def test_random_codes(signs):
    codes = random_codes(200, 300, signs=signs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (codes.shape, codes.dtype) == ((200, 300), torch.float64)
    assert codes.mean().abs() < 1e-3
    assert codes.square().sum(1).mean().item() == pytest.approx(1, abs=0.02 if not signs else 1e-12)
    assert (codes.abs() * 300**0.5).unique().numel() == 1 if signs else codes.abs().unique().numel() > 1000
    squares = torch.pdist(codes).square()
    assert squares.mean().item() == pytest.approx(2, rel=0.01)
    assert random_codes(2, 3, signs=signs).dtype == torch.float32


def test_similarity_by_hand():
    features = torch.tensor([[0.0, 0], [2, 0], [0, 2], [4, 1], [0, 3], [8, 8]], dtype=torch.float64)
    targets = torch.tensor([0, 0, 2, 1, 2, 4])  # class 3 has no sample
    means = {0: [1.0, 0.0], 1: [4.0, 1.0], 2: [0.0, 2.5], 4: [8.0, 8.0]}
    squares = {pair: math.dist(means[pair[0]], means[pair[1]]) ** 2 for pair in itertools.combinations(means, 2)}
    scale = sorted(squares.values())[2]  # PyTorch's median is the lower of two
    expected = torch.full((5, 5), math.exp(-1), dtype=torch.float64)
    for (a, b), value in squares.items():
        expected[a, b] = expected[b, a] = math.exp(-value / scale)
    torch.testing.assert_close(class_similarity(features, targets, 5), expected.fill_diagonal_(0), rtol=1e-12, atol=0)


def test_similarity_of_classes_in_one_place():
    s = class_similarity(torch.ones(4, 2), torch.tensor([0, 1, 2, 2]), 3)
    assert s.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_eigen_codes_solve_the_laplacian():
    s = numbers(7, 7).abs()
    s = (s + s.T).fill_diagonal_(0)
    codes = eigen_codes(s, 3)
    assert codes.shape == (7, 3)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(7, dtype=torch.float64))
    root = s.sum(1).rsqrt().diag()
    laplacian = torch.eye(7, dtype=torch.float64) - root @ s @ root
    values, vectors = torch.linalg.eigh(laplacian)
    assert values[0].abs() < 1e-12
    expected = torch.nn.functional.normalize(vectors[:, 1:4], dim=1)
    torch.testing.assert_close((codes * expected).sum(0).abs(), (expected * expected).sum(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(eigen_codes(s + 5 * torch.eye(7, dtype=torch.float64), 3), codes)


def test_eigen_codes_put_similar_classes_together():
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) + 0.01
    codes = eigen_codes(blocks, 1)
    assert codes[:3].unique().numel() == codes[3:].unique().numel() == 1
    assert codes[0] == -codes[3]


@pytest.mark.parametrize("form", ["squared", "cosine"])
def test_loss(form):
    outputs, codes, targets = numbers(2, 3, 4).requires_grad_(), numbers(5, 4, seed=1), torch.tensor([[0, 4, 2], [1, 1, 3]])
    losses = code_loss(outputs, targets, codes, form=form, reduction="none")
    for place in itertools.product(range(2), range(3)):
        o, c = outputs[place], codes[targets[place]]
        expected = (o - c).square().sum() if form == "squared" else 1 - o @ c / (o.norm() * c.norm())
        torch.testing.assert_close(losses[place], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(code_loss(outputs, targets, codes, form=form), losses.mean())
    torch.testing.assert_close(code_loss(outputs, targets, codes, form=form, reduction="sum"), losses.sum())
    assert torch.autograd.gradcheck(lambda o: code_loss(o, targets, codes, form=form), (outputs,))
    nothing = code_loss(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), codes.float(), form=form)
    assert nothing.isnan()
    far = code_loss(torch.full((1, 4), 1e4), torch.tensor([2]), codes.float(), form=form)
    assert torch.isfinite(far)


def test_nearest_code():
    outputs, codes = numbers(2, 6, 4), numbers(5, 4, seed=1)
    distances = (outputs.unsqueeze(-2) - codes).square().sum(-1)
    assert torch.equal(nearest_code(outputs, codes), distances.argmin(-1))
    assert nearest_code(torch.zeros(4), torch.ones(3, 4)).item() == 0
    assert torch.equal(nearest_code(torch.eye(3), torch.eye(3)), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    features, targets = numbers(40, 3).to(dtype), torch.arange(40) % 4
    similarity = class_similarity(features, targets, 4)
    assert similarity.dtype == dtype
    torch.testing.assert_close(similarity.float(), class_similarity(features.float(), targets, 4), rtol=0.01, atol=0.01)
    outputs, codes = torch.full((1, 4), 300.0, dtype=dtype), torch.eye(4, dtype=dtype)
    loss = code_loss(outputs, torch.tensor([1]), codes)
    assert loss.item() == pytest.approx(3 * 300.0**2 + 299.0**2, rel=0.01)
    far = torch.tensor([[100.0, 60000.0]]).to(dtype)
    assert nearest_code(far, torch.tensor([[1.0, 1.0], [1.0, 2.0]]).to(dtype)).item() == 1


def test_a_linear_head_from_zero_learns_the_projected_one_hot_head():
    x, targets, codes = numbers(30, 6), torch.arange(30) % 5, numbers(5, 3, seed=1)
    heads = [torch.zeros(6, 5, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64)]
    tables = [torch.eye(5, dtype=torch.float64), codes]
    for _ in range(50):
        for head, table in zip(heads, tables, strict=True):
            head.requires_grad_()
            (slope,) = torch.autograd.grad(code_loss(x @ head, targets, table), head)
            head.requires_grad_(False)
            head -= 0.05 * slope
    torch.testing.assert_close(heads[1], heads[0] @ codes, rtol=1e-10, atol=1e-12)


def test_bound():
    assert distortion_bound(1000, 400, 0.5) == pytest.approx(1000 * 999 * math.exp(-400 * (0.0625 - 1 / 48)))
    assert distortion_bound(1000, 332, 0.5) < 1 < distortion_bound(1000, 331, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_codes(0, 3), "a class"),
        (lambda: random_codes(3, 0), "dimension"),
        (lambda: class_similarity(torch.ones(3), torch.zeros(3).long(), 2), "floating point"),
        (lambda: class_similarity(torch.ones(3, 2).long(), torch.zeros(3).long(), 2), "floating point"),
        (lambda: class_similarity(torch.ones(3, 2), torch.zeros(2).long(), 2), "targets"),
        (lambda: class_similarity(torch.ones(3, 2), torch.zeros(3), 2), "int64"),
        (lambda: class_similarity(torch.ones(3, 2), torch.tensor([0, 1, 2]), 2), "0..1"),
        (lambda: class_similarity(torch.ones(3, 2), torch.zeros(3).long(), 2), "two classes"),
        (lambda: eigen_codes(torch.ones(3, 3), 3), "below classes"),
        (lambda: eigen_codes(torch.ones(3, 3), 0), "below classes"),
        (lambda: eigen_codes(torch.ones(3, 2), 1), "classes, classes"),
        (lambda: eigen_codes(torch.ones(3), 1), "classes, classes"),
        (lambda: eigen_codes(torch.tensor([[0.0, 1, 2], [1, 0, 1], [1, 1, 0]]), 1), "symmetric"),
        (lambda: eigen_codes(-torch.ones(3, 3), 1), "not negative"),
        (lambda: eigen_codes(torch.eye(3), 1), "similar to no other"),
        (lambda: eigen_codes(torch.block_diag(*[torch.ones(2, 2)] * 4), 2), "no code"),
        (lambda: class_similarity(torch.full((2, 2), math.nan), torch.tensor([0, 1]), 2), "not finite"),
        (lambda: nearest_code(torch.ones(2, 3), torch.ones(0, 3)), "codes"),
        (lambda: code_loss(torch.ones(2, 3), torch.zeros(2).long(), torch.ones(4, 2)), "codes"),
        (lambda: code_loss(torch.ones(2, 3), torch.zeros(2).long(), torch.ones(4, 3).double()), "dtype"),
        (lambda: code_loss(torch.ones(2, 3), torch.zeros(3).long(), torch.ones(4, 3)), "targets"),
        (lambda: code_loss(torch.ones(2, 3), torch.zeros(2), torch.ones(4, 3)), "int64"),
        (lambda: code_loss(torch.ones(2, 3), torch.tensor([0, 4]), torch.ones(4, 3)), "0..3"),
        (lambda: code_loss(torch.ones(2, 3), torch.tensor([0, -1]), torch.ones(4, 3)), "0..3"),
        (lambda: code_loss(torch.ones(2, 3), torch.zeros(2).long(), torch.ones(4, 3), form="l1"), "form"),
        (lambda: code_loss(torch.ones(2, 3), torch.zeros(2).long(), torch.ones(4, 3), reduction="max"), "reduction"),
        (lambda: nearest_code(torch.ones(2, 3), torch.ones(4, 2)), "codes"),
        (lambda: distortion_bound(10, 10, 1.0), "eps"),
        (lambda: distortion_bound(10, 10, 0.0), "eps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
