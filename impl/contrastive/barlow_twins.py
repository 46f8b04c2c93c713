"""Barlow Twins (Zbontar, Jing, Misra, LeCun, Deny, 2021, arXiv 2103.03230): the loss, plain, tiled and through Gram matrices.

Every function takes stacks of problems, shape (..., n, D), and keeps the leading dimensions apart.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["barlow_twins_loss", "barlow_twins_terms", "cross_correlation", "gram_redundancy", "standardise"]


class _GlobalSum(torch.autograd.Function):
    """Sum over a process group of tensors that every process then uses in its own way: gradients are summed as well."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _GlobalSum.apply(grad, ctx.group), None


class _ReplicatedSum(torch.autograd.Function):
    """Sum over a process group that every process carries on to the same loss: the gradient is already whole."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _replicated_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else _ReplicatedSum.apply(x, group)


def _batch_size(z: Tensor, group: dist.ProcessGroup | None) -> int:
    """Rows of the global batch; every process holds the same number."""
    return z.shape[-2] * (1 if group is None else dist.get_world_size(group))


def _check(z_a: Tensor, z_b: Tensor) -> None:
    if z_a.shape != z_b.shape or z_a.ndim < 2:
        raise ValueError(f"the two views must share one shape (..., n, D), got {tuple(z_a.shape)} and {tuple(z_b.shape)}")
    if not (z_a.is_floating_point() and z_a.dtype == z_b.dtype):
        raise ValueError(f"the two views must share one floating-point dtype, got {z_a.dtype} and {z_b.dtype}")


def standardise(z: Tensor, *, eps: float = 1e-5, group: dist.ProcessGroup | None = None) -> Tensor:
    """Columns of `z` with mean 0 and (biased) variance 1 over the batch.

    Args:
        z: embeddings, shape (..., n, D), floating point.
        eps: added to every variance. 0 is the paper's Eq. 2, where a constant column gives NaN; 1e-5 is the batch normalisation
            without affine parameters of the authors' code, where it gives 0.
        group: processes over which the batch is spread, an equal share each; None for one process.

    Returns:
        Shape (..., n, D).

    Raises:
        ValueError: not a floating-point (..., n, D) with a global batch of two rows at least, or a negative eps.
    """
    if z.ndim < 2 or not z.is_floating_point():
        raise ValueError(f"z must be floating point of shape (..., n, D), got {z.dtype} of shape {tuple(z.shape)}")
    n = _batch_size(z, group)
    if n < 2:
        raise ValueError(f"a batch of {n} has no variance: at least 2 rows are needed")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")

    def mean(x: Tensor) -> Tensor:
        total = x.sum(-2, keepdim=True)
        return (total if group is None else _GlobalSum.apply(total, group)) / n

    centred = z - mean(z)
    return centred * (mean(centred.square()) + eps).rsqrt()


def cross_correlation(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross-correlation matrix between the columns of two views, Eq. 2.

    Args:
        z_a, z_b: embeddings of the two views, row by row of the same samples, shape (..., n, D), floating point.
        eps, group: as in `standardise`; with a group, the matrix of the global batch, on every process.

    Returns:
        Shape (..., D, D), entries in [-1, 1]. (The paper's Algorithm 1 divides by the unbiased deviation and then by n, which
        shrinks every entry by (n - 1) / n; Eq. 2 and the authors' code do not.)

    Raises:
        ValueError: as in `standardise`, or two shapes or dtypes.
    """
    _check(z_a, z_b)
    a, b = standardise(z_a, eps=eps, group=group), standardise(z_b, eps=eps, group=group)
    return _replicated_sum(a.mT @ b, group) / _batch_size(z_a, group)


def _row_blocks(a: Tensor, b: Tensor, tile: int, group: dist.ProcessGroup | None):
    """Rows of the off-diagonal cross-correlation matrix, `tile` at a time: pairs of a slice and (..., tile, D)."""
    for start in range(0, a.shape[-1], tile):
        rows = slice(start, start + tile)
        block = a[..., rows].mT @ b
        if group is not None:
            dist.all_reduce(block, group=group)
        block.diagonal(start, -2, -1).zero_()
        yield rows, block.div_(_batch_size(a, group))


class _TiledRedundancy(torch.autograd.Function):
    """Sum of squared off-diagonal entries of a^T b / n, storing `tile` rows at a time; the backward pass makes them again."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, tile: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.tile, ctx.group = tile, group
        total = a.new_zeros(a.shape[:-2])
        for _, block in _row_blocks(a, b, tile, group):
            total += block.square_().sum((-2, -1))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, b = ctx.saved_tensors
        grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
        scale = grad[..., None, None] * (2 / _batch_size(a, ctx.group))
        for rows, block in _row_blocks(a, b, ctx.tile, ctx.group):
            block *= scale
            grad_a[..., rows] = b @ block.mT
            grad_b += a[..., rows] @ block
        return grad_a, grad_b, None, None


def gram_redundancy(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared off-diagonal entries of a^T b / n from the two n x n Gram matrices: |a^T b|^2 = <a a^T, b b^T>.

    Costs n^2 D instead of n D^2 and stores n x n, so it is the form to take where the batch is smaller than the embedding. The
    diagonal's share is subtracted, which costs digits where the off-diagonal entries are tiny.

    Args:
        a, b: standardised views, shape (..., n, D), floating point.

    Returns:
        Shape (...).

    Raises:
        ValueError: two shapes or dtypes.
    """
    _check(a, b)
    diagonal = (a * b).sum(-2)
    return (((a @ a.mT) * (b @ b.mT)).sum((-2, -1)) - diagonal.square().sum(-1)) / a.shape[-2] ** 2


def barlow_twins_terms(
    z_a: Tensor,
    z_b: Tensor,
    *,
    tile: int | None = None,
    gram: bool = False,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The two terms of the loss, Eq. 1: invariance sum_i (1 - C_ii)^2 and redundancy sum_i sum_{j != i} C_ij^2.

    Args:
        z_a, z_b: embeddings of the two views, row by row of the same samples, shape (..., n, D), floating point.
        tile: rows of the cross-correlation matrix held at a time, forward and backward; None holds all D (and can be
            differentiated twice, which the tiles cannot).
        gram: the redundancy term through n x n Gram matrices (`gram_redundancy`): the matrix is not formed at all.
        eps: as in `standardise`.
        group: processes over which the batch is spread, an equal share each. Moments and C are then those of the global batch,
            and each process gets the gradient of the one global loss with respect to its rows: sum parameter gradients over
            the group (an average, as DistributedDataParallel takes, is smaller by the number of processes).

    Returns:
        Two tensors of shape (...).

    Raises:
        ValueError: two shapes or dtypes, fewer than two rows, a negative eps, a tile below 1, or gram with a tile or a group.
    """
    _check(z_a, z_b)
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if gram and (tile is not None or group is not None):
        raise ValueError("gram holds no cross-correlation matrix: it takes neither a tile nor a group")
    a, b = standardise(z_a, eps=eps, group=group), standardise(z_b, eps=eps, group=group)
    n = _batch_size(z_a, group)
    diagonal = _replicated_sum((a * b).sum(-2), group) / n
    invariance = (1 - diagonal).square().sum(-1)
    if gram:
        return invariance, gram_redundancy(a, b)
    if tile is not None:
        return invariance, _TiledRedundancy.apply(a, b, tile, group)
    c = _replicated_sum(a.mT @ b, group) / n
    return invariance, (c - torch.diag_embed(c.diagonal(0, -2, -1))).square().sum((-2, -1))


def barlow_twins_loss(z_a: Tensor, z_b: Tensor, lambd: float | Tensor = 5e-3, **options) -> Tensor:
    """Barlow Twins loss, Eq. 1: sum_i (1 - C_ii)^2 + lambd * sum_i sum_{j != i} C_ij^2.

    Args:
        z_a, z_b: embeddings of the two views, row by row of the same samples, shape (..., n, D), floating point.
        lambd: weight of the redundancy term; the paper takes 5e-3 at D = 8192, smaller D want about 1 / D.
        options: `tile`, `gram`, `eps` and `group` of `barlow_twins_terms`.

    Returns:
        Shape (...).

    Raises:
        ValueError: as in `barlow_twins_terms`, or a number lambd that is negative or NaN.
    """
    if not isinstance(lambd, Tensor) and not lambd >= 0:
        raise ValueError(f"lambd must be at least 0, got {lambd}")
    invariance, redundancy = barlow_twins_terms(z_a, z_b, **options)
    return invariance + lambd * redundancy
