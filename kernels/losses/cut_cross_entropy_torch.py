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


class Options(NamedTuple):
    """Settings of the operator, in the order of its schema."""

    softcap: float = 0.0  # 0: none
    label_smoothing: float = 0.0
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


def forward(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, each (n,); holds one tile of logits at a time."""
    tile = _buffer(e, c, options)
    loss, lse = _per_token(e), _per_token(e)
    for tokens in blocks(len(e), options.tile_tokens):
        x = _compute(e[tokens])
        running = _RunningLoss(x, targets[tokens], len(c), options)
        for words in blocks(len(c), options.tile_words):
            running.add(words, _logits(x, c, bias, words, options, tile))
        loss[tokens], lse[tokens] = running.finish()
    return loss, lse


def backward(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    needs: Sequence[bool],
    options: Options,
) -> Gradients:
    """Gradients of `scale * (weights * loss).sum()`, every tile of logits computed again from `lse` (n,).

    A tile of words meets all tokens before the next one, so that its rows of the classifier's gradient are summed in full
    precision and written once; the embeddings' gradient is the running sum.

    Args:
        weights: one a token, (n,), at most 1 in size; None: all 1.
        scale: scalar.
        needs: which of the gradients by e, c and bias to form.
    """
    tile = _buffer(e, c, options)
    order = vocabulary_order(e, c, bias) if options.sort_vocabulary else None
    place = targets if order is None else inverse(order)[targets]
    de = _RunningSum(e, options.accumulate) if needs[0] else None
    dc = torch.empty_like(c, memory_format=torch.contiguous_format) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] else None
    for words in blocks(len(c), options.tile_words):
        rows = words if order is None else order[words]
        w = _compute(c[rows])
        dw = torch.zeros_like(w) if needs[1] else None
        db = w.new_zeros(len(w)) if needs[2] else None
        for tokens in blocks(len(e), options.tile_tokens):
            x = _compute(e[tokens])
            g = _logits(x, w, None if bias is None else bias[rows], slice(0, len(w)), options, tile)
            keep = _logit_gradient(g, lse[tokens], place[tokens] - words.start, _at(weights, tokens), len(c), options)
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
) -> tuple[Tensor, Tensor, Gradients]:
    """Loss and log-sum-exp of every token, and the gradients of `scale * loss.sum()`, each logit computed once.

    The logits of a tile of tokens are kept until its log-sum-exp is known: (tile_tokens, v) numbers. The classifier's
    gradient is the running sum.
    """
    kept = e.new_empty(min(options.tile_tokens, len(e)) * len(c), dtype=_compute_dtype(e.dtype))
    loss, lse = _per_token(e), _per_token(e)
    de = torch.empty_like(e, memory_format=torch.contiguous_format) if needs[0] else None
    dc = _RunningSum(c, options.accumulate) if needs[1] else None
    db = e.new_zeros(len(c), dtype=kept.dtype) if needs[2] else None
    for tokens in blocks(len(e), options.tile_tokens):
        x = _compute(e[tokens])
        running = _RunningLoss(x, targets[tokens], len(c), options)
        tiles = []
        for words in blocks(len(c), options.tile_words):
            tile = _logits(x, c, bias, words, options, kept[words.start * len(x) :])
            most = running.add(words, tile, keep=options.softcap > 0)
            tiles.append((words, tile, None if options.softcap else most))
        loss[tokens], lse[tokens] = running.finish()
        dx = torch.zeros_like(x) if needs[0] else None
        scaled = x * scale
        for words, g, most in tiles:
            keep = _logit_gradient(g, lse[tokens], targets[tokens] - words.start, None, len(c), options, most)
            if needs[0] and (keep or not options.filter_e):
                torch.addmm(dx, g, _compute(c[words]), out=dx)
            if needs[1] and (keep or not options.filter_c):
                dc.add(words, g.T, scaled)
            if needs[2]:
                db[words] += g.sum(0)
        if needs[0]:
            de[tokens] = dx.mul_(scale).to(de.dtype)
    return loss, lse, Gradients(de, dc.finish() if needs[1] else None, db.mul_(scale).to(bias.dtype) if needs[2] else None)


def vocabulary_order(e: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """Words by falling average logit over the tokens, before any softcap: the paper's vocabulary sorting; (v,), int64.

    The average of a linear map is the map of the average, so this costs one product with a vector.
    """
    average = c @ e.mean(0, dtype=_compute_dtype(e.dtype)).to(c.dtype)
    return (average if bias is None else average + bias).argsort(descending=True, stable=True)


def inverse(order: Tensor) -> Tensor:
    """Place of every word in an order of the vocabulary."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor` times a scalar, in place; 16 bits by blocks of rows, since a GPU would round the scalar to 16 bits first."""
    if tensor.dtype == _compute_dtype(tensor.dtype):
        return tensor.mul_(scale)
    for rows in blocks(len(tensor), 256):
        tensor[rows] = _compute(tensor[rows]).mul_(scale)
    return tensor


class _RunningLoss:
    """Loss of a block of tokens while the tiles of its logits pass by."""

    def __init__(self, x: Tensor, targets: Tensor, vocabulary: int, options: Options):
        self.targets, self.vocabulary, self.smoothing = targets, vocabulary, options.label_smoothing
        self.lse = x.new_full((len(x),), -torch.inf)
        self.target_logit = x.new_zeros(len(x))
        self.sum = x.new_zeros(len(x))

    def add(self, words: slice, tile: Tensor, keep: bool = False) -> Tensor:
        """Takes in a tile and, unless it is to `keep` its logits, leaves exp(logits - most) there; returns most, (n, 1)."""
        place, inside = _inside(self.targets - words.start, tile.shape[1])
        self.target_logit += torch.where(inside, tile.gather(1, place[:, None])[:, 0], 0)
        if self.smoothing:
            self.sum += tile.sum(1)
        most = tile.amax(1, keepdim=True).clamp_(min=torch.finfo(tile.dtype).min)  # a tile may hold nothing but -inf
        total = torch.sub(tile, most, out=None if keep else tile).exp_().sum(1)
        self.lse = torch.logaddexp(self.lse, total.log_().add_(most[:, 0]))
        return most

    def finish(self) -> tuple[Tensor, Tensor]:
        expected = self.target_logit
        if self.smoothing:
            expected = (1 - self.smoothing) * expected + self.smoothing / self.vocabulary * self.sum
        return self.lse - expected, self.lse


class _RunningSum:
    """Sum of matrix products by blocks of rows, shaped like `model`, in fp32, compensated or in the model's own precision."""

    def __init__(self, model: Tensor, accumulate: str):
        wide = _compute_dtype(model.dtype)
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
    tile = torch.mm(x, _compute(c[words]).T, out=buffer[: n * width].view(n, width))
    if bias is not None:
        tile += bias[words]
    if options.softcap:
        tile.div_(options.softcap).tanh_().mul_(options.softcap)
    return tile


def _logit_gradient(
    tile: Tensor,
    lse: Tensor,
    place: Tensor,
    weights: Tensor | None,
    vocabulary: int,
    options: Options,
    most: Tensor | None = None,
) -> bool:
    """Turns a tile of logits, in place, into the gradient of the weighted loss by the uncapped logits.

    `place` is the target's column in the tile, or out of it; with `most`, (n, 1), the tile holds exp(logits - most). Returns
    whether the tile counts: False where every softmax minus its target distribution is below `filter_eps` in size.
    """
    slope = 1 - (tile / options.softcap).square_() if options.softcap else None
    if most is None:
        tile.sub_(lse[:, None]).exp_()
    else:
        tile *= (most - lse[:, None]).exp_()
    place, inside = _inside(place, tile.shape[1])
    label = inside.to(tile.dtype).mul_(options.label_smoothing - 1)
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


def _inside(place: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Column of every target clamped to a tile of `width` columns, and whether it lay inside; each (n,)."""
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def _at(weights: Tensor | None, tokens: slice) -> Tensor | None:
    return None if weights is None else weights[tokens]


def _buffer(e: Tensor, c: Tensor, options: Options) -> Tensor:
    size = min(options.tile_tokens, len(e)) * min(options.tile_words, len(c))
    return e.new_empty(size, dtype=_compute_dtype(e.dtype))


def _per_token(e: Tensor) -> Tensor:
    return e.new_empty(len(e), dtype=_compute_dtype(e.dtype))


def _compute(tensor: Tensor) -> Tensor:
    return tensor.to(_compute_dtype(tensor.dtype))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
