"""Log-sum-exps of scores that fall with the squared distance of two points, over tiles, in plain PyTorch.

    lse_i = log sum_{j != own_i} exp(score(D_ij)),   D_ij = |x_i - w_j|^2 + eps (|x_i|^2 + |w_j|^2)

with the score -power/2 log D (of inverse powers of the distance) or, for power 0, -D/2 (of a Gaussian). The n x v scores are
never held: undecorated functions of ordinary operators that write into a few buffers, as a dispatch mode sees them under fake
tensors too. Shapes: x (n, d), w (v, d), own (n,) in [0, v) or None: no column is left out.

A product of matrices gives a small distance with an error of rounding times |x|^2, however small it is. Inverse powers magnify
that, so `refine` computes pairs that are near each other again from the difference of the points, also in the gradient; and
the distance to one's own column is always of that kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paperclaims.kernels.backend import blocks
from paperclaims.kernels.losses.tiles import buffer, compute, compute_dtype, inside, log_sum_exp, per_token

NEAR = 1 / 16  # pairs with a squared distance below this share of |x|^2 are near


class Options(NamedTuple):
    """Settings of the operators, in the order of their schemas."""

    power: float = 0.0  # 0: the Gaussian
    eps: float = 0.0
    refine: bool = True
    tile_rows: int = 1024
    tile_columns: int = 1024

    @property
    def tile(self) -> tuple[int, int]:
        return self.tile_rows, self.tile_columns


def log_sums(x: Tensor, w: Tensor, own: Tensor | None, options: Options) -> Tensor:
    """lse of every point, (n,), -inf where no column is left; holds one tile of scores at a time."""
    room, result = buffer(x, w, options.tile), per_token(x)
    for rows in blocks(len(x), options.tile_rows):
        a = compute(x[rows])
        total = a.new_full((len(a),), -torch.inf)
        for columns in blocks(len(w), options.tile_columns):
            tile, _ = _squares(a, compute(w[columns]), options, room)
            if options.power:
                tile.log_().mul_(-options.power / 2)
            else:
                tile.mul_(-0.5)
            if own is not None:
                _put(tile, *inside(own[rows] - columns.start, tile.shape[1]), -torch.inf)
            total = torch.logaddexp(total, log_sum_exp(tile)[0])
        result[rows] = total
    return result


def own_squares(x: Tensor, w: Tensor, own: Tensor, options: Options) -> Tensor:
    """D of every point and its own column, (n,), from their difference, at least the dtype's smallest normal number."""
    result = per_token(x)
    for rows in blocks(len(x), options.tile_rows):
        result[rows] = _pair_squares(compute(x[rows]), compute(w[own[rows]]), options.eps)
    return result


def gradients(
    x: Tensor,
    w: Tensor,
    own: Tensor | None,
    lse: Tensor,
    weights: Tensor,
    pull: Tensor | None,
    needs: Sequence[bool],
    options: Options,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by x (n, d) and w (v, d) of sum_i [weights_i lse_i + pull_i power/2 log(D of i and its own column)].

    None for one that `needs` does not ask for.

    exp(score - lse) is the weight of a column in lse, which may be that of `log_sums` or one that counts the own column too; the
    latter's weight is part of `pull`. A tile of columns meets all rows before the next one, so that its rows of the second
    gradient are summed in full precision and written once. Two points at distance zero do not move each other.
    """
    room = buffer(x, w, options.tile)
    by_x = x.new_zeros(x.shape, dtype=compute_dtype(x.dtype)) if needs[0] else None
    by_w = torch.empty_like(w, memory_format=torch.contiguous_format) if needs[1] else None
    for columns in blocks(len(w), options.tile_columns):
        b = compute(w[columns])
        by_b, sums = (torch.zeros_like(b), b.new_zeros(len(b))) if needs[1] else (None, None)
        for rows in blocks(len(x), options.tile_rows):
            a, level, weight = compute(x[rows]), lse[rows], weights[rows]
            by_a = by_x[rows] if needs[0] else None
            tile, near = _squares(a, b, options, room)
            _slopes(tile, level, weight, options.power)
            if own is not None:
                column = own[rows] - columns.start
                place, within = inside(column, len(b))
                _put(tile, place, within, 0.0)
                _add_pairs(by_a, by_b, a, b, slice(None), place, torch.where(within, pull[rows], 0), options)
            if near is not None:
                for i, j in _parts(near, tile.numel() // a.shape[1]):
                    tile[i, j] = 0
                    squares = _pair_squares(a[i], b[j], options.eps)
                    share = weight[i] * squares.log_().mul_(-options.power / 2).sub_(level[i]).exp_()
                    if own is not None:
                        share = torch.where(column[i] == j, 0, share)
                    _add_pairs(by_a, by_b, a, b, i, j, -share, options)
            if needs[0]:
                torch.addmm(by_a, tile, b, alpha=-1, out=by_a)
                by_a.addcmul_(tile.sum(1, keepdim=True), a, value=1 + options.eps)
            if needs[1]:
                torch.addmm(by_b, tile.T, a, alpha=-1, out=by_b)
                sums += tile.sum(0)
        if needs[1]:
            by_w[columns] = by_b.addcmul_(sums[:, None], b, value=1 + options.eps)
    return by_x.to(x.dtype) if needs[0] else None, by_w


def pair_gradients(a: Tensor, b: Tensor, strength: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Gradients by a and b, (n, d) each, of sum_i strength_i power/2 log D(a_i, b_i), from the difference of the points."""
    distance = _pair_squares(a, b, options.eps).sqrt_()[:, None]
    between = (a - b) / distance  # at most 1 in size, where 1 / D may overflow
    factor = options.power * strength[:, None] / distance
    if not options.eps:
        return factor * between, -factor * between
    return factor * (between + options.eps * a / distance), factor * (options.eps * b / distance - between)


def _add_pairs(by_a: Tensor | None, by_b: Tensor | None, a, b, i, j: Tensor, strength: Tensor, options: Options) -> None:
    """Adds the `pair_gradients` of the rows i of a and j of b to those of by_a and by_b."""
    first, second = pair_gradients(a[i], b[j], strength, options)
    if by_a is not None:
        by_a.add_(first) if isinstance(i, slice) else by_a.index_add_(0, i, first)
    if by_b is not None:
        by_b.index_add_(0, j, second)


def _squares(a: Tensor, b: Tensor, options: Options, room: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """D of the rows of a (n, d) and b (v, d) in the front of `room`, (n, v), and the indices of the pairs that are near."""
    norms, wide = torch.linalg.vector_norm(a, dim=1).square_(), 1 + options.eps
    tile = room[: len(a) * len(b)].view(len(a), len(b))
    torch.addmm(torch.linalg.vector_norm(b, dim=1).square_(), a, b.T, beta=wide, alpha=-2, out=tile)
    tile.add_(norms[:, None], alpha=wide)
    if not options.power:
        return tile.clamp_(min=0), None
    limits = torch.finfo(tile.dtype)
    if not options.refine:
        return tile.clamp_(min=(limits.eps * norms).clamp_(min=limits.tiny)[:, None]), None
    near = None
    if (tile.amin(1) <= NEAR * norms).any():
        near = (tile <= NEAR * norms[:, None]).nonzero().unbind(1)
        for i, j in _parts(near, tile.numel() // a.shape[1]):
            tile[i, j] = _pair_squares(a[i], b[j], options.eps)
    return tile.clamp_(min=limits.tiny), near


def _slopes(tile: Tensor, lse: Tensor, weights: Tensor, power: float) -> None:
    """Turns D, in place, into twice the derivative of sum_i weights_i lse_i by it."""
    if power:
        tile.log_().mul_(-power / 2 - 1).sub_(lse[:, None]).exp_().mul_(-power * weights[:, None])
    else:
        tile.mul_(-0.5).sub_(lse[:, None]).exp_().mul_(-weights[:, None])


def _pair_squares(a: Tensor, b: Tensor, eps: float) -> Tensor:
    squares = (a - b).square_().sum(1)
    if eps:
        squares += eps * (a.square().sum(1) + b.square().sum(1))
    return squares.clamp_(min=torch.finfo(squares.dtype).tiny)


def _parts(pairs: tuple[Tensor, Tensor], size: int):
    """The pairs' indices, at most `size` (but at least 1) at a time."""
    return zip(*(index.split(max(size, 1)) for index in pairs), strict=True)


def _put(tile: Tensor, place: Tensor, within: Tensor, value: float) -> None:
    """Writes a value into the column `place` of every row that has it `within` the tile."""
    before = tile.gather(1, place[:, None])
    tile.scatter_(1, place[:, None], torch.where(within[:, None], value, before))
