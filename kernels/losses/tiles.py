"""What operators over tiles of scores share in plain PyTorch: precision, targets, log-sum-exps, tokens that are left out."""

import torch
from torch import Tensor

from paperclaims.kernels.backend import blocks


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of a dtype are computed in: float64 in itself, all others in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that it is computed in."""
    return tensor.to(compute_dtype(tensor.dtype))


def per_token(x: Tensor) -> Tensor:
    """One uninitialised number for every row of `x`, in the dtype that it is computed in."""
    return x.new_empty(len(x), dtype=compute_dtype(x.dtype))


def buffer(x: Tensor, w: Tensor, tile: tuple[int, int]) -> Tensor:
    """Room for a tile of scores of the rows of `x` against those of `w`, flat."""
    return x.new_empty(min(tile[0], len(x)) * min(tile[1], len(w)), dtype=compute_dtype(x.dtype))


def inside(place: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Column of every target clamped to a tile of `width` columns, and whether it lay inside; each (n,)."""
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def log_sum_exp(tile: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the rows of a tile (n, v), (n,), and their largest entries (n, 1).

    Unless it is to `keep` its entries, the tile then holds exp(entry - largest).
    """
    most = tile.amax(1, keepdim=True).clamp_(min=torch.finfo(tile.dtype).min)  # a tile may hold nothing but -inf
    total = torch.sub(tile, most, out=None if keep else tile).exp_().sum(1)
    return total.log_().add_(most[:, 0]), most


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor` times a scalar, in place; 16 bits by blocks of rows, since a GPU would round the scalar to 16 bits first."""
    if tensor.dtype == compute_dtype(tensor.dtype):
        return tensor.mul_(scale)
    for rows in blocks(len(tensor), 256):
        tensor[rows] = compute(tensor[rows]).mul_(scale)
    return tensor


def check_targets(targets: Tensor, valid: Tensor, words: int) -> None:
    """ValueError for a valid target outside [0, words); on a GPU an assertion that does not wait for the device."""
    fits = (~valid | ((targets >= 0) & (targets < words))).all()
    if targets.is_cuda:
        torch._assert_async(fits, f"targets are in [0, {words}) or ignore_index")
    elif not fits:
        raise ValueError(f"targets are in [0, {words}) or ignore_index, got {targets.min().item()} to {targets.max().item()}")


def kept(valid: Tensor) -> Tensor | slice:
    """Index of the tokens that are not ignored; everything, without a copy, where none is."""
    return slice(None) if valid.all() else valid.nonzero()[:, 0]


def spread(values: Tensor | None, kept: Tensor | slice, length: int) -> Tensor | None:
    """Values of the kept tokens at their places among `length`, zero elsewhere."""
    if values is None or isinstance(kept, slice):
        return values
    return values.new_zeros(length, *values.shape[1:]).index_copy_(0, kept, values)
