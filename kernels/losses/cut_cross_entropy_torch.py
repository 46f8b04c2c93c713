"""Linear layer and cross-entropy over tiles of the logits, in plain PyTorch.

Undecorated functions of tensors, made of ordinary operators that write into a few buffers: what they hold is what a
dispatch mode or an allocator sees, at any size, under fake tensors too. Shapes: e (n, d), c (v, d), bias (v,), targets (n,)
with every target in range: ignored tokens carry the weight 0, or are left out by the caller.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paperclaims.kernels.backend import blocks
from paperclaims.kernels.losses.tiles import buffer, compute, compute_dtype, inside, log_sum_exp, per_token, scale_


class Options(NamedTuple):
    """Settings of the operator, in the order of its schema."""

    softcap: float = 0.0  # 0: none
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    poly: Sequence[float] = ()
    ignore_index: int = -100
    reduction: str = "mean"
    filter_eps: float = 0.0  # 0: none
    filter_e: bool = True
    filter_c: bool = True
    sort_vocabulary: bool = False
    accumulate: str = "fp32"
    tile_tokens: int = 256
    tile_words: int = 2048


class Gradients(NamedTuple):
    """Gradients by the embeddings (n, d), the classifier (v, d) and the bias (v,); None where not asked for."""

    e: Tensor | None
    c: Tensor | None
    bias: Tensor | None


def forward(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, log-sum-exp and `epilogue`'s pull of every token, each (n,); holds one tile of logits at a time."""
    tile = buffer(e, c, (options.tile_tokens, options.tile_words))
    loss, lse, pull = _outputs(e, options)
    for tokens in blocks(len(e), options.tile_tokens):
        x = compute(e[tokens])
        running = _RunningLoss(x, targets[tokens], len(c), options)
        for words in blocks(len(c), options.tile_words):
            running.add(words, _logits(x, c, bias, words, options, tile))
        running.finish(tokens, loss, lse, pull)
    return loss, lse, pull


def backward(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    pull: Tensor | None,
    weights: Tensor | None,
    scale: Tensor,
    needs: Sequence[bool],
    options: Options,
) -> Gradients:
    """Gradients of `scale * (weights * loss).sum()`, every tile of logits computed again from `lse` and `pull` (n,).

    A tile of words meets all tokens before the next one, so that its rows of the classifier's gradient are summed in full
    precision and written once; the embeddings' gradient is the running sum.

    Args:
        weights: one a token, (n,), at most 1 in size; None: all 1.
        scale: scalar.
        needs: which of the gradients by e, c and bias to form.
    """
    tile = buffer(e, c, (options.tile_tokens, options.tile_words))
    order = vocabulary_order(e, c, bias) if options.sort_vocabulary else None
    place = targets if order is None else inverse(order)[targets]
    de = _RunningSum(e, options.accumulate) if needs[0] else None
    dc = torch.empty_like(c, memory_format=torch.contiguous_format) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] else None
    for words in blocks(len(c), options.tile_words):
        rows = words if order is None else order[words]
        w = compute(c[rows])
        dw = torch.zeros_like(w) if needs[1] else None
        db = w.new_zeros(len(w)) if needs[2] else None
        for tokens in blocks(len(e), options.tile_tokens):
            x = compute(e[tokens])
            g = _logits(x, w, None if bias is None else bias[rows], slice(0, len(w)), options, tile)
            state = lse[tokens], _at(pull, tokens), place[tokens] - words.start, _at(weights, tokens)
            keep = _logit_gradient(g, *state, len(c), options)
            if needs[0] and (keep or not options.filter_e):
                de.add(tokens, g, w)
            if needs[1] and (keep or not options.filter_c):
                torch.addmm(dw, g.T, x, out=dw)
            if needs[2]:
                db += g.sum(0)
        if needs[1]:
            dc[rows] = dw.mul_(scale).to(dc.dtype)
        if needs[2]:
            dbias[rows] = db.mul_(scale).to(dbias.dtype)
    return Gradients(de.finish(scale) if needs[0] else None, dc, dbias)


def forward_and_gradients(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, scale: Tensor, needs: Sequence[bool], options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Gradients]:
    """Loss, log-sum-exp and pull of every token, and the gradients of `scale * loss.sum()`, each logit computed once.

    The logits of a tile of tokens are kept until its log-sum-exp is known: (tile_tokens, v) numbers. The classifier's
    gradient is the running sum.
    """
    kept = e.new_empty(min(options.tile_tokens, len(e)) * len(c), dtype=compute_dtype(e.dtype))
    loss, lse, pull = _outputs(e, options)
    de = torch.empty_like(e, memory_format=torch.contiguous_format) if needs[0] else None
    dc = _RunningSum(c, options.accumulate) if needs[1] else None
    db = e.new_zeros(len(c), dtype=kept.dtype) if needs[2] else None
    for tokens in blocks(len(e), options.tile_tokens):
        x = compute(e[tokens])
        running = _RunningLoss(x, targets[tokens], len(c), options)
        tiles = []
        for words in blocks(len(c), options.tile_words):
            tile = _logits(x, c, bias, words, options, kept[words.start * len(x) :])
            most = running.add(words, tile, keep=options.softcap > 0)
            tiles.append((words, tile, None if options.softcap else most))
        running.finish(tokens, loss, lse, pull)
        dx = torch.zeros_like(x) if needs[0] else None
        scaled = x * scale
        for words, g, most in tiles:
            state = lse[tokens], _at(pull, tokens), targets[tokens] - words.start, None
            keep = _logit_gradient(g, *state, len(c), options, most)
            if needs[0] and (keep or not options.filter_e):
                torch.addmm(dx, g, compute(c[words]), out=dx)
            if needs[1] and (keep or not options.filter_c):
                dc.add(words, g.T, scaled)
            if needs[2]:
                db[words] += g.sum(0)
        if needs[0]:
            de[tokens] = dx.mul_(scale).to(de.dtype)
    by_bias = db.mul_(scale).to(bias.dtype) if needs[2] else None
    return loss, lse, pull, Gradients(de, dc.finish() if needs[1] else None, by_bias)


def epilogue(
    lse: Tensor, target_logit: Tensor, total: Tensor | None, vocabulary: int, options: Options
) -> tuple[Tensor, Tensor | None]:
    """What becomes of a pass over the logits: the loss of every token, and how much harder than in cross-entropy it pulls.

    With the softmax p, its entry p_t at the target, smoothing s, v words, the weight z of the squared log-sum-exp and the
    polynomial's coefficients eps_j,

        r        = (1 - s) (1 - p_t) + s (1 - 1 / v)
        pull     = (1 - s) p_t sum_j j eps_j r^(j - 1)
        loss     = lse - (1 - s) target_logit - s total / v + z lse^2 + sum_j eps_j r^j
        gradient = (1 + 2 z lse + pull) p - (1 - s + pull) onehot - s / v

    Args:
        lse, target_logit: (n,).
        total: sum of all logits, (n,), for a smoothing.

    Returns:
        Loss and pull, (n,); no pull without a polynomial.
    """
    s = options.label_smoothing
    loss = lse - (1 - s) * target_logit
    if s:
        loss -= s / vocabulary * total
    if options.z_loss:
        loss += options.z_loss * lse.square()
    if not options.poly:
        return loss, None
    log_p = target_logit - lse
    rest = -(1 - s) * torch.expm1(log_p) + s * (1 - 1 / vocabulary)
    value, slope = torch.zeros_like(rest), torch.zeros_like(rest)
    for coefficient in reversed(options.poly):  # Horner's rule, value and derivative
        slope = value + coefficient + rest * slope
        value = rest * (value + coefficient)
    return loss + value, (1 - s) * log_p.exp() * slope


def vocabulary_order(e: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """Words by falling average logit over the tokens, before any softcap: the paper's vocabulary sorting; (v,), int64.

    The average of a linear map is the map of the average, so this costs one product with a vector.
    """
    average = c @ e.mean(0, dtype=compute_dtype(e.dtype)).to(c.dtype)
    return (average if bias is None else average + bias).argsort(descending=True, stable=True)


def inverse(order: Tensor) -> Tensor:
    """Place of every word in an order of the vocabulary."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _RunningLoss:
    """Loss of a block of tokens while the tiles of its logits pass by."""

    def __init__(self, x: Tensor, targets: Tensor, vocabulary: int, options: Options):
        self.targets, self.vocabulary, self.options = targets, vocabulary, options
        self.lse = x.new_full((len(x),), -torch.inf)
        self.target_logit = x.new_zeros(len(x))
        self.sum = x.new_zeros(len(x))

    def add(self, words: slice, tile: Tensor, keep: bool = False) -> Tensor:
        """Takes in a tile and, unless it is to `keep` its logits, leaves exp(logits - most) there; returns most, (n, 1)."""
        place, within = inside(self.targets - words.start, tile.shape[1])
        self.target_logit += torch.where(within, tile.gather(1, place[:, None])[:, 0], 0)
        if self.options.label_smoothing:
            self.sum += tile.sum(1)
        lse, most = log_sum_exp(tile, keep)
        self.lse = torch.logaddexp(self.lse, lse)
        return most

    def finish(self, tokens: slice, loss: Tensor, lse: Tensor, pull: Tensor | None) -> None:
        """Writes loss, log-sum-exp and pull of these tokens at their places."""
        lse[tokens] = self.lse
        loss[tokens], own = epilogue(self.lse, self.target_logit, self.sum, self.vocabulary, self.options)
        if pull is not None:
            pull[tokens] = own


class _RunningSum:
    """Sum of matrix products by blocks of rows, shaped like `model`, in fp32, compensated or in the model's own precision."""

    def __init__(self, model: Tensor, accumulate: str):
        wide = compute_dtype(model.dtype)
        self.dtype = model.dtype
        self.total = torch.zeros(model.shape, dtype=wide if accumulate == "fp32" else self.dtype, device=model.device)
        self.lost = torch.zeros_like(self.total) if accumulate == "compensated" else None

    def add(self, rows: slice, a: Tensor, b: Tensor) -> None:
        total = self.total[rows]
        if self.lost is None and total.dtype == a.dtype:
            torch.addmm(total, a, b, out=total)
            return
        summand = torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # with `out`, autocast leaves the product alone
        if self.lost is not None:
            summand -= self.lost[rows]
        rounded = (total + summand).to(self.dtype)
        if self.lost is not None:  # Kahan: what rounding added beyond the summand is taken off the next one
            self.lost[rows] = ((rounded.to(a.dtype) - total) - summand).to(self.dtype)
        self.total[rows] = rounded

    def finish(self, scale: Tensor | None = None) -> Tensor:
        return (self.total if scale is None else scale_(self.total, scale)).to(self.dtype)


def _logits(x: Tensor, c: Tensor, bias: Tensor | None, words: slice, options: Options, buffer: Tensor) -> Tensor:
    """Logits of the tokens x (n, d) for some words, (n, words), capped, in the front of `buffer`."""
    n, width = len(x), words.stop - words.start
    tile = torch.mm(x, compute(c[words]).T, out=buffer[: n * width].view(n, width))
    if bias is not None:
        tile += bias[words]
    if options.softcap:
        tile.div_(options.softcap).tanh_().mul_(options.softcap)
    return tile


def _logit_gradient(
    tile: Tensor,
    lse: Tensor,
    pull: Tensor | None,
    place: Tensor,
    weights: Tensor | None,
    vocabulary: int,
    options: Options,
    most: Tensor | None = None,
) -> bool:
    """Turns a tile of logits, in place, into the gradient of the weighted loss by the uncapped logits.

    `place` is the target's column in the tile, or out of it; with `most`, (n, 1), the tile holds exp(logits - most). Returns
    whether the tile counts: False where all of the gradients by the capped logits are below `filter_eps` in size.
    """
    slope = 1 - (tile / options.softcap).square_() if options.softcap else None
    if most is None:
        tile.sub_(lse[:, None]).exp_()
    else:
        tile *= (most - lse[:, None]).exp_()
    if options.z_loss or pull is not None:
        tile *= push(lse, pull, options)[:, None]
    place, within = inside(place, tile.shape[1])
    label = within.to(tile.dtype).mul_(options.label_smoothing - 1 - (0 if pull is None else pull))
    tile.scatter_add_(1, place[:, None], label[:, None])
    if options.label_smoothing:
        tile -= options.label_smoothing / vocabulary
    keep = True
    if options.filter_eps:
        least, most = tile.aminmax()
        keep = bool(torch.maximum(most, -least) >= options.filter_eps)
    if slope is not None:
        tile *= slope
    if weights is not None:
        tile *= weights[:, None]
    return keep


def push(lse: Tensor, pull: Tensor | None, options: Options) -> Tensor:
    """What the softmax is multiplied by in the gradient of `epilogue`, (n,)."""
    factor = 1 + 2 * options.z_loss * lse
    return factor if pull is None else factor + pull


def _outputs(e: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for loss, log-sum-exp and, with a polynomial, pull of every token."""
    return per_token(e), per_token(e), per_token(e) if options.poly else None


def _at(weights: Tensor | None, tokens: slice) -> Tensor | None:
    return None if weights is None else weights[tokens]
