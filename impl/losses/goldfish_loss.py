"""Goldfish loss: next-token training that leaves a fixed 1/k of the tokens out, so that no passage is learned whole.

Source: Hans, Wen, Jain, Kirchenbauer, Kazemi, Singhania, Singh, Somepalli, Geiping, Bhatele, Goldstein, "Be like a Goldfish,
Don't Memorize! Mitigating Memorization in Generative LLMs", 2024, arXiv 2406.10209. In the paper's symbols (section 3):

    L = -1/|G| sum_i G_i log P(x_i | x_<i),   G_i in {0, 1}

    static mask   G_i = 0 for every k-th token
    random mask   G_i = 0 with probability 1/k, drawn afresh for every copy of a passage
    hashed mask   G_i = 0 where f(x_{i-h}, ..., x_{i-1}) < 1/k, f a hash into [0, 1): the same for every copy of a passage

A mask here is a tensor G of bool, True where a token is kept, shaped like the tokens.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from paperclaims.kernels.losses.cut_cross_entropy import linear_cross_entropy

TABLE_SIZE, TABLE_SEED = 1_000_003, 2_971_215_073  # of the authors' code


def hashed_mask(tokens: Tensor, k: float = 4, h: int = 13, *, key: int = 0) -> Tensor:
    """Mask that leaves a token out by a hash of the h tokens before it: any copy of h tokens decides alike on the next one.

    Args:
        tokens: (..., n), any integer dtype; every row is a sequence of its own.
        k: one of k tokens is left out, above 1.
        h: tokens of context that are hashed, at least 1. The paper takes 13: with a short one, what follows a common phrase
            may be left out wherever it occurs.
        key: whole number that chooses the hash function.

    Returns:
        bool, shape of `tokens`, the same on any device. The first h tokens of a row have too little context and are kept.

    Raises:
        ValueError: tokens that are no integers or have no axis, k not above 1, h below 1.
    """
    _check_rate(k)
    _check_tokens(tokens)
    if h < 1:
        raise ValueError(f"h is at least 1, got {h}")
    keep = torch.ones_like(tokens, dtype=torch.bool)
    n = tokens.shape[-1] - h
    if n > 0:
        words, state = _mixed(tokens.long() + 1), _mixed(torch.tensor(key, device=tokens.device))
        for j in range(h):
            state = _mixed(state + words[..., j : n + j])
        keep[..., h:] = (state >> 1) & (2**63 - 1) >= int(2**63 / k)
    return keep


def table_mask(tokens: Tensor, k: float = 4, width: int = 4) -> Tensor:
    """Mask of the authors' released code ("hash-table"): a random number looked up by the product of `width` token ids.

    It differs from the paper's text: the window ends with the very token that is left out or kept, the product does not see
    the order, and every window that holds the id 0 shares one number.

    Args:
        tokens: (..., n), integers.
        k: as in `hashed_mask`.
        width: tokens of the window, at least 1; the code's default is 4, the paper's models have 13.

    Returns:
        bool, shape of `tokens`; the first width - 1 tokens of a row are kept.

    Raises:
        ValueError: as in `hashed_mask`.
    """
    _check_rate(k)
    _check_tokens(tokens)
    if width < 1:
        raise ValueError(f"width is at least 1, got {width}")
    keep = torch.ones_like(tokens, dtype=torch.bool)
    if tokens.shape[-1] >= width:
        product = tokens.long().unfold(-1, width, 1).prod(-1)
        keep[..., width - 1 :] = _table().to(tokens.device)[product % TABLE_SIZE] >= 1 / k
    return keep


def static_mask(tokens: Tensor, k: int = 4, *, start: int = 0) -> Tensor:
    """Mask that leaves out every k-th token of a row, beginning with number `start`.

    Args:
        tokens: (..., n).
        k: whole number, at least 2.
        start: at least 0.

    Raises:
        ValueError: tokens without an axis, k below 2 or not whole, a negative start.
    """
    if tokens.ndim < 1 or k < 2 or int(k) != k or start < 0:
        raise ValueError(f"needs tokens (..., n), a whole k >= 2 and start >= 0, got {tuple(tokens.shape)}, k={k}, start={start}")
    keep = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    keep[..., start :: int(k)] = False
    return keep


def random_mask(tokens: Tensor, k: float = 4, *, generator: torch.Generator | None = None) -> Tensor:
    """Mask that leaves out every token with probability 1/k by itself, shape of `tokens`. ValueError: k not above 1."""
    _check_rate(k)
    return torch.rand(tokens.shape, generator=generator, device=tokens.device) >= 1 / k


def goldfish_targets(targets: Tensor, keep: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Targets with `ignore_index` where the mask leaves them out: for any loss that knows such an index.

    Raises:
        ValueError: a mask that is not bool or not of the targets' shape.
    """
    if keep.dtype != torch.bool or keep.shape != targets.shape:
        raise ValueError(f"the mask is bool of shape {tuple(targets.shape)}, got {keep.dtype} of shape {tuple(keep.shape)}")
    return targets.masked_fill(~keep, ignore_index)


def goldfish_loss(
    logits: Tensor,
    targets: Tensor,
    keep: Tensor | None = None,
    *,
    k: float = 4,
    h: int = 13,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Mean of -log P(x_i | x_<i) over the tokens that the mask keeps, Eq. 2.

    Args:
        logits: (..., n, v), floating point; row i scores targets[..., i].
        targets: (..., n), the next tokens in [0, v), or `ignore_index` for those to leave out in any case.
        keep: bool, shape of `targets`; None: `hashed_mask(targets, k, h)`. Where targets were blanked (a prompt, padding),
            hash the true tokens instead: `keep=hashed_mask(tokens, k, h)`.
        k, h: of the hashed mask.
        reduction: "mean" over the tokens kept (NaN where there is none), "sum", or "none" (0 where left out).

    Returns:
        Scalar, or shape of `targets` for "none".

    Raises:
        ValueError: logits and targets that do not fit, a mask that is not bool of their shape, what `hashed_mask` refuses.
    """
    if logits.ndim != targets.ndim + 1 or logits.shape[:-1] != targets.shape or not logits.is_floating_point():
        raise ValueError(
            f"logits are floating point (..., n, v) and targets (..., n), got {logits.dtype} {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    keep = hashed_mask(targets, k, h) if keep is None else keep
    kept = goldfish_targets(targets, keep, ignore_index=ignore_index)
    loss = F.cross_entropy(logits.flatten(0, -2), kept.flatten().long(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_goldfish_loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    keep: Tensor | None = None,
    *,
    k: float = 4,
    h: int = 13,
    ignore_index: int = -100,
    **settings,
) -> Tensor:
    """`goldfish_loss(e @ c.T, targets, ...)` without the matrix of logits; rows that are left out are not computed.

    Args:
        e: embeddings, (..., n, d).
        c: classifier, (v, d).
        targets, keep, k, h, ignore_index: as in `goldfish_loss`.
        settings: further arguments of `linear_cross_entropy` (reduction, bias, softcap and others; no shift).

    Raises:
        ValueError: what `goldfish_targets`, `hashed_mask` and `linear_cross_entropy` refuse, or a shift.
    """
    if settings.get("shift"):
        raise ValueError("shift the targets themselves: the mask belongs to them")
    keep = hashed_mask(targets, k, h) if keep is None else keep
    kept = goldfish_targets(targets, keep, ignore_index=ignore_index)
    return linear_cross_entropy(e, c, kept, ignore_index=ignore_index, **settings)


def _mixed(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea & Flood 2014) on int64, whose products wrap as those of unsigned numbers do."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 2**33 - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


@functools.cache
def _table() -> Tensor:
    return torch.rand(TABLE_SIZE, generator=torch.Generator().manual_seed(TABLE_SEED))


def _check_rate(k: float) -> None:
    if not k > 1:
        raise ValueError(f"k is above 1, got {k}")


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim < 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens are integers of shape (..., n), got {tokens.dtype} of shape {tuple(tokens.shape)}")
